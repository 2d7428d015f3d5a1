"""The decode engine, over pages that the prefill engine filled, against the oracle.

Shapes: R requests, V vocabulary, L layers, B pages, P tokens of a page, K kv heads, D head dim, M pages of a request.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colm_kernels import native, tolerance
from colm_kernels.decode_attention import decode_attention
from numpy.typing import NDArray
from torch import Tensor

from colm.checkpoint import Checkpoint
from colm.kv import KvFormat
from colm.model import ChainTransformer
from colm.model.config import RopeScaling
from colm.sampling import SamplingParams
from colm.wire.tile_codec import decode_message, decode_tile, encode_tile
from decode_node import engine as engine_module
from decode_node.engine import DecodeEngine
from decode_node.kv_layout import KvLayout
from decode_node.kv_store import KvStore
from decode_node.page_pool import PagePool
from decode_node.plan import PlanRow, StepPlan
from decode_node.running_answer import RunningAnswer
from prefill_node.engine import PrefillEngine
from tests.covering import pairs
from tests.library import needs_library
from tests.tiny import tiny_checkpoint, tiny_config

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE_TOKENS = 4
SCALES = [1, 2, 3]
LENGTHS = [1, 2, PAGE_TOKENS, PAGE_TOKENS + 1, 2 * PAGE_TOKENS + 1, 31]

MODELS: dict[str, dict[str, Any]] = {
    "small heads": {},
    "heads of the native kernel": {"dim": 8 * 64},
    "one kv head": {"chains": (8, 4, 2), "num_kv_heads": 1},
    "stretched rope": {"rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_max_context=32)},
    "yarn": {"rope_scaling": RopeScaling(kind="yarn", factor=8.0, original_max_context=32, beta_fast=4.0)},
    "tied": {"tie_embeddings": True},
    "biases": {"bias": True},
    "gelu": {"activation": "gelu"},
}


class Machine:
    """A prefill engine, a page store and a decode engine of one model, without a wire between them."""

    def __init__(self, checkpoint: Checkpoint, num_pages: int = 128, *, in_one_call: bool = True) -> None:
        kv_format = KvFormat.of(checkpoint.config, torch.float32)
        self.store = KvStore(KvLayout(kv_format, PAGE_TOKENS), num_pages)
        for pages in (self.store.k_pages_LBPKD, self.store.v_pages_LBPKD):
            pages.fill_(float("nan"))
        self.pool = PagePool(num_pages)
        self.prefill = PrefillEngine(checkpoint, kv_format, tile_tokens=2 * PAGE_TOKENS + 1)
        self.decode = DecodeEngine(checkpoint, self.store, in_one_call=in_one_call)
        # Free pages with gaps between them, so that a request's pages lie apart.
        leases = [self.pool.reserve("hole", 3) for _ in range(num_pages // 3)]
        for lease in leases[::2]:
            self.pool.release(lease)

    def admit(self, token_ids: NDArray[np.int64], num_new_tokens: int = 1) -> NDArray[np.int32]:
        """Write the keys and values of all but the last token into pages, as a stream does."""
        layout = self.store.layout
        lease = self.pool.reserve("request", layout.pages(len(token_ids) + num_new_tokens - 1))
        table_M = self.store.page_table(lease)
        if len(token_ids) > 1:
            for tile in self.prefill.run(token_ids[:-1]):
                header, payload = decode_message(encode_tile(tile, transfer_id="t", epoch=1))
                self.store.write(table_M, decode_tile(header.tile, payload, layout.kv_format))
        return table_M

    def first_row(self, token_ids: NDArray[np.int64], num_chains: int) -> PlanRow:
        return PlanRow((int(token_ids[-1]),), len(token_ids) - 1, num_chains, self.admit(token_ids))

    def step(self, *rows: PlanRow) -> Tensor:
        """Logits of all rows, in the plan's order: larger scale first."""
        return self.decode.step(StepPlan(rows))

    def kept(self, table_M: NDArray[np.int32], num_tokens: int) -> tuple[Tensor, Tensor]:
        """The stored keys and values of a request's tokens, all layers."""
        pages = torch.from_numpy(table_M).long()
        keys, values = self.store.k_pages_LBPKD[:, pages], self.store.v_pages_LBPKD[:, pages]
        return keys.flatten(1, 2)[:, :num_tokens], values.flatten(1, 2)[:, :num_tokens]


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", tiny_config(**MODELS[request.param]))


@pytest.fixture
def tiny(tmp_path: Path) -> Checkpoint:
    return tiny_checkpoint(tmp_path / "tiny")


def prompt(num_tokens: int, seed: int = 5) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, 320, num_tokens)


@lru_cache(maxsize=1)
def exact_model(path: Path) -> ChainTransformer:
    return Checkpoint.open(path).load(dtype=torch.float64)


@torch.inference_mode()
def oracle(checkpoint: Checkpoint, token_ids: NDArray[np.int64], num_chains: int) -> tolerance.Expected:
    """The plain model's logits after the last token."""
    model, config = exact_model(checkpoint.path), checkpoint.config
    logits_BTV: Tensor = model(torch.from_numpy(token_ids).unsqueeze(0), num_chains)
    return tolerance.layers(logits_BTV[0, -1], torch.float32, num_layers=config.num_layers, width=config.dim)


def assert_oracles(result_V: Tensor, checkpoint: Checkpoint, token_ids: NDArray[np.int64], num_chains: int) -> None:
    oracle(checkpoint, token_ids, num_chains).check(result_V)


@pytest.mark.parametrize(
    *pairs({"checkpoint": MODELS, "num_tokens": LENGTHS, "num_chains": SCALES}), indirect=["checkpoint"]
)
def test_the_first_logits_are_the_oracles_at_every_scale(
    checkpoint: Checkpoint, num_tokens: int, num_chains: int
) -> None:
    machine, token_ids = Machine(checkpoint), prompt(num_tokens)
    (logits_V,) = machine.step(machine.first_row(token_ids, num_chains))
    assert_oracles(logits_V, checkpoint, token_ids, num_chains)


def test_a_batch_of_mixed_scales_gives_each_request_the_oracles_logits_in_its_place(checkpoint: Checkpoint) -> None:
    machine = Machine(checkpoint, num_pages=256)
    requests = [
        (prompt(length, seed), scale) for seed, (length, scale) in enumerate([(1, 3), (4, 3), (31, 2), (9, 1), (5, 1)])
    ]
    logits_RV = machine.step(*(machine.first_row(token_ids, scale) for token_ids, scale in requests))
    for logits_V, (token_ids, scale) in zip(logits_RV, requests, strict=True):
        assert_oracles(logits_V, checkpoint, token_ids, scale)


def test_a_batch_of_mixed_scales_gives_each_request_what_it_gets_alone(tiny: Checkpoint) -> None:
    requests = [(prompt(length, seed), scale) for seed, (length, scale) in enumerate([(17, 3), (12, 2), (9, 1)])]
    together = Machine(tiny)
    logits_RV = together.step(*(together.first_row(token_ids, scale) for token_ids, scale in requests))
    for logits_V, (token_ids, scale) in zip(logits_RV, requests, strict=True):
        machine = Machine(tiny)
        (alone_V,) = machine.step(machine.first_row(token_ids, scale))
        assert_oracles(logits_V, tiny, token_ids, scale)
        if native.default_variant(torch.float32) != "torch":  # whose products depend on the number of rows
            assert torch.equal(logits_V, alone_V)


def test_keys_and_values_that_are_written_do_not_depend_on_the_scale(checkpoint: Checkpoint) -> None:
    """They are bit-equal, except where PyTorch's products run, which may depend on the row's width."""
    token_ids, kept = prompt(11), []
    for num_chains in SCALES:
        machine = Machine(checkpoint)
        row = machine.first_row(token_ids, num_chains)
        machine.step(row)
        kept.append(machine.kept(row.table_M, len(token_ids)))
    for keys, values in kept[1:]:
        for ours, of_chain1 in zip((keys, values), kept[0], strict=True):
            if native.default_variant(torch.float32) != "torch":
                assert torch.equal(ours, of_chain1)
            else:
                config = checkpoint.config
                tolerance.layers(
                    of_chain1.double(), torch.float32, num_layers=config.num_layers, width=config.dim
                ).check(ours)


def test_a_step_writes_its_own_token_and_nothing_else(tiny: Checkpoint) -> None:
    machine, token_ids = Machine(tiny), prompt(11)
    row = machine.first_row(token_ids, 3)
    before = [pages.clone() for pages in (machine.store.k_pages_LBPKD, machine.store.v_pages_LBPKD)]
    machine.step(row)
    page, slot = row.position // PAGE_TOKENS, row.position % PAGE_TOKENS
    for pages, old in zip((machine.store.k_pages_LBPKD, machine.store.v_pages_LBPKD), before, strict=True):
        changed = (pages.view(torch.int32) != old.view(torch.int32)).flatten(3).any(dim=3).nonzero()
        layers = range(tiny.config.num_layers)
        assert {tuple(place) for place in changed.tolist()} == {
            (layer, int(row.table_M[page]), slot) for layer in layers
        }


@pytest.mark.parametrize(
    *pairs({"checkpoint": MODELS, "num_tokens": [1, 7, 8], "num_chains": SCALES}), indirect=["checkpoint"]
)
def test_greedy_tokens_are_the_oracles(checkpoint: Checkpoint, num_tokens: int, num_chains: int) -> None:
    """The seven steps cross at least one page's end."""
    machine, token_ids = Machine(checkpoint), prompt(num_tokens)
    table_M = machine.admit(token_ids, num_new_tokens=7)
    text = token_ids
    for _ in range(7):
        (logits_V,) = machine.step(PlanRow((int(text[-1]),), len(text) - 1, num_chains, table_M))
        oracle(checkpoint, text, num_chains).check_largest(int(logits_V.argmax()))
        text = np.append(text, int(logits_V.argmax()))


def test_an_answer_may_change_its_scale_between_tokens(tiny: Checkpoint) -> None:
    """Every scale reads the same keys and values, so those of earlier steps serve whatever comes next."""
    machine, text = Machine(tiny), prompt(6)
    table_M = machine.admit(text, num_new_tokens=6)
    for num_chains in (3, 1, 2, 3, 1, 2):
        (logits_V,) = machine.step(PlanRow((int(text[-1]),), len(text) - 1, num_chains, table_M))
        assert_oracles(logits_V, tiny, text, num_chains)
        text = np.append(text, int(logits_V.argmax()))


def test_requests_that_come_and_go_leave_the_others_alone(tiny: Checkpoint) -> None:
    machine = Machine(tiny)
    long, short = prompt(14, seed=1), prompt(3, seed=2)
    tables = {"long": machine.admit(long, num_new_tokens=3), "short": machine.admit(short)}
    first = PlanRow((int(long[-1]),), len(long) - 1, 2, tables["long"])
    second = PlanRow((int(short[-1]),), len(short) - 1, 2, tables["short"])
    for batch in ([first], [first, second], [second, first]):
        logits_RV = machine.step(*batch)
        assert_oracles(logits_RV[batch.index(first)], tiny, long, 2)


def test_the_batchs_table_is_made_anew_only_for_other_requests(
    tiny: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: the table was copied together at every step, 1 MB for each request of a million tokens."""
    machine = Machine(tiny, num_pages=256, in_one_call=False)
    long, short = machine.first_row(prompt(31), 2), machine.first_row(prompt(6), 3)
    seen: list[Tensor] = []

    def attend(q: Tensor, k_pages: Tensor, v_pages: Tensor, table_RM: Tensor, lens_R: Tensor, **more: Tensor) -> Tensor:
        seen.append(table_RM)
        return decode_attention(q, k_pages, v_pages, table_RM, lens_R, **more)

    monkeypatch.setattr(engine_module, "decode_attention", attend)
    for batch in ([short, long], [replace(short, position=6), long], [long], [short]):
        machine.step(*batch)
    first, again, alone, other = (seen[index : index + 2] for index in range(0, 8, 2))
    assert all(table_RM is first[0] for table_RM in (*first, *again))
    assert first[0].tolist() == [[*short.table_M.tolist(), *[0] * 6], long.table_M.tolist()]
    assert alone[0].tolist() == [long.table_M.tolist()]
    assert other[0].tolist() == [short.table_M.tolist()]


RAGGED = [(3, 2, 9), (3, 16, 17), (2, 1, 6), (2, 3, 3), (1, 2, 31), (1, 16, 16)]
"""Scale, query tokens and length of the text that they end; the fourth and the last begin their texts."""


def ragged_texts() -> list[NDArray[np.int64]]:
    return [prompt(length, seed) for seed, (_, _, length) in enumerate(RAGGED)]


def row_of(machine: Machine, text: NDArray[np.int64], num_chains: int, num_tokens: int, num_logits: int) -> PlanRow:
    """The last tokens of a text, over pages that hold those before."""
    position = len(text) - num_tokens
    table_M = machine.admit(text[: position + 1], num_new_tokens=num_tokens)
    return PlanRow(tuple(text[position:].tolist()), position, num_chains, table_M, num_logits)


def one_at_a_time(row: PlanRow) -> list[PlanRow]:
    return [
        replace(row, token_ids=(token_id,), position=row.position + index, num_logits=1)
        for index, token_id in enumerate(row.token_ids)
    ]


def test_rows_of_several_tokens_give_every_token_the_oracles_logits_and_write_what_single_tokens_do(
    checkpoint: Checkpoint,
) -> None:
    together, apart, config = Machine(checkpoint, 256), Machine(checkpoint, 256), checkpoint.config
    texts = ragged_texts()
    rows, singles = (
        [row_of(m, text, scale, n, n) for text, (scale, n, _) in zip(texts, RAGGED, strict=True)]
        for m in (together, apart)
    )
    logits = iter(together.step(*rows))
    for text, row, single in zip(texts, rows, singles, strict=True):
        for step in one_at_a_time(single):
            alone_V, logits_V, read = apart.step(step)[0], next(logits), text[: step.position + 1]
            expected = oracle(checkpoint, read, row.num_chains)
            expected.check(logits_V)
            expected.check(alone_V)
        for ours, one_by_one in zip(
            together.kept(row.table_M, len(text)), apart.kept(single.table_M, len(text)), strict=True
        ):
            exact = one_by_one.double()
            tolerance.layers(exact, torch.float32, num_layers=config.num_layers, width=config.dim).check(ours)
    assert next(logits, None) is None


@needs_library  # PyTorch's bits depend on the rows beside
def test_few_tokens_of_several_rows_give_the_bits_that_each_gives_alone(tiny: Checkpoint) -> None:
    together, apart = Machine(tiny), Machine(tiny)
    shapes = [(3, 3, 9), (2, 1, 6), (2, 8, 8), (1, 4, 17)]
    texts = [prompt(length, seed) for seed, (_, _, length) in enumerate(shapes)]
    rows, singles = (
        [row_of(m, text, scale, n, n) for text, (scale, n, _) in zip(texts, shapes, strict=True)]
        for m in (together, apart)
    )
    alone_QV = torch.cat([apart.step(step) for row in singles for step in one_at_a_time(row)])
    assert torch.equal(together.step(*rows), alone_QV)
    for text, row, single in zip(texts, rows, singles, strict=True):
        for ours, one_by_one in zip(
            together.kept(row.table_M, len(text)), apart.kept(single.table_M, len(text)), strict=True
        ):
            assert torch.equal(ours, one_by_one)


@pytest.mark.parametrize("counts", [(0, 1, 0, 3, 1, 16), (0, 0, 0, 0, 2, 0), (2, 16, 1, 0, 0, 0), (0,) * 6])
def test_only_the_last_tokens_of_a_row_that_ask_for_logits_get_them(tiny: Checkpoint, counts: tuple[int, ...]) -> None:
    machine, texts = Machine(tiny, 256), ragged_texts()
    asked = [
        row_of(machine, text, scale, n, count) for text, (scale, n, _), count in zip(texts, RAGGED, counts, strict=True)
    ]
    logits_QV = machine.step(*asked)
    assert logits_QV.shape == (sum(counts), tiny.config.vocab_size)
    logits = iter(logits_QV)
    for text, (scale, _, length), count in zip(texts, RAGGED, counts, strict=True):
        for end in range(length - count + 1, length + 1):
            assert_oracles(next(logits), tiny, text[:end], scale)


def test_a_cache_that_caught_up_serves_the_next_token(tiny: Checkpoint) -> None:
    """Tokens that asked for no logits, at one scale, are read by a token at another."""
    machine, text = Machine(tiny), prompt(20)
    behind = row_of(machine, text, 1, 12, 0)
    table_M, position = behind.table_M, behind.position
    machine.step(replace(behind, token_ids=behind.token_ids[:11]))
    (logits_V,) = machine.step(PlanRow(behind.token_ids[11:], position + 11, 3, table_M))
    assert_oracles(logits_V, tiny, text, 3)


def first_rows(machine: Machine, text: NDArray[np.int64], num_chains: int) -> list[PlanRow]:
    """What an answer's first step reads where the cache holds nothing of its prompt."""
    lease = machine.pool.reserve("request", machine.store.layout.pages(len(text)))
    answer = RunningAnswer(
        unread_token_ids=text.tolist(),
        position=0,
        num_chains=num_chains,
        max_new_tokens=1,
        table_M=machine.store.page_table(lease),
        sampling=SamplingParams(),
        stop_token_ids=(),
        text_stream=None,
    )
    return answer.next_rows()


@pytest.mark.parametrize("num_chains", SCALES)
@pytest.mark.parametrize("num_tokens", [1, 2, 17, 18, 31])
def test_a_prompt_that_is_read_in_one_step_gets_the_oracles_logits(
    checkpoint: Checkpoint, num_tokens: int, num_chains: int
) -> None:
    machine, text = Machine(checkpoint), prompt(num_tokens)
    (logits_V,) = machine.step(*first_rows(machine, text, num_chains))
    assert_oracles(logits_V, checkpoint, text, num_chains)


def test_prompts_that_share_a_step_leave_keys_and_values_as_if_each_had_been_prefilled(checkpoint: Checkpoint) -> None:
    """Beside an answer that goes on; and later tokens read them at any scale."""
    machine, prefilled, config = Machine(checkpoint, 256), Machine(checkpoint, 256), checkpoint.config
    texts, going = [prompt(18, seed=1), prompt(23, seed=2)], prompt(9, seed=3)
    goes_on = machine.first_row(going, 1)
    (last, *first), (other, *second) = (
        first_rows(machine, text, scale) for text, scale in zip(texts, (3, 2), strict=True)
    )
    logits_QV = machine.step(last, other, goes_on, *first, *second)
    for logits_V, text, scale in zip(logits_QV, [*texts, going], (3, 2, 1), strict=True):
        assert_oracles(logits_V, checkpoint, text, scale)
    for row, text in zip((last, other), texts, strict=True):
        row_of_prefill = prefilled.first_row(text, 1)
        prefilled.step(row_of_prefill)
        wanted = prefilled.kept(row_of_prefill.table_M, len(text))
        for ours, exact in zip(machine.kept(row.table_M, len(text)), wanted, strict=True):
            tolerance.layers(exact.double(), torch.float32, num_layers=config.num_layers, width=config.dim).check(ours)


def test_a_row_of_more_tokens_than_attention_takes_is_our_own_error(tiny: Checkpoint) -> None:
    machine = Machine(tiny)
    with pytest.raises(AssertionError, match=r"rows of \[17\] tokens, at most 16"):
        machine.step(row_of(machine, prompt(17), 1, 17, 1))
