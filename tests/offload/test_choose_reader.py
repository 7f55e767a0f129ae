"""Which reader is taken, and what is said where one cannot be had."""

from __future__ import annotations

import os
import resource
import sys
import threading
from pathlib import Path

import pytest

from offload.aligned import aligned_memory
from offload.readers import choose
from offload.readers.aio import AioReader
from offload.readers.aio_kernel import AioKernel
from offload.readers.choose import choose_reader, make_reader
from offload.readers.deepspeed import DeepSpeedReader
from offload.readers.deepspeed_ops import build_ops
from offload.readers.measure import ReadRate
from offload.readers.port import ReadFile
from offload.readers.scripted import Fail, ScriptedReader
from partition.errors import ConfigError, StoreError


@pytest.fixture
def sample(tmp_path):
    path = tmp_path / "sample"
    path.write_bytes(os.urandom(300_000))
    return path


def rates(*gigabytes_per_s, cpu_s_per_gb):
    return [ReadRate(num_bytes=int(rate * 1e9), seconds=1.0, cpu_s=cpu_s_per_gb * rate) for rate in gigabytes_per_s]


@pytest.mark.parametrize(
    ("found", "name"),
    [
        ({"threads": (1.0, 0.03), "aio": (1.2, 0.09)}, "aio"),
        ({"threads": (1.0, 0.03), "aio": (1.1, 0.01)}, "threads"),  # too little for what it may lose beside computing
        ({"threads": (1.0, 0.03), "aio": (1.2, 0.02), "deepspeed": (1.3, 0.01)}, "deepspeed"),
        ({"threads": (1.0, 0.03), "deepspeed": (0.9, 0.01)}, "threads"),
        ({"threads": (1.0, 0.03)}, "threads"),
    ],
)
def test_another_reader_is_taken_only_where_it_is_clearly_faster(found, name):
    measured = {key: rates(speed / 3, speed, speed * 1.5, cpu_s_per_gb=cost) for key, (speed, cost) in found.items()}
    choice = choose._choice(measured, {})
    assert choice.name == name
    assert choice.bytes_per_s == {key: pytest.approx(speed * 1e9) for key, (speed, _) in found.items()}


def test_auto_measures_all_of_them_and_gives_an_open_one(sample):
    num_threads, num_fds = threading.active_count(), len(os.listdir("/proc/self/fd"))
    reader, choice = choose_reader("auto", sample, seconds=0.2)
    assert set(choice.bytes_per_s) == {"threads", "aio", "deepspeed"}
    assert all(f"{name} " in choice.reason for name in choice.bytes_per_s)
    assert reader.name == choice.name
    into = aligned_memory(4096)
    assert reader.submit(ReadFile(sample), 4096, 4096, into).result(5) == 4096
    assert into == sample.read_bytes()[4096:8192]
    reader.close()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (num_threads, num_fds)


@pytest.mark.parametrize("name", ["threads", "aio", "deepspeed"])
def test_one_that_is_named_is_not_measured(tmp_path, name):
    reader, choice = choose_reader(name, tmp_path / "gone")
    assert (reader.name, choice.name, choice.bytes_per_s) == (name, name, {})
    reader.close()


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"'mmap'.*auto, threads, aio, deepspeed"):
        make_reader("mmap")


def test_a_reader_that_fails_to_read_is_not_taken(sample, monkeypatch):
    broken = ScriptedReader({1: Fail()})
    monkeypatch.setattr(choose, "_MAKERS", {**choose._MAKERS, "aio": lambda: broken})
    reader, choice = choose_reader("auto", sample, seconds=0.1)
    assert "aio failed to read" in choice.reason
    assert "aio" not in choice.bytes_per_s
    assert broken.closed
    reader.close()


def test_a_sample_that_cannot_be_read_is_an_error_and_leaves_nothing_open(tmp_path):
    num_threads = threading.active_count()
    with pytest.raises(StoreError, match="cannot be measured"):
        choose_reader("auto", tmp_path / "gone")
    (tmp_path / "short").write_bytes(b"x")
    with pytest.raises(StoreError, match="less than 4096"):
        choose_reader("auto", tmp_path / "short")
    assert threading.active_count() == num_threads


def test_deepspeed_that_is_not_built_is_refused_with_the_command_and_never_built(sample, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "ops"))
    with pytest.raises(ConfigError, match=r"python -m offload\.readers\.deepspeed"):
        make_reader("deepspeed")
    reader, choice = choose_reader("auto", sample, seconds=0.1)
    assert "deepspeed not available" in choice.reason
    reader.close()
    assert not (tmp_path / "ops").exists()


def test_building_without_deepspeed_names_the_extra_and_leaves_the_environment_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    before = dict(os.environ)
    with pytest.raises(ConfigError, match=r"dist-infer\[deepspeed\]"):
        build_ops()
    assert dict(os.environ) == before
    assert not list(tmp_path.iterdir())


def test_the_operator_is_loaded_without_the_package():
    """Which is slow to import, speaks on stderr and takes part in transformers' decisions."""
    before = set(sys.modules)
    DeepSpeedReader().close()
    assert "deepspeed" not in set(sys.modules) - before


def test_deepspeed_without_locked_memory_is_refused(kit):
    """The operator would abort the process."""

    def build():
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (0, 0))
        if os.getuid() == 0:
            os.setuid(65534)  # root may lock without limit
        try:
            DeepSpeedReader()
        except ConfigError as error:
            return str(error)
        return "made"

    status, words = kit.in_child(build)
    assert status == 0
    assert "locked memory" in words
    assert "ulimit -l" in words


def test_a_kernel_that_has_no_reads_to_give_is_named():
    too_many = int(Path("/proc/sys/fs/aio-max-nr").read_text()) + 1
    with pytest.raises(ConfigError, match=r"fs\.aio-max-nr.*reader: threads"):
        AioKernel(too_many, -1)
    num_fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigError, match=r"aio-max-nr"):
        AioReader(depth=too_many)
    assert len(os.listdir("/proc/self/fd")) == num_fds
