"""What computing takes beside weights and KV: nothing large is left out of a plan."""

from dataclasses import replace

import pytest

from partition.activations import activation_bytes
from partition.families import family_of
from partition.hardware import HardwareFacts, NodeFacts
from partition.kv_layout import kv_bytes_per_token
from partition.model_spec import ModelSpec
from partition.plan import make_plan
from partition.plan_data import HEAD_ROWS, PlanOptions
from partition.work import prepare

SPEC = ModelSpec.from_config(
    {
        "model_type": "mistral",
        "num_hidden_layers": 4,
        "hidden_size": 256,
        "vocab_size": 50_000,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 512,
        "max_position_embeddings": 4096,
        "sliding_window": None,
    }
)
NODE = NodeFacts(
    name="a",
    cores=4,
    memory_bytes=64 << 30,
    memory_source="cgroup",
    devices=(),
    disk_bytes_per_s=1.5e9,
    flops=1e12,
    memory_bytes_per_s=20e9,
)
HARDWARE = HardwareFacts(nodes=(NODE,))


def options(**changes):
    wanted = {"max_requests": 8, "max_batch_tokens": 64, "max_model_len": 2048, "dtype": "float32"} | changes
    return PlanOptions(name="x", host_memory=8 << 30, process_footprint_bytes=0, **wanted)


def activations(spec, ring_rows=(), **changes):
    work = prepare(spec, HARDWARE, options(**changes), embedding_rows=False)
    return activation_bytes(work, work.stages[0], 0, 1, ring_rows)


def unpacked(kv_elements, *, eager, path="fallback"):
    table = {**family_of("mistral"), "eager": eager}
    return replace(SPEC, path=path, kv_elements=kv_elements, table=table)


def test_one_request_still_computes_rows_of_its_prompt():
    """Guards log-probabilities of prompts, which take HEAD_ROWS rows at once however few requests there are."""
    drawing = 50_000 * 80
    assert activations(SPEC, max_requests=2) - activations(SPEC, max_requests=1) == drawing
    more = activations(SPEC, max_requests=HEAD_ROWS + 1) - activations(SPEC, max_requests=HEAD_ROWS)
    assert more == 3 * 50_000 * 4  # drawing is in slices there


def test_eager_attention_is_counted_whole():
    """It knows no slices: 8 MiB were counted for scores of which a long sequence takes a hundred times as much."""
    kept = (4 * 64,) * 4
    scores = 64 * 2048 * 8
    assert activations(unpacked(kept, eager=True)) - activations(unpacked(kept, eager=False)) == 12 * scores
    assert activations(unpacked(kept, eager=True), max_model_len=4096) > 24 * scores


def test_without_attention_there_are_no_scores():
    """The library calls a mamba's attention eager, and it has none."""
    nothing = unpacked((0,) * 4, eager=True, path="stepwise")
    assert activations(nothing) == activations(nothing, max_model_len=4096)


@pytest.mark.parametrize("path", ["fallback", "stepwise"])
def test_a_plan_counts_what_the_librarys_caches_keep(path):
    """Not heads times width: falcon's 71 query heads share one key, and a mamba keeps nothing of a token."""
    spec = unpacked((0, 64, 0, 96), eager=False, path=path)
    assert kv_bytes_per_token(spec, "float32") == 160 * 4
    made = make_plan(spec, HARDWARE, options(pipeline=2, kv_memory=1 << 20))
    assert [rank.kv_bytes for rank in made.ranks] == [made.num_kv_blocks * 16 * size * 4 for size in (64, 96)]
    assert made.num_kv_blocks == (1 << 20) // (16 * 96 * 4)
    states = make_plan(unpacked((0,) * 4, eager=True, path=path), HARDWARE, options())
    assert [rank.kv_bytes for rank in states.ranks] == [0]
    assert states.num_kv_blocks * 16 >= 8 * 2048


def test_the_copy_of_a_context_is_counted():
    """Blocks that do not follow each other are gathered and a wrapped ring is joined, at every decoded token."""
    row, wide = 4 * 64 * 4, {"max_batch_tokens": 512}  # at which scores are in slices
    tokens = activations(SPEC, max_model_len=4096, **wide) - activations(SPEC, max_model_len=2048, **wide)
    assert tokens == 2048 * row
    windowed = replace(SPEC, windows=(64,) * 4)
    assert activations(windowed, **wide) - activations(windowed, (576,) * 4, **wide) == (2048 - 576) * row
