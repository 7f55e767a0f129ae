"""The command line as people and scripts see it: exit codes, messages, what is on disk, and what runs afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import typer
import yaml
from demo_model import SMOLLM2
from safetensors.torch import load_file, save_file

from dist_infer import __version__
from dist_infer.config import RunConfig
from launch import cli
from partition.plan import plan_from_json, plan_to_json

ROOT = Path(cli.__file__).resolve().parent.parent
EXIT_LIMIT_S = 10.0
_INTERRUPTED = 130


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


Command = Callable[..., Done]
WriteRun = Callable[..., Path]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`dist-infer …` in this process, through the entry point."""

    def run(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["dist-infer", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return Done(int(ended.value.code or 0), out, err)

    return run


@contextmanager
def spawned(*arguments: str | Path) -> Iterator[subprocess.Popen[str]]:
    """`dist-infer …` as a process group of its own, as a terminal would start it; killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for member in group_of(process.pid):
            member.kill()
        process.wait(10)
        process.stdout.close()


def group_of(leader: int) -> list[psutil.Process]:
    """Running processes of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def read_until(process: subprocess.Popen[str], pattern: str) -> str:
    """Its output up to the first line that matches."""
    seen = []
    for line in process.stdout:
        seen.append(line)
        if re.search(pattern, line):
            return "".join(seen)
    raise AssertionError(f"no line matches {pattern!r}:\n{''.join(seen)}")


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str], timeout_s: float = 60) -> None:
    deadline, pause = time.monotonic() + timeout_s, threading.Event()
    while not what():
        assert process.poll() is None, f"it ended too early:\n{process.stdout.read()}"
        assert time.monotonic() < deadline
        pause.wait(0.002)


@pytest.fixture
def write_run(tmp_path: Path) -> WriteRun:
    """write_run(model, **sections): a run file for this machine's processor, store beside it."""

    def write(path: str | Path, /, **sections: Any) -> Path:
        content: dict[str, Any] = {
            "model": {"path": str(path)},
            "offload": {"store": "stores"},
            "cluster": {"device": "cpu"},
            "engine": {"max_model_len": 64, "kv_memory": "1 MiB", "max_requests": 4},
            "run": {"kind": "generate", "prompts": ["w5 w6"], "chat": False, "max_tokens": 4},
        }
        for name, values in sections.items():
            content[name] = {**content.get(name, {}), **values}
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump(content))
        return file

    return write


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, to be damaged."""
    shutil.copytree(tiny_checkpoint("llama"), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def worded(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer (`w7` is token 7) and room for long answers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("worded") / "model"
    shutil.copytree(tiny_checkpoint("llama", max_position_embeddings=16384, eos_token_id=None), directory)
    inner = Tokenizer(models.WordLevel({f"w{i}": i for i in range(160)}, unk_token="w0"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="w0").save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def many_layers(tiny_checkpoint: Callable[..., Path]) -> Path:
    """Packs for long enough to be interrupted."""
    return tiny_checkpoint("llama", num_hidden_layers=120)


def blobs(root: Path) -> list[Path]:
    return sorted(root.glob("stores/*/*.bin"))


def entries(root: Path) -> int:
    return len(list(root.glob("stores/*/*.tp*.json")))


# ---- refused before anything is started


def _remove_weights(model: Path) -> None:
    (model / "model.safetensors").unlink()


def _pickled(model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")


def _truncated(model: Path) -> None:
    os.truncate(model / "model.safetensors", (model / "model.safetensors").stat().st_size - 1)


def _wrong_shape(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(96, 71)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def _other_family(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "moshi"}))


def _senseless_for_its_family(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "mamba2"}))


@pytest.mark.parametrize(
    ("damage", "code", "parts"),
    [
        (_remove_weights, 3, ("no weights",)),
        (_pickled, 3, ("pytorch_model.bin", "safetensors")),
        (_truncated, 3, ("model.safetensors", r"\d+.*\d+")),
        (_wrong_shape, 3, (r"model\.layers\.2\.mlp\.up_proj\.weight", r"\[96, 71\]", r"\[96, 72\]")),
        (_other_family, 3, ("moshi", "check-arch")),
        (_senseless_for_its_family, 3, ("mamba2", "num_heads")),
        (shutil.rmtree, 3, ("no model at",)),
    ],
)
def test_a_model_that_cannot_be_run_right_is_refused(
    damage: Callable[[Path], None],
    code: int,
    parts: tuple[str, ...],
    model: Path,
    write_run: WriteRun,
    command: Command,
) -> None:
    damage(model)
    done = command("launch", write_run(model))
    assert (done.code, done.out) == (code, "")
    (line,) = [text for text in done.err.splitlines() if text]
    assert line.startswith("error: ")
    for part in parts:
        assert re.search(part, line), line
    assert not (model.parent / "stores").exists()
    assert psutil.Process().children() == []


@pytest.mark.parametrize(
    ("sections", "parts"),
    [
        ({"parallell": {"tensor": 2}}, ("unknown key `parallell`", "did you mean `parallel`")),
        (
            {"offload": {"host_memory": "100 KiB"}},
            (r"needs at least [\d.]+ .iB", r"may use 100\.00 KiB", "offload.host_memory"),
        ),
        ({"parallel": {"tensor": 64}}, ("64", "tensor")),
        ({"parallel": {"pipeline": 99}}, ("99", "8")),
        ({"cluster": {"device": "cuda"}}, ("no GPU",)),
        ({"offload": {"device_memory": "1 GiB"}}, ("offload.device_memory", "offload.host_memory")),
        ({"engine": {"max_model_len": 100_000}}, ("max_model_len",)),
        ({"run": {"temperature": 1e-9}}, ("temperature",)),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_run_is_refused(
    sections: dict[str, Any],
    parts: tuple[str, ...],
    model: Path,
    write_run: WriteRun,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dist_infer.machine.nvidia_devices", lambda: ())
    done = command("launch", write_run(model, **sections))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: ")
    for part in parts:
        assert re.search(part, done.err), done.err
    assert not (model.parent / "stores").exists()


def test_usage_errors_end_with_2(command: Command, model: Path, write_run: WriteRun, tmp_path: Path) -> None:
    file = write_run(model)
    for arguments, part in [
        (("launch", tmp_path / "absent.yaml"), "no run file at"),
        (("launch", file, "--set", "a"), "--set takes a.b=value"),
        (("launch", file, "--set", "paralel.tensor=2"), "did you mean `parallel`"),
        (("launch", file, "--no-such-flag"), "no-such-flag"),
        (("generate", file), "--prompt"),
        (("generate", file, "--prompt", ""), "--prompt is empty"),
        (("nonsense",), "nonsense"),
        (("verify", tmp_path / "absent"), "no run file at"),
        (("plan", file, "--hardware", tmp_path / "absent.yaml"), "hardware file"),
    ]:
        done = command(*arguments)
        assert done.code == 2, arguments
        assert part in done.err.replace("\n", " ")
        assert "Traceback" not in done.err


def test_a_file_without_a_run_section_says_what_to_add(command: Command, model: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(f"model: {{path: {model}}}\n")
    done = command("launch", tmp_path / "run.yaml")
    assert done.code == 2
    assert "no `run:` section: add e.g." in done.err


# ---- plan, schema, version


def test_plan_as_json_is_the_plan(command: Command, model: Path, write_run: WriteRun) -> None:
    done = command("plan", write_run(model), "--json", "--set", "parallel.tensor=2", "--set", "name=other")
    assert (done.code, done.err) == (0, "")
    plan = plan_from_json(done.out)
    assert (plan.name, plan.tensor, len(plan.ranks)) == ("other", 2, 2)
    assert plan_to_json(plan) == done.out.rstrip("\n")


def test_plan_for_people_shows_every_rank(command: Command, model: Path, write_run: WriteRun) -> None:
    done = command("plan", write_run(model), "--set", "parallel={tensor: 2, pipeline: 2}")
    assert done.code == 0
    assert "predicted" in done.out
    assert "host memory" in done.out
    assert not (model.parent / "stores").exists()


def test_planning_loads_neither_torch_nor_transformers_nor_ray(model: Path, write_run: WriteRun) -> None:
    """A plan is made on a laptop, in less time than torch takes to be imported. Also for executor: ray."""
    files = [write_run(model), ROOT / "configs" / "quickstart.yaml"]
    code = (
        "import sys; from launch.cli import app\n"
        f"for file in {[str(file) for file in files]!r}: app(['plan', file, '--json'], standalone_mode=False)\n"
        "print([m for m in ('torch', 'transformers', 'ray', 'gguf', 'safetensors') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_schema_and_version(command: Command) -> None:
    assert json.loads(command("schema").out) == RunConfig.model_json_schema()
    assert command("version") == Done(0, f"dist-infer {__version__}\n", "")


def test_the_commands_and_their_flags_are_these() -> None:
    """So that a change is deliberate."""
    group = typer.main.get_command(cli.app)
    found = {
        name: sorted(option for parameter in each.params for option in parameter.opts if option != "--help")
        for name, each in group.commands.items()
    }
    run = ["--json", "--set", "file"]
    assert found == {
        "launch": ["--detach", "--json", "--no-preflight", "--set", "file"],
        "generate": ["--json", "--prompt", "--set", "file"],
        "plan": ["--hardware", *run],
        "pack": run,
        "verify": ["--json", "--set", "target"],
        "bench": [],
        "check-arch": [
            *("--all", "--deadline", "--every-layout", "--jobs", "--json", "--pipeline", "--tensor", "--write"),
            *("--write-types", "targets"),
        ],
        "doctor": run,
        "status": ["--json", "name"],
        "logs": ["--follow", "-f", "name", "which"],
        "drain": ["name"],
        "down": ["--now", "name"],
        "top": ["--interval", "--key-env", "--once", "url"],
        "schema": [],
        "version": [],
    }


# ---- pack and verify


def test_packing_again_writes_nothing(command: Command, model: Path, write_run: WriteRun, tmp_path: Path) -> None:
    file = write_run(model)
    first = json.loads(command("pack", file, "--json").out)
    assert first["num_written"] == 10
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("stores/*/*")}
    second = json.loads(command("pack", file, "--json").out)
    assert (second["num_written"], second["num_reused"], second["bytes_written"]) == (0, 10, 0)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("stores/*/*")} == before
    done = command("pack", file)
    assert done.code == 0
    assert "nothing in" in done.out
    assert str(next(tmp_path.glob("stores/*"))) == first["store"] == second["store"]


def test_verify_finds_a_flipped_bit_and_launch_refuses_it(
    command: Command, worded: Path, write_run: WriteRun, tmp_path: Path
) -> None:
    file = write_run(worded)
    assert command("verify", file).code == 3  # nothing was packed yet
    assert command("pack", file).code == 0
    done = command("verify", file)
    assert done.code == 0
    assert "10 of 10 blobs are as they were packed" in done.out
    (blob,) = tmp_path.glob("stores/*/layers.3.tp0.bin")
    data = bytearray(blob.read_bytes())
    data[1000] ^= 1
    blob.write_bytes(data)
    for target in (file, blob.parent):
        done = command("verify", target)
        assert done.code == 3
        assert "BAD layers.3 of tensor rank 0" in done.out
        assert "9 of 10 blobs" in done.out
    bad = json.loads(command("verify", file, "--json").out)["bad"]
    assert [(found["unit"], found["file"]) for found in bad] == [("layers.3", "layers.3.tp0.bin")]
    done = command("launch", file)
    assert done.code == 4  # by then it is a rank that failed
    assert "unit 'layers.3'" in done.err
    assert "w5" not in done.out  # no answer


def test_another_type_or_degree_is_another_store(command: Command, model: Path, write_run: WriteRun) -> None:
    """Never guessed from the file's name: the old store stays as it is."""
    file = write_run(model)
    stores = {
        json.loads(command("pack", file, "--json", *change).out)["store"]
        for change in ((), ("--set", "model.dtype=bfloat16"), ("--set", "parallel.tensor=2"))
    }
    assert len(stores) == 3


@pytest.mark.slow
def test_a_pack_that_was_killed_is_resumed_to_the_same_store(
    command: Command, many_layers: Path, write_run: WriteRun, tmp_path: Path
) -> None:
    file = write_run(many_layers)
    for least in (3, 30):
        with spawned("pack", file) as process:
            wait_for(lambda least=least: entries(tmp_path) >= least, process)
            process.kill()
        assert least <= entries(tmp_path) < 122
        assert list(tmp_path.glob("stores/*/manifest.json")) == []
    finished = {path: path.stat().st_mtime_ns for path in blobs(tmp_path) if path.with_suffix(".json").exists()}
    report = json.loads(command("pack", file, "--json").out)
    assert report["num_reused"] == len(finished) >= 30
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert command("verify", file).code == 0
    assert list(tmp_path.glob("stores/*/*.tmp")) == []
    (manifest,) = tmp_path.glob("stores/*/manifest.json")
    undisturbed = command("pack", file, "--json", "--set", f"offload.store={tmp_path / 'others'}")
    assert (Path(json.loads(undisturbed.out)["store"]) / "manifest.json").read_bytes() == manifest.read_bytes()


# ---- generate


def test_generate_answers_as_one_json_document(command: Command, worded: Path, write_run: WriteRun) -> None:
    file = write_run(worded)
    done = command("generate", file, "--prompt", "w5 w6", "--prompt", "w9", "--json", "--set", "run.logprobs=1")
    assert done.code == 0, done.err
    answer = json.loads(done.out)
    assert [output["prompt_token_ids"] for output in answer["outputs"]] == [[5, 6], [9]]
    for output in answer["outputs"]:
        (one,) = output["outputs"]
        assert (len(one["token_ids"]), one["finish_reason"]) == (4, "length")
        assert one["text"].split() == [f"w{token}" for token in one["token_ids"]]
        assert len(one["logprobs"]) == 4
    assert answer["summary"]["num_requests"] == 2
    assert answer["summary"]["num_output_tokens"] == 8
    assert "packed 10 blobs" in done.err
    again = command("launch", file)
    assert again.code == 0
    assert "packed nothing" in again.out
    assert answer["outputs"][0]["outputs"][0]["text"] in again.out


def test_text_for_a_model_without_a_tokenizer_is_refused(command: Command, model: Path, write_run: WriteRun) -> None:
    done = command("generate", write_run(model), "--prompt", "Hello")
    assert done.code == 2
    assert "no usable tokenizer" in done.err
    assert "token ids" in done.err


@pytest.mark.slow
def test_the_demo_model_knows_the_capital_of_france(command: Command, write_run: WriteRun, store_root: Path) -> None:
    file = write_run(
        SMOLLM2,
        model={"dtype": "float32"},
        offload={"store": str(store_root)},
        engine={"kv_memory": "16 MiB"},
        run={"chat": True, "max_tokens": 10},
    )
    done = command("generate", file, "--prompt", "What is the capital of France?", "--json")
    assert done.code == 0, done.err
    assert "Paris" in json.loads(done.out)["outputs"][0]["outputs"][0]["text"]


# ---- Ctrl-C


def assert_interrupted(process: subprocess.Popen[str]) -> None:
    started = time.monotonic()
    out, _ = process.communicate(timeout=EXIT_LIMIT_S)
    assert process.returncode == _INTERRUPTED, out
    assert time.monotonic() - started < EXIT_LIMIT_S
    assert "Traceback" not in out
    deadline, pause = time.monotonic() + 1, threading.Event()
    while (left := group_of(process.pid)) and time.monotonic() < deadline:
        pause.wait(0.05)
    assert left == []


@pytest.mark.slow
def test_ctrl_c_while_packing(many_layers: Path, write_run: WriteRun, tmp_path: Path, command: Command) -> None:
    file = write_run(many_layers)
    with spawned("pack", file) as process:
        wait_for(lambda: entries(tmp_path) >= 3, process)
        os.killpg(process.pid, signal.SIGINT)
        assert_interrupted(process)
    assert list(tmp_path.glob("stores/*/*.tmp")) == []
    assert json.loads(command("pack", file, "--json").out)["num_reused"] >= 3


@pytest.mark.slow
@pytest.mark.parametrize("to_all", [True, False], ids=["group", "leader"])
@pytest.mark.parametrize("phase", ["starting workers", r"^loading", r"^\[1\] w\d"], ids=["start", "load", "generate"])
def test_ctrl_c_with_two_ranks(phase: str, to_all: bool, worded: Path, write_run: WriteRun) -> None:
    """A terminal signals the whole group, a supervisor only the leader: both must end all of it."""
    file = write_run(
        worded,
        parallel={"tensor": 2},
        engine={"max_model_len": 16000, "kv_memory": "64 MiB"},
        run={"max_tokens": 15000},
    )
    with spawned("launch", file) as process:
        read_until(process, phase)
        (os.killpg if to_all else os.kill)(process.pid, signal.SIGINT)
        assert_interrupted(process)


@pytest.mark.slow
def test_sigterm_while_generating(worded: Path, write_run: WriteRun) -> None:
    file = write_run(worded, engine={"max_model_len": 16000, "kv_memory": "64 MiB"}, run={"max_tokens": 15000})
    with spawned("launch", file) as process:
        read_until(process, r"^\[1\] w\d")
        process.terminate()
        assert_interrupted(process)
