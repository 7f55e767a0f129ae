"""FAULTS T11: packing on a disk that is too small, or that fills up at any write. Nothing half-done is ever trusted."""

from __future__ import annotations

import itertools
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dist_infer.config import load_config
from dist_infer.startup import open_model, pack_model
from offload.format import MANIFEST_FILE, StoreKey, read_manifest
from offload.pack import pack_store, verify_store
from partition.errors import StoreError

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
ROOT = Path(__file__).resolve().parent.parent.parent
MIB = 1 << 20

# On a disk of its own: `dist-infer pack` with too little space, then with enough.
TWO_RUNS = """
import subprocess, sys
from pathlib import Path
from launch import cli

disk, short, run = sys.argv[1:]
sys.argv = ["dist-infer", "pack", run]

def pack():
    try:
        cli.main()
    except SystemExit as end:
        print("exit code", end.code)

subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={short}", "none", disk], check=True)
pack()
print("left:", [path.name for path in Path(disk).rglob("*") if path.is_file()])
subprocess.run(["mount", "-o", "remount,size=64m", "none", disk], check=True)
pack()
print(next(Path(disk).rglob("manifest.json")).read_text(), end="")
"""


def test_a_disk_that_is_a_mebibyte_short(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """`dist-infer pack` ends with 3 and both figures before it writes anything; with space it makes the same store."""
    (tmp_path / "disk").mkdir()
    config: dict[str, Any] = {"model": {"path": str(tiny_checkpoint("llama"))}, "cluster": {"device": "cpu"}}
    calm = load_config({**config, "offload": {"store": str(tmp_path / "calm")}})
    location, _ = pack_model(calm, open_model(calm), lambda progress: None)
    store = Path(location.directory)
    needed = sum(blob.length for blob in read_manifest(store).blobs)
    free = (needed - MIB) // 4096 * 4096
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump({**config, "offload": {"store": str(tmp_path / "disk")}}))
    done = subprocess.run(
        ["unshare", "-m", sys.executable, "-c", TWO_RUNS, str(tmp_path / "disk"), str(free), str(run)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"},
        timeout=100,
    )
    assert done.returncode == 0, done.stdout
    first, second = done.stdout.split("exit code 3\n")
    found = re.search(r"^error: .* needs .* \((\d+) bytes\) more, free are .* \((\d+) bytes\)", first, re.MULTILINE)
    assert found, first
    assert int(found[1]) == needed
    assert free - 16384 <= int(found[2]) <= free  # the store's directory and its lock take something
    assert second.startswith("left: ['pack.lock']\n")
    assert second.split("exit code 0\n")[1] == (store / MANIFEST_FILE).read_text()


KEY = StoreKey(fingerprint="f" * 16, model_type="llama", dtype="float32", encoding="float", tensor=1)


class Source:
    """Three units of three pages each; of the first, one tensor has to be gathered before it can be written."""

    units = ("a", "b", "c")

    def load_unit(self, unit: str) -> list[dict[str, torch.Tensor]]:
        start = ord(unit)
        whole = torch.arange(start, start + 2048, dtype=torch.float32).view(32, 64)
        return [{"w": whole.t() if unit == "a" else whole, "n": torch.ones(700)}]


def pack(directory: Path) -> None:
    pack_store(directory, KEY, Source.units, [0], Source(), lambda progress: None)


@pytest.mark.parametrize("call", ["fallocate", "pwrite64", "write", "fsync"])
def test_no_space_at_any_write(call: str, tmp_path: Path, injected: Callable[..., Any]) -> None:
    """The k-th call of a kind, for every k there is, finds the disk full, while the free space looked right before."""
    pack(tmp_path / "calm")
    manifest = (tmp_path / "calm" / MANIFEST_FILE).read_bytes()
    for k in itertools.count(1):
        store = tmp_path / f"{call}-{k}"
        error, num_injected = packed_under(injected, store, call, k)
        if num_injected == 0:
            assert error == ""
            break
        assert error.startswith("3 "), error
        assert "No space left on device" in error
        assert str(store) in error
        if (store / MANIFEST_FILE).exists():  # the last of all: its rename could not be made durable
            assert (call, (store / MANIFEST_FILE).read_bytes()) == ("fsync", manifest)
        assert list(store.glob("*.tmp")) == []
        pack(store)
        assert (store / MANIFEST_FILE).read_bytes() == manifest
        assert verify_store(store, lambda done, total: None).bad == ()
    assert k > 3


def packed_under(injected: Callable[..., Any], store: Path, call: str, k: int) -> tuple[str, int]:
    """Pack in a forked child whose k-th `call` finds no space: (exit code and words, or "", calls tampered with)."""
    store.mkdir()
    ours, theirs = socket.socketpair()  # its calls are none of those that fail
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # the parent's pool of threads did not come along
            theirs.recv(1)
            pack(store)
            theirs.send(b"ok")
        except StoreError as error:
            theirs.send(f"{error.exit_code} {error}".encode())
        except BaseException as error:
            theirs.send(f"{type(error).__name__} {error}".encode())
        finally:
            os._exit(0)
    theirs.close()
    ours.settimeout(30)
    with injected(pid, f"error=ENOSPC:when={k}", calls=call) as strace:
        ours.send(b"g")
        words = ours.recv(65536).decode()
        os.waitpid(pid, 0)
    ours.close()
    return "" if words == "ok" else words, strace.num_injected
