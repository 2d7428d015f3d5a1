"""The first look: what its lines say of a record, and that the README says the same."""

import json
from pathlib import Path
from typing import Any

from bench.harness.markdown import around
from bench.quick import BEGIN, END, FIRST_TOKENS, PAGE, PRESETS, RECORD, lines_of, markdown

ROOT = Path(__file__).parents[2]


def case(**metrics: float) -> dict[str, Any]:
    return {"metrics": {name: {"median": value} for name, value in metrics.items()}}


def test_prefills_stand_beside_the_plain_model_and_steps_beside_reading() -> None:
    times = dict(zip(PRESETS, (8.0, 2.0, 1.0), strict=True))
    record = {
        "cases": [
            case(**{f"{name}_2K_s": seconds for name, seconds in times.items()}),
            case(one_call_s=0.01, over_read_x=0.8),
            case(one_call_s=0.02, over_read_x=0.5),
            case(**{f"cluster_tokens{n}_s": n / 1000 for n in FIRST_TOKENS}),
        ]
    }
    plain, two, four, scale_1, scale_2, *first_tokens = lines_of(record)
    assert (plain.rate, plain.beside) == ("256 tokens/s", "")
    assert (two.rate, two.beside) == ("1,024 tokens/s", "4.00x as fast")
    assert four.beside == "8.00x as fast"
    assert scale_1.what.endswith("at scale 1")
    assert scale_2.what.endswith("at scale 2, all chains")
    assert (scale_2.rate, scale_2.beside) == ("50 tokens/s", "50% of the speed of reading memory")
    assert [line.seconds for line in first_tokens] == [n / 1000 for n in FIRST_TOKENS]


def test_the_readme_has_the_records_table() -> None:
    before, after = around(ROOT / PAGE, BEGIN, END)
    record = json.loads((ROOT / RECORD).read_text(encoding="utf-8"))
    assert (ROOT / PAGE).read_text(encoding="utf-8") == before + "\n".join([BEGIN, *markdown(record), END]) + after
