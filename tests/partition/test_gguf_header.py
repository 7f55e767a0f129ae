"""GGUF headers as hostile input, and the config that their metadata stands for."""

import struct

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from partition.checkpoint import check_tensors, open_checkpoint
from partition.errors import CheckpointError, UnsupportedModelError
from partition.gguf_header import SkippedArray, read_gguf_header
from partition.gguf_types import TENSOR_TYPES
from partition.model_spec import ModelSpec

U32, F32, STRING, ARRAY = 4, 6, 8, 9


def text(value):
    data = value.encode()
    return struct.pack("<Q", len(data)) + data


def build(metadata, tensors, *, alignment=32, trailing=b"", version=3):
    """metadata: {key: (type, packed value)}; tensors: [(name, shape rows first, type id)]; data is zeros."""
    out = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    for key, (kind, value) in metadata.items():
        out += text(key) + struct.pack("<I", kind) + value
    offset = 0
    for name, shape, kind in tensors:
        _, block, size = TENSOR_TYPES[kind]
        out += text(name) + struct.pack("<I", len(shape))
        out += b"".join(struct.pack("<Q", dim) for dim in reversed(shape)) + struct.pack("<IQ", kind, offset)
        count = 1
        for dim in shape:
            count *= dim
        offset += -(-count // block * size // alignment) * alignment
    out += b"\0" * (-len(out) % alignment)
    return out + b"\0" * offset + trailing


def u32(value):
    return U32, struct.pack("<I", value)


def tiny(**changes):
    """A two-layer llama with 4 heads of 8, 2 KV heads."""
    tokens = b"".join(text(f"token{i}") for i in range(50))
    metadata = {
        "general.architecture": (STRING, text("llama")),
        "llama.block_count": u32(2),
        "llama.context_length": u32(128),
        "llama.embedding_length": u32(32),
        "llama.feed_forward_length": u32(64),
        "llama.attention.head_count": u32(4),
        "llama.attention.head_count_kv": u32(2),
        "llama.attention.layer_norm_rms_epsilon": (F32, struct.pack("<f", 1e-5)),
        "tokenizer.ggml.tokens": (ARRAY, struct.pack("<IQ", STRING, 50) + tokens),
        "tokenizer.ggml.scores": (ARRAY, struct.pack("<IQ", F32, 3) + struct.pack("<3f", 1, 2, 3)),
        "tokenizer.ggml.eos_token_id": u32(7),
    }
    return {key: value for key, value in (metadata | changes).items() if value is not None}


TENSORS = [("token_embd.weight", (50, 32), 0), ("output_norm.weight", (32,), 0)] + [
    (f"blk.{i}.{name}.weight", shape, kind)
    for i in range(2)
    for name, shape, kind in (
        ("attn_norm", (32,), 0),
        ("attn_q", (32, 32), 2),
        ("attn_k", (16, 32), 8),
        ("attn_v", (16, 32), 8),
        ("attn_output", (32, 32), 1),
        ("ffn_gate", (64, 32), 3),
        ("ffn_up", (64, 32), 3),
        ("ffn_down", (32, 64), 3),
        ("ffn_norm", (32,), 0),
    )
]


def write(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    return path


def test_metadata_shapes_and_byte_ranges(tmp_path):
    path = write(tmp_path, build(tiny(), TENSORS))
    header = read_gguf_header(path)
    assert header.metadata["tokenizer.ggml.tokens"] == SkippedArray(length=50)
    assert header.metadata["tokenizer.ggml.scores"] == [1.0, 2.0, 3.0]
    found = {entry.name: entry for entry in header.tensors}
    assert (found["blk.0.ffn_down.weight"].shape, found["blk.0.ffn_down.weight"].dtype) == ((32, 64), "Q4_1")
    assert found["blk.0.ffn_down.weight"].end - found["blk.0.ffn_down.weight"].start == 32 * 64 // 32 * 20


def test_the_config_and_the_check(tmp_path):
    index = open_checkpoint(write(tmp_path, build(tiny(), TENSORS)))
    assert index.kind == "gguf"
    spec = ModelSpec.from_config(index.config)
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim, spec.vocab_size, spec.tied) == (2, 2, 8, 50, True)
    assert (index.config["eos_token_id"], index.config["attention_bias"]) == (7, False)
    check_tensors(spec, index)


def test_a_wrong_shape_and_a_missing_block_are_named(tmp_path):
    wrong = [(n, (16, 32) if n == "blk.1.attn_q.weight" else s, k) for n, s, k in TENSORS]
    index = open_checkpoint(write(tmp_path, build(tiny(), wrong)))
    with pytest.raises(CheckpointError, match=r"blk\.1\.attn_q\.weight.*\[16, 32\].*\[32, 32\]"):
        check_tensors(ModelSpec.from_config(index.config), index)
    index = open_checkpoint(write(tmp_path, build(tiny(), [t for t in TENSORS if not t[0].startswith("blk.1")])))
    with pytest.raises(CheckpointError, match=r"blk\.1"):
        check_tensors(ModelSpec.from_config(index.config), index)


def test_the_block_sizes_are_those_of_the_gguf_package():
    gguf = pytest.importorskip("gguf")
    for kind, (name, block, size) in TENSOR_TYPES.items():
        known = gguf.GGMLQuantizationType(kind)
        assert (known.name, gguf.GGML_QUANT_SIZES[known]) == (name, (block, size))


def test_what_the_gguf_package_writes_is_read(tmp_path):
    gguf, numpy = pytest.importorskip("gguf"), pytest.importorskip("numpy")
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    writer.add_block_count(1)
    writer.add_tensor("token_embd.weight", numpy.zeros((6, 4), dtype=numpy.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(tmp_path / "w.gguf")
    assert header.metadata["llama.block_count"] == 1
    assert header.tensors[0].shape == (6, 4)


def test_truncation_anywhere_is_noticed(tmp_path):
    whole = build(tiny(), TENSORS)
    for size in [*range(4, 1500, 7), len(whole) - 40, len(whole) - 1024]:
        with pytest.raises(CheckpointError, match="truncated"):
            read_gguf_header(write(tmp_path, whole[:size]))


def test_a_text_longer_than_the_file_is_noticed_in_the_fast_path(tmp_path):
    tokens = text("ok") + struct.pack("<Q", 2**40) + b"short"
    bad = tiny(**{"tokenizer.ggml.tokens": (ARRAY, struct.pack("<IQ", STRING, 50) + tokens)})
    with pytest.raises(CheckpointError):
        read_gguf_header(write(tmp_path, build(bad, TENSORS)))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"GGML" + b"\0" * 100, "not a GGUF"),
        (build(tiny(), TENSORS, version=1), "version 1"),
        (build(tiny(), TENSORS, trailing=b"x" * 64), "trailing bytes"),
        (build(tiny(), [*TENSORS, TENSORS[0]]), "twice"),
        (build(tiny(**{"general.alignment": u32(24)}), TENSORS), "power of two"),
        (build(tiny(**{"odd": (77, b"")}), TENSORS), "unknown type 77"),
        (build(tiny(**{"nested": (ARRAY, struct.pack("<IQ", ARRAY, 1))}), TENSORS), "items of the unknown type 9"),
        (build(tiny(), [("token_embd.weight", (50, 33), 2)]), "block of 32"),
    ],
)
def test_damage_is_named(tmp_path, content, says):
    with pytest.raises(CheckpointError, match=says):
        read_gguf_header(write(tmp_path, content))


@pytest.mark.parametrize(
    ("metadata", "tensors", "says"),
    [
        (tiny(**{"general.architecture": (STRING, text("mamba"))}), TENSORS, "'mamba' is not supported"),
        (tiny(**{"split.count": u32(3)}), TENSORS, "split GGUF"),
        (tiny(), [*TENSORS, ("rope_freqs.weight", (4,), 0)], "rotary factors"),
        (tiny(**{"llama.rope.scaling.type": (STRING, text("yarn"))}), TENSORS, "'yarn'"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(tmp_path, metadata, tensors, says):
    with pytest.raises(UnsupportedModelError, match=says):
        open_checkpoint(write(tmp_path, build(metadata, tensors)))


@pytest.mark.parametrize("length", [1, 5, 16, 301, 5_000_000])
def test_a_vocabulary_larger_than_the_read_buffer(tmp_path, length):
    """The fast path must go on correctly where a text crosses from one chunk of the file into the next."""
    count = 9_000_000 // (8 + length) + 2
    tokens = text("x" * length) * count
    big = tiny(**{"tokenizer.ggml.tokens": (ARRAY, struct.pack("<IQ", STRING, count) + tokens)})
    header = read_gguf_header(write(tmp_path, build(big, TENSORS)))
    assert header.metadata["tokenizer.ggml.eos_token_id"] == 7
    assert len(header.tensors) == len(TENSORS)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_mutations_end_in_a_header_or_a_typed_error(tmp_path, data):
    content = bytearray(build(tiny(), TENSORS))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, 2500))] = data.draw(st.integers(0, 255))
    try:
        index = open_checkpoint(write(tmp_path, content))
    except CheckpointError:
        return
    assert all(entry.end <= len(content) for entry in index.tensors.values())
