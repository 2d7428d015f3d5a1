"""The paper's models by name, against the figures it prints."""

import pytest

from colm.model import num_parameters
from colm.model.presets import PRESETS, preset

# Table 9: printed size in units of 10M parameters, dim, hidden dim, layers, heads, kv heads, chains.
TABLE_9 = {
    "expansion-llama3.2-1b": (193, 2560, 10240, 16, 40, 10, (32, 8)),
    "expansion-tinyllama": (144, 2560, 7040, 22, 40, 5, (32, 8)),
    "llama": (110, 2048, 8192, 16, 32, 8, (32,)),
    "colm-16-16": (86, 2048, 8192, 16, 32, 8, (16, 16)),
    "colm-8-24": (92, 2048, 8192, 16, 32, 8, (8, 24)),
    "colm-8-8-16": (80, 2048, 8192, 16, 32, 8, (8, 8, 16)),
    "colm-8-8-8-8": (74, 2048, 8192, 16, 32, 8, (8, 8, 8, 8)),
    "colm-16-16-same-params": (111, 2560, 8192, 16, 32, 8, (16, 16)),
    "colm-8-8-8-8-same-params": (118, 3072, 8192, 16, 32, 8, (8, 8, 8, 8)),
}
# In billions, to four digits, of the same rows.
EXACT = (1.9339, 1.4356, 1.1042, 0.8609, 0.9218, 0.8001, 0.7393, 1.1155, 1.1876)

# Tables 10 to 13: layers, dim, dim of the first chain.
TABLES_10_TO_13 = {
    "llama-3.2-1b": (16, 2048, 2048),
    "llama-3.2-1b-16-16-air": (16, 2048, 1024),
    "llama-3.2-1b-8-8-8-8-air": (16, 2048, 512),
    "llama-3.2-1b-16-16-air-same-params": (22, 2048, 1024),
    "llama-3.2-1b-8-8-8-8-air-same-params": (26, 2048, 512),
    "llama-3.2-1b-8-8-16-air-same-params": (24, 2048, 512),
    "llama-3.2-1b-8-24-air-same-params": (21, 2048, 512),
    "llama-3.1-8b": (32, 4096, 4096),
    "llama-3.1-8b-16-16-air": (32, 4096, 2048),
    "llama-3.1-8b-8-8-8-8-air": (32, 4096, 1024),
    "llama-3.1-8b-16-16-air-same-params": (43, 4096, 2048),
    "llama-3.1-8b-8-8-8-8-air-same-params": (52, 4096, 1024),
    "llama-3.1-8b-8-8-16-air-same-params": (48, 4096, 1024),
    "llama-3.1-8b-8-24-air-same-params": (40, 4096, 1024),
}


@pytest.mark.parametrize(("name", "row"), TABLE_9.items(), ids=TABLE_9.keys())
def test_table_9_comes_out_to_the_printed_digits(name, row):
    config = preset(name)
    printed, *shape, chains = row
    # The paper rounds some rows and cuts digits off others.
    assert printed in (round(num_parameters(config) / 1e7), num_parameters(config) // 10**7)
    assert round(num_parameters(config) / 1e9, 4) == EXACT[list(TABLE_9).index(name)]
    assert [config.dim, config.hidden_dim, config.num_layers, config.num_heads, config.num_kv_heads] == shape
    assert (config.chains, config.kv_sharing) == (chains, False)


@pytest.mark.parametrize(("name", "row"), TABLES_10_TO_13.items(), ids=TABLES_10_TO_13.keys())
def test_tables_10_to_13_have_their_depth_and_widths(name, row):
    config = preset(name)
    assert (config.num_layers, config.dim, config.chain_dims[0]) == row
    assert config.kv_sharing
    assert config.max_context >= 1_000_000


@pytest.mark.parametrize("name", [name for name in TABLES_10_TO_13 if name.endswith("same-params")])
def test_models_of_about_the_same_parameters_are_within_3_percent_of_their_baseline(name):
    baseline = preset("-".join(name.split("-")[:3]))
    assert num_parameters(preset(name)) == pytest.approx(num_parameters(baseline), rel=0.03)


@pytest.mark.parametrize("name", [name for name in TABLE_9 if name != "llama"])
def test_every_chained_row_of_table_9_also_exists_with_kv_sharing(name):
    colm = preset(name)
    air = preset(name.replace("-same-params", "") + "-air" + "-same-params" * ("-same-params" in name))
    assert air.kv_sharing
    assert (air.dim, air.hidden_dim, air.num_layers, air.chains) == (
        colm.dim,
        colm.hidden_dim,
        colm.num_layers,
        colm.chains,
    )
    assert air.head_dim == colm.head_dim


def test_every_preset_is_of_a_table():
    air = {name for name in PRESETS if "-air" in name and not name.startswith("llama")}
    assert set(PRESETS) == set(TABLE_9) | set(TABLES_10_TO_13) | air
    assert len(air) == len(TABLE_9) - 1


def test_published_shapes_have_their_published_parameters():
    assert num_parameters(preset("llama-3.1-8b")) == 8_030_261_248


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match=r"preset='colm-16-61' is unknown; nearest are colm-16-16"):
        preset("colm-16-61")
