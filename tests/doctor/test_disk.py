"""The store's disk: of the wrong kind, full, not writable, slow. Real file systems in a mount namespace."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dist_infer.config import load_config
from dist_infer.startup import open_model, pack_model
from launch.doctor.disk import DiskFacts, DiskRate, judge_disk, judge_rate, measure_disk, read_disk
from launch.doctor.node import look_here

GIB = 1 << 30
MOUNTS = """\
20 1 254:0 / / rw - ext4 /dev/vda rw
21 20 0:30 / /home rw - nfs4 server:/home rw
22 20 0:31 / /mnt/a\\040b rw - fuse.sshfs host: rw
23 20 0:32 / /run rw - tmpfs none rw
24 20 0:33 / /home rw shared:1 - ext4 /dev/vdb rw
25 20 0:34 / /work rw - overlay overlay rw
26 20 0:35 / /data rw - nfs4 server:/data rw
27 20 0:36 / /host rw - 9p share rw
28 20 0:37 / /old rw - fuseblk /dev/sda rw
"""


def facts(**changes: Any) -> DiskFacts:
    values: dict[str, Any] = {"path": "/s", "mount": "/", "device": "d", "kind": "ext4", "free_bytes": GIB}
    return DiskFacts(**{**values, "refusal": "", "blobs": {}, **changes})


@pytest.mark.parametrize(
    ("path", "kind", "severity"),
    [
        ("/data/stores", "nfs4", "warning"),
        ("/mnt/a b/x", "fuse.sshfs", "warning"),
        ("/host", "9p", "warning"),
        ("/run/x", "tmpfs", "warning"),
        ("/work/x", "overlay", "ok"),
        ("/old", "fuseblk", "ok"),
        ("/database", "ext4", "ok"),  # not below /data
        ("/home/x", "ext4", "ok"),  # mounted over the first
    ],
)
def test_the_kind_of_the_file_system(
    path: str, kind: str, severity: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store on a network file system is a warning; an overlay or a local disk is none."""
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(MOUNTS)
    monkeypatch.setattr(Path, "resolve", lambda self, strict=False: Path(path))
    found = read_disk(tmp_path, proc=tmp_path)
    assert found.kind == kind
    assert judge_disk("a", found, None)[0].severity == severity


def test_a_full_disk_is_told_before_anything_is_written(doctor: Callable[..., Any], tmp_path: Path) -> None:
    """The issue's planted fault, with both figures and exit code 3; nothing is left on the disk."""
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o size=200k none {disk}; "$@"; code=$?; ls {disk} >&2; exit $code'
    found = doctor(around=["unshare", "-m", "sh", "-c", script, "sh"], offload={"store": str(disk / "stores")})
    assert found.code == 3
    (full,) = found.of("disk", "error")
    needed, free = map(int, re.findall(r"\((\d+) bytes\)", full["what"]))
    assert free <= 200 << 10 < needed
    assert "offload.store" in full["do"]
    assert [finding["what"] for finding in found.of("disk", "warning")] == [
        f"offload.store is in memory: {disk} (tmpfs on {disk})"
    ]


def test_a_disk_that_cannot_be_written(doctor: Callable[..., Any], tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    script = f'mount -t tmpfs -o ro none {disk}; exec "$@"'
    found = doctor(around=["unshare", "-m", "sh", "-c", script, "sh"], offload={"store": str(disk / "stores")})
    assert found.code == 3
    assert found.of("disk", "error")[0]["what"].endswith("it is mounted read-only")


def test_a_store_that_is_there_needs_no_room_and_is_what_is_measured(
    content: Mapping[str, Any], tmp_path: Path
) -> None:
    config = load_config(content)
    location, _ = pack_model(config, open_model(config), lambda progress: None)
    look = look_here("a", config)
    assert look.failed == ()
    assert look.disk is not None
    assert look.rate is not None
    assert look.rate.bytes_per_s
    assert look.rate.sample in {f"of {path.name}" for path in Path(location.directory).glob("*.bin")}
    assert [finding.severity for finding in judge_disk("a", facts(free_bytes=0, blobs=look.disk.blobs), {})] == ["ok"]
    needed = dict(look.disk.blobs)
    (Path(location.directory) / "embed.tp0.json").unlink()  # written last: without it the blob is packed again
    (finding,) = judge_disk("a", facts(free_bytes=0, blobs=read_disk(Path(location.directory)).blobs), needed)
    assert f"({needed['embed.tp0.bin']} bytes) more" in finding.what


def test_measuring_leaves_nothing(tmp_path: Path) -> None:
    """Not even when it is killed: the sample has no name."""
    store = tmp_path / "not" / "made"
    found = read_disk(store)
    assert found.path == str(tmp_path)
    rate = measure_disk(store, found)
    assert rate.bytes_per_s
    assert list(tmp_path.iterdir()) == []


def test_no_sample_is_written_where_little_is_free(tmp_path: Path) -> None:
    assert measure_disk(tmp_path, facts(path=str(tmp_path), free_bytes=GIB - 1)).bytes_per_s is None


def test_a_slow_disk_matters_where_weights_are_streamed() -> None:
    slow, usual = DiskRate(bytes_per_s=0.2e9, sample="of x"), DiskRate(bytes_per_s=1.1e9, sample="of x")
    effect = ": predicted are 1.0 output tok/s, not 9.0"
    found = judge_rate("a", slow, assumed=2e9, effect=effect)
    assert found.severity == "warning"
    assert "0.20 GB/s" in found.what
    assert "1.0 output tok/s, not 9.0" in found.why
    assert judge_rate("a", slow, assumed=2e9, effect="").severity == "ok"
    assert judge_rate("a", usual, assumed=2e9, effect=effect).severity == "ok"


def test_the_namespaces_of_these_tests_work() -> None:
    """So that they fail for a reason that is told, where they cannot run."""
    done = subprocess.run(["unshare", "-m", sys.executable, "-c", "print(1)"], capture_output=True, check=False)
    assert done.stdout == b"1\n", done.stderr
