"""Other software beside ours: the same model, kept optional."""

import builtins
import importlib
import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from colm_kernels import tolerance
from numpy.typing import NDArray
from torch import Tensor

from bench import peers
from bench.peers import INSTALL, PEERS, PeerAbsent, weights_for
from bench.peers.gguf_file import write_gguf
from bench.prefill import cost
from bench.prefill.plan import Group, Row
from bench.prefill.sparse import Budget
from bench.prefill.timer import EngineTimer
from colm.checkpoint import assign
from colm.convert import gguf
from colm.convert.gguf_file import GgufFile
from colm.convert.llama import source_names
from colm.model import ChainTransformer, parameter_shapes
from colm.model.config import RopeScaling
from tests.tiny import tiny_config

LLAMA = tiny_config(
    chains=(4,),
    tie_embeddings=True,
    rope_theta=500_000.0,
    rope_scaling=RopeScaling(kind="llama3", factor=32.0, original_max_context=8192),
)
WEIGHTS = weights_for(LLAMA, torch.float32, 0)
PROMPT = np.random.default_rng(0).integers(0, LLAMA.vocab_size, 300)


def exact_logits() -> Tensor:
    """Of the last token, by the definition in float64."""
    with torch.device("meta"):
        model = ChainTransformer(LLAMA)
    assign(model, WEIGHTS.tensors(parameter_shapes(LLAMA)), torch.float64)
    with torch.inference_mode():
        found: Tensor = model(torch.from_numpy(PROMPT).unsqueeze(0))[0, -1]
    return found


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", PEERS)
def test_a_peer_runs_the_model_whose_weights_it_is_given_or_says_that_it_is_absent(name: str) -> None:
    if not peers.is_installed(name):
        assert name == "llama.cpp", f"{name} is among the tests' own packages"  # llama.cpp is compiled, and not
        with pytest.raises(PeerAbsent, match=re.escape(INSTALL)), PEERS[name](WEIGHTS, torch.float32, 512):
            pass
        return
    with PEERS[name](WEIGHTS, torch.float32, 512) as peer:
        assert peer.version
        for _ in range(2):  # each prompt is read from nothing
            found = peer.prefill(PROMPT)
    # llama.cpp keeps keys and values in fp16, as many bytes as ours have in bf16.
    dtype = {"transformers": torch.float32, "llama.cpp": torch.float16}[name]
    exact = exact_logits()
    tolerance.layers(exact, dtype, num_layers=LLAMA.num_layers, width=LLAMA.dim).check(found.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_written_file_holds_the_shape_and_the_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    write_gguf(tmp_path / "m.gguf", WEIGHTS, dtype)
    file = GgufFile(tmp_path / "m.gguf")
    config = gguf._config(file)
    assert config.norm_eps == pytest.approx(LLAMA.norm_eps)  # in fp32 there
    assert replace(config, norm_eps=LLAMA.norm_eps) == LLAMA
    assert file.natural_dtype() == dtype
    for ours, theirs in source_names(LLAMA, gguf.LAYOUT).items():
        wanted, found = WEIGHTS.tensors([ours])[ours], file.read(theirs)
        if ".wq." in ours or ".wk." in ours:
            heads = LLAMA.num_heads if ".wq." in ours else LLAMA.num_kv_heads
            found = gguf._half_split_rows(found, heads)
        assert torch.equal(found, wanted.to(dtype if wanted.ndim == 2 else torch.float32))


def test_weights_are_as_large_as_a_models_and_of_a_size_that_keeps_activations_near_one() -> None:
    for name, tensor in WEIGHTS.tensors(parameter_shapes(LLAMA)).items():
        if tensor.ndim == 2 and not name.startswith("embedding."):
            assert tensor.std() * tensor.shape[1] ** 0.5 == pytest.approx(1, abs=0.1)
    with pytest.raises(AssertionError, match="no chains"):
        weights_for(tiny_config(), torch.float32, 0)


@pytest.mark.parametrize(("name", "package"), [("transformers", "transformers"), ("llama.cpp", "llama_cpp")])
def test_a_peer_that_is_not_installed_is_absent_and_says_how_it_is_installed(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(module: str, *words: Any, **named: Any) -> Any:
        if module.partition(".")[0] == package:
            raise ImportError(module)
        return real(module, *words, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with (
        pytest.raises(PeerAbsent, match=r"is not installed; pip install 'colm-serve\[peers\]'"),
        PEERS[name](WEIGHTS, torch.float32, 512),
    ):
        pass


def test_a_peer_that_is_absent_or_fails_leaves_our_rows_their_times(monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails:
        version = "1"

        def prefill(self, token_ids: NDArray[np.int64]) -> Tensor:
            if len(token_ids) == 32:  # the group's; not that which warms up
                raise RuntimeError("out of sorts")
            return torch.zeros(1)

    def absent(*_: Any) -> AbstractContextManager[Any]:
        raise PeerAbsent("not here")

    monkeypatch.setattr(peers, "PEERS", {"fails": lambda *_: nullcontext(Fails()), "absent": absent})
    config = replace(LLAMA, tie_embeddings=False)
    for module in (cost, importlib.import_module("bench.prefill.timer")):
        monkeypatch.setattr(module, "preset", lambda _: config)
    timer = EngineTimer(dtype=torch.float32, tile_tokens=16, seed=0, budget=Budget(), say=lambda _: None)
    group = Group(rows=(Row("llama-3.2-1b", "dense"),), num_tokens=32, peers=("fails", "absent"))
    seen = timer.measure(group, is_whole=True, num_rounds=2)
    assert {name: each.absent for name, each in seen.peers.items()} == {
        "fails": "it failed: out of sorts",
        "absent": "not here",
    }
    assert [len(each.whole_s) for each in seen.rows.values()] == [2]
    timer.close()
