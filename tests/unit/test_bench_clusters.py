"""Clusters that benchmarks bring up: whatever ends a benchmark takes its cluster down."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench.head_of_line import clusters
from cluster.state import ClusterState
from colm.errors import ClusterError

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def own_signals() -> Iterator[None]:
    """An interrupt leaves its signals ignored until the process ends, which is not now."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the `colm` command was asked."""
    said: list[str] = []
    monkeypatch.setattr(clusters, "_colm", lambda _, *words: said.append(words[0]))
    monkeypatch.setattr(ClusterState, "require", lambda _: None)
    return said


@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_takes_the_cluster_down(number: signal.Signals, said: list[str]) -> None:
    """SIGTERM left the clusters of `bench.simulate check` and of `bench.recovery` up."""
    with pytest.raises(KeyboardInterrupt), clusters.running(Path("model"), None):
        signal.raise_signal(number)
    assert said == ["up", "down"]


@pytest.mark.usefixtures("own_signals")
def test_a_second_signal_does_not_end_the_clearing_up(monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    def colm(_: Path, word: str, *__: str) -> None:
        if word == "down":
            signal.raise_signal(signal.SIGTERM)
        said.append(word)

    monkeypatch.setattr(clusters, "_colm", colm)
    with pytest.raises(KeyboardInterrupt), clusters.running(Path("model"), None):
        signal.raise_signal(signal.SIGTERM)
    assert said == ["up", "down"]


def test_after_a_benchmark_signals_are_as_before(said: list[str]) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with clusters.running(Path("model"), None):
        assert signal.getsignal(signal.SIGTERM) is not before[1]
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert said == ["up", "down"]


class _Interrupted:
    """A process in whose midst somebody interrupts."""

    def __init__(self, calls: list[str]) -> None:
        self._calls = calls

    def wait(self) -> int:
        self._calls.append("wait")
        if len(self._calls) == 1:
            raise KeyboardInterrupt
        return 1

    def kill(self) -> None:
        self._calls.append("kill")

    def terminate(self) -> None:
        self._calls.append("terminate")


def test_a_command_that_runs_is_told_to_end_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`colm up` was killed a quarter of a second after the signal and left the Ray that it had started."""
    calls: list[str] = []
    monkeypatch.setattr(clusters.subprocess, "Popen", lambda *_, **__: _Interrupted(calls))
    with pytest.raises(KeyboardInterrupt):
        clusters._colm(Path("state"), "up")
    assert calls == ["wait", "terminate", "wait"]


def test_a_command_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters.subprocess, "Popen", lambda *_, **__: _Interrupted(["begun"]))
    with pytest.raises(ClusterError, match="colm down"):
        clusters._colm(Path("state"), "down")
