"""Pattern files: read back as written, compatible with MInference's, and refused by file, layer, head and field."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colm.errors import ConfigError
from prefill_node.sparse.patterns import AShape, BlockSparse, HeadPattern, PatternFile, VerticalSlash
from tests.tiny import tiny_config

CONFIG = tiny_config(chains=(2, 4))
GOOD = ["vertical_and_slash", 1000, 6096, 0.9858]

sizes = st.integers(1, 1 << 20)
scores = st.floats(allow_nan=False, allow_infinity=False)
patterns: st.SearchStrategy[HeadPattern] = st.one_of(
    st.builds(AShape, sink_tokens=sizes, local_tokens=sizes, score=scores),
    st.builds(VerticalSlash, num_verticals=sizes, num_slashes=sizes, score=scores),
    st.builds(BlockSparse, num_blocks=sizes, score=scores),
)


def written(folder: Path, body: object) -> Path:
    path = folder / "patterns.json"
    path.write_text(json.dumps(body))
    return path


@given(st.lists(st.tuples(patterns, patterns), min_size=2, max_size=2))
def test_a_file_is_read_back_as_written(tmp_path_factory, layers):
    path = tmp_path_factory.mktemp("file") / "patterns.json"
    PatternFile(tuple(layers)).write(path)
    assert PatternFile.read(path, CONFIG) == PatternFile(tuple(layers))


def test_a_config_of_minference_is_read_and_written_alike(tmp_path):
    body = [
        {"0": GOOD, "1": ["stream_llm", 100, 800, 1]},
        {"0": ["block_sparse", 100, 1, 0.5], "1": ["vertical_and_slash", 30, 800, 1.0]},
    ]
    read = PatternFile.read(written(tmp_path, body), CONFIG)
    assert read.layers[0] == (
        VerticalSlash(num_verticals=1000, num_slashes=6096, score=0.9858),
        AShape(sink_tokens=100, local_tokens=800, score=1),
    )
    assert read.layers[1][0] == BlockSparse(num_blocks=100, score=0.5)
    read.write(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"0": GOOD}, "must be a list with one object for each layer"),
        ([{"0": GOOD, "1": GOOD}], "is of a model of 1 layers; this one has 2"),
        ([{"0": GOOD, "1": GOOD}, {"0": GOOD}], r"layer 1 has 1 heads, expected 0 to 1, chain 1's; see \['1'\]"),
        ([{"0": GOOD, "1": GOOD, "2": GOOD}, {}], r"layer 0 has 3 heads, expected 0 to 1.*\['2'\]"),
        ([{"0": GOOD, "one": GOOD}, {}], r"layer 0 has 2 heads.*\['1', 'one'\]"),
        ([{"0": GOOD, "1": GOOD}, {"0": GOOD, "1": GOOD[:3]}], "layer 1, head 1: .* must be .type, vertical_size"),
        ([{"0": ["flex", 1, 1, 1], "1": GOOD}, {}], "layer 0, head 0: type='flex' is unknown; use one of stream_llm, "),
        ([{"0": [["x"], 1, 1, 1], "1": GOOD}, {}], r"layer 0, head 0: type=\['x'\] is unknown"),
        ([{"0": ["stream_llm", 0, 1, 1], "1": GOOD}, {}], "layer 0, head 0: vertical_size=0 must be a whole number"),
        ([{"0": ["stream_llm", 1, -4, 1], "1": GOOD}, {}], "head 0: slash_size=-4 must be a whole number"),
        ([{"0": GOOD, "1": ["stream_llm", 1, True, 1]}, {}], "head 1: slash_size=True must"),
        ([{"0": GOOD, "1": ["stream_llm", "9", 1, 1]}, {}], "head 1: vertical_size='9' must"),
        ([{"0": GOOD, "1": ["stream_llm", 9, 1.5, 1]}, {}], "head 1: slash_size=1.5 must"),
        ([{"0": GOOD, "1": ["stream_llm", 9, 1, None]}, {}], "head 1: score=None must be a finite number"),
        ([{"0": GOOD, "1": ["stream_llm", 9, 1, float("nan")]}, {}], "head 1: score=nan must be a finite number"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, body, message):
    path = written(tmp_path, body)
    with pytest.raises(ConfigError, match=message) as refused:
        PatternFile.read(path, CONFIG)
    assert str(refused.value).startswith(str(path))


def test_a_file_that_is_missing_or_no_json_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"patterns\.json cannot be read: No such file"):
        PatternFile.read(tmp_path / "patterns.json", CONFIG)
    (tmp_path / "patterns.json").write_bytes(b"\xff[")
    with pytest.raises(ConfigError, match=r"patterns\.json is not valid JSON"):
        PatternFile.read(tmp_path / "patterns.json", CONFIG)
    with pytest.raises(ConfigError, match="cannot be written"):
        PatternFile(()).write(tmp_path / "nowhere" / "patterns.json")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AShape(sink_tokens=0, local_tokens=1), "sink_tokens=0"),
        (lambda: VerticalSlash(num_verticals=1, num_slashes=0), "num_slashes=0"),
        (lambda: BlockSparse(num_blocks=-1), "num_blocks=-1"),
    ],
)
def test_a_pattern_has_no_size_below_one(build, message):
    with pytest.raises(ValueError, match=message):
        build()
