"""Each node's part of a packed store: who packs what, who shares a directory, and what a part's manifest says."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_infer import load_config
from dist_infer.config import RunConfig
from dist_infer.messages import decode, encode
from dist_infer.node_store import NodeStore, PackOrder, share_groups, sum_reports, units_by_node
from dist_infer.startup import find_units, open_model, pack_model, pack_units, plan_run
from offload.format import read_manifest
from offload.store_marks import leave_mark, sees_mark
from partition.checkpoint import open_checkpoint
from partition.errors import StoreError
from partition.hardware import HardwareFacts, NodeFacts

GIB = 1 << 30


def run_of(model: Path, store: Path, **sections: Any) -> RunConfig:
    return load_config(
        {
            "model": {"path": str(model)},
            "parallel": {"tensor": 2, "pipeline": 2},
            "offload": {"store": str(store)},
            "engine": {"max_model_len": 64, "max_requests": 2},
            **sections,
        }
    )


def two_nodes() -> HardwareFacts:
    nodes = [
        NodeFacts(
            name=name,
            cores=2,
            memory_bytes=4 * GIB,
            memory_source="test",
            devices=(),
            disk_bytes_per_s=1e9,
            flops=1e11,
            memory_bytes_per_s=1e10,
        )
        for name in ("a", "b")
    ]
    return HardwareFacts(nodes=tuple(nodes))


@pytest.fixture(scope="module")
def parts(tiny_checkpoint: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The two halves of a model packed one after the other into one directory, and what it looked like between."""
    from dist_infer.backend import Footprint

    config = run_of(tiny_checkpoint("llama"), tmp_path_factory.mktemp("parts"))
    model = open_model(config)
    units = units_by_node(plan_run(config, model, two_nodes(), Footprint(rank_bytes=0, launcher_bytes=0)))
    steps: list[str] = []
    first = pack_units(config, model, units[0], lambda progress: steps.append(progress.detail))
    directory = Path(first.location.directory)
    half = read_manifest(directory)
    others_missing = find_units(config, model, units[1]) is None
    second = pack_units(config, model, units[1], lambda progress: None)
    return {
        "config": config,
        "model": model,
        "units": units,
        "first": first,
        "second": second,
        "half": half,
        "others_missing": others_missing,
        "steps": steps,
        "directory": directory,
    }


def test_every_unit_belongs_to_the_node_of_its_stage(parts: dict[str, Any]) -> None:
    units = parts["units"]
    assert list(units) == [0, 1]
    assert units[0][0] == "embed"
    assert units[1][-1] == "head"
    assert not set(units[0]) & set(units[1])
    assert len(units[0]) + len(units[1]) == 10  # 8 layers, embedding, head


def test_a_partial_manifest_is_complete_for_what_it_names(parts: dict[str, Any]) -> None:
    """Guards a node with half of the layers: its half opens, the other half is known to be missing, nothing is both."""
    blobs = {(blob.unit, blob.tp_rank) for blob in parts["half"].blobs}
    assert blobs == {(unit, rank) for unit in parts["units"][0] for rank in range(2)}
    assert parts["others_missing"]
    assert parts["first"].num_written == len(blobs) == 2 * len(parts["units"][0])
    assert Path(parts["first"].sample).is_file()


def test_the_rest_is_added_and_nothing_written_twice(parts: dict[str, Any]) -> None:
    assert parts["second"].num_written == 2 * len(parts["units"][1])
    location, report = pack_model(parts["config"], parts["model"], lambda progress: None)
    assert (report.num_written, report.num_reused) == (0, 20)
    assert Path(location.directory) == parts["directory"]
    again = find_units(parts["config"], parts["model"], parts["units"][0])
    assert again is not None
    assert (again.num_written, again.num_reused) == (0, 2 * len(parts["units"][0]))


def test_a_copy_is_told_from_another_checkpoint(parts: dict[str, Any], tmp_path: Path) -> None:
    """Guards nodes with their own copies: `content` survives copying, the fingerprint that names the store does not."""
    original = parts["model"].index
    shutil.copytree(original.path, tmp_path / "copy", copy_function=shutil.copy)
    copy = open_checkpoint(tmp_path / "copy")
    assert copy.content == original.content
    assert copy.fingerprint != original.fingerprint
    with (tmp_path / "copy" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    assert open_checkpoint(tmp_path / "copy").content != original.content


def test_marks_say_who_shares_a_directory_and_are_swept_by_the_packer(parts: dict[str, Any], tmp_path: Path) -> None:
    leave_mark(tmp_path / "a", "mark-1")
    assert sees_mark(tmp_path / "a", "mark-1")
    assert not sees_mark(tmp_path / "b", "mark-1")
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"offload\.store"):
        leave_mark(tmp_path / "file" / "x", "mark-1")
    config = run_of(parts["model"].path, tmp_path / "stores")
    directory = Path(parts["directory"]).name
    leave_mark(tmp_path / "stores" / directory, "mark-2")
    pack_units(config, parts["model"], ("head",), lambda progress: None)
    assert not sees_mark(tmp_path / "stores" / directory, "mark-2")


@given(st.dictionaries(st.integers(0, 5), st.sets(st.integers(0, 5)), max_size=6))
def test_groups_hold_every_node_once(seen: dict[int, set[int]]) -> None:
    groups = share_groups({node: sorted(others) for node, others in seen.items()})
    assert sorted(node for group in groups for node in group) == sorted(seen)


def test_only_who_sees_each_other_shares() -> None:
    """A mark that one node sees and the other does not is a directory copied meanwhile, say: both pack."""
    assert share_groups({0: [0, 1], 1: [0, 1], 2: [2]}) == [(0, 1), (2,)]
    assert share_groups({0: [0, 1], 1: [1]}) == [(0,), (1,)]


def test_reports_add_up_and_orders_cross_processes(parts: dict[str, Any]) -> None:
    total = sum_reports([parts["first"], parts["second"]])
    assert (total.num_written, total.num_reused) == (20, 0)
    assert total.seconds == max(parts["first"].seconds, parts["second"].seconds)
    both = parts["second"].after(parts["first"])
    assert both.num_written == 20
    order = PackOrder(config_json=parts["config"].model_dump_json(), content="x", units=parts["units"])
    assert decode(PackOrder, encode(order)) == order
    assert decode(NodeStore, encode(parts["first"])) == parts["first"]
