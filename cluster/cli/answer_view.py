"""Shows an answer on the terminal while it arrives, and records what was measured."""

import sys
import time
from dataclasses import asdict
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from colm.events import (
    Accepted,
    Event,
    Finished,
    LayerRecall,
    PrefillProgress,
    ProvisionalToken,
    Queued,
    Reconnecting,
    Token,
    tokens_by_scale,
)


class AnswerView:
    """Shows events on a terminal and remembers them.

    Args:
        stream_text: write the answer to stdout as it comes.
    """

    def __init__(self, *, stream_text: bool) -> None:
        self._stream_text = stream_text
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} tokens"),
            TextColumn("{task.fields[speed]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar: TaskID | None = None
        self._started_s = time.monotonic()
        self._prefill_began_s: float | None = None
        self._provisional_token_s: float | None = None
        self._provisional: ProvisionalToken | None = None
        self._num_shown_cells = 0
        """Of a provisional token, on the terminal."""
        self._first_token_s: float | None = None
        self._accepted: Accepted | None = None
        self._finished: Finished | None = None
        self._tokens: list[Token] = []
        self._text: list[str] = []
        self._num_reconnects = 0
        self._is_held_up = False

    def __enter__(self) -> Self:
        self._started_s = time.monotonic()
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def see(self, event: Event) -> None:
        """Take the next event."""
        match event:
            case Accepted():
                self._accepted = event
                self._bar = self._progress.add_task("prefill", total=max(1, event.num_prompt_tokens - 1), speed="")
            case Queued():
                self._wait(event)
            case PrefillProgress():
                self._advance(event)
            case Reconnecting():
                self._num_reconnects += 1
                self._note(f"the gateway was lost; asking for the rest of the answer ({event.cause})")
            case ProvisionalToken():
                self._provisional, self._provisional_token_s = event, time.monotonic() - self._started_s
                self._progress.stop()
                self._show(event.text)
            case Token():
                self._is_held_up = False
                if self._first_token_s is None:
                    self._first_token_s = time.monotonic() - self._started_s
                    self._progress.stop()
                self._tokens.append(event)
                self._write(event.text)
            case Finished():
                self._finished = event
                self._write(event.text)
            case _:
                pass

    def record(self) -> dict[str, object]:
        """Return what was measured, as one flat object for JSON."""
        accepted, finished = self._ends()
        usage, timings = finished.usage, finished.timings
        record: dict[str, object] = {
            "request_id": accepted.request_id,
            **({"trace_id": accepted.trace_id} if accepted.trace_id else {}),
            "model": accepted.model,
            "num_chains": accepted.num_chains,
            "prompt_tokens": usage.num_prompt_tokens,
            "prefill_tokens": usage.num_prefill_tokens,
            "prefill_cached_tokens": usage.num_prefill_cached_tokens,
            "decode_prompt_tokens": usage.num_decode_prompt_tokens,
            "cached_tokens": usage.num_cached_tokens,
            "kv_bytes_received": usage.kv_received_bytes,
            "kv_bytes_shared": usage.kv_shared_bytes,
            "kv_bytes_effective": usage.kv_effective_bytes,
            "kv_streams": usage.num_kv_streams,
            "decode_nodes": usage.num_decode_nodes,
            "reconnects": self._num_reconnects,
            "new_tokens": usage.num_new_tokens,
            "tokens_by_scale": tokens_by_scale(self._tokens),
            "draft_tokens": usage.num_draft_tokens,
            "accepted_tokens": usage.num_accepted_tokens,
            "finish_reason": finished.reason.value,
            "ttft_s": round(self._first_token_s or 0.0, 4),
            **self._of_provisional(),
            "queue_s": round(timings.queue_s, 4),
            "prefill_s": round(timings.prefill_s, 4),
            "decode_s": round(timings.decode_s, 4),
            "prefill_tokens_per_s": _rate(
                usage.num_prefill_tokens - usage.num_prefill_cached_tokens, timings.prefill_s
            ),
            "decode_tokens_per_s": _rate(usage.num_new_tokens - 1, timings.decode_s),
            "text": "".join(self._text),
        }
        if finished.sparse is not None:
            record["sparse_layers"] = [_layer(layer) for layer in finished.sparse.layers]
        return record

    def print_summary(self) -> None:
        """Print what was measured, as one line on stderr."""
        record = self.record()
        drafted, accepted = record["draft_tokens"], record["accepted_tokens"]
        usage = self._ends()[1].usage
        num_kept = usage.num_cached_tokens + usage.num_prefill_cached_tokens
        kept = f", {num_kept} of them kept" if num_kept else ""
        drafts = f"; {accepted} of {drafted} drafts accepted" if drafted else ""
        guess = ""
        if self._provisional_token_s is not None:
            guess = f" (a provisional one after {self._provisional_token_s:.2f} s, {record['provisional_token']})"
        # A short prompt has no prefill, and one new token no rate.
        prefill, decode = (record[f"{what}_tokens_per_s"] for what in ("prefill", "decode"))
        Console(stderr=True, highlight=False).print(
            f"\n{record['prompt_tokens']} prompt tokens{kept}, first token after {record['ttft_s']:.2f} s{guess}"
            f"{'' if prefill is None else f' (prefill {prefill} tokens/s)'}; {record['new_tokens']} new tokens"
            f"{'' if decode is None else f' at {decode} tokens/s'} on {record['num_chains']} chains, ended by "
            f"{record['finish_reason']}{drafts}",
            style="dim",
            soft_wrap=True,
        )

    def _ends(self) -> tuple[Accepted, Finished]:
        if self._accepted is None or self._finished is None:
            raise AssertionError("a record needs a finished answer")
        return self._accepted, self._finished

    def _wait(self, event: Queued) -> None:
        if self._first_token_s is not None:
            self._note(f"the decode node was lost; the answer waits for {event.waits_for.value}")
        if self._bar is not None:
            place = f"{event.num_ahead} ahead" if event.num_ahead else "next"
            if event.estimated_wait_s is not None:
                place += f", about {timedelta(seconds=round(event.estimated_wait_s))}"
            self._progress.update(self._bar, description=f"waiting for {event.waits_for.value}", speed=place)

    def _advance(self, event: PrefillProgress) -> None:
        if self._bar is not None:
            if self._prefill_began_s is None:
                self._prefill_began_s = time.monotonic()
            elapsed_s = max(1e-9, time.monotonic() - self._prefill_began_s)
            speed = f"{event.num_tokens_done / elapsed_s:.0f} tokens/s"
            self._progress.update(self._bar, description="prefill", completed=event.num_tokens_done, speed=speed)

    def _of_provisional(self) -> dict[str, object]:
        """When a provisional token came, and what became of it; nothing where none did."""
        if self._provisional is None or self._provisional_token_s is None:
            return {}
        outcome = "confirmed" if self._tokens and self._tokens[0].confirms_provisional else "replaced"
        return {
            "provisional_token_s": round(self._provisional_token_s, 4),
            "provisional_token": outcome,
            "provisional_text": self._provisional.text,
        }

    def _note(self, text: str) -> None:
        """Say once on stderr why an answer that has begun does not go on."""
        self._take_back()
        if not self._is_held_up:
            self._is_held_up = True
            Console(stderr=True, highlight=False).print(f"\n{text}", style="dim", soft_wrap=True)

    def _show(self, text: str) -> None:
        """Show a provisional word, dimmed, where it can be taken back: on a terminal, within its line."""
        if self._stream_text and sys.stdout.isatty() and text.isprintable():
            self._num_shown_cells = cell_len(text)
            sys.stdout.write(f"\x1b[2m{text}\x1b[22m")
            sys.stdout.flush()

    def _take_back(self) -> None:
        if self._num_shown_cells:
            sys.stdout.write("\b" * self._num_shown_cells + "\x1b[K")
            self._num_shown_cells = 0

    def _write(self, text: str) -> None:
        self._take_back()
        self._text.append(text)
        if self._stream_text:
            sys.stdout.write(text)
            sys.stdout.flush()


def _layer(layer: LayerRecall) -> dict[str, object]:
    return asdict(layer) | {"recall": round(layer.recall, 4), "recall_bound": round(layer.recall_bound, 4)}


def _rate(count: int, seconds: float) -> float | None:
    """Events per second; None where none were counted or no time was measured."""
    return round(count / seconds, 1) if count > 0 and seconds > 0 else None
