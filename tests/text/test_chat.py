"""Conversations from Python and from files: which template is taken, what becomes token ids, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from demo_model import SMOLLM2
from tokenizer_kinds import make_tokenizer
from typer.testing import CliRunner

from dist_infer import LLM, SamplingParams, load_config
from dist_infer.errors import ConfigError
from dist_infer.prompt_config import ChatPrompt
from dist_infer.prompts_file import MAX_LINE_BYTES, read_prompts
from dist_infer.tokenizer import Tokenizer
from launch.cli import app

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if not loop.last }}{% endfor %}"
    "{% for t in tools or [] %}{{ t.name }}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}"
)
HELLO = [{"role": "user", "content": "Anne"}]
SHORT = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
TOOL = {"name": "Elliot"}


@pytest.fixture(scope="module")
def talkative(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a byte-level tokenizer and TEMPLATE."""
    directory = tmp_path_factory.mktemp("talkative") / "model"
    shutil.copytree(tiny_checkpoint("llama", vocab_size=640), directory)
    make_tokenizer("byte-level", directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return directory


def run_config(path: Path | str, store: Path, **model: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(path), **model},
        "offload": {"store": str(store)},
        "engine": {"kv_memory": "8 MiB", "max_batch_tokens": 64, "max_requests": 2, "max_model_len": 128},
        "cluster": {"device": "cpu"},
    }


@pytest.fixture(scope="module")
def llm(talkative: Path, store_root: Path) -> Iterator[LLM]:
    with LLM(run_config(talkative, store_root)) as made:
        yield made


# ---- LLM.chat


def test_one_conversation_or_several(llm: LLM) -> None:
    (output,) = llm.chat(HELLO, SHORT)
    assert output.prompt == "<s>user: Anne<|im_start|>"
    assert output.prompt_token_ids == llm.encode("<s>user: Anne<|im_start|>")
    assert len(output.outputs[0].token_ids) == 2
    both = llm.chat([HELLO, [*HELLO, *HELLO]], SHORT)
    assert [found.prompt for found in both] == [output.prompt, "<s>user: Anne</s>user: Anne<|im_start|>"]
    assert llm.chat([], SHORT) == []


def test_tools_template_and_flags_reach_the_template(llm: LLM) -> None:
    assert llm.chat_prompt(HELLO, tools=[TOOL])[0] == "<s>user: AnneElliot<|im_start|>"
    assert llm.chat_prompt(HELLO, add_generation_prompt=False)[0] == "<s>user: Anne"
    open_end = [*HELLO, {"role": "assistant", "content": "Sir Wal"}]
    text, ids = llm.chat_prompt(open_end, add_generation_prompt=False, continue_final_message=True)
    assert text == "<s>user: Anne</s>assistant: Sir Wal"
    assert ids == llm.encode(text)
    documents = "{% for d in documents %}{{ d.title }} {% endfor %}"
    assert llm.chat_prompt(HELLO, documents=[{"title": "a"}], chat_template=documents)[0] == "a "
    with pytest.raises(ConfigError, match="give add_generation_prompt=False"):
        llm.chat(open_end, continue_final_message=True)


def test_a_bad_conversation_is_refused_by_its_number_before_any_runs(llm: LLM) -> None:
    refuse = "{{ raise_exception('no ' ~ messages[0].content) if messages[0].content == 'Wentworth' }}"
    bad = [{"role": "user", "content": "Wentworth"}]
    with pytest.raises(ConfigError, match=r"conversation 2 of 2: the model's chat template refuses .*: no Wentworth"):
        llm.chat([HELLO, bad], SHORT, chat_template=refuse)
    for messages in ("Hello", [3], [["Hello"]], None):
        with pytest.raises(ConfigError):
            llm.chat(messages, SHORT)  # type: ignore[arg-type]
    llm.integrity()
    assert llm.stats.num_running == llm.stats.num_waiting == 0


def test_pieces_of_a_stream_join_to_the_text(llm: LLM) -> None:
    """Random weights emit bytes that are no text: each request's pieces are still its text, and no more."""
    params = SamplingParams(max_tokens=80, temperature=2.0, seed=1, ignore_eos=True)
    shown, outputs = ["", ""], {}
    prompts = [llm.chat_prompt(HELLO), llm.chat_prompt(HELLO, tools=[TOOL])]
    for index, event in llm.events(prompts, [params, params]):
        if hasattr(event, "text"):
            shown[index] += event.text
        elif hasattr(event, "output"):
            outputs[index] = event.output.outputs[0]
    assert shown == [outputs[0].text, outputs[1].text]
    tokenizer = Tokenizer(Path(llm.gang.model.path))
    assert shown == [tokenizer.decode(outputs[index].token_ids) for index in range(2)]


def test_closing_ends_the_template_process(talkative: Path, store_root: Path) -> None:
    before = set(psutil.Process().children())
    with LLM(run_config(talkative, store_root)) as llm:
        llm.chat_prompt(HELLO)
        assert set(psutil.Process().children()) - before
    assert set(psutil.Process().children()) == before


@pytest.mark.slow
def test_the_demo_model_answers_through_its_own_template(store_root: Path) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    with LLM(run_config(SMOLLM2, store_root)) as llm:
        (output,) = llm.chat(question, SamplingParams(max_tokens=12, temperature=0))
        inner: Any = Tokenizer(Path(llm.gang.model.path))._inner
    assert "Paris" in output.outputs[0].text
    assert output.prompt == inner.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    ids = inner.apply_chat_template(question, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert output.prompt_token_ids == list(ids)


# ---- which template


def test_no_template_says_what_there_is_and_what_to_do(tmp_path: Path) -> None:
    tokenizer = make_tokenizer("char-level", tmp_path)
    with pytest.raises(
        ConfigError, match=r"no chat template: .* has tokenizer_config\.json, and no template in it\. .*chat_template="
    ):
        tokenizer.chat_template(None, with_tools=False)
    assert tokenizer.chat_template("mine", with_tools=False) == "mine"


def test_several_templates_are_chosen_from(tmp_path: Path) -> None:
    make_tokenizer("char-level", tmp_path)
    directory = tmp_path / "additional_chat_templates"
    directory.mkdir()
    (directory / "tool_use.jinja").write_text("TOOLS")
    (directory / "rag.jinja").write_text("RAG")
    with pytest.raises(ConfigError, match="has the chat templates rag, tool_use and no default"):
        Tokenizer(tmp_path).chat_template(None, with_tools=False)
    (tmp_path / "chat_template.jinja").write_text("DEFAULT")
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.chat_template(None, with_tools=False) == "DEFAULT"
    assert tokenizer.chat_template(None, with_tools=True) == "TOOLS"
    assert tokenizer.chat_template("rag", with_tools=True) == "RAG"
    assert tokenizer.chat_template("{{ 1 }}", with_tools=True) == "{{ 1 }}"


# ---- run files and files of prompts


def run_file(**run: Any) -> dict[str, Any]:
    return {"model": {"path": "/m"}, "run": {"kind": "generate", **run}}


def test_prompts_of_a_run_file_may_have_tools_and_documents() -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": [1, None]}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "b", "tool_call_id": "1", "name": "f"},
    ]
    config = load_config(run_file(prompts=["a", HELLO, {"messages": messages, "tools": [TOOL], "documents": [{}]}]))
    assert config.run is not None
    text, plain, full = config.run.prompts
    assert text == "a"
    assert isinstance(plain, list)
    assert isinstance(full, ChatPrompt)
    assert [message.model_dump(exclude_none=True) for message in full.messages] == messages
    assert (full.tools, full.documents) == ([TOOL], [{}])


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({}, "`run`: give run.prompts or run.prompts_file, one of the two"),
        ({"prompts": ["a"], "prompts_file": "b"}, "`run`: give run.prompts or run.prompts_file, one of the two"),
        ({"prompts": [3]}, "`run.prompts.0`: a prompt is a text, a list of messages, or an object"),
        ({"prompts": [{"tools": []}]}, "missing key `run.prompts.0.messages`"),
        ({"prompts": [{"messages": []}]}, "`run.prompts.0.messages`: "),
        (
            {"prompts": [{"messages": HELLO, "tool": []}]},
            "unknown key `run.prompts.0.tool`; did you mean `tools`?",
        ),
        (
            {"prompts": ["a", {"messages": [{"role": "user", "contnt": "a"}]}]},
            "unknown key `run.prompts.1.messages.0.contnt`; did you mean `content`?",
        ),
        ({"prompts": [[{"role": "user"}]]}, "`run.prompts.0.0`: a message needs content"),
        ({"prompts": [[{"role": "user", "content": [{"type": "image"}]}]]}, "`run.prompts.0.0.content.0.type`"),
    ],
)
def test_other_prompts_are_refused_with_their_place(run: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(run_file(**run))
    assert message in str(caught.value)


def test_a_prompts_file_is_found_beside_its_run_file_and_read(tmp_path: Path) -> None:
    lines = [{"prompt": "a"}, {"messages": HELLO}, {"messages": HELLO, "tools": [TOOL], "documents": [{"title": "é"}]}]
    (tmp_path / "p.jsonl").write_text("\n\n".join(json.dumps(line) for line in lines) + "\n", encoding="utf-8")
    (tmp_path / "run.yaml").write_text(json.dumps(run_file(prompts_file="p.jsonl")), encoding="utf-8")
    config = load_config(tmp_path / "run.yaml")
    assert config.run is not None
    assert config.run.prompts_file == str(tmp_path / "p.jsonl")
    text, plain, full = read_prompts(config.run.prompts_file)
    assert text == "a"
    assert isinstance(plain, ChatPrompt)
    assert isinstance(full, ChatPrompt)
    assert (plain.tools, full.tools, full.documents) == (None, [TOOL], [{"title": "é"}])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', r"p\.jsonl:2: Invalid JSON"),
        ('{"prompt": "a"}\n\n{"promt": "a"}\n', r"p\.jsonl:3: unknown key `promt`; did you mean `prompt`"),
        ("{}", r"p\.jsonl:1: a line has `prompt`"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', r"p\.jsonl:1: a line has `prompt`"),
        ('{"prompt": "a", "tools": []}', r"p\.jsonl:1: `tools` and `documents` go with `messages`"),
        ('{"messages": [{"role": "", "content": "a"}]}', r"p\.jsonl:1: `messages\.0\.role`: "),
        ('"a"', r"p\.jsonl:1: "),
        ("\n \n", r"p\.jsonl holds no prompt"),
        ('{"prompt": "' + "a" * MAX_LINE_BYTES + '"}', r"p\.jsonl:1: the line is longer than"),
    ],
    ids=range(9),
)
def test_a_bad_line_is_refused_by_its_number(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_prompts(tmp_path / "p.jsonl")


def test_no_prompts_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no prompts file at"):
        read_prompts(tmp_path / "p.jsonl")
    with pytest.raises(ConfigError, match="cannot read the prompts file"):
        read_prompts(tmp_path)


def test_the_command_names_the_prompt_that_a_template_refuses(
    talkative: Path, store_root: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "model"
    shutil.copytree(talkative, broken)
    (broken / "chat_template.jinja").write_text("{{ raise_exception('no tools') if tools }}a")
    run = {"kind": "generate", "prompts": ["a", {"messages": HELLO, "tools": [TOOL]}]}
    (tmp_path / "run.yaml").write_text(json.dumps({**run_config(broken, store_root), "run": run}), encoding="utf-8")
    result = CliRunner().invoke(app, ["launch", str(tmp_path / "run.yaml")])
    assert isinstance(result.exception, ConfigError)
    assert "prompt 2 of 2: the model's chat template refuses these messages: no tools" in str(result.exception)


def test_the_command_answers_a_prompts_file(talkative: Path, store_root: Path, tmp_path: Path) -> None:
    lines = [{"prompt": "Anne"}, {"messages": HELLO, "tools": [TOOL]}]
    (tmp_path / "p.jsonl").write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
    run = {"kind": "generate", "prompts_file": "p.jsonl", "max_tokens": 2, "system": "Sir"}
    (tmp_path / "run.yaml").write_text(json.dumps({**run_config(talkative, store_root), "run": run}), encoding="utf-8")
    result = CliRunner().invoke(app, ["launch", str(tmp_path / "run.yaml"), "--json"])
    assert result.exit_code == 0, result.output
    tokenizer = Tokenizer(talkative)
    asked = [tokenizer.decode(output["prompt_token_ids"]) for output in json.loads(result.stdout)["outputs"]]
    assert asked == ["system: Siruser: Anne", "user: AnneElliot"]
