"""Templates write what transformers would, and can neither get out, nor take all time or memory, nor stay behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from dist_infer.chat_messages import make_conversation
from dist_infer.chat_template import RenderLimits, TemplateRenderer
from dist_infer.errors import ClusterError, ConfigError

TEMPLATES = Path(__file__).parent.parent / "data" / "templates"
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Wetter für <Stadt> & Tag",
        "parameters": {
            "type": "object",
            "properties": {"days": {"type": "array", "items": {"type": "integer"}}, "city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
CALL = {
    "type": "function",
    "id": "abcdefghi",
    "function": {"name": "weather", "arguments": {"city": "Zürich", "days": [1, 2]}},
}
USER, ANSWER = {"role": "user", "content": " How is it in Zürich? 你好 😀 "}, {"role": "assistant", "content": "Fine."}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "one": {"messages": [USER]},
    "system": {"messages": [{"role": "system", "content": "Be <brief> & 'kind'."}, USER, ANSWER, USER]},
    "tools": {
        "messages": [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": '{"sky": "blue"}', "name": "weather", "tool_call_id": "abcdefghi"},
            {"role": "assistant", "content": "<think>hm</think>Blue."},
            USER,
        ],
        "tools": [WEATHER],
    },
    "documents": {"messages": [USER], "documents": [{"title": "Öl", "text": "line\nline"}, {"title": "b", "text": ""}]},
    "reasoning": {"messages": [USER, {**ANSWER, "reasoning": "It says so."}]},
}


@pytest.fixture(scope="module")
def renderer() -> Iterator[TemplateRenderer]:
    with TemplateRenderer(RenderLimits(timeout_s=2.0, max_memory_bytes=128 << 20)) as made:
        yield made


def render(
    renderer: TemplateRenderer,
    template: str,
    *,
    messages: Any = (USER,),
    tools: Any = None,
    documents: Any = None,
    **flags: bool,
) -> str:
    return renderer.render(template, make_conversation(messages, tools, documents), variables=SPECIAL, **flags)


def reference(template: str, *, messages: Any, tools: Any = None, documents: Any = None, **flags: bool) -> str:
    """What transformers' own tokenizers write, in this process."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({})), **SPECIAL)
    text = tokenizer.apply_chat_template(
        messages, tools=tools, documents=documents, chat_template=template, tokenize=False, **flags
    )
    assert isinstance(text, str)
    return text


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


# ---- the same text


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
@pytest.mark.parametrize("mode", ["answer", "as it is", "continue"])
def test_templates_write_what_transformers_writes(
    renderer: TemplateRenderer, name: str, conversation: str, mode: str
) -> None:
    template = (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")
    given = CONVERSATIONS[conversation]
    if mode == "continue":
        asked = [*given["messages"]] if given["messages"][-1]["role"] == "user" else given["messages"][:-1]
        given = {**given, "messages": [*asked, {"role": "assistant", "content": "The sky is "}]}
    flags = {"add_generation_prompt": mode == "answer", "continue_final_message": mode == "continue"}
    text = render(renderer, template, **given, **flags)
    assert text == reference(template, **given, **flags)
    assert "Zürich" in text
    assert ("Öl" in text) == (conversation == "documents" and name == "hermes")
    assert ("Wetter für <Stadt> &" in text) == (conversation == "tools" and name != "deepseek")
    assert mode != "continue" or text.rstrip().endswith("The sky is")


def test_every_date_is_todays(renderer: TemplateRenderer) -> None:
    template = "{{ strftime_now('%Y %B') }}"
    assert render(renderer, template) == reference(template, messages=[USER])


def test_texts_come_through_unchanged(renderer: TemplateRenderer) -> None:
    """Whatever JSON lines and pipes could do to them: line ends, nulls, half of a pair, a megabyte."""
    for content in ("a\nb\r\n\0\x1f\u2028\x85", "half \ud800", '"\\', "é" * 500_000):
        assert render(renderer, "{{ messages[0].content }}", messages=[{"role": "user", "content": content}]) == content


# ---- what a template may not do


def test_what_a_template_raises_is_what_people_read(renderer: TemplateRenderer) -> None:
    with pytest.raises(ConfigError, match="refuses these messages: after the system message user and assistant"):
        render(renderer, (TEMPLATES / "mistral.jinja").read_text(encoding="utf-8"), messages=[USER, USER])
    with pytest.raises(ConfigError, match=r"fails on these messages \(TemplateSyntaxError: "):
        render(renderer, "{% for")
    with pytest.raises(ConfigError, match=r"fails on these messages \(UndefinedError: "):
        render(renderer, "{{ messages[0].nothing.more }}")
    assert render(renderer, PLAIN)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ lipsum.__globals__['os'].system('true') }}",
        "{{ cycler.__init__.__globals__.os }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace(__class__=1) %}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_the_sandbox_holds(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(ConfigError, match="fails on these messages"):
        render(renderer, template)
    assert render(renderer, "{{ '{0.__class__}'.format(messages) }}") == ""


def test_an_endless_template_is_ended_and_the_next_request_works() -> None:
    before = children()
    with TemplateRenderer(RenderLimits(timeout_s=0.3)) as renderer:
        assert render(renderer, PLAIN)
        (first,) = children() - before
        for template in (ENDLESS, "{{ 7 ** (10 ** 9) }}"):  # the second never comes back to Python
            with pytest.raises(ConfigError, match=r"took longer than 0\.3 s and was ended"):
                render(renderer, template)
        assert not first.is_running()
        assert render(renderer, PLAIN) == render(renderer, PLAIN)


@pytest.mark.parametrize(
    "template",
    [
        "{{ 'a' * 10 ** 10 }}",
        "{% set ns = namespace(x='abc') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% for i in range(99999) %}{{ messages[0].content * 99999 }}{% endfor %}",
        "{% set x = [] %}{% for i in range(9) %}{{ range(99999) | list | string * 999 }}{% endfor %}",
    ],
)
def test_a_memory_bomb_is_refused_and_the_next_request_works(renderer: TemplateRenderer, template: str) -> None:
    with pytest.raises(ConfigError, match=r"took (more than the 128 MiB of memory|longer)"):
        render(renderer, template)
    assert render(renderer, PLAIN)


def test_too_much_text_is_refused_with_the_numbers() -> None:
    with TemplateRenderer(RenderLimits(max_text_bytes=1000, max_input_bytes=2000)) as renderer:
        assert len(render(renderer, "{{ 'é' * 500 }}")) == 500
        with pytest.raises(ConfigError, match="gives 1002 bytes of text, more than the 1000"):
            render(renderer, "{{ 'é' * 501 }}")
        with pytest.raises(ConfigError, match=r"are \d+ bytes together, more than the 2000"):
            render(renderer, PLAIN, messages=[{"role": "user", "content": "x" * 3000}])
        assert render(renderer, PLAIN)


# ---- the process


def test_a_killed_process_is_replaced() -> None:
    before = children()
    with TemplateRenderer() as renderer:
        assert render(renderer, PLAIN)
        (process,) = children() - before
        process.kill()
        psutil.wait_procs([process], timeout=10)
        assert render(renderer, PLAIN)


def test_nothing_is_started_before_it_is_needed_and_nothing_stays() -> None:
    before, files = children(), psutil.Process().num_fds()
    renderer = TemplateRenderer()
    assert children() == before
    render(renderer, PLAIN)
    assert len(children() - before) == 1
    renderer.close()
    renderer.close()
    assert children() == before
    assert psutil.Process().num_fds() == files
    with pytest.raises(ClusterError, match="closed"):
        render(renderer, PLAIN)


def test_closing_ends_a_rendering_in_another_thread() -> None:
    """Otherwise closing the engine would wait for the deadline of every template that is queued."""
    before = children()
    renderer = TemplateRenderer(RenderLimits(timeout_s=60.0))
    with ThreadPoolExecutor(2) as pool:
        assert render(renderer, PLAIN)
        (process,) = children() - before
        process.suspend()
        waiting = [pool.submit(render, renderer, PLAIN) for _ in range(2)]
        renderer.close()
        for future in waiting:
            with pytest.raises(ClusterError, match="closed"):
                future.result(timeout=30)
    assert children() == before


def test_without_an_owner_an_endless_template_ends_too() -> None:
    """An owner that was killed can kill nobody: the kernel's alarm does."""
    limits = {**asdict(RenderLimits()), "timeout_s": 0.1}
    request = {"template": ENDLESS, "messages": [USER], "tools": None, "documents": None, "variables": {}}
    request |= {"add_generation_prompt": True, "continue_final_message": False}
    process = subprocess.Popen(
        [sys.executable, "-m", "dist_infer.template_process", json.dumps(limits)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.close()
        assert process.wait(30) == -signal.SIGALRM


def test_threads_get_their_own_answers(renderer: TemplateRenderer) -> None:
    def ask(number: int) -> str:
        return render(renderer, PLAIN, messages=[{"role": "user", "content": f"{number}" * 2000}])

    with ThreadPoolExecutor(8) as pool:
        for number, text in enumerate(pool.map(ask, range(40))):
            assert text == "user: " + f"{number}" * 2000 + "\n"


def test_an_interrupted_rendering_is_nobody_elses_answer() -> None:
    """Ctrl-C while it waits: the late answer must not be given to the next request."""
    before = children()
    with TemplateRenderer() as renderer:
        assert render(renderer, PLAIN)
        (process,) = children() - before
        process.suspend()
        timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            render(renderer, "late")
        timer.join()
        assert render(renderer, "{{ 'next' }}") == "next"


def test_it_sees_none_of_this_processs_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "secret")
    before = children()
    with TemplateRenderer() as renderer:
        render(renderer, PLAIN)
        (process,) = children() - before
        assert "A_TOKEN" not in process.environ()


# ---- messages


def test_parts_of_text_are_joined_and_nones_left_out() -> None:
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    (call,) = make_conversation([{"role": "assistant", "content": None, "tool_calls": [CALL]}]).messages
    assert call == {"role": "assistant", "content": None, "tool_calls": [CALL]}  # some templates ask whether it is none
    made = make_conversation([{"role": "user", "content": parts, "name": None}])
    assert made.messages == [{"role": "user", "content": "a b"}]
    assert (made.tools, made.documents) == (None, None)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"messages": "Hello"}, "messages must be a list"),
        ({"messages": []}, "1 to 65536 messages, not 0"),
        ({"messages": ["Hello"]}, r"messages\[0\] must be an object with role and content, not 'Hello'"),
        ({"messages": [USER, {"role": "user"}]}, r"messages\[1\] has no content"),
        ({"messages": [{"content": "a"}]}, r"messages\[0\]\.role must be a text"),
        ({"messages": [{"role": "user", "contnt": "a"}]}, "unknown key 'contnt'; did you mean `content`"),
        ({"messages": [{"role": "user", "content": 5}]}, r"messages\[0\]\.content must be a text or a list"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "only text can be given"),
        ({"messages": [{"role": "user", "content": "a", "name": 5}]}, r"messages\[0\]\.name must be a text"),
        ({"messages": [{"role": "assistant", "tool_calls": ["a"]}]}, r"tool_calls\[0\] must be a JSON object"),
        ({"messages": [USER], "tools": [len]}, r"tools\[0\] must be a JSON object.*JSON Schema"),
        ({"messages": [USER], "tools": {"a": 1}}, "tools must be a list of JSON objects"),
        ({"messages": [USER], "tools": [{"a": {1, 2}}]}, "tools: only what JSON can say"),
        ({"messages": [USER], "documents": [{"a": float("nan")}]}, "documents: only what JSON can say"),
        ({"messages": [USER], "documents": [{}] * 5000}, "documents has 5000 entries, more than the 4096"),
    ],
)
def test_other_messages_are_refused_with_their_place(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_conversation(**given)
