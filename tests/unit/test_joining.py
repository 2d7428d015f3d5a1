"""`colm up` as it joins Ray."""

import signal
import threading
from typing import Any

import pytest
import ray

from cluster.deployment import _connect


def test_a_sigterm_waits_until_ray_is_joined_and_is_heard_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: Ray's handler aborts the process three seconds later, and on a busy machine joining takes longer: `up` ended
    without its clean-up and left Ray running.
    """
    done: list[str] = []

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def join(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda *_: done.append("heard by Ray"))
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
        done.append("joined")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", join)
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            _connect("127.0.0.1:1")
        assert signal.getsignal(signal.SIGTERM) is interrupt
        assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGTERM, before)
    assert done == ["joined"]
