"""A node computes on the device that its options name, or says why it cannot before anything is started."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from colm_kernels import native

from cluster.lifecycle import up
from cluster.options import ClusterConfig, load_config
from colm.checkpoint import Checkpoint
from colm.errors import ClusterError, ConfigError
from colm.placement import CPU, Placement, parse_device, why_unusable
from tests.nodes import decode_node, prefill_node
from tests.tiny import tiny_checkpoint

FIRST_GPU = torch.device("cuda", 0)
NOT_BUILT = "this PyTorch is built without CUDA; install one"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return tiny_checkpoint(tmp_path_factory.mktemp("placement") / "tiny")


def machine(monkeypatch: pytest.MonkeyPatch, *, is_built: bool = True, num_gpus: int = 0) -> None:
    """What PyTorch says of a machine."""
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: is_built)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)


def configured(checkpoint: Checkpoint, **options: object) -> ClusterConfig:
    named = {name.replace("__", "."): value for name, value in options.items()}
    return load_config(None, {"model.path": checkpoint.path, "model.dtype": "float32", "gateway.port": 0} | named)


def bring_up(checkpoint: Checkpoint, state_dir: Path, **options: object) -> None:
    up(configured(checkpoint, **options), state_dir, lambda _: pytest.fail("went on to start something"))


@pytest.mark.parametrize(
    ("name", "device"),
    [("cpu", CPU), ("cuda", FIRST_GPU), ("cuda:0", FIRST_GPU), ("cuda:11", torch.device("cuda", 11))],
)
def test_a_device_is_read_with_its_index(name: str, device: torch.device) -> None:
    assert parse_device(name) == device


@pytest.mark.parametrize(
    ("has_bf16_unit", "variant", "dtype"),
    [
        (True, "avx512_bf16", torch.bfloat16),
        (True, "torch", torch.bfloat16),
        (False, "avx512", torch.float32),
        (False, "avx2", torch.bfloat16),
        (False, "torch", torch.float32),
    ],
)
def test_bfloat16_is_used_where_it_is_as_fast(
    has_bf16_unit: bool, variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16_unit)
    monkeypatch.setattr(native, "default_variant", lambda _: variant)
    assert Placement.of("cpu", "auto").dtype is dtype
    assert Placement.of("cuda", "auto").dtype is torch.bfloat16


@pytest.mark.parametrize("name", ["", "CPU", "gpu", "meta", "cuda:", "cuda:01", "cuda:300", "cuda:0 ", "cuda:1\u0661"])
def test_an_unknown_device_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"device={name!r} is unknown; use cpu, cuda or cuda:N"):
        parse_device(name)
    with pytest.raises(ConfigError, match=r"decode\.device="):
        load_config(None, {"decode.device": name})


@pytest.mark.parametrize(
    ("is_built", "num_gpus", "reason"),
    [
        (False, 0, NOT_BUILT),
        (True, 0, "PyTorch finds no GPU: no driver"),
        (True, 2, "no such GPU among the 2 here; the last is cuda:1"),
        (True, 3, None),
    ],
    ids=["built without CUDA", "no driver", "no device N", "there"],
)
def test_a_gpu_that_cannot_be_used_is_told_with_the_reason(
    is_built: bool, num_gpus: int, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, is_built=is_built, num_gpus=num_gpus)
    found = why_unusable(torch.device("cuda", 2))
    assert found is None if reason is None else reason in str(found)
    assert why_unusable(CPU) is None


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_a_node_refuses_to_start_on_a_gpu_that_is_not_there(
    role: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, is_built=False)
    options = {"placement": Placement.of("cuda", "float32", 1)}
    path = str(checkpoint.path)
    node = prefill_node(path, **options) if role == "prefill" else decode_node(path, ["localhost:1"], **options)
    with pytest.raises(ConfigError, match=f"device='cuda:0': {NOT_BUILT}"):
        async with node:
            pytest.fail("started")


async def test_a_prefill_node_on_the_cpu_refuses_a_backend_of_gpus(checkpoint: Checkpoint) -> None:
    with pytest.raises(ConfigError, match=r"attention_backend='triton': .* runs on CUDA alone, and this is cpu"):
        async with prefill_node(str(checkpoint.path), attention_backend="triton"):
            pytest.fail("started")


PREFILL, DECODE = ["prefill_node"], ["decode_node", "--prefill", "localhost:1"]


@pytest.mark.parametrize(
    ("node", "device", "error"),
    [
        (PREFILL, "cuda:99", "device='cuda:99': "),
        (DECODE, "cuda:99", "device='cuda:99': "),
        (DECODE, "gpu", "--device='gpu': "),  # refused where both nodes' options are read
    ],
)
def test_a_node_by_hand_answers_a_wrong_device_with_one_line(
    node: list[str], device: str, error: str, checkpoint: Checkpoint
) -> None:
    command = [sys.executable, "-m", *node, "--model", str(checkpoint.path), "--device", device]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1].startswith(f"error: {error}")
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("role", ["prefill", "decode"])
@pytest.mark.parametrize("option", [{"num_gpus": 1}, {"device": "cuda"}], ids=["num_gpus", "device"])
def test_up_refuses_a_gpu_that_this_machine_has_not(
    role: str, option: dict[str, object], checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bug: Ray set a GPU aside, and the replica computed on the CPU."""
    machine(monkeypatch, is_built=False)
    ((name, value),) = option.items()
    with pytest.raises(ConfigError, match=rf"{role}\.device=.* with {role}\.num_gpus=\d: {NOT_BUILT}"):
        bring_up(checkpoint, tmp_path, **{f"{role}__{name}": value})


def test_up_refuses_a_file_of_patterns_of_another_model(checkpoint: Checkpoint, tmp_path: Path) -> None:
    path = tmp_path / "patterns.json"
    path.write_text("[]")
    with pytest.raises(ConfigError, match=r"patterns\.json is of a model of 0 layers"):
        bring_up(checkpoint, tmp_path, prefill__sparse_patterns=path)


async def test_a_prefill_node_refuses_a_file_of_patterns_that_it_cannot_use(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"absent\.json cannot be read"):
        async with prefill_node(str(checkpoint.path), sparse_patterns=str(tmp_path / "absent.json")):
            pytest.fail("started")


def test_up_refuses_more_gpus_than_this_machine_has(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, num_gpus=2)
    options = {"prefill__num_gpus": 1, "prefill__replicas": 2, "decode__num_gpus": 1}
    with pytest.raises(ConfigError, match=r"take 3 GPUs and this machine has 2; .*device = \"cuda\""):
        bring_up(checkpoint, tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"device": "cpu", "num_gpus": 1}, "decode.device='cpu' leaves idle the GPU that decode.num_gpus=1 sets aside"),
        ({"device": "cuda:1", "num_gpus": 1}, "decode.device='cuda:1' with decode.num_gpus=1: a replica sees only"),
        ({"num_gpus": 2}, "decode.num_gpus=2: Input should be less than or equal to 1"),
    ],
    ids=["cpu", "another one", "more than one"],
)
def test_a_gpu_is_not_set_aside_to_stand_idle(options: dict[str, object], refusal: str) -> None:
    """Bug: it was."""
    with pytest.raises(ConfigError) as refused:
        load_config(None, {f"decode.{name}": value for name, value in options.items()})
    assert refusal in str(refused.value)


@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_a_backend_of_gpus_is_refused_where_prefill_computes_on_the_cpu(device: str) -> None:
    with pytest.raises(ConfigError, match=r"prefill\.attention_backend='triton' needs a GPU"):
        load_config(None, {"prefill.attention_backend": "triton", "prefill.device": device})


def test_auto_is_the_gpu_that_ray_sets_aside_or_the_cpu() -> None:
    config = load_config(None, {"prefill.num_gpus": 1, "prefill.attention_backend": "triton"})
    assert (config.prefill.resolved_device, config.decode.resolved_device) == ("cuda", "cpu")
    shared = load_config(None, {"prefill.device": "cuda:1", "decode.device": "cuda:1"})
    assert (shared.prefill.resolved_device, shared.decode.resolved_device) == ("cuda:1", "cuda:1")


def test_auto_dtype_is_of_the_devices_that_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: a GPU in the machine made bfloat16 of it, for a CPU that is slow at that."""
    machine(monkeypatch, num_gpus=2)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(native, "default_variant", lambda _: "avx512")
    assert load_config(None, {}).resolved_dtype == "float32"
    assert load_config(None, {"prefill.num_gpus": 1}).resolved_dtype == "float32"
    assert load_config(None, {"prefill.num_gpus": 1, "decode.num_gpus": 1}).resolved_dtype == "bfloat16"
    assert Placement.of("cpu", "auto").dtype == torch.float32
    assert Placement.of("cuda", "auto").dtype == torch.bfloat16


def test_a_ray_cluster_with_too_few_gpus_is_refused(checkpoint: Checkpoint) -> None:
    from cluster.deployment import check_resources  # imports Ray

    config = configured(checkpoint, prefill__num_gpus=1, prefill__replicas=2, decode__num_gpus=1)
    roles = {"prefill": 2.0, "decode": 1.0}
    with pytest.raises(ClusterError, match=r"carries 2 GPUs and the replicas take 3; .*num_gpus"):
        check_resources(config, roles | {"GPU": 2.0})
    with pytest.raises(ClusterError, match=r"carries 0 GPUs"):
        check_resources(config, roles)
    check_resources(config, roles | {"GPU": 3.0})
