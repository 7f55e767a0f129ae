"""The chat as a user has it: write, read, stop, go on, come back; and what is said when something is wrong."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect
from served_model import Served, assert_idle, wait_until
from web_chat import Watch, answers, ask, prompt, script, text_of_answers, texts, wait_for_end, wait_for_requests

from dist_infer import LLM
from dist_infer.openai.keys import ApiKey

pytestmark = pytest.mark.slow
KEY = "sk-0123456789abcdef"
# the name of what has the focus, nothing for the page itself, and how its focus is drawn
_FOCUSED = """() => {
    const at = document.activeElement;
    if (at === document.body) return ["", ""];
    return [at.id || at.name || at.textContent, getComputedStyle(at).outlineStyle];
}"""
ALICE = ApiKey(name="alice", sha256=hashlib.sha256(KEY.encode()).hexdigest())


def test_type_and_stream(page: Page) -> None:
    """Guards the first thing anybody does: the real server's answer, with its figures."""
    ask(page, "Hello!", temperature="0", max_tokens="24")
    wait_for_end(page)
    expect(page.locator(".message.user .plain")).to_have_text("Hello!")
    assert text_of_answers(page).inner_text().strip()
    figures = answers(page).locator(".figures")
    expect(figures).to_contain_text(re.compile(r"24 tokens · prompt \d+ · first token .* · .* tok/s"))
    expect(page.locator("#announcer")).to_have_text("The answer is complete: 24 tokens.")
    expect(prompt(page)).to_be_focused()


def test_it_is_shown_before_it_is_complete(page: Page, served: Served, llm: LLM) -> None:
    """Guards the stream against a page that waits for the end, and Stop against blocks that stay in use."""
    ask(page, "Tell me all.", temperature="0", max_tokens="3000")
    expect(text_of_answers(page)).not_to_be_empty()
    assert llm.stats.num_running == 1
    page.get_by_role("button", name="Stop").click()
    wait_for_end(page)
    assert_idle(llm)
    expect(answers(page).locator(".figures")).to_contain_text("stopped")
    before = text_of_answers(page).inner_text()
    page.reload()
    expect(answers(page).locator(".figures")).to_contain_text("stopped")
    assert text_of_answers(page).inner_text() == before


def test_escape_stops(page: Page, llm: LLM) -> None:
    """Guards the keyboard's way to stop, wherever the focus is."""
    ask(page, "Tell me all.", temperature="0", max_tokens="3000")
    wait_until(lambda: llm.stats.num_running == 1)
    page.keyboard.press("Escape")
    wait_for_end(page)
    expect(answers(page).locator(".figures")).to_contain_text("stopped")
    assert_idle(llm)


def test_reload_keeps_conversation_and_settings(page: Page) -> None:
    """Guards what is kept in the tab, and that a new chat forgets it."""
    page.get_by_label("System prompt").fill("Be brief.")
    ask(page, "One", max_tokens="4")
    wait_for_end(page)
    page.reload()
    expect(page.locator(".message.user .plain")).to_have_text("One")
    expect(page.get_by_label("System prompt")).to_have_value("Be brief.")
    page.get_by_role("button", name="New chat").click()
    expect(page.locator(".message")).to_have_count(0)
    page.reload()
    expect(page.get_by_role("heading", name="Ask the model something.")).to_be_visible()


def test_what_is_sent(page: Page) -> None:
    """Guards every control: its value reaches the server under its name, and an empty one does not."""
    sent = script(page, texts("Yes."))
    values = {
        "System prompt": "Be brief.", "Temperature": "0.5", "Max tokens": "9", "Top p": "0.9", "Top k": "40",
        "Min p": "0.05", "Seed": "7", "Presence penalty": "0.1", "Frequency penalty": "-0.2",
        "Repetition penalty": "1.1", "Stop at": "END\n\\n\\n",
        "Tools": '[{"type": "function", "function": {"name": "add"}}]',
    }  # fmt: skip
    for name, value in values.items():
        page.get_by_label(name, exact=True).fill(value)
    ask(page, "Hello")
    wait_for_end(page)
    page.get_by_role("button", name="Reset all").click()
    ask(page, "Again")
    expect(answers(page)).to_have_count(2)
    wait_for_end(page)
    assert sent[0] == {
        "model": "tiny", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
        "temperature": 0.5, "max_tokens": 9, "top_p": 0.9, "top_k": 40, "min_p": 0.05, "seed": 7,
        "presence_penalty": 0.1, "frequency_penalty": -0.2, "repetition_penalty": 1.1, "stop": ["END", "\n\n"],
        "tools": [{"type": "function", "function": {"name": "add"}}],
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    roles = [(message["role"], message["content"]) for message in sent[1]["messages"]]
    assert roles == [("user", "Hello"), ("assistant", "Yes."), ("user", "Again")]
    assert set(sent[1]) == {"model", "messages", "stream", "stream_options"}


def test_regenerate_and_edit(page: Page) -> None:
    """Guards against an answer, or a message, that stays in the conversation it was taken out of."""
    sent = script(page, texts("Yes."))
    ask(page, "One")
    wait_for_end(page)
    page.get_by_role("button", name="Regenerate the answer").click()
    wait_for_requests(page, sent, 2)
    wait_for_end(page)
    page.get_by_role("button", name="Edit this message").click()
    expect(prompt(page)).to_have_value("One")
    expect(page.get_by_text("Editing your last message")).to_be_visible()
    page.keyboard.press("Escape")
    expect(prompt(page)).to_have_value("")
    page.get_by_role("button", name="Edit this message").click()
    ask(page, "Two")
    wait_for_requests(page, sent, 3)
    wait_for_end(page)
    assert [body["messages"] for body in sent[1:]] == [
        [{"role": "user", "content": "One"}],
        [{"role": "user", "content": "Two"}],
    ]
    expect(page.locator(".message")).to_have_count(2)


def test_copy(open_page: Callable[..., Page], served: Served) -> None:
    """Guards both copy buttons: the answer as the model wrote it, the code without its fence."""
    page = open_page(served.url, permissions=["clipboard-read", "clipboard-write"])
    script(page, texts("Look:\n\n```python\nprint(1)\n```\n"))
    ask(page, "Code, please")
    wait_for_end(page)
    for name, text in (
        ("Copy this python code", "print(1)"),
        ("Copy the answer", "Look:\n\n```python\nprint(1)\n```\n"),
    ):
        page.get_by_role("button", name=name).click()
        expect(page.get_by_role("button", name=name)).to_have_text("Copied")
        assert page.evaluate("navigator.clipboard.readText()") == text


def test_reasoning_and_tool_calls(page: Page) -> None:
    """Guards what is no text: thought in a block of its own, calls in pieces, their results under their ids."""
    sent = script(
        page,
        [
            {"reasoning_content": "The user wants "},
            {"reasoning_content": "weather."},
            {"tool_calls": [{"index": 0, "id": "call_1", "function": {"name": "weather", "arguments": '{"city":'}}]},
            {"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}]},
        ],
        finish="tool_calls",
    )
    ask(page, "Weather?")
    wait_for_end(page)
    thought = page.get_by_text("The user wants weather.")
    expect(thought).to_be_hidden()
    page.get_by_text("Reasoning", exact=True).click()
    expect(thought).to_be_visible()
    expect(page.get_by_label("Arguments of weather")).to_have_text('{\n  "city": "Paris"\n}')
    page.get_by_label("Result of weather").fill("rain")
    page.get_by_role("button", name="Send results").click()
    wait_for_requests(page, sent, 2)
    call, result = sent[1]["messages"][1:]
    assert call["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city":"Paris"}'}
    assert result == {"role": "tool", "tool_call_id": "call_1", "content": "rain"}


def test_keys(open_page: Callable[..., Page], serve: Callable[..., Served], watch: Watch) -> None:
    """Guards the way to a server with keys: it asks, says when a key is wrong, keeps a right one in this tab."""
    watch.expected.append("401")
    page = open_page(serve(keys=(ALICE,)).url)
    field = page.get_by_label("Key", exact=True)
    dialog = page.get_by_role("dialog", name="API key")
    expect(dialog).to_contain_text("an API key is needed")
    field.fill("sk-wrong-wrong-wrong")
    field.press("Enter")
    expect(dialog).to_contain_text("this API key is not known")
    field.fill(KEY)
    page.get_by_role("button", name="Use this key").click()
    expect(page.locator("#model")).to_have_text("tiny")
    ask(page, "Hello", max_tokens="4")
    wait_for_end(page)
    assert page.evaluate("JSON.stringify(localStorage)").find(KEY) == -1
    assert KEY in page.evaluate("Object.values(sessionStorage)")
    page.get_by_role("button", name="Key").click()
    page.get_by_role("button", name="Forget it").click()
    expect(dialog).to_contain_text("an API key is needed")
    assert KEY not in page.evaluate("JSON.stringify(sessionStorage)")


def test_a_refused_key_in_a_chat(page: Page, watch: Watch) -> None:
    """Guards against a 401 that leaves the user with nothing to press."""
    watch.expected.append("401")
    body = '{"error": {"message": "this API key is not known", "code": "invalid_api_key"}}'
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=401, body=body))
    ask(page, "Hello")
    expect(answers(page)).to_contain_text("Enter an API key that this server knows.")
    page.unroute("**/v1/chat/completions")
    script(page, texts("Yes."))
    page.get_by_role("button", name="Enter a key").click()
    page.get_by_label("Key", exact=True).fill(KEY)
    page.get_by_role("button", name="Use this key").click()
    expect(text_of_answers(page)).to_have_text("Yes.")


def test_the_server_refuses(page: Page, watch: Watch) -> None:
    """Guards a 400's words: what is wrong, and where to change it. The message can be sent again."""
    watch.expected.append("400")
    ask(page, "Hello", max_tokens="999999")
    expect(answers(page)).to_contain_text("Lower “Max tokens” in the settings")
    page.get_by_label("Max tokens").fill("4")
    page.get_by_role("button", name="Regenerate the answer").click()
    expect(answers(page).locator(".figures")).to_contain_text("4 tokens")


def test_a_wrong_setting(page: Page) -> None:
    """Guards against a request with what the field itself says cannot be."""
    ask(page, "Hello", temperature="9")
    expect(answers(page)).to_contain_text("Temperature: Value must be less than or equal to 2")
    expect(page.get_by_label("Temperature")).to_be_focused()
    ask(page, "Again", temperature="", tools="no JSON")
    expect(answers(page).last).to_contain_text("Tools must be a JSON list")


def test_the_server_is_gone(open_page: Callable[..., Page], serve: Callable[..., Served], watch: Watch) -> None:
    """Guards an answer that breaks off in its middle, and a server that cannot be reached any more."""
    watch.expected += ["ERR_", "Failed to load"]
    served = serve()
    page = open_page(served.url)
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(
            body='data: {"choices": [{"index": 0, "delta": {"content": "Half an "}}]}\n\n',
            content_type="text/event-stream",
        ),
    )
    ask(page, "Hello")
    expect(answers(page)).to_contain_text("The connection ended before the answer did.")
    expect(answers(page)).to_contain_text("Half an")
    page.unroute_all()
    served.run(served.server.stop())
    page.get_by_role("button", name="Regenerate the answer").click()
    expect(answers(page)).to_contain_text("The server cannot be reached.")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("#phase")).to_have_text("Unreachable")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_disabled()


def test_an_error_in_the_stream(page: Page) -> None:
    """Guards the only way in which a stream can say that it failed."""
    error = '{"error": {"message": "an internal error ended this request", "code": "internal_error"}}'
    page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=f"data: {error}\n\ndata: [DONE]\n\n", content_type="text/event-stream"),
    )
    ask(page, "Hello")
    expect(answers(page)).to_contain_text("an internal error ended this request")


def test_ready_by_itself(open_page: Callable[..., Page], serve: Callable[..., Served], llm: LLM, watch: Watch) -> None:
    """Guards the wait for a model: phase and progress, then a page that can be used without a reload."""
    watch.expected.append("503")
    served = serve(ready=False)
    served.service.note_progress("loading", 3, 12)
    page = open_page(served.url)
    expect(page.get_by_text("The model is not ready yet: loading 3 of 12.")).to_be_visible()
    expect(page.get_by_role("progressbar", name="Loading the model")).to_have_attribute("value", "3")
    prompt(page).fill("Hello")
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_disabled()
    plan = llm.plan
    become = served.service.become_ready
    served.loop.call_soon_threadsafe(
        lambda: become(llm, max_requests=plan.max_requests, max_model_len=plan.max_model_len)
    )
    expect(page.get_by_role("button", name="Send", exact=True)).to_be_enabled()
    ask(page, "Hello", max_tokens="4")
    wait_for_end(page)


def test_an_open_page_costs_nothing(page: Page) -> None:
    """Guards an idle engine against passes for a page that is only open: readiness may ask it for a token."""
    seen: list[str] = []
    page.on("request", lambda request: seen.append(request.url))
    page.reload()
    expect(page.locator("#phase")).to_have_text("Ready")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    wait_until(lambda: page.wait_for_timeout(10) is None and sum("/health" in url for url in seen) == 2)
    assert {url.partition("/health")[2] for url in seen if "/health" in url} == {"/startup"}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours(open_page: Callable[..., Page], served: Served, scheme: str) -> None:
    """Guards the system's choice, the button's, and that this one outlives a reload."""
    page = open_page(served.url, color_scheme=scheme)
    background = "getComputedStyle(document.body).backgroundColor"
    by_scheme = {"light": "rgb(251, 251, 250)", "dark": "rgb(20, 22, 25)"}
    other = "dark" if scheme == "light" else "light"
    assert page.evaluate(background) == by_scheme[scheme]
    page.get_by_role("button", name=f"Use {other} colours").click()
    assert page.evaluate(background) == by_scheme[other]
    page.reload()
    assert page.evaluate(background) == by_scheme[other]
    expect(page.get_by_role("button", name=f"Use {scheme} colours")).to_be_visible()


@pytest.mark.parametrize("view", ["chat", "room"])
def test_phone(open_page: Callable[..., Page], served: Served, view: str) -> None:
    """Guards 360 pixels: nothing to scroll sideways, whatever the model writes, and settings that can be left again."""
    page = open_page(served.url, view, viewport={"width": 360, "height": 740}, has_touch=True)
    if view == "chat":
        wide = f"{'x' * 200}\n\n```\n{'y' * 300}\n```\n\n|a|b|\n|-|-|\n|{'z' * 90}|{'w ' * 90}|\n"
        script(page, texts(wide))
        prompt(page).fill("u" * 200)
        page.get_by_role("button", name="Send", exact=True).tap()
        wait_for_end(page)
        page.get_by_role("button", name="Settings").tap()
        expect(page.get_by_label("System prompt")).to_be_visible()
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        page.get_by_role("button", name="Close").tap()
        expect(page.get_by_label("System prompt")).to_be_hidden()
    else:
        expect(page.locator(".tile")).to_have_count(6)
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    for place in ("#scroller", "#room"):
        assert page.evaluate("(place) => document.querySelector(place).scrollWidth", place) <= 360


def test_keyboard_alone(page: Page) -> None:
    """Guards a whole visit without a mouse: every control in reach, each with a visible focus, Shift+Enter no send."""
    script(page, texts("Yes."))
    expect(page.get_by_role("button", name="Close")).to_be_visible()
    expect(prompt(page)).to_be_focused()
    seen: list[tuple[str, str]] = []
    while len(seen) < 50 and "prompt" not in [name for name, _ in seen]:
        page.keyboard.press("Tab")
        seen.append(page.evaluate(_FOCUSED))
    assert [name for name, outline in seen if outline == "none" and name] == []
    assert [name for name, _ in seen if name] == [
        "settings-close", "system", "temperature", "max_tokens", "top_p", "top_k", "min_p", "seed",
        "presence_penalty", "frequency_penalty", "repetition_penalty", "stop", "tools", "Reset all",
        "Skip to the message field", "to-chat", "to-room", "key-open", "theme", "settings-toggle", "scroller", "prompt",
    ]  # fmt: skip
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("Two")
    page.keyboard.press("Enter")
    wait_for_end(page)
    assert page.locator(".message.user .plain").inner_text() == "One\nTwo"


def test_roles(page: Page) -> None:
    """Guards what a screen reader hears: landmarks, names, and an answer that is announced at its end alone."""
    script(page, texts("Yes."))
    ask(page, "Hello")
    wait_for_end(page)
    for role, name in (
        ("navigation", "Views"), ("region", "Chat"), ("region", "Conversation"), ("complementary", "Settings"),
        ("form", "New message"), ("textbox", "Message"), ("button", "New chat"),
    ):  # fmt: skip
        expect(page.get_by_role(role, name=name, exact=True)).to_be_visible()
    expect(page.get_by_role("main")).to_be_visible()
    expect(page.get_by_role("banner")).to_be_visible()
    expect(page.get_by_role("link", name="Chat")).to_have_attribute("aria-current", "page")
    expect(page.get_by_role("button", name="Settings")).to_have_attribute("aria-expanded", "true")
    assert answers(page).get_attribute("aria-busy") == "false"
    live = page.locator("[aria-live], [role=status], [role=log], [role=alert]")
    assert page.evaluate("document.querySelector('#messages').closest('[aria-live], [role=log]')") is None
    assert live.count() >= 2
