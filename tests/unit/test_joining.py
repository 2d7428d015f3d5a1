"""`colm up` as it joins Ray."""

import signal
import sys
import threading
from typing import Any

import pytest
import ray

from cluster.deployment import _connect


def test_a_sigterm_as_ray_is_joined_is_an_interruption_and_ray_ends_nothing_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Bug: Ray has handlers of its own then. `up` ended without its clean-up, and left Ray running."""

    def join(**_: Any) -> None:
        signal.signal(signal.SIGTERM, lambda number, _: sys.exit(number))
        signal.alarm(600)
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", join)
    before = signal.signal(signal.SIGTERM, ours := lambda *_: None)
    try:
        with pytest.raises(KeyboardInterrupt):
            _connect("127.0.0.1:1")
        assert signal.getsignal(signal.SIGTERM) is ours
        assert signal.alarm(0) == 0
    finally:
        signal.signal(signal.SIGTERM, before)
