"""SIGTERM to a replica's process: the replica leaves, as one does that Serve replaces (ADR 59)."""

from ray._private import worker

_END = worker.raise_sys_exit_with_custom_error_message
"""Ray's own."""


class Leaving:
    """Whether a SIGTERM has come. Make it in a replica's `__init__`, and `check` it whenever Serve asks for its health.

    Ray would end the process; now the first SIGTERM makes the replica say that it is ill, and the next one ends it. A
    replica's code runs beside the main thread, where Python takes no handlers, so this is the one function by which
    Ray's own handler ends the process.
    """

    def __init__(self) -> None:
        self.has_begun = False

        def begin(_message: str, exit_code: int = 0) -> None:  # noqa: ARG001 - as Ray calls it
            worker.raise_sys_exit_with_custom_error_message = _END
            self.has_begun = True

        worker.raise_sys_exit_with_custom_error_message = begin

    def check(self) -> None:
        """Say that the replica is ill once it leaves: Serve starts another one and lets this one end in order.

        Raises:
            RuntimeError: a SIGTERM has come.
        """
        if self.has_begun:
            raise RuntimeError("a SIGTERM has come, and another replica shall take this one's place")
