"""The dashboard and the alerts ask for metrics that exist, by labels that these have."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
METRICS = {
    name: {kind, *labels.replace("`", "").split(",")}
    for name, kind, labels in re.findall(
        r"^\| `(\w+)` \| (\w+)(?:, (`[\w,]+`))? \|", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE
    )
}
DASHBOARD = json.loads((ROOT / "deploy" / "grafana" / "colm-serve.json").read_text())
ALERTS = (ROOT / "deploy" / "prometheus" / "alerts.yaml").read_text()
KINDS = {"counter", "gauge", "histogram", ""}
OF_TARGETS = {"role", "model"}
OF_PROMETHEUS = OF_TARGETS | {"instance", "job", "le"}


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from re.findall(r"expr: (?:>-\n)?((?:.|\n)*?)\n        for:", ALERTS)


def test_every_metric_exists_and_has_the_labels_that_it_is_asked_for() -> None:
    found = list(expressions())
    assert len(found) == 44 + 9
    for text in found:
        for name, labels in re.findall(r"\b(colm_\w+)(?:\{([^}]*)\})?", text):
            family = re.sub(r"_bucket$", "", name)
            assert family in METRICS, f"{name} in {text}"
            assert (family != name) <= ("histogram" in METRICS[family]), text
            chosen = set(re.findall(r"(\w+)[=!]~?\"", labels))
            assert chosen <= METRICS[family] | OF_PROMETHEUS, text
            # Else it is several series, which no ratio finds a partner for.
            assert not METRICS[family] - chosen - KINDS or "sum" in text, text
        grouped = {label.strip() for each in re.findall(r"by \(([^)]*)\)", text) for label in each.split(",")}
        of_metrics = set().union(
            *(METRICS[re.sub(r"_bucket$", "", name)] for name in re.findall(r"colm_\w+", text)), set()
        )
        assert grouped <= of_metrics | OF_PROMETHEUS, text


def test_every_alert_says_what_it_means_and_what_to_do() -> None:
    alerts = ALERTS.split("- alert: ")[1:]
    assert len(alerts) >= 8
    assert [each.split("\n")[0] for each in alerts if "summary:" not in each or "description:" not in each] == []


def test_panels_have_places_and_numbers_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
