"""A name belongs to one run at a time, and what is written down of it is whole and nobody else's to read."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from named_runs import Shell, WriteRun

from dist_infer import load_config
from dist_infer.errors import ConfigError
from dist_infer.startup import Progress
from launch.runs.announce import ENVIRONMENT, Announcer, Notice
from launch.runs.mark import MARK, is_label_of, run_label
from launch.runs.place import run_directory, state_directory
from launch.runs.ray_home import RayHome
from launch.runs.record import read_record
from launch.runs.run import Run, take_name

GENERATE = {"kind": "generate", "max_tokens": 4, "chat": False, "prompts": ["the sea"]}
TAKE = """
import sys
from launch.runs.run import take_name
from launch.runs.place import run_directory
held = take_name(run_directory("tiny"))
print("no" if held is None else "yes", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv(MARK, "")  # set by the runs below, and not for the tests after them


def make_run(tmp_path: Path, write_run: WriteRun, **sections: dict[str, object]) -> Run:
    file = write_run(tmp_path, run=GENERATE, **sections)
    return Run(load_config(file), file, Announcer(None, None))


def test_directories_are_the_users_alone(tmp_path: Path) -> None:
    """Guards secrets and logs: mode 0700 to the top, also where it was looser, and never another user's directory."""
    top = tmp_path / "state" / "dist-infer"
    top.mkdir(parents=True, mode=0o755)
    found = state_directory()
    assert found.parent == top
    assert [stat.S_IMODE(path.stat().st_mode) for path in (top, found)] == [0o700, 0o700]
    for name in ("../x", "a/b", ".", "", ".hidden"):
        with pytest.raises(ConfigError, match="no name of a run"):
            run_directory(name)


def test_a_place_that_cannot_be_written_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="XDG_STATE_HOME"):
        state_directory()


def test_the_second_run_of_a_name_is_refused_and_named_the_first(tmp_path: Path, write_run: WriteRun) -> None:
    """T25: the error has pid and URL; the first run is untouched; afterwards the name is free."""
    with make_run(tmp_path, write_run) as first:
        first.note("ready", url="http://127.0.0.1:1234")
        before = (run_directory("tiny") / "run.json").read_bytes()
        with (
            pytest.raises(ConfigError, match=rf"pid {os.getpid()}, http://127.0.0.1:1234"),
            make_run(tmp_path, write_run),
        ):
            pytest.fail("two runs of one name")
        assert (run_directory("tiny") / "run.json").read_bytes() == before
    assert not run_directory("tiny").exists(), "of a run in a terminal nothing is kept when it ends well"
    with make_run(tmp_path, write_run):
        pass


def test_of_eight_at_once_one_gets_the_name(tmp_path: Path) -> None:
    """T26: and it is free as soon as that one is gone, however it went."""
    many = [subprocess.Popen([sys.executable, "-c", TAKE], stdin=-1, stdout=-1, text=True) for _ in range(8)]
    answers = [process.stdout.readline().strip() for process in many if process.stdout is not None]
    assert sorted(answers) == ["no"] * 7 + ["yes"]
    for process in many:
        process.kill()
        process.communicate()
    descriptor = take_name(run_directory("tiny"))
    assert descriptor is not None
    os.close(descriptor)


def test_what_is_written_down_is_how_it_stands(tmp_path: Path, write_run: WriteRun) -> None:
    with make_run(tmp_path, write_run) as run:
        directory = run_directory("tiny")
        run.progress(Progress(phase="packing", done=1, total=9))
        found = read_record(directory)
        assert found == run.record
        assert found is not None
        assert (found.state, found.detail, found.done, found.total) == ("starting", "packing", 1, 9)
        assert stat.S_IMODE((directory / "run.json").stat().st_mode) == 0o600
        assert run.note("ready", url="http://x")
        assert not run.note("ready")
        (directory / "run.json").write_text("{half")
        assert read_record(directory) is None, "what was damaged is no run, and no traceback"


def test_the_environment_is_as_it_was(tmp_path: Path, write_run: WriteRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards whoever starts a Ray in the same process afterwards: the token and the directory are gone with the run."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another-clusters")
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    before = dict(os.environ)
    with make_run(tmp_path, write_run, cluster={"executor": "ray"}) as run:
        assert os.environ["RAY_TMPDIR"] == run.record.home
        assert "RAY_AUTH_TOKEN" not in os.environ
        assert os.environ[MARK] == run.record.run_id
    assert dict(os.environ) == before
    monkeypatch.setattr("launch.runs.run.write_record", _disk_full)
    with (
        pytest.raises(ConfigError, match=r"disk full\. Set XDG_STATE_HOME"),
        make_run(tmp_path, write_run, cluster={"executor": "ray"}),
    ):
        pytest.fail("a run that is written down nowhere")
    assert dict(os.environ) == before


def _disk_full(_directory: Path, _record: object) -> None:
    raise OSError("disk full")


def test_a_failed_run_is_kept_until_the_next_one(tmp_path: Path, write_run: WriteRun) -> None:
    with pytest.raises(ConfigError, match="too hot"), make_run(tmp_path, write_run):
        raise ConfigError("too hot")
    found = read_record(run_directory("tiny"))
    assert found is not None
    assert (found.state, found.error, found.exit_code) == ("failed", "too hot", 2)
    with pytest.raises(KeyboardInterrupt), make_run(tmp_path, write_run):
        raise KeyboardInterrupt
    assert not run_directory("tiny").exists()


def test_a_record_of_another_process_with_the_same_pid_is_a_killed_run(tmp_path: Path, write_run: WriteRun) -> None:
    """Guards against a name that stays taken after a reboot, since its pid is somebody's again."""
    with make_run(tmp_path, write_run) as run:
        record = run.record
    directory = run_directory("tiny")
    directory.mkdir()
    text = json.dumps([{"phase": "ready", **json.loads(_encoded(record))[0]}])
    (directory / "run.json").write_text(text.replace(str(record.process.start_ticks), "1"))
    found = read_record(directory)
    assert found is not None
    assert found.state == "killed"
    with make_run(tmp_path, write_run):
        pass


def _encoded(record: object) -> bytes:
    from dist_infer.messages import encode

    return encode(record)


def test_a_detached_run_says_what_went_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the pipe: an error before there is a run is heard too, and children do not take themselves for it."""
    from dist_infer.messages import decode

    read, write = os.pipe()
    monkeypatch.setenv(ENVIRONMENT, f"{write}:/tmp/x:y.log")
    announcer = Announcer.from_environment()
    assert announcer.log == "/tmp/x:y.log"
    assert ENVIRONMENT not in os.environ
    with pytest.raises(ConfigError), announcer:
        raise ConfigError("no such model")
    with os.fdopen(read) as pipe:
        (line,) = pipe.readlines()
    assert decode(Notice, line.encode()) == Notice(phase="failed", error="no such model", exit_code=2)


def test_labels() -> None:
    """Guards `down` against taking `tiny-2` for a run of `tiny`."""
    label = run_label("tiny", "0123456789abcdef" * 2)
    assert label == "tiny-01234567"
    assert is_label_of(label, "tiny")
    assert not is_label_of(run_label("tiny-2", "0" * 32), "tiny")
    assert not is_label_of("tiny-production", "tiny")


def test_the_token_is_the_users_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards the secret: a file of mode 0600 in a directory of mode 0700, and no copy of it in the environment."""
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another-clusters")
    for variable in ("RAY_TMPDIR", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(variable, "")
    first, second = RayHome.make(), RayHome.make()
    try:
        first.enter()
        token = (first.path / "token").read_text()
        assert len(token) == 64
        assert token != (second.path / "token").read_text()
        assert [stat.S_IMODE(path.stat().st_mode) for path in (first.path, first.path / "token")] == [0o700, 0o600]
        assert token not in os.environ.values()
        assert "RAY_AUTH_TOKEN" not in os.environ
        socket = f"{first.path}/ray/session_2026-11-23_03-00-52_090036_4194304/sockets/plasma_store"
        assert len(socket) <= 107
    finally:
        for home in (first, second):
            home.remove()
            assert not home.path.exists()


def test_status_of_nothing(shell: Shell) -> None:
    assert shell.run("status").out == "no runs on this machine\n"
    done = shell.run("status", "tiny")
    assert (done.code, "no run is named tiny" in done.err) == (2, True)
    assert shell.run("down", "tiny").code == 0
