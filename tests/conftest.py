"""Fixtures for every kind of test."""

import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from colm.checkpoint import Checkpoint
from colm.convert import from_gguf

# How long an example takes says more of the machine than of the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Triton's kernels are interpreted on CPU tensors. It reads this when it is first imported, so it stands here.
os.environ["TRITON_INTERPRET"] = "1"

MODEL_FILE = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The one real model of the suite. Its absence is a failure: a skipped test proves nothing."""
    if not MODEL_FILE.exists():
        pytest.fail("models/SmolLM2-135M-Instruct.Q4_1.gguf is missing; run `make model`", pytrace=False)
    return MODEL_FILE


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The real model imported once, in float32: exactly what the file says. Not to be changed."""
    return from_gguf(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "colm", dtype=torch.float32)
