"""Every query of the dashboard and of the documented alerts asks for something that a real scrape has."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql
import pytest
import yaml

from dist_infer.metrics.scraped import read_scrape

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = json.loads((ROOT / "docs" / "grafana" / "dist-infer.json").read_text(encoding="utf-8"))
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
OF_PROMETHEUS = {"job", "instance"}  # labels that a scrape gets from who scrapes


def targets() -> Iterator[tuple[str, str]]:
    """(query, legend) of every panel."""
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"], target["legendFormat"]


def alerts() -> list[dict[str, Any]]:
    blocks = re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (found,) = [block for block in map(yaml.safe_load, blocks) if "groups" in block]
    return [rule for group in found["groups"] for rule in group["rules"]]


def labels_of(scrape: str) -> dict[str, set[str]]:
    samples = read_scrape(scrape, 0.0).samples
    return {name: {label for labels, _ in found for label in labels} for name, found in samples.items()}


def check(expr: str, legend: str, known: dict[str, set[str]]) -> None:
    query = promql.parse(expr)
    for name, labels, _ in query.selectors:
        assert name in known, f"{name} is in no scrape"
        assert labels <= known[name] | OF_PROMETHEUS, (name, labels)
    for labels, names in query.groupings:
        assert all(labels <= known[name] | OF_PROMETHEUS for name in names), expr
    wanted = set(re.findall(r"\{\{(\w+)\}\}", legend))
    if query.groupings and not expr.startswith(("time", "rate")):
        assert wanted <= query.groupings[-1][0], f"{legend} of {expr}: summed away"
    elif query.selectors:
        assert wanted <= known[query.selectors[0][0]] | OF_PROMETHEUS, (expr, legend)


def test_every_query_of_the_dashboard_finds_something(scrape: str) -> None:
    """Guards the dashboard against a metric or a label that was renamed, and against broken PromQL."""
    known = labels_of(scrape)
    for expr, legend in targets():
        check(expr, legend, known)


def test_the_dashboard_shows_every_metric(scrape: str) -> None:
    """Guards a new metric against being forgotten there."""
    shown = {name for expr, _ in targets() for name, _, _ in promql.parse(expr).selectors}
    families = {re.sub(r"_(bucket|sum|count)$", "_bucket", name) for name in labels_of(scrape)}
    assert families - shown == set()


def test_every_alert_finds_something(scrape: str) -> None:
    """Guards what people copy from the page."""
    rules = alerts()
    assert len(rules) >= 4
    for rule in rules:
        check(rule["expr"], "", labels_of(scrape))


def test_panels_have_ids_places_and_a_data_source() -> None:
    """Guards the import: Grafana refuses doubled ids and draws overlapping panels over each other."""
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    covered: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + column, place["y"] + line) for column in range(place["w"]) for line in range(place["h"])}
        assert place["x"] + place["w"] <= 24
        assert not cells & covered, panel["title"]
        covered |= cells
        assert panel["type"] == "row" or panel["datasource"]["uid"] == "${datasource}"
    variables = {each["name"] for each in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$(\w+)", " ".join(expr for expr, _ in targets()))) - {"__rate_interval"}
    assert used <= variables


@pytest.mark.parametrize("expr", ["sum(rate(a[5m])", "rate(a)", "a{b=c}", "sum by (x) a", "a[5m", "nope(a)", ""])
def test_the_parser_refuses(expr: str) -> None:
    """Guards the tests above: a parser that takes everything proves nothing."""
    with pytest.raises(AssertionError):
        promql.parse(expr)
