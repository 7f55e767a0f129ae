"""The machine room: what it makes of /metrics, and that it moves when there is work."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect
from room_scrapes import FIRST_TOKEN_S, READ_BYTES_PER_S, STALL_SHARE, TOKENS_PER_S, scrape
from served_model import Served
from web_chat import Watch

from dist_infer import LLM, SamplingParams

pytestmark = pytest.mark.slow
_FIGURES = """([before, after, seconds]) =>
    Promise.all([import("./web/prometheus.js"), import("./web/room_figures.js")])
        .then(([{ Scrape }, { roomFigures }]) =>
        roomFigures(new Scrape(before, 0), new Scrape(after, seconds)))"""


@pytest.fixture
def plain(open_page: Callable[..., Page], served: Served) -> Page:
    return open_page(served.url)


def tile(page: Page, title: str) -> Any:
    return page.locator(".tile").filter(has_text=title).locator(".big")


def test_figures(plain: Page) -> None:
    """Guards the arithmetic: rates and shares of an interval, sums, a median from buckets, order of ranks."""
    found = plain.evaluate(_FIGURES, [scrape(100), scrape(131.416), 31.416])  # a whole wave of tokens
    assert found["outRate"] == pytest.approx(TOKENS_PER_S, rel=0.01)
    assert found["inRate"] == pytest.approx(410, rel=0.001)
    assert found["firstToken"] == pytest.approx(0.375)
    assert abs(found["firstToken"] - FIRST_TOKEN_S) < 0.125  # half of its bucket
    assert (found["phase"], found["refused"], found["waiting"]) == ("ready", 5, 3)
    assert [stage["boundBy"] for stage in found["stages"]] == ["compute", "disk"]
    ranks = [rank for stage in found["stages"] for rank in stage["ranks"]]
    assert [rank["rank"] for rank in ranks] == ["0", "1", "2", "3"]
    assert [rank["readRate"] for rank in ranks] == pytest.approx(READ_BYTES_PER_S)
    assert [rank["stall"] for rank in ranks] == pytest.approx(STALL_SHARE)
    assert ranks[0]["bytes"] == {"device": 14e9, "host": 6e9, "nvme": 15e9, "rows": 0}


def test_a_server_that_began_anew(plain: Page) -> None:
    """Guards against a negative rate, and a median of what is no more, after a restart."""
    found = plain.evaluate(_FIGURES, [scrape(500), scrape(2), 5])
    assert found["outRate"] is None
    assert found["firstToken"] is None
    assert all(rank["readRate"] is None for stage in found["stages"] for rank in stage["ranks"])


def test_text_of_a_scrape(plain: Page) -> None:
    """Guards the parser: escapes in labels, infinities, times at the end, lines that are none."""
    text = 'a{x="q\\"}\\\\\\n,",y="2"} 1.5 1700000000\n# TYPE a gauge\nb +Inf\nnot a line }{\nc NaN\na{x="z"} 2e3\n\n'
    found = plain.evaluate(
        """(text) => import("./web/prometheus.js").then(({ Scrape }) => {
            const made = new Scrape(text, 0);
            return [made.series("a"), made.value("a"), made.value("a", {x: "z"}), made.value("b") === Infinity,
                    made.value("c"), made.value("nothing")];
        })""",
        text,
    )
    assert found[0][0] == {"name": "a", "labels": {"x": 'q"}\\\n,', "y": "2"}, "value": 1.5}
    assert found[1:] == [2001.5, 2000, True, None, None]


def test_drawing(open_page: Callable[..., Page], served: Served) -> None:
    """Guards the view: every stage and rank with its figures, as a drawing and as a table."""
    page = open_page(served.url, "chat")
    seconds = [100.0]

    def answer(route: Route) -> None:
        seconds[0] += 1
        route.fulfill(body=scrape(seconds[0]), content_type="text/plain")

    page.route("**/metrics", answer)
    page.get_by_role("link", name="Machine room").click()
    expect(page.get_by_text("2 stages × 2 tensor ranks, ray executor")).to_be_visible()
    drawing = page.get_by_role("img", name=re.compile("2 stages with 4 ranks"))
    expect(drawing).to_be_visible()
    for words in ("Stage 0", "bound by compute", "bound by disk", "Rank 3 · cuda", "waited for weights 58 %"):
        expect(drawing).to_contain_text(words)
    expect(drawing.locator("rect.nvme")).to_have_count(4)
    expect(drawing.locator("rect.stall")).to_have_count(4)
    expect(drawing).to_contain_text(re.compile(r"\d\.\d\d GB/s"))
    page.get_by_text("Every figure as a table").click()
    table = page.get_by_role("table")
    expect(table.get_by_role("row")).to_have_count(5)
    expect(table.get_by_role("row").nth(3)).to_contain_text("node-1")
    expect(page.get_by_role("columnheader", name="On NVMe")).to_be_visible()
    page.set_viewport_size({"width": 360, "height": 740})
    expect(drawing).to_have_attribute("width", re.compile(r"^3[0-4]\d$"))


def test_it_moves(open_page: Callable[..., Page], served: Served, llm: LLM) -> None:
    """Guards the whole way, from the engine's counts over the real /metrics to the page."""
    page = open_page(served.url, "room")
    expect(tile(page, "Requests")).to_have_text("0 running")
    expect(page.get_by_role("img", name=re.compile("2 stages with 2 ranks"))).to_be_visible()
    params = SamplingParams(max_tokens=3000, temperature=0, ignore_eos=True)
    request = llm.submit("Hello", llm.encode("Hello"), params, lambda event: None)
    try:
        expect(tile(page, "Requests")).to_have_text("1 running")
        expect(tile(page, "KV cache")).not_to_have_text("0 %")
        expect(tile(page, "Output")).to_have_text(re.compile(r"^\d.* tok/s$"))
        expect(page.locator(".drawing")).to_contain_text(re.compile(r"waited for weights \d+ %"))
    finally:
        llm.abort(request)
    expect(tile(page, "Requests")).to_have_text("0 running")


def test_unreachable(open_page: Callable[..., Page], serve: Callable[..., Served], watch: Watch) -> None:
    """Guards the view of a server that has gone: it says so, and keeps what it last knew."""
    watch.expected += ["ERR_"]
    served = serve()
    page = open_page(served.url, "room")
    expect(page.locator(".tile")).to_have_count(6)
    served.run(served.server.stop())
    expect(page.locator("#room-error")).to_contain_text("The server cannot be reached.")
    expect(page.locator(".tile")).to_have_count(6)
