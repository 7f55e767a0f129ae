"""The whole look on this machine, with faults planted in the world around a real process."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory_group import MemoryGroup
from dist_infer.config import load_config
from dist_infer.machine import machine_facts
from dist_infer.startup import open_model
from launch.doctor import node
from launch.doctor.checkpoint import judge_checkpoints, read_checkpoint
from launch.doctor.examine import examine
from launch.doctor.limits import LimitFacts, judge_limits
from launch.doctor.network import LinkFacts
from launch.doctor.planning import plan_for
from launch.doctor.running import Running

Doctor = Callable[..., Any]


def test_a_machine_without_faults(doctor: Doctor, tmp_path: Path) -> None:
    """Every check has run, none has anything to say against it, and nothing was made or left."""
    found = doctor(run={"kind": "serve", "port": 0})
    assert (found.code, found.problems) == (0, [])
    checks = [finding["check"] for finding in found.findings]
    assert checks == ["versions", "checkpoint", "memory", "disk", "disk", "limits", "ports"]
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_few_open_files(doctor: Doctor) -> None:
    """A real limit around a real process: it could not open every blob of the store."""
    found = doctor(around=["sh", "-c", 'ulimit -n 150; exec "$@"', "sh"])
    assert found.code == 4
    (few,) = found.of("limits", "error")
    assert few["what"].startswith("a process may have 150 files open, and needs 266 (10 of the store")
    assert "ulimit -n" in few["do"]


def test_limits_by_what_uses_them() -> None:
    usual = LimitFacts(files=1024, most_files=1 << 20, memlock_bytes=8 << 20)
    ask: dict[str, Any] = {"num_blobs": 100, "num_connections": 0, "uses_ray": False, "is_raised": False}
    ask["uses_rdma"] = False
    assert [finding.severity for finding in judge_limits("a", usual, **ask)] == ["ok"]
    (clients,) = judge_limits("a", usual, **{**ask, "num_connections": 1024})
    assert clients.severity == "warning"
    (workers,) = judge_limits("a", usual, **{**ask, "uses_ray": True})
    assert workers.severity == "warning"
    assert [each.severity for each in judge_limits("a", usual, **{**ask, "uses_ray": True, "is_raised": True})] == [
        "ok"
    ]
    (locked,) = judge_limits("a", usual, **{**ask, "uses_rdma": True})
    assert locked.severity == "warning"
    assert "InfiniBand" in locked.why
    (hard,) = judge_limits("a", LimitFacts(files=200, most_files=300, memlock_bytes=None), **ask)
    assert hard.severity == "error"
    assert "the hard limit is 300" in hard.do


def test_a_memory_group_that_is_too_small(doctor: Doctor) -> None:
    """FAULTS T10: the group's limit is what counts, and it is named."""
    with MemoryGroup(200 << 20) as group:
        found = doctor(around=group.command([]))
        assert group.num_kills == 0
    assert found.code == 2
    (small,) = found.of("memory", "error")
    assert f"/{group.folder.name}" in small["what"]


def test_a_port_that_is_taken(doctor: Doctor) -> None:
    """FAULTS T26: the port and who holds it, before a model is loaded for it."""
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        found = doctor(run={"kind": "serve", "port": port})
    assert found.code == 2
    (taken,) = found.of("ports", "error")
    assert taken["what"].startswith(f"cannot listen on 127.0.0.1:{port}: Address already in use")
    assert f"process {os.getpid()} " in taken["what"]


def test_a_misfit_and_a_missing_model_end_as_a_launch_would(doctor: Doctor, tmp_path: Path) -> None:
    """The planner's and the reader's own words and exit codes; the other checks run all the same."""
    found = doctor(offload={"host_memory": "100 KiB"})
    assert found.code == 2
    assert "offload.host_memory" in found.of("memory", "error")[0]["what"]
    assert found.of("limits", "ok")
    found = doctor(model={"path": str(tmp_path / "none")})
    assert found.code == 3
    (missing,) = found.problems
    assert missing["what"].startswith(f"no model at {tmp_path / 'none'}")


def test_a_check_that_hangs_is_a_finding(
    content: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real hang: opening a pipe that nobody writes to, as reading from a dead network disk hangs."""
    model = tmp_path / "model"
    model.mkdir()
    os.mkfifo(model / "config.json")
    monkeypatch.setattr(node, "_CHECK_S", 0.3)
    monkeypatch.setattr("launch.doctor.examine._MODEL_S", 0.3)
    report = examine(load_config({**content, "model": {"path": str(model)}}))
    hung = [finding for finding in report.findings if finding.check == "checkpoint"]
    assert {finding.severity for finding in hung} == {"warning"}
    assert all("had not ended after 0.3 s" in finding.what for finding in hung)
    assert {finding.check for finding in report.findings if finding.severity == "ok"} >= {"versions", "disk", "limits"}
    with (model / "config.json").open("w"):  # lets the threads go
        pass


def test_a_check_that_raises_is_a_finding(content: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a crash: whatever a machine's /proc may hold."""

    def broken() -> None:
        raise KeyError("Max open files")

    monkeypatch.setattr(node, "read_limits", broken)
    report = examine(load_config(content))
    (finding,) = [finding for finding in report.findings if finding.check == "limits"]
    assert (finding.severity, report.exit_code) == ("warning", 0)
    assert finding.what == "this check did not run: KeyError: 'Max open files'"


def test_work_that_is_late_or_fails_says_which() -> None:
    """The deadline is ours, a TimeoutError of the work is the work's."""
    never = threading.Event()
    with pytest.raises(TimeoutError, match=r"had not ended after 0\.01 s"):
        Running(never.wait, limit_s=0.01, name="x").result()
    never.set()

    def late() -> None:
        raise TimeoutError("the disk's own")

    with pytest.raises(TimeoutError, match="the disk's own"):
        Running(late, limit_s=5, name="x").result()


def test_copies_are_equal_whatever_their_times_and_other_weights_are_not(
    content: Mapping[str, Any], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Nodes pack from their own copies: those may be older or newer, but of the same model."""
    original = read_checkpoint(load_config(content))
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in Path(original.path).iterdir():
        (copied / file.name).write_bytes(file.read_bytes())
        os.utime(copied / file.name, (1, 1))
    copy = read_checkpoint(load_config({**content, "model": {"path": str(copied)}}))
    assert copy.store != original.store
    others = {**content, "model": {"path": str(tiny_checkpoint("llama", seed=7))}}
    other = read_checkpoint(load_config(others))
    missing = read_checkpoint(load_config({**content, "model": {"path": str(tmp_path / "none")}}))
    nodes = {"a": original, "b": copy, "c": other, "d": missing, "e": other}
    found = judge_checkpoints(nodes, here="a", used={"a", "b", "c", "d"})
    assert [(each.severity, each.exit_code) for each in found] == [
        ("ok", 0),
        ("ok", 0),
        ("error", 3),
        ("error", 3),
        ("warning", 0),
    ]
    assert "another model than on a" in found[2].what
    assert "no model at" in found[3].what


def test_a_rate_counts_by_what_it_costs(content: dict[str, Any], tiny_checkpoint: Callable[..., Path]) -> None:
    """A slow disk under weights that stay in memory is no problem; a slow network is one where stages are apart."""
    larger = tiny_checkpoint("llama", num_hidden_layers=12, intermediate_size=1536)
    streamed = {"model": {"path": str(larger)}, "offload": {**content["offload"], "host_memory": "8 MiB"}}
    few = {"engine": {**content["engine"], "max_batch_tokens": 16}}
    config = load_config({**content, **streamed, **few, "parallel": {"pipeline": 2}})
    model = open_model(config)
    facts = machine_facts(with_devices=False)
    nodes = [replace(facts, name=name) for name in "ab"]
    link = LinkFacts(source="a", target="b", host="h", port=1, latency_s=1e-4, bytes_per_s=1e4)
    found = plan_for(config, model, nodes, [1e6, None], [link])
    assert found.used == {"a", "b"}
    assert "output tok/s, not " in found.disk_effect
    assert "output tok/s, not " in found.network_effect
    found = plan_for(config, model, nodes, [9e9, None], [replace(link, bytes_per_s=9e9)])
    assert (found.disk_effect, found.network_effect, found.findings) == ("", "", ())
    resident = load_config(content)
    assert plan_for(resident, open_model(resident), nodes[:1], [1e6], []).disk_effect == ""
