"""Which options of a cluster that is up may change, and what stays as it is."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.application import build
from cluster.change import (
    as_kept,
    changed,
    has_room_for_both,
    is_another_model,
    require_changeable,
    require_room_for_both,
    weights_stamp,
    with_its_ports,
)
from cluster.options import ClusterConfig, load_config
from colm.errors import ConfigError
from tests.secret_folder import secret_files

RUNNING = {"model.path": "m", "gateway.port": 4000, "gateway.http_port": 4001}


def kept(**more: Any) -> dict[str, Any]:
    options: dict[str, Any] = json.loads(json.dumps(as_kept(load_config(None, RUNNING | more))))
    return options


def wanted(**more: Any) -> ClusterConfig:
    return with_its_ports(load_config(None, {"model.path": "m", "gateway.port": 0} | more), kept())


def test_kept_options_are_those_that_were_given() -> None:
    assert changed(kept(), wanted()) == {}
    assert ClusterConfig.model_validate(kept()) == load_config(
        None, RUNNING | {"model.path": Path("m").resolve(), "model.name": "m"}
    )


def test_what_differs_is_named_with_both_values() -> None:
    changes = changed(kept(), wanted(**{"decode.max_batch_size": 3, "prefill.replicas": 2}))
    assert changes == {
        "decode.max_batch_size": (load_config(None, {}).decode.max_batch_size, 3),
        "prefill.replicas": (1, 2),
    }
    require_changeable(changes)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("security.token", "off"),
        ("gateway.host", "0.0.0.0"),
        ("gateway.port", 5000),
        ("ray.insecure", True),
        ("ray.application", "other"),
    ],
)
def test_what_others_rely_on_is_refused(option: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{option}=.*cannot change under it; run `colm down` first"):
        require_changeable(changed(kept(), wanted(**{option: value})))


def test_a_role_whose_options_stay_has_the_version_that_it_had(tmp_path: Path) -> None:
    secrets = secret_files(tmp_path)

    def versions(**more: Any) -> dict[str, str]:
        config, found, waiting = load_config(None, RUNNING | more), {}, []
        waiting.append(build(config, tmp_path, secrets)._bound_deployment)
        while waiting:
            deployment = waiting.pop()
            found[deployment.name] = deployment.version
            handles = (each for each in deployment.init_args if hasattr(each, "_bound_deployment"))
            waiting += [each._bound_deployment for each in handles]
        return found

    first = versions()
    assert set(first) == {"prefill", "decode", "gateway"}
    assert versions() == first
    for option, roles in (
        ({"decode.max_batch_size": 3}, {"decode"}),
        ({"prefill.stall_s": 7.0}, {"prefill"}),
        ({"gateway.max_requests": 9}, {"gateway"}),
        ({"metrics.enabled": False}, {"prefill", "decode", "gateway"}),
        # Bug: a prefill replica began anew, without what it had kept, since there was to be another one.
        ({"prefill.replicas": 2}, set()),
        ({"prefill.max_replicas": 3}, {"gateway"}),
        ({"decode.replicas": 2}, {"gateway"}),
        ({"decode.scale_down_s": 900.0, "prefill.target_queue_s": 3.0}, set()),
    ):
        other = versions(**option)
        assert {role for role in first if first[role] != other[role]} == roles


def test_a_model_is_another_one_by_its_path_or_by_the_dtype_it_is_computed_in() -> None:
    before = ClusterConfig.model_validate(kept(**{"model.dtype": "float32"}))
    assert not is_another_model(before, wanted(**{"model.dtype": "float32", "model.name": "n", "prefill.replicas": 2}))
    assert is_another_model(before, wanted(**{"model.dtype": "float32", "model.path": "other"}))
    assert is_another_model(before, wanted(**{"model.dtype": "bfloat16"}))


def test_another_model_without_room_beside_the_running_one_is_refused_with_the_figures(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"1234")
    small = {"decode.kv_cache_bytes": "1KiB"}
    require_room_for_both(load_config(None, {"ray.address": "auto", "security.folder": "f"}), weights)
    with pytest.raises(ConfigError, match=r"takes up to 1.0EiB, .* left; lower decode.kv_cache_bytes=1.0EiB"):
        require_room_for_both(load_config(None, {"decode.kv_cache_bytes": 1 << 60}), weights)
    with pytest.raises(ConfigError, match=r"prefill.device='cuda' with prefill.num_gpus=0 shares a GPU"):
        require_room_for_both(load_config(None, small | {"prefill.device": "cuda"}), weights)


def test_replicas_start_beside_others_only_where_memory_is_this_machines_and_enough(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"1234")
    small = {"decode.kv_cache_bytes": "1MiB"}
    assert not has_room_for_both(load_config(None, {"decode.kv_cache_bytes": 1 << 60}), weights)
    assert not has_room_for_both(load_config(None, small | {"decode.device": "cuda"}), weights)
    joined = small | {"ray.address": "auto", "security.folder": "f"}
    assert not has_room_for_both(load_config(None, joined), weights)


def test_weights_that_are_written_anew_have_another_stamp(tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"1234")
    before = weights_stamp(weights)
    assert weights_stamp(weights) == before
    weights.write_bytes(b"12345")
    assert weights_stamp(weights) != before
