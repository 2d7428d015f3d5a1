"""The comparison with the paper from stored records, byte for byte, and figures of pages that name their records."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.paper import Attention
from bench.report import plots
from bench.report.compare import Comparison, compare, load
from bench.report.figures import problems, sections, slug
from bench.report.page import page

STORED = Path(__file__).parent / "report"
RECORDS = STORED / "records.jsonl"
ROOT = Path(__file__).parents[2]


def compared(attention: Attention = "dense") -> dict[tuple[str, int], Comparison]:
    found = compare(load(RECORDS))
    return {(each.cell.preset, each.cell.num_tokens): each for each in found if each.cell.attention == attention}


def test_the_page_comes_out_of_stored_records_byte_for_byte() -> None:
    found = load(RECORDS)
    text = page(compare(found), found, "../bench/results/records.jsonl", ["plots/a.svg"])
    assert text == (STORED / "prefill.md").read_text(encoding="utf-8")


def test_a_cell_is_compared_by_speedups_of_one_run_each() -> None:
    each = compared()["llama-3.2-1b-16-16-air", 2048]
    assert each.paper_speedup == pytest.approx(0.051 / 0.047)
    assert each.over_paper == pytest.approx(4.0 / (0.051 / 0.047))
    assert each.bar == each.paper_speedup
    assert each.is_met is True


def test_where_the_paper_is_beyond_the_operations_the_bar_is_most_of_what_they_allow() -> None:
    each = compared()["llama-3.2-1b-16-16-air", 128 << 10]
    assert each.flops_ratio == pytest.approx(2.20, abs=0.005)
    assert each.bar == pytest.approx(0.97 * each.flops_ratio)
    assert each.bar is not None
    assert each.bar < (each.paper_speedup or 0)
    assert each.is_met is False


def test_a_sparse_cell_is_over_the_dense_baseline_and_its_bar_is_the_papers() -> None:
    each = compared("sparse")["llama-3.2-1b", 128 << 10]
    assert each.paper_speedup == pytest.approx(8.6 / 5.5)
    assert each.over_paper == pytest.approx(2.0 / (8.6 / 5.5))
    assert (each.flops_ratio, each.bar, each.is_met) == (None, each.paper_speedup, True)
    wrong = compared("sparse")["llama-3.1-8b-8-8-8-8-air", 1 << 20]
    assert (wrong.paper_speedup, wrong.bar, wrong.is_met) == (None, None, None)


def test_samples_peers_and_sparse_budgets_are_on_the_page() -> None:
    found = load(RECORDS)
    text = page(compare(found), found, "r.jsonl", [])
    assert "| 4K | 1 | 6.2% | +6.2%, llama-3.2-1b | no |" in text
    assert "| 2K | transformers 5.23.0 | 12.0 s | 1.50x (1.40 .. 1.60) | 6.00x |" in text
    assert "| 2K | llama.cpp | absent: llama-cpp-python is not installed |  |  |" in text
    assert "gives each query row of a kv head 4,096 keys at most" in text
    assert "| 128K, sparse | 1.56x | 2.00x (1.90 .. 2.10) |" in text


def test_modelled_cells_cells_not_run_and_cells_that_the_paper_has_wrong_are_not_judged() -> None:
    modelled = compared()["llama-3.2-1b-16-16-air", 1 << 20]
    assert modelled.ours is not None
    assert (modelled.over_paper, modelled.is_met) == (None, None)
    wrong = compared()["llama-3.1-8b-8-24-air-same-params", 16 << 10]
    assert (wrong.paper_speedup, wrong.ours, wrong.over_paper, wrong.is_met) == (None, None, None, None)
    measured = replace(wrong, ours=compared()["llama-3.2-1b-16-16-air", 2048].ours)
    assert measured.over_paper is None


def test_records_of_another_commit_are_not_mixed_in() -> None:
    each = compared()["llama-3.2-1b", 2048].ours
    assert each is not None
    assert each.seconds.value == 8.0  # the stored file has 1.0 s of another commit before it


def test_a_file_without_records_says_how_they_are_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"bench\.prefill --budget-minutes 25` makes them"):
        load(tmp_path / "none.jsonl")


def test_plots_are_written_for_families_that_have_records(tmp_path: Path) -> None:
    found = load(RECORDS)
    drawn = plots.write(compare(found), found, tmp_path)
    assert [path.name for path in drawn] == ["prefill-speedup-llama-3.2-1b.svg", "prefill-tokens-llama-3.2-1b.svg"]
    assert all(path.read_text(encoding="utf-8").startswith("<?xml") for path in drawn)


def test_every_figure_of_readme_and_docs_names_its_record() -> None:
    assert problems(ROOT) == []


LOG = "# Log\n\n## An entry of 2.0x\n\n9.5 ms. Command not kept.\n"


def checked(tmp_path: Path, readme: str, log: str = LOG) -> list[str]:
    (tmp_path / "docs").mkdir()
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "bench" / "results" / "a.json").write_text("{}")
    (tmp_path / "bench" / "results" / "torn.json").write_text("{")
    (tmp_path / "README.md").write_text(readme)
    (tmp_path / "docs" / "log.md").write_text(log)
    return problems(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "12 tokens/s, see [a](bench/results/a.json).",
        "1.5x as fast ([measured](docs/log.md#an-entry-of-20x)).",
        "8 KiB, 10 s, 4 replicas, 16x64 tiles, v2x and `--rounds 3`",
        "```\n# 12 tokens/s\n```\n`bench/results/a.json`",
        "![A page of a program](docs/pictures/page.png)",
    ],
)
def test_figures_with_records_and_numbers_that_are_none_pass(tmp_path: Path, text: str) -> None:
    assert checked(tmp_path, f"# Title\n\n## Part\n\n{text}\n") == []


@pytest.mark.parametrize(
    "figure", ["12 tokens/s", "1.0 GB/s", "300 GFLOP/s", "1.1x", "| 3x |", "11.88 s", "0.5 ms", "![](docs/plots/a.svg)"]
)
def test_a_figure_without_a_record_is_named_with_its_section(tmp_path: Path, figure: str) -> None:
    (found,) = checked(tmp_path, f"# Title\n\n## First\n\n`bench/results/a.json`\n\n## Part\n\nIt is {figure}.\n")
    assert found.startswith("README.md:7: ")
    assert found.endswith("under 'Part' names no record")


def test_a_pages_introduction_names_the_record_for_all_of_it(tmp_path: Path) -> None:
    assert checked(tmp_path, "# Title\n\nFrom `bench/results/a.json`.\n\n## Part\n\n3x\n") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("`bench/results/gone.json`", "bench/results/gone.json does not exist"),
        ("`bench/results/torn.json`", "bench/results/torn.json is no record"),
    ],
)
def test_what_a_page_names_must_be_there(tmp_path: Path, text: str, said: str) -> None:
    (found,) = checked(tmp_path, f"# Title\n\n## Part\n\n{text}\n")
    assert said in found


def test_an_entry_of_the_log_says_how_it_was_measured(tmp_path: Path) -> None:
    (found,) = checked(tmp_path, "# Title\n", "# Log\n\n## Faster\n\n2.0x.\n\n## Slower\n\n3x; commit 0123abc.\n")
    assert found == "docs/log.md:3: '2.0x' under 'Faster' names no record"


def test_a_heading_in_a_code_block_begins_no_section() -> None:
    listed = list(sections("p", "# A\nx\n```\n# not one\n```\n## B `c`\ny"))
    assert [each.heading for each in listed] == ["", "A", "B `c`"]
    assert slug("Prefill in fp32 is 1.1x to 1.3x faster") == "prefill-in-fp32-is-11x-to-13x-faster"
