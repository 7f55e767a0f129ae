"""Safetensors headers as hostile input: the right file is read, everything else is a CheckpointError."""

import json
import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partition.errors import CheckpointError
from partition.safetensors_header import read_safetensors_header

HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "empty": {"dtype": "F32", "shape": [0], "data_offsets": [32, 32]},
}


def pack(header, data=b"x" * 32):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def change(name, **fields):
    return HEADER | {name: HEADER[name] | fields}


def test_a_right_file_is_read(tmp_path):
    path = tmp_path / "m.safetensors"
    path.write_bytes(pack(HEADER))
    tensors = {entry.name: entry for entry in read_safetensors_header(path).tensors}
    start = path.stat().st_size - 32
    assert (tensors["a"].dtype, tensors["a"].shape) == ("F32", (2, 3))
    assert (tensors["b"].start, tensors["b"].end) == (start + 24, start + 32)
    assert set(tensors) == {"a", "b", "empty"}


def test_what_safetensors_itself_writes_is_read(tmp_path):
    torch = pytest.importorskip("torch")
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file({"w": torch.zeros(3, 5, dtype=torch.bfloat16), "n": torch.zeros(2)}, tmp_path / "m.safetensors")
    tensors = {entry.name: entry for entry in read_safetensors_header(tmp_path / "m.safetensors").tensors}
    assert (tensors["w"].dtype, tensors["w"].shape) == ("BF16", (3, 5))


def test_truncation_anywhere_is_noticed(tmp_path):
    whole = pack(HEADER)
    path = tmp_path / "m.safetensors"
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated"):
            read_safetensors_header(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (pack(HEADER, b"x" * 33), "trailing bytes"),
        (pack(change("b", data_offsets=[20, 28])), "overlaps"),
        (pack(change("b", data_offsets=[28, 36]), b"x" * 36), "hole of 4"),
        (pack(change("a", dtype="F31")), "unknown dtype 'F31'"),
        (pack(change("a", dtype=["F32"])), "unknown dtype"),
        (pack(change("a", shape=[2, 4])), "32 bytes, its data_offsets hold 24"),
        (pack(change("a", shape=[-2, -3])), "no list of whole numbers"),
        (pack(change("a", shape=[2.0, 3])), "no list of whole numbers"),
        (pack(change("a", shape=[True, 6])), "no list of whole numbers"),
        (pack(change("a", data_offsets=[24, 0])), "data_offsets"),
        (pack(change("a", data_offsets=[0])), "data_offsets"),
        (pack(change("a", extra=1)), "exactly dtype, shape"),
        (pack(HEADER | {"a": 5}), "exactly dtype, shape"),
        (pack(b'{"a": 1, "a": 2}'), "'a' is there twice"),
        (pack(b"[1, 2]"), "not a JSON object"),
        (pack(b"{" * 30), "not valid JSON"),
        (pack(b"[" * 200_000), "not valid JSON"),
        (pack(b"\xff\xfe{}"), "not valid JSON"),
        (struct.pack("<Q", 2**63) + b"{}", "claims 9223372036854775808"),
    ],
)
def test_damage_is_named(tmp_path, content, says):
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=says):
        read_safetensors_header(path)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_end_in_a_header_or_a_typed_error(tmp_path, data):
    content = bytearray(pack(HEADER))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path / "m.safetensors"
    path.write_bytes(content)
    try:
        header = read_safetensors_header(path)
    except CheckpointError:
        return
    assert all(entry.end <= len(content) for entry in header.tensors)
