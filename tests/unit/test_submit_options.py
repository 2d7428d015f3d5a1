"""What `colm submit` makes of its sampling flags."""

from pathlib import Path

import pytest

from cluster.cli.submit import _bias, _constraint
from colm.errors import ClusterError, InvalidRequest
from colm.sampling import Constraint


def test_a_bias_is_a_token_id_and_a_number() -> None:
    assert [_bias(word) for word in ("42=-1.5", "0=100")] == [(42, -1.5), (0, 100.0)]


@pytest.mark.parametrize("word", ["42", "=1", "42=", "x=1", "1=2=3"])
def test_another_bias_is_refused_with_an_example(word: str) -> None:
    with pytest.raises(ClusterError, match=r"must be a token id and a number, as in 42=-1\.5"):
        _bias(word)


def test_a_schema_is_read_from_its_file_and_excludes_a_regex(tmp_path: Path) -> None:
    path = tmp_path / "schema.json"
    path.write_text('{"type": "integer"}')
    assert _constraint(path, None) == Constraint(kind="json_schema", text='{"type": "integer"}')
    assert _constraint(None, "a+") == Constraint(kind="regex", text="a+")
    assert _constraint(None, None) is None
    with pytest.raises(ClusterError, match="exclude each other"):
        _constraint(path, "a+")
    with pytest.raises(ClusterError, match="is not a text file that can be read"):
        _constraint(tmp_path / "absent", None)
    path.write_text("integer")
    with pytest.raises(InvalidRequest, match="must be a JSON object"):
        _constraint(path, None)
