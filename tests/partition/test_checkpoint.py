"""What is a checkpoint, what is refused, when the fingerprint changes, and whether tensors match the config."""

import json
import os
import struct

import pytest

from partition.checkpoint import check_tensors, open_checkpoint
from partition.errors import CheckpointError, UnsupportedModelError
from partition.model_spec import ModelSpec
from partition.sharding import units_of

LLAMA = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "vocab_size": 40,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
}
MOE = LLAMA | {"num_local_experts": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}


def shapes_of(config):
    return {p.name: p.shape for unit in units_of(ModelSpec.from_config(config)) for p in unit.parameters}


def save(path, shapes, dtype="F32", size=4):
    header, at = {}, 0
    for name, shape in shapes.items():
        count = 1
        for dim in shape:
            count *= dim
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + count * size]}
        at += count * size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * at)


def model(tmp_path, config=LLAMA, shapes=None, **saving):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save(tmp_path / "model.safetensors", shapes_of(config) if shapes is None else shapes, **saving)
    return tmp_path


def sharded(tmp_path):
    """Two shards and their index."""
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    shapes = shapes_of(LLAMA)
    parts = [dict(list(shapes.items())[:5]), dict(list(shapes.items())[5:])]
    weight_map = {}
    for number, part in enumerate(parts):
        save(tmp_path / f"model-{number}.safetensors", part)
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    return weight_map


def write_index(tmp_path, weight_map):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_whole_checkpoint_passes(tmp_path):
    index = open_checkpoint(model(tmp_path))
    assert (index.kind, [fact.name for fact in index.files]) == ("safetensors", ["model.safetensors"])
    check_tensors(ModelSpec.from_config(index.config), index)


def test_shards_are_joined(tmp_path):
    write_index(tmp_path, sharded(tmp_path))
    index = open_checkpoint(tmp_path)
    assert len(index.files) == 2
    check_tensors(ModelSpec.from_config(index.config), index)


def test_a_missing_shard_is_named(tmp_path):
    write_index(tmp_path, sharded(tmp_path))
    (tmp_path / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors.*missing"):
        open_checkpoint(tmp_path)


def test_shards_without_their_index_are_refused(tmp_path):
    sharded(tmp_path)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index\.json"):
        open_checkpoint(tmp_path)


def test_a_tensor_that_is_listed_but_absent(tmp_path):
    weight_map = sharded(tmp_path)
    write_index(tmp_path, weight_map | {"ghost": "model-0.safetensors"})
    with pytest.raises(CheckpointError, match="'ghost'"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards(tmp_path):
    weight_map = sharded(tmp_path)
    save(tmp_path / "model-1.safetensors", shapes_of(LLAMA))
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="in both"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin", 5, None])
def test_the_index_cannot_lead_out_of_the_directory(tmp_path, file):
    sharded(tmp_path)
    write_index(tmp_path, {"w": file})
    with pytest.raises(CheckpointError, match="no shard"):
        open_checkpoint(tmp_path)


def test_pickled_weights_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        open_checkpoint(tmp_path)


def test_a_config_alone_can_be_opened_but_not_launched(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    index = open_checkpoint(tmp_path)
    assert index.kind == "config_only"
    with pytest.raises(CheckpointError, match="planned, not launched"):
        check_tensors(ModelSpec.from_config(index.config), index)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a": 1, "a": 2}', b"\xff", b"[" * 100_000])
def test_a_damaged_config_is_refused(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        open_checkpoint(tmp_path)


def test_no_checkpoint_at_all(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError):
            open_checkpoint(path)
    (tmp_path / "file.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="directory with config"):
        open_checkpoint(tmp_path / "file.safetensors")


def test_the_fingerprint_changes_with_the_source(tmp_path):
    path = model(tmp_path)
    weights = path / "model.safetensors"
    seen = [open_checkpoint(path).fingerprint]
    assert open_checkpoint(path).fingerprint == seen[0]
    before = weights.stat()

    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns + 1))  # same bytes, new mtime
    seen.append(open_checkpoint(path).fingerprint)

    content = bytearray(weights.read_bytes())  # new bytes, same size and mtime
    content[-1000:] = b"\1" * 1000
    weights.write_bytes(content)
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
    seen.append(open_checkpoint(path).fingerprint)

    (path / "config.json").write_text(json.dumps(LLAMA | {"rope_theta": 5}))
    seen.append(open_checkpoint(path).fingerprint)
    assert len(set(seen)) == 4


def test_a_missing_and_a_misshapen_tensor_are_named(tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    shapes = shapes_of(LLAMA)
    index = open_checkpoint(model(tmp_path, shapes={k: v for k, v in shapes.items() if k != name}))
    with pytest.raises(CheckpointError, match=rf"lacks tensor '{name}' of shape \[24, 16\]"):
        check_tensors(ModelSpec.from_config(LLAMA), index)
    index = open_checkpoint(model(tmp_path, shapes=shapes | {name: (16, 24)}))
    with pytest.raises(CheckpointError, match=r"\[16, 24\].*\[24, 16\]"):
        check_tensors(ModelSpec.from_config(LLAMA), index)


def test_only_a_tied_head_may_be_absent(tmp_path):
    shapes = {k: v for k, v in shapes_of(LLAMA).items() if k != "lm_head.weight"}
    index = open_checkpoint(model(tmp_path, shapes=shapes))
    check_tensors(ModelSpec.from_config(LLAMA | {"tie_word_embeddings": True}), index)
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        check_tensors(ModelSpec.from_config(LLAMA), index)


def test_a_bias_that_the_config_does_not_mention_is_refused(tmp_path):
    """Otherwise the model would be computed without it: fluent nonsense, no error."""
    shapes = shapes_of(LLAMA) | {"model.layers.0.self_attn.q_proj.bias": (16,)}
    index = open_checkpoint(model(tmp_path, shapes=shapes))
    with pytest.raises(CheckpointError, match=r"q_proj\.bias"):
        check_tensors(ModelSpec.from_config(LLAMA), index)


def test_tensors_beyond_the_model_are_ignored(tmp_path):
    shapes = shapes_of(LLAMA) | {"model.layers.2.mtp.weight": (3,), "model.layers.0.self_attn.rotary_emb.weight": (2,)}
    check_tensors(ModelSpec.from_config(LLAMA), open_checkpoint(model(tmp_path, shapes=shapes)))


def test_quantized_weights_are_refused(tmp_path):
    index = open_checkpoint(model(tmp_path, LLAMA | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(UnsupportedModelError, match="fp8"):
        check_tensors(ModelSpec.from_config(LLAMA), index)
    index = open_checkpoint(model(tmp_path, LLAMA, dtype="I32"))
    with pytest.raises(UnsupportedModelError, match="I32"):
        check_tensors(ModelSpec.from_config(LLAMA), index)


def test_a_composite_checkpoint_is_checked_under_its_prefix(tmp_path):
    renamed = {
        f"model.language_model.{name.removeprefix('model.')}" if name.startswith("model.") else name: shape
        for name, shape in shapes_of(LLAMA).items()
    }
    config = {"model_type": "some_vision_model", "text_config": LLAMA}
    index = open_checkpoint(model(tmp_path, config, shapes=renamed))
    check_tensors(ModelSpec.from_config(config), index)


@pytest.mark.parametrize(
    ("family", "folder", "leaves"),
    [
        ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
    ],
)
def test_experts_stored_one_by_one_are_all_checked(tmp_path, family, folder, leaves):
    config = MOE | {"model_type": family}
    inter = ModelSpec.from_config(config).dims["moe_inter"]
    shapes = {}
    for name, shape in shapes_of(config).items():
        if name.endswith("mlp.gate.weight"):
            shapes[name.replace(".mlp.", f".{folder}.")] = shape
        elif name.endswith("experts.gate_up_proj"):
            for expert in range(2):
                base = name.replace(".mlp.", f".{folder}.").replace("gate_up_proj", str(expert))
                shapes |= {f"{base}.{leaf}.weight": (inter, 16) for leaf in leaves[:2]}
                shapes[f"{base}.{leaves[2]}.weight"] = (16, inter)
        elif not name.endswith("experts.down_proj"):
            shapes[name] = shape
    check_tensors(ModelSpec.from_config(config), open_checkpoint(model(tmp_path, config, shapes=shapes)))
    lost = next(name for name in shapes if f"experts.1.{leaves[2]}" in name)
    del shapes[lost]
    with pytest.raises(CheckpointError, match=lost.replace(".", r"\.")):
        check_tensors(ModelSpec.from_config(config), open_checkpoint(model(tmp_path, config, shapes=shapes)))
