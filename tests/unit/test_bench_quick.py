"""The first look: what its lines say of results."""

from bench.harness.contest import Result, Spread
from bench.quick import FIRST_TOKENS, PRESETS, decode_line, first_token_lines, prefill_lines


def result(seen: dict[str, dict[str, float]], ratios: dict[str, float] | None = None) -> Result:
    return Result(
        seen={name: {key: Spread.of([value]) for key, value in each.items()} for name, each in seen.items()},
        ours=None,
        ratios={name: Spread.of([value]) for name, value in (ratios or {}).items()},
        facts={},
    )


def test_prefills_stand_beside_the_plain_model() -> None:
    times = dict(zip(PRESETS, (8.0, 2.0, 1.0), strict=True))
    plain, two, four = prefill_lines(result({f"{name}_2K": {"s": seconds} for name, seconds in times.items()}))
    assert (plain.rate, plain.beside) == ("256 tokens/s", "")
    assert (two.rate, two.beside) == ("1,024 tokens/s", "4.00x as fast")
    assert four.beside == "8.00x as fast"


def test_a_step_stands_beside_reading_and_the_last_scale_is_named() -> None:
    seen = result({"one_call": {"s": 0.02}}, {"read": 0.5})
    assert decode_line(2, 2, seen).what.endswith("at scale 2, all chains")
    assert decode_line(1, 2, seen).what.endswith("at scale 1")
    assert (decode_line(1, 2, seen).rate, decode_line(1, 2, seen).beside) == (
        "50 tokens/s",
        "50% of the speed of reading memory",
    )


def test_every_prompt_through_the_cluster_has_a_line() -> None:
    lines = list(first_token_lines(result({"cluster": {f"tokens{n}_s": n / 1000 for n in FIRST_TOKENS}})))
    assert [line.seconds for line in lines] == [n / 1000 for n in FIRST_TOKENS]
