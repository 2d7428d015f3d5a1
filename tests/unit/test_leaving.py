"""SIGTERM to a replica's process, under Ray's own handler."""

import os
import signal
import threading
from types import SimpleNamespace

import pytest
from ray._private import worker

from cluster.replicas.leaving import Leaving


def test_the_first_sigterm_makes_a_replica_ill_and_the_second_ends_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the first one ended it, with all that it had in hand. A process may have had a replica before, as here."""
    name = "raise_sys_exit_with_custom_error_message"
    monkeypatch.setattr(worker, name, getattr(worker, name))
    Leaving()
    seen = []

    def run() -> None:
        making = threading.Thread(target=lambda: seen.append(Leaving()))  # where a replica's code runs
        making.start()
        making.join()
        seen[0].check()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(RuntimeError, match="SIGTERM"):
            seen[0].check()
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            worker.Worker.main_loop(SimpleNamespace(core_worker=SimpleNamespace(run_task_loop=run)))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 1
    assert seen[0].has_begun
