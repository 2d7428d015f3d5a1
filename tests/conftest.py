"""Fixtures for every kind of test."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from colm.checkpoint import Checkpoint
from colm.convert import from_gguf
from tests.gpu import HAS_GPU, MadeOnGpu
from tests.library import why_no_library

# No deadline for an example: its time depends on the machine more than on the code.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")

# Without a GPU, Triton's kernels are interpreted. It reads this when it is first imported, so it stands here.
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_configure() -> None:
    """Without the library, tests would pass that never ran the kernels."""
    if (reason := why_no_library()) is not None:
        raise pytest.UsageError(reason)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a GPU need one."""
    for item in items:
        if not HAS_GPU and item.get_closest_marker("gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def where_triton_runs() -> Iterator[None]:
    """Tensors that the test makes lie where Triton's kernels run."""
    with MadeOnGpu() if HAS_GPU else nullcontext():
        yield


MODEL_FILE = Path(__file__).parent.parent / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The one real model of the suite. Its absence is a failure: a skipped test proves nothing."""
    if not MODEL_FILE.exists():
        pytest.fail("models/SmolLM2-135M-Instruct.Q4_1.gguf is missing; run `make model`", pytrace=False)
    return MODEL_FILE


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The real model, imported once in float32, which holds the file's values exactly. Tests must not change it."""
    return from_gguf(smollm2_gguf, tmp_path_factory.mktemp("smollm2") / "colm", dtype=torch.float32)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: on a busy machine, threads that wait for one another take ten times as long as one."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)
