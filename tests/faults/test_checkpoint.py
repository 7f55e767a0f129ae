"""FAULTS T12, T14 and hostile headers: a checkpoint that is not whole, or not what it says, is refused when opened."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dist_infer.config import load_config
from dist_infer.startup import open_model
from partition.checkpoint import open_checkpoint
from partition.errors import CheckpointError

WEIGHTS = "model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def open_it(model: Path) -> None:
    """What every command does with a model before anything else."""
    open_model(load_config({"model": {"path": str(model)}}))


@pytest.fixture
def model(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    return shutil.copytree(tiny_checkpoint("llama", num_hidden_layers=2), tmp_path / "model")


@pytest.fixture
def sharded(model: Path) -> Path:
    """The same in two shards: the even tensors and the odd ones."""
    tensors = sorted(load_file(model / WEIGHTS).items())
    weight_map = {}
    for number, shard in enumerate(SHARDS):
        part = dict(tensors[number::2])
        save_file(part, model / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (model / WEIGHTS).unlink()
    open_it(model)
    return model


def header_bytes(file: Path) -> int:
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@pytest.mark.parametrize(
    "shorter",
    [
        lambda file: file.stat().st_size - 1,
        lambda file: file.stat().st_size - 4096,
        lambda file: header_bytes(file) - 9,
    ],
    ids=["1 byte", "4 KiB", "inside the header"],
)
def test_a_truncated_shard_is_refused_with_both_sizes(sharded, shorter):
    """T12."""
    file = sharded / SHARDS[1]
    whole, part = file.stat().st_size, shorter(file)
    needed = whole if part >= header_bytes(file) else header_bytes(file)
    os.truncate(file, part)
    with pytest.raises(CheckpointError, match=rf"{SHARDS[1]} is truncated: .* {needed} bytes, the file has {part}\b"):
        open_it(sharded)


def test_bytes_behind_the_last_tensor_are_refused_with_both_sizes(sharded):
    """T12: two downloads into one file, or a header that is not of these bytes."""
    file = sharded / SHARDS[0]
    size = file.stat().st_size
    with open(file, "ab") as end:
        end.write(b"\0" * 3)
    with pytest.raises(CheckpointError, match=rf"{SHARDS[0]} has trailing bytes: .* {size} bytes, .* has {size + 3}\b"):
        open_it(sharded)


@pytest.mark.parametrize("at_end", [False, True])
def test_a_hole_that_was_never_written_is_refused(sharded, at_end):
    """T12: a download that reserved its space and lost a piece has the right size, and zeros for weights."""
    file = sharded / SHARDS[0]
    content = file.read_bytes()
    start = len(content) - 8192 if at_end else 32768
    start -= start % 4096
    with open(file, "wb") as copy:
        copy.write(content[:start])
        if at_end:
            copy.truncate(len(content))
        else:
            copy.seek(start + 8192)
            copy.write(content[start + 8192 :])
    assert file.stat().st_size == len(content)
    with pytest.raises(CheckpointError, match=rf"{SHARDS[0]} was never written completely: bytes {start} to \d+ of"):
        open_it(sharded)


def test_a_hole_in_a_gguf_is_refused(tmp_path):
    """T12."""
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", torch.zeros(64, 256).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = tmp_path / "m.gguf"
    size = file.stat().st_size
    os.truncate(file, size - 16384)
    os.truncate(file, size)
    with pytest.raises(CheckpointError, match=r"m\.gguf was never written completely"):
        open_checkpoint(file)


def test_zeros_that_were_written_are_weights(model):
    """A padded vocabulary has rows of zeros; only what was never written is a hole."""
    tensors = load_file(model / WEIGHTS)
    tensors["model.embed_tokens.weight"] = torch.zeros_like(tensors["model.embed_tokens.weight"])
    save_file(tensors, model / WEIGHTS, metadata={"format": "pt"})
    open_it(model)


def test_a_missing_shard_is_named(sharded):
    """T14."""
    (sharded / SHARDS[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"the shard {SHARDS[1]} with \d+ tensors is missing"):
        open_it(sharded)


def test_two_shards_swapped_are_refused_with_a_tensor_and_its_file(sharded):
    """T14."""
    first, second = (sharded / shard for shard in SHARDS)
    first.rename(sharded / "other")
    second.rename(first)
    (sharded / "other").rename(second)
    with pytest.raises(CheckpointError, match=rf"says that tensor '[a-z.0-9_]+' is in {SHARDS[0]}, but it is not"):
        open_it(sharded)


def test_a_tensor_in_two_shards_is_refused_by_name(sharded):
    """T14."""
    name = "model.layers.1.mlp.up_proj.weight"
    parts = {shard: load_file(sharded / shard) for shard in SHARDS}
    for part in parts.values():
        part[name] = torch.zeros(96, 72)
    for shard, part in parts.items():
        save_file(part, sharded / shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"'{name}' is in both {SHARDS[0]} and {SHARDS[1]}"):
        open_it(sharded)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (torch.zeros(96, 71), r"shape \[96, 71\], .* \[96, 72\]"),
        (torch.zeros(72, 96), r"shape \[72, 96\], .* \[96, 72\]"),
        (torch.zeros(96, 72, dtype=torch.int32), "is I32, not a float"),
        (torch.zeros(96, 72, dtype=torch.bool), "is BOOL, not a float"),
    ],
    ids=["shape", "turned", "int32", "bool"],
)
def test_a_tensor_of_another_shape_or_type_is_refused_by_name(model, wrong, words):
    """T14."""
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({**load_file(model / WEIGHTS), name: wrong}, model / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"tensor '{name}'.* {words}"):
        open_it(model)


def test_a_type_that_is_not_that_of_the_bytes_is_refused_by_name(model):
    """T14: the header says F16 of bytes that were F32."""
    file = model / WEIGHTS
    content = file.read_bytes()
    at = content.index(b'"model.layers.1.mlp.up_proj.weight"')
    file.write_bytes(content[:at] + content[at:].replace(b'"F32"', b'"F16"', 1))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight'.* of F16 is 13824 bytes"):
        open_it(model)


MUTATE = """
import random, resource, signal, struct, sys
from pathlib import Path
from partition.checkpoint import open_checkpoint
from partition.errors import CheckpointError

MEMORY = 200 << 20
SECONDS = 2.0
number, work = 0, Path(sys.argv[1])
seeds = [Path(name) for name in sys.argv[3:]]


def mutated(content, random):
    # one to four changes, most of them in the header: bytes, numbers, lengths, pieces moved, removed, doubled
    data = bytearray(content)
    header = min(len(data), 4096)
    for _ in range(random.randint(1, 4)):
        at = random.randrange(min(header, len(data)) or 1)
        kind = random.randrange(7)
        if not data:
            break
        if kind == 0:
            data[at] = random.randrange(256)
        elif kind == 1:
            data[at] ^= 1 << random.randrange(8)
        elif kind == 2:
            value = random.choice([0, 1, 2**31 - 1, 2**32 - 1, 2**62, 2**63, 2**64 - 1, random.getrandbits(64)])
            size = random.choice("IQ")
            data[at : at + struct.calcsize(size)] = struct.pack("<" + size, value % 2 ** (8 * struct.calcsize(size)))
        elif kind == 3:
            digits = [i for i in range(header) if i < len(data) and 48 <= data[i] <= 57]
            if digits:
                at = random.choice(digits)
                long = b"9" * random.randint(1, 400)
                data[at : at + 1] = random.choice([long, b"-1", b"1e9", b"0.5", b"null", b"[" * 99])
        elif kind == 4:
            del data[at : at + random.choice([1, 8, 100, len(data)])]
        elif kind == 5:
            piece = data[at : at + random.choice([1, 8, 100, 2000])]
            where = random.randrange(len(data))
            data[where:where] = piece
        else:
            piece = random.choice([b'"', b"{", b"}", b",", b"\\\\ud800", b"\\xff", bytes(8), b"GGUF"])
            data[at : at + len(piece)] = piece
    return bytes(data)


def too_slow(*_):
    raise SystemExit(f"mutation {number} takes more than {SECONDS} s")


signal.signal(signal.SIGALRM, too_slow)
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
refused = 0
for number in range(int(sys.argv[2])):
    seed = seeds[number % len(seeds)]
    content = mutated(seed.read_bytes(), random.Random(number))
    work.joinpath(seed.name).unlink(missing_ok=True)  # writing over it, ext4 would wait for the disk each time
    work.joinpath(seed.name).write_bytes(content)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        index = open_checkpoint(work if seed.suffix == ".safetensors" else work / seed.name)
    except CheckpointError:
        refused += 1
    except BaseException as error:
        raise SystemExit(f"mutation {number} of {seed.name}: {type(error).__name__}: {error}")
    else:
        for entry in index.tensors.values():
            if not 0 <= entry.start <= entry.end <= len(content):
                raise SystemExit(f"mutation {number} of {seed.name}: {entry} is outside of the file")
    signal.setitimer(signal.ITIMER_REAL, 0)
print(refused)
"""


def tiny_gguf(path: Path) -> None:
    """A GGUF as converters write it: keys of all kinds, a vocabulary, several tensor types."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_token_list([f"token{i}" for i in range(40)])
    writer.add_token_scores([0.5] * 40)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)
    for name, shape in (("token_embd", (40, 32)), ("output_norm", (32,)), ("blk.0.attn_q", (32, 32))):
        writer.add_tensor(f"{name}.weight", torch.zeros(shape).numpy())
    blocks = torch.zeros(64, 18, dtype=torch.uint8).numpy()  # 32 elements of Q4_0 in each row
    writer.add_tensor("blk.0.ffn_up.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    open_checkpoint(path)


@pytest.mark.slow
def test_ten_thousand_mutated_headers_end_in_a_header_or_a_typed_error(tmp_path):
    """Never another exception, never 200 MB, never two seconds; what is accepted lies inside of the file."""
    tiny_gguf(tmp_path / "seed.gguf")
    tensors = {f"model.layers.{number}.mlp.up_proj.weight": torch.zeros(number, 4) for number in range(20)}
    save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
    work = tmp_path / "work"
    work.mkdir()
    (work / "config.json").write_text("{}")
    command = [sys.executable, "-c", MUTATE, work, "10000", tmp_path / WEIGHTS, tmp_path / "seed.gguf"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 8000 < int(done.stdout) < 10000  # most are refused; some changes are harmless


def test_a_name_listed_twice_among_many_is_found_at_once(tmp_path):
    """A header with 100,000 names and the last of them doubled took minutes to be refused."""
    names = [f'"tensor.{number}":0' for number in range(100_000)]
    text = ("{" + ",".join([*names, names[-1]]) + "}").encode()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=r"'tensor\.99999' is there twice"):
        open_checkpoint(tmp_path)
