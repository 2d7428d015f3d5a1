"""How long a client has no token when a process of its answer is killed, on a cluster of this machine.

A client asks about a document as long as the demo's, and a process gets SIGKILL: a decode replica or the gateway in
mid-answer, a prefill replica in mid-prompt; without standby replicas, and with one more of the killed role. Every
answer has the tokens of the undisturbed one. Wanted: with a standby, less than a second without a token, and a first
token that is less than a second later, but for what had been computed by then and has to be computed again.
"""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.harness.contest import Case, Contest
from bench.harness.suite import Options, arguments, positive, run
from bench.head_of_line.clusters import running
from cluster.cli.demo import QUESTION, manual_chapter
from cluster.state import ClusterState
from colm.checkpoint import Checkpoint
from colm.client import Client
from colm.errors import ColmError
from colm.events import Event, Finished, PrefillProgress, Token
from colm.nodes import NodeReport, Role
from colm.sampling import SamplingParams
from colm.text.tokenizer import Tokenizer

KILL_AT_TOKEN = 60
"""By then reports say which replica works for the answer."""
KILL_AT_FRACTION = 0.3
"""Of the prompt, where its prefill replica is killed."""
_LIMIT_S = 180.0


@dataclass(frozen=True, kw_only=True, eq=False)
class RecoveryCase(Case):
    """Clusters that differ in their standby replicas."""

    model: Path
    standby: Role | None
    """One more replica of it; None for one of each alone."""
    max_new_tokens: int

    @property
    def name(self) -> str:
        """By what stands by."""
        return "no standby" if self.standby is None else f"{self.standby.value} standby"

    @property
    def shape(self) -> dict[str, Any]:
        """Without the places of files."""
        return {"model": self.model.name, "max_new_tokens": self.max_new_tokens}

    def num_replicas(self, role: Role) -> int:
        """When all are there."""
        return 1 + (role is self.standby)

    @contextmanager
    def contest(self, seed: int) -> Iterator[Contest]:
        """A turn is an answer with a kill in it, after all replicas have come back from the last one."""
        del seed  # nothing is drawn
        # A decode node that finds the prompt in its own pages does not ask for it, and where the prefill node has been
        # killed in another turn, both have lost it.
        options: dict[str, object] = {"decode.prefix_cache_bytes": 0}
        if self.standby is not None:
            options[f"{self.standby.value}.standby"] = 1
        with running(self.model, None, options) as state, _Asked(self, state) as asked:
            kills = {"decode": asked.lose_decode, "gateway": asked.lose_gateway, "prefill": asked.lose_prefill}
            if self.standby is not None:
                kills = {self.standby.value: kills[self.standby.value]}
            yield Contest(check=asked.check, contenders=kills)


class _Asked(contextlib.AbstractContextManager["_Asked"]):
    """A client's answers, and what it saw of the kills."""

    def __init__(self, case: RecoveryCase, state: ClusterState) -> None:
        tokenizer = Tokenizer.load(Checkpoint.open(case.model))
        assert tokenizer is not None, "the model reads text"
        self._case = case
        self._state = state
        self._document = manual_chapter(tokenizer)
        self._client = Client(state.gateway_address, state.security)
        self._token_ids: list[int] = []
        self._undisturbed_s = 0.0
        self._num_documents = 0

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def check(self) -> None:
        """Ask undisturbed, once anew and once where the prompt is kept; the answers are the same."""
        self._until_whole()
        first = self._watch(self._document, lambda *_: None)
        self._token_ids = first.token_ids
        self._undisturbed_s = first.token_at_s[0] - first.began_s
        again = self._watch(self._document, lambda *_: None)
        assert again.usage.num_prefill_cached_tokens == again.usage.num_prefill_tokens

    def lose_decode(self) -> Mapping[str, float]:
        """Kill the decode replica of an answer."""
        seen = self._watch(self._document, self._in_mid_answer(lambda: self._pid_of_busy(Role.DECODE)))
        usage = seen.usage
        assert usage.num_decode_nodes == 2
        assert usage.num_prefill_cached_tokens == usage.num_prefill_tokens, "the prompt was computed again"
        return {"without_a_token_s": seen.gap_s}

    def lose_gateway(self) -> Mapping[str, float]:
        """Kill the gateway."""
        seen = self._watch(self._document, self._in_mid_answer(self._gateway_pid))
        return {"without_a_token_s": seen.gap_s}

    def lose_prefill(self) -> Mapping[str, float]:
        """Kill the prefill replica of a prompt that nobody has computed before."""
        self._num_documents += 1

        def kill(event: Event, seen: "_Seen") -> None:
            if seen.killed_s is not None or not isinstance(event, PrefillProgress):
                return
            if event.num_tokens_done >= KILL_AT_FRACTION * event.num_tokens_total:
                seen.kill(self._pid_of_busy(Role.PREFILL))

        seen = self._watch(f"Copy {self._num_documents}.\n{self._document}", kill, is_known=False)
        assert seen.killed_s is not None, "the prompt was there before anybody was killed"
        assert seen.usage.num_kv_streams > 1
        return seen.lost_prefill(self._undisturbed_s)

    def _watch(self, document: str, see: Callable[[Event, "_Seen"], None], *, is_known: bool = True) -> "_Seen":
        self._until_whole()
        seen = _Seen()
        sampling = SamplingParams(ignore_eos=True)
        options = {"max_new_tokens": self._case.max_new_tokens, "sampling": sampling, "timeout_s": _LIMIT_S}
        for event in self._client.generate(document, QUESTION, **options):  # type: ignore[arg-type]
            seen.note(event)
            see(event, seen)
        if is_known and self._token_ids:
            assert seen.token_ids == self._token_ids, "the answer is another one"
        return seen

    def _in_mid_answer(self, pid: Callable[[], int]) -> Callable[[Event, "_Seen"], None]:
        def kill(_: Event, seen: "_Seen") -> None:
            if len(seen.token_ids) == KILL_AT_TOKEN and seen.killed_s is None:
                seen.kill(pid())

        return kill

    def _pid_of_busy(self, role: Role) -> int:
        (node,) = (node for node in self._nodes(role) if node.num_active_requests)
        return node.process.pid

    def _gateway_pid(self) -> int:
        assert self._state.ray_pid is not None
        family = psutil.Process(self._state.ray_pid).children(recursive=True)
        (gateway,) = (each for each in family if "ServeReplica:colm:gateway" in " ".join(each.cmdline()))
        return gateway.pid

    def _nodes(self, role: Role) -> list[NodeReport]:
        reports = [node.report for node in self._client.cluster_status().nodes]
        return [report for report in reports if report.role is role]

    def _until_whole(self) -> None:
        """Wait until all replicas report, none of them a dead one's last words, and nobody works."""
        give_up_s = time.monotonic() + _LIMIT_S
        while not self._is_whole():
            assert time.monotonic() < give_up_s, "the cluster has not come back"
            time.sleep(0.2)

    def _is_whole(self) -> bool:
        try:
            nodes = {role: self._nodes(role) for role in (Role.DECODE, Role.PREFILL)}
        except ColmError:
            return False
        return all(
            len(each) == self._case.num_replicas(role)
            and all(psutil.pid_exists(node.process.pid) and not node.num_active_requests for node in each)
            for role, each in nodes.items()
        )


class _Seen:
    """One answer, as its client saw it; seconds of the monotonic clock."""

    def __init__(self) -> None:
        self.began_s = time.monotonic()
        self.token_ids: list[int] = []
        self.token_at_s: list[float] = []
        self.prefill_began_s: float | None = None
        """When the client first heard of it."""
        self.killed_s: float | None = None
        self._finished: Finished | None = None

    @property
    def usage(self) -> Any:
        """Of the whole answer."""
        assert self._finished is not None, "the answer has not ended"
        return self._finished.usage

    @property
    def gap_s(self) -> float:
        """The longest time without a token that ended after the kill."""
        assert self.killed_s is not None, "nobody was killed"
        pairs = zip(self.token_at_s, self.token_at_s[1:], strict=False)
        return max(after_s - before_s for before_s, after_s in pairs if after_s > self.killed_s)

    def lost_prefill(self, undisturbed_s: float) -> Mapping[str, float]:
        """What it cost that the prompt's prefill node was killed; a node that takes over computes all of it.

        Args:
            undisturbed_s: from the question to the first token where nobody is killed.
        """
        assert self.killed_s is not None, "nobody was killed"
        assert self.prefill_began_s is not None, "nobody was killed while the prompt was computed"
        later_s = self.token_at_s[0] - self.began_s - undisturbed_s
        again_s = self.killed_s - self.prefill_began_s
        return {
            "kill_to_first_token_s": self.token_at_s[0] - self.killed_s,
            "first_token_later_s": later_s,
            "computed_again_s": again_s,
            "recovery_s": later_s - again_s,
        }

    def note(self, event: Event) -> None:
        """Remember tokens, when the prefill began, and the end."""
        match event:
            case Token():
                self.token_ids.append(event.token_id)
                self.token_at_s.append(time.monotonic())
            case PrefillProgress():
                self.prefill_began_s = self.prefill_began_s or time.monotonic()
            case Finished():
                self._finished = event
            case _:
                pass

    def kill(self, pid: int) -> None:
        """Kill a process."""
        os.kill(pid, signal.SIGKILL)
        self.killed_s = time.monotonic()


class RecoveryOptions(Options):
    """And what is asked of which model."""

    model: Path
    max_new_tokens: int
    standby: list[str] | None


STANDBY: Mapping[str, Role | None] = {"none": None, "decode": Role.DECODE, "prefill": Role.PREFILL}
"""What may stand by, by the name that an option gives it."""


def main() -> None:
    """Measure the three clusters."""
    parser = arguments("bench.recovery", __doc__, rounds=3)
    parser.add_argument("model", type=Path, metavar="MODEL", help="checkpoint that reads text")
    parser.add_argument("--max-new-tokens", type=positive, default=400, help="of each answer; 400")
    parser.add_argument(
        "--standby", action="append", choices=STANDBY, help="of the clusters, that with this standby; repeatable; all"
    )
    options = parser.parse_args(namespace=RecoveryOptions())
    cases = [
        RecoveryCase(model=options.model, standby=standby, max_new_tokens=options.max_new_tokens)
        for standby in map(STANDBY.__getitem__, options.standby or STANDBY)
    ]
    run(cases, options)


if __name__ == "__main__":
    main()
