"""What a model may write: shown as it should look, and never more than text."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect
from served_model import Served
from web_chat import answers, ask, script, text_of_answers, texts, wait_for_end

pytestmark = pytest.mark.slow
# the tree of an element as [tag, children...]; texts as they are
_TREE = """(text) => import("./web/markdown.js").then(({ Markdown }) => {
    const made = new Markdown(() => {});
    made.show(text);
    const tree = (node) => node.nodeType === 3 ? node.data :
        [node.tagName.toLowerCase(), ...[...node.childNodes].map(tree)];
    return [...made.node.childNodes].map(tree);
})"""
_ATTACKS = """<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 1">

[a](javascript:window.hacked=1) [b](JaVaScRiPt:window.hacked=1) [c](data:text/html,<script>1</script>)
[d]( javascript:window.hacked=1 ) [e](java\tscript:window.hacked=1) [f](vbscript:x) [g](/v1/models)
![picture](https://elsewhere.example/x.png) [h](https://elsewhere.example/" onmouseover="window.hacked=1)

```html"><script>window.hacked = 1</script>
</code></pre><script>window.hacked = 1</script>
```

| <b>x</b> | <iframe src="https://elsewhere.example"> |
|-|-|
| <svg onload=window.hacked=1> | y |
"""


@pytest.fixture(scope="module")
def plain(browser: Any, served: Served) -> Any:
    """A page whose modules are called directly."""
    page = browser.new_page()
    page.goto(served.url)
    yield page
    page.close()


@pytest.mark.parametrize(
    ("text", "tree"),
    [
        ("a **b** _c_ `d*e*` ~~f~~", [["p", "a ", ["strong", "b"], " ", ["em", "c"], " ", ["code", "d*e*"], " ",
                                      ["s", "f"]]]),
        ("2 * 3 * 4 and snake_case_name and **open", [["p", "2 * 3 * 4 and snake_case_name and **open"]]),
        (r"\*not\* `` a`b ``", [["p", "*not* ", ["code", " a`b "]]]),
        ("# One #\n## Two", [["h3", "One"], ["h4", "Two"]]),
        ("a\nb\n\nc", [["p", "a\nb"], ["p", "c"]]),
        ("- a\n- b\n  - c\n- d", [["ul", ["li", "a"], ["li", "b", ["ul", ["li", "c"]]], ["li", "d"]]]),
        ("3. a\n4. b", [["ol", ["li", "a"], ["li", "b"]]]),
        ("1. a\n\n2. b\n\nend", [["ol", ["li", "a"], ["li", "b"]], ["p", "end"]]),
        ("> a\n> - b", [["blockquote", ["p", "a"], ["ul", ["li", "b"]]]]),
        ("a\n\n---\n\n* * *", [["p", "a"], ["hr"], ["hr"]]),
        ("|a|b|\n|-|:-:|\n|1|**2**|\n|3|", [["div", ["table", ["thead", ["tr", ["th", "a"], ["th", "b"]]],
            ["tbody", ["tr", ["td", "1"], ["td", ["strong", "2"]]], ["tr", ["td", "3"], ["td"]]]]]]),
        ("[x](https://a.example/) [y](relative)", [["p", ["a", "x"], " [y](relative)"]]),
        ("see https://a.example/x.", [["p", "see ", ["a", "https://a.example/x"], "."]]),
        ("~~~js\na < b\n\nc", [["figure", ["figcaption", ["span", "js"], ["button", "Copy"]],
                               ["pre", ["code", "a < b\n\nc"]]]]),
        ("", []),
        ("&amp; <b>x</b>", [["p", "&amp; <b>x</b>"]]),
        ("привет **мир** 你好 👍", [["p", "привет ", ["strong", "мир"], " 你好 👍"]]),
    ],
)  # fmt: skip
def test_markdown(plain: Page, text: str, tree: list[Any]) -> None:
    """Guards each construct, and what only looks like one."""
    assert plain.evaluate(_TREE, text) == tree


@pytest.mark.parametrize(
    "text", ["*" * 20000, "`" * 20000, "[" * 20000, "_a" * 10000, "> " * 5000, "- " * 5000, "**a *b " * 3000,
             "[a](" * 5000, "|" * 20000 + "\n" + "|-" * 10000, "`a``b" * 4000, "![" * 9000, "https://" * 3000]
)  # fmt: skip
def test_no_text_is_slow(plain: Page, text: str) -> None:
    """Guards against text that takes the page minutes: the test's own deadline is what ends it."""
    plain.set_default_timeout(15_000)
    assert plain.evaluate(_TREE, text)


def test_growing_text_is_the_whole_text(plain: Page) -> None:
    """Guards drawing only what changed: after every piece the page is as if it had been drawn at once."""
    text = "# T\n\na **b**\n\n- x\n- y\n\n```py\ncode\n```\n\n|a|b|\n|-|-|\n|1|2|\n\nend"
    same = plain.evaluate(
        """(text) => import("./web/markdown.js").then(({ Markdown }) => {
            const growing = new Markdown(() => {});
            for (let end = 0; end <= text.length; end += 1) {
                growing.show(text.slice(0, end));
                const whole = new Markdown(() => {});
                whole.show(text.slice(0, end));
                if (!growing.node.isEqualNode(whole.node)) return end;
            }
            return -1;
        })""",
        text,
    )
    assert same == -1


def test_text_stays_text(open_page: Callable[..., Page], served: Served) -> None:
    """Guards against a model, or whoever writes its prompt, that acts in the user's browser."""
    page = open_page(served.url)
    pieces = [_ATTACKS[start : start + 7] for start in range(0, len(_ATTACKS), 7)]
    calls = [{"index": 0, "id": "c", "function": {"name": "<img src=x onerror=hacked=1>", "arguments": _ATTACKS}}]
    script(page, [*texts(*pieces), {"reasoning_content": _ATTACKS}, {"tool_calls": calls}])
    ask(page, _ATTACKS)
    wait_for_end(page)
    page.get_by_text("Reasoning", exact=True).click()
    assert page.evaluate("window.hacked") is None
    for tag in ("script", "img", "iframe", "svg", "b"):
        assert page.locator(f"#messages {tag}").count() == 0, tag
    targets = page.locator("#messages a").evaluate_all("links => links.map((link) => link.href)")
    assert set(targets) == {
        "https://elsewhere.example/",  # a bare address in the table
        "https://elsewhere.example/x.png",
        "https://elsewhere.example/%22%20onmouseover=%22window.hacked=1",
    }
    relations = page.locator("#messages a").evaluate_all("links => links.map((link) => link.rel)")
    assert all("noopener" in relation for relation in relations)
    expect(text_of_answers(page)).to_contain_text("<script>window.hacked = 1</script>")
    expect(answers(page)).to_contain_text("[a](javascript:window.hacked=1)")
    assert json.loads(page.evaluate("sessionStorage['dist-infer.conversation']"))[1]["content"] == _ATTACKS
