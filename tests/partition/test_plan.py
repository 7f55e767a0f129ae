"""Plans: every rank fits its budget, nothing is lost or planned twice, misfits say what to turn."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partition.cost import active_parameters, costs_of, predict, stage_loads
from partition.encoding import EncodingChoice
from partition.errors import BudgetError, ConfigError
from partition.hardware import DeviceFacts, HardwareFacts, NodeFacts
from partition.model_spec import ModelSpec
from partition.plan import PlanOptions, describe, make_plan, plan_from_json, plan_to_json, unit_bytes
from partition.sharding import cut_axes, units_of

DATA = Path(__file__).parent.parent / "data"
MIB, GIB = 1 << 20, 1 << 30

SPEC = ModelSpec.from_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 12,
        "hidden_size": 576,
        "vocab_size": 8192,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 1536,
        "max_position_embeddings": 4096,
    }
)
WEIGHTS = sum(unit_bytes(unit, cut_axes(SPEC, 1), 0, "bfloat16") for unit in units_of(SPEC))


def node(name="a", memory=8 * GIB, cores=4, devices=0, device_memory=2 * GIB, disk=1.5e9, flops=5e11):
    device = DeviceFacts(name="gpu", memory_bytes=device_memory, link_bytes_per_s=10e9)
    return NodeFacts(
        name=name,
        cores=cores,
        memory_bytes=memory,
        memory_source="cgroup",
        devices=(device,) * devices,
        disk_bytes_per_s=disk,
        flops=flops,
        memory_bytes_per_s=20e9,
        assumed=("flops",),
    )


def cluster(count=1, **facts):
    return HardwareFacts(nodes=tuple(node(f"n{i}", **facts) for i in range(count)), network_bytes_per_s=1e9)


def options(**changes):
    return PlanOptions(name="test", process_footprint_bytes=100 * MIB, **changes)


def check(plan, hardware, encodings=None):
    """What must hold for every plan."""
    assert [rank.rank for rank in plan.ranks] == list(range(plan.tensor * plan.pipeline))
    for tp in range(plan.tensor):
        column = [rank for rank in plan.ranks if rank.tp_rank == tp]
        cut = cut_axes(plan.model, plan.tensor)
        kept_as = encodings or EncodingChoice(wished=plan.encoding.partition("-g")[0])
        expected = [(unit.name, unit_bytes(unit, cut, tp, plan.dtype, kept_as)) for unit in units_of(plan.model)]
        assert [(unit.name, unit.num_bytes) for rank in column for unit in rank.units] == expected
    for rank in plan.ranks:
        assert rank.rank == rank.stage * plan.tensor + rank.tp_rank
        leader = plan.stage_ranks(rank.stage)[0]
        assert rank.node == leader.node
        assert [unit.tier for unit in rank.units] == [unit.tier for unit in leader.units]
        assert (rank.num_slots, rank.num_device_slots) == (leader.num_slots, leader.num_device_slots)
        assert rank.num_kv_blocks == plan.num_kv_blocks
        on_disk = [unit.disk_bytes for unit in rank.units if unit.tier == "nvme"]
        assert (rank.num_slots >= 2) == bool(on_disk)
        assert rank.slot_bytes >= max(on_disk, default=0)
        twice = 0
        for unit, same in zip(rank.units, leader.units, strict=True):
            assert (unit.kept_bytes, unit.streamed_from) == (0, 0) or unit.tier == "nvme"
            assert bool(unit.kept_bytes) == bool(same.kept_bytes)
            assert unit.kept_bytes % 4096 == unit.streamed_from % 4096 == 0
            assert unit.streamed_from <= unit.kept_bytes <= unit.streamed_from + 4096
            assert unit.kept_bytes < unit.num_bytes
            twice += unit.kept_bytes - unit.streamed_from
        moved = sum(unit.num_bytes for unit in rank.units) - rank.resident_bytes
        assert rank.streamed_bytes_per_pass == moved + twice
        if plan.device == "cuda":
            assert rank.device_bytes <= hardware.nodes[rank.node].devices[0].memory_bytes
            assert (rank.num_device_slots == 2) == bool(rank.streamed_bytes_per_pass)
        else:
            assert rank.device_bytes == 0
    assert plan.num_kv_blocks * plan.block_tokens >= plan.max_model_len >= 2
    (choice,) = (choice for choice in plan.kv_choices if choice.chosen)
    assert plan.prediction == predict(
        plan.model,
        plan.ranks,
        hardware,
        dtype=plan.dtype,
        batch=choice.batch,
        steps_in_flight=plan.max_steps_in_flight,
        max_batch_tokens=plan.max_batch_tokens,
    )
    for budget in plan.budgets:
        used = sum(rank.host_bytes for rank in plan.ranks if rank.node == budget.node)
        assert budget.used_bytes == used <= budget.limit_bytes
        assert budget.limit_bytes + budget.footprint_bytes <= hardware.nodes[budget.node].memory_bytes
    assert plan_from_json(plan_to_json(plan)) == plan
    json.dumps(describe(plan))


@settings(max_examples=400, deadline=None)
@given(
    tensor=st.integers(1, 4),
    pipeline=st.integers(1, 5),
    nodes=st.integers(1, 3),
    host_share=st.floats(0.2, 1.2),
    device=st.sampled_from(["cpu", "cuda"]),
    device_share=st.floats(0.2, 1.2),
    max_model_len=st.sampled_from([None, None, 64, 4096]),
    max_batch_tokens=st.sampled_from([8, 128]),
    max_requests=st.sampled_from([2, 20]),
    num_slots=st.sampled_from([None, 2, 5]),
    kv_memory=st.sampled_from([None, None, 4 * MIB]),
)
def test_every_plan_fits_or_is_refused(
    tensor,
    pipeline,
    nodes,
    host_share,
    device,
    device_share,
    max_model_len,
    max_batch_tokens,
    max_requests,
    num_slots,
    kv_memory,
):
    hardware = cluster(nodes, memory=3 * GIB, devices=8)
    wanted = options(
        tensor=tensor,
        pipeline=pipeline,
        device=device,
        host_memory=int(host_share * WEIGHTS / min(nodes, pipeline)) + 20 * MIB,
        device_memory=int(device_share * WEIGHTS / (tensor * pipeline)) + 8 * MIB if device == "cuda" else None,
        max_model_len=max_model_len,
        max_batch_tokens=max_batch_tokens,
        max_requests=max_requests,
        num_slots=num_slots,
        kv_memory=kv_memory,
    )
    try:
        plan = make_plan(SPEC, hardware, wanted)
    except ConfigError as error:
        assert isinstance(error, BudgetError) or "accelerators" in str(error)  # noqa: PT017 - either is right
        return
    check(plan, hardware)
    if max_model_len:
        assert plan.max_model_len == max_model_len


def test_everything_resident_needs_no_slots_and_one_micro_batch():
    plan = make_plan(SPEC, cluster(), options())
    assert all(rank.num_slots == 0 and rank.streamed_bytes_per_pass == 0 for rank in plan.ranks)
    assert plan.max_micro_batches == 1
    assert plan.prediction.bound_by in ("memory", "compute")
    assert plan.prediction.crossing_tokens == 0
    assert plan.prediction.assumed == ("flops", "layer_overhead_s")


def test_more_host_memory_never_streams_more():
    """With as much KV; where that is free, memory may buy requests instead (see test_kv_budget)."""
    streamed = []
    for memory in range(40, 200, 5):
        wanted = options(host_memory=memory * MIB, max_batch_tokens=64, max_requests=4, num_slots=3, kv_memory=10 * MIB)
        try:
            plan = make_plan(SPEC, cluster(), wanted)
        except BudgetError:
            continue
        streamed.append(plan.ranks[0].streamed_bytes_per_pass)
    assert streamed == sorted(streamed, reverse=True)
    assert streamed[0] > 0
    assert streamed[-1] == 0


def test_micro_batches_cover_the_crossing_point():
    slow = cluster(disk=2e8)
    plan = make_plan(SPEC, slow, options(host_memory=80 * MIB, max_batch_tokens=64, max_requests=4))
    assert plan.prediction.bound_by == "disk"
    covered = plan.max_micro_batches * plan.max_batch_tokens
    assert covered >= min(plan.prediction.crossing_tokens, 16 * 64) / 2
    check(plan, slow)


def test_a_stage_pair_on_one_disk_takes_one_step_at_a_time():
    """Two steps in flight would halve the requests that each pass over the same disk serves."""
    tight = options(pipeline=2, host_memory=90 * MIB, max_batch_tokens=64, max_requests=4)
    assert make_plan(SPEC, cluster(), tight).max_steps_in_flight == 1
    assert make_plan(SPEC, cluster(2), replace(tight, host_memory=50 * MIB)).max_steps_in_flight == 2
    assert make_plan(SPEC, cluster(), options(pipeline=2)).max_steps_in_flight == 2


def test_stages_are_spread_over_nodes_in_order():
    plan = make_plan(SPEC, cluster(3), options(pipeline=5, tensor=2))
    assert [rank.node for rank in plan.ranks[::2]] == [0, 0, 1, 1, 2]
    assert [budget.node for budget in plan.budgets] == [0, 1, 2]
    assert plan.ranks[0].threads == 1


def test_uneven_heads_give_uneven_kv():
    plan = make_plan(SPEC, cluster(), options(tensor=2))
    assert [rank.num_kv_heads for rank in plan.ranks] == [2, 1]
    assert plan.ranks[0].kv_bytes == 2 * plan.ranks[1].kv_bytes
    per_token_layer = 2 * (64 + 64) * 2
    assert plan.ranks[0].kv_bytes == plan.num_kv_blocks * plan.block_tokens * 12 * per_token_layer


def test_kv_yields_to_the_smallest_ring():
    """With little more than the ring there is less than a quarter for KV: a short model, not a refusal."""
    for memory in range(15 * MIB, 60 * MIB, MIB // 2):
        try:
            plan = make_plan(SPEC, cluster(), options(host_memory=memory, max_batch_tokens=8, max_requests=1))
        except BudgetError:
            continue
        assert plan.ranks[0].kv_bytes < memory // 10
        assert plan.max_model_len < 512
        check(plan, cluster())
        return
    raise AssertionError("no plan was made")


def test_max_model_len_shrinks_to_the_kv_only_when_it_is_automatic():
    tight = options(host_memory=100 * MIB, max_batch_tokens=64, kv_memory=8 * MIB)
    plan = make_plan(SPEC, cluster(), tight)
    assert plan.max_model_len == plan.num_kv_blocks * plan.block_tokens < 4096
    with pytest.raises(BudgetError, match=r"4096 tokens needs .* raise engine.kv_memory or lower engine.max_model_len"):
        make_plan(SPEC, cluster(), replace(tight, max_model_len=4096))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"device_memory": GIB}, "on cpu use offload.host_memory"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"num_slots": 1}, "offload.num_slots is 1, but must be at least 2"),
        ({"pipeline": 13}, "13, but the model has 12 layers"),
        ({"tensor": 10}, "only 9 attention heads"),
        ({"max_model_len": 5000}, "knows only 4096 positions"),
        ({"max_requests": 0}, "engine.max_requests is 0"),
        ({"device": "cuda"}, "accelerators"),
    ],
)
def test_contradictions_are_refused_by_key(changes, says):
    with pytest.raises(ConfigError, match=says):
        make_plan(SPEC, cluster(), options(**changes))


@pytest.mark.parametrize(
    ("changes", "facts", "says"),
    [
        ({"host_memory": 9 * GIB}, {}, r"host_memory is 9.00 GiB .*8.00 GiB \(cgroup\)"),
        ({"host_memory": 10 * MIB}, {}, "needs at least .* raise offload.host_memory"),
        ({"kv_memory": 7 * GIB}, {"memory": 2 * GIB}, "lower engine.kv_memory or raise offload.host_memory"),
        ({}, {"memory": 60 * MIB}, "before any weight"),
        ({"device": "cuda"}, {"devices": 1, "device_memory": 1040 * MIB}, "raise offload.device_memory"),
        ({"device": "cuda", "device_memory": 3 * GIB}, {"devices": 1}, "have 2.00 GiB: lower it"),
    ],
)
def test_misfits_name_need_have_and_key(changes, facts, says):
    with pytest.raises(BudgetError, match=says):
        make_plan(SPEC, cluster(**facts), options(**changes))


def test_cuda_uses_all_three_tiers():
    spec = ModelSpec.from_config(json.loads((DATA / "llama-3.1-405b" / "config.json").read_text()))
    hardware = cluster(memory=256 * GIB, cores=64, devices=8, device_memory=24 * GIB)
    plan = make_plan(spec, hardware, PlanOptions(name="x", tensor=8, device="cuda"))
    check(plan, hardware)
    assert {unit.tier for unit in plan.ranks[0].units} == {"device", "host", "nvme"}
    assert plan.ranks[0].threads == 7


@pytest.mark.timeout(5)
@pytest.mark.parametrize("name", ["llama-3.1-405b", "deepseek-v3"])
@pytest.mark.parametrize(("nodes", "tensor", "pipeline"), [(16, 8, 16), (1, 8, 1), (1, 1, 1), (4, 2, 24)])
def test_giants_are_planned_from_their_config(name, nodes, tensor, pipeline):
    spec = ModelSpec.from_config(json.loads((DATA / name / "config.json").read_text()))
    hardware = cluster(nodes, memory=512 * GIB, cores=64, devices=8, device_memory=80 * GIB)
    for device in ("cpu", "cuda"):
        if device == "cuda" and tensor * pipeline > 8 * nodes:
            continue
        check(
            make_plan(spec, hardware, PlanOptions(name="x", tensor=tensor, pipeline=pipeline, device=device)), hardware
        )


def test_the_prediction_is_the_streaming_model():
    """S/BW and T* worked out by hand from the plan's own bytes."""
    plan = make_plan(SPEC, cluster(disk=1e8), options(host_memory=80 * MIB, max_batch_tokens=64, max_requests=4))
    rank = plan.ranks[0]
    seconds = rank.streamed_bytes_per_pass / 1e8
    assert plan.prediction.seconds_per_pass == pytest.approx(seconds)
    assert plan.prediction.decode_tokens_per_s == pytest.approx(plan.prediction.tokens_per_pass / seconds)
    active = sum(active_parameters(unit, SPEC) for unit in units_of(SPEC) if unit.name != "head")
    computing = seconds - 12 * 0.7e-3  # beside what twelve layers cost whatever their size
    assert plan.prediction.crossing_tokens == math.ceil(computing * 5e11 / (2 * active))


def test_a_layer_costs_something_whatever_its_size():
    """A small encoded model in memory was predicted twice as fast as calls of 0.7 ms a layer let it be."""
    slow = replace(node(), layer_overhead_s=0.01)
    plan = make_plan(SPEC, HardwareFacts(nodes=(slow,)), options(max_batch_tokens=16))
    weights = sum(unit.num_bytes for unit in plan.ranks[0].units if unit.name != "embed")
    assert plan.prediction.tokens_per_pass == 64
    (memory,) = (
        cost.seconds["memory"]
        for cost in costs_of(
            stage_loads(SPEC, plan.ranks),
            HardwareFacts(nodes=(slow,)),
            hidden_bytes=576 * 2,
            tokens=64,
            batch=64,
            micro_batches=4,
        )
    )
    assert memory == pytest.approx(weights / 20e9 + 4 * 12 * 0.01)
    assert plan.prediction.seconds_per_pass >= memory  # 64 tokens are four micro-batches of 16
    assert plan.prediction.assumed == ("flops",)


@pytest.mark.parametrize("tensor", [1, 2])
def test_encoded_weights_are_planned_at_their_own_size(tensor):
    def planned(wished):
        wanted = options(
            tensor=tensor,
            host_memory=100 * MIB,
            max_batch_tokens=64,
            max_requests=1,
            encodings=EncodingChoice(wished=wished),
        )
        return make_plan(SPEC, cluster(), wanted)

    whole, quarter = planned("float"), planned("int4")
    check(quarter, cluster())
    assert (whole.encoding, quarter.encoding) == ("float", "int4-g64")
    assert whole.ranks[0].streamed_bytes_per_pass > 0
    assert quarter.ranks[0].streamed_bytes_per_pass == 0
    # where no kernel takes codes, the largest matrix is decoded into a temporary: 1536 x 576 over the ranks
    more = quarter.ranks[0].activation_bytes - planned("float").ranks[0].activation_bytes
    per_micro_batch = 2 * 64 * 576 * 2
    assert more == 1536 // tensor * 576 * 2 - (whole.max_micro_batches - 1) * per_micro_batch


def test_layers_that_are_stored_differently_weigh_differently():
    """Sizes were kept by the kind of layer, but a GGUF may hold the same matrix in other types in some layers."""
    stored = {"model.layers.3.mlp.down_proj.weight": "int4-g32", "model.layers.4.mlp.down_proj.weight": "int8-g32"}
    plan = make_plan(SPEC, cluster(), options(encodings=EncodingChoice(wished="as-is", stored=stored)))
    check(plan, cluster(), EncodingChoice(wished="as-is", stored=stored))
    sizes = {unit.name: unit.num_bytes for unit in plan.ranks[0].units}
    assert sizes["layers.3"] < sizes["layers.4"] < sizes["layers.2"] == sizes["layers.5"]


def test_a_full_pipeline_is_as_fast_as_its_slowest_stage():
    hardware = cluster(2)
    plan = make_plan(SPEC, hardware, options(pipeline=2))
    tokens = plan.prediction.tokens_per_pass
    costs = costs_of(stage_loads(SPEC, plan.ranks), hardware, hidden_bytes=576 * 2, tokens=tokens, batch=tokens)
    assert plan.max_steps_in_flight == 2
    assert plan.prediction.seconds_per_pass == pytest.approx(sum(cost.total for cost in costs))
    assert plan.prediction.decode_tokens_per_s == pytest.approx(tokens / max(cost.total for cost in costs))
    assert costs[0].seconds["network"] == pytest.approx(tokens * 576 * 2 / 1e9)
    assert costs[1].seconds["network"] == 0


def test_only_the_routed_experts_count_as_active():
    spec = ModelSpec.from_config(json.loads((DATA / "deepseek-v3" / "config.json").read_text()))
    active = sum(active_parameters(unit, spec) for unit in units_of(spec))
    assert active / 1e9 == pytest.approx(36.7, abs=0.3)  # published: 37 billion


def test_a_kept_part_counts_as_host_memory():
    """The table must add up to the weights, but for the pages that are in both parts."""
    plan = make_plan(SPEC, cluster(), options(host_memory=90 * MIB, max_batch_tokens=64, max_requests=1))
    (row,), (rank,) = describe(plan), plan.ranks
    cut = [unit for unit in rank.units if unit.kept_bytes]
    assert row["cut_units"] == len(cut) > 0
    assert row["host_weights_bytes"] == rank.resident_bytes >= sum(unit.kept_bytes for unit in cut)
    assert row["nvme_weights_bytes"] == row["streamed_bytes_per_pass"] == rank.streamed_bytes_per_pass
    assert 0 <= rank.bytes_in("host") + rank.bytes_in("nvme") - WEIGHTS <= 4096 * len(cut)
    assert rank.slot_bytes == max(unit.disk_bytes for unit in rank.units)
    assert rank.slot_bytes < max(unit.num_bytes for unit in rank.units if unit.tier == "nvme")


def test_foreign_json_is_no_plan():
    for text in ("", "{}", "[1]", plan_to_json(make_plan(SPEC, cluster(), options())).replace('"ranks"', '"rank"')):
        with pytest.raises(ConfigError, match="not a plan"):
            plan_from_json(text)


def test_kv_does_not_push_the_embedding_out_of_memory():
    """KV was sized first, so that a budget a little larger than the pinned ends streamed them in every pass.

    For a single request more blocks bring nothing that pays for it.
    """
    spec = ModelSpec.from_config(
        {
            "model_type": "llama",
            "num_hidden_layers": 30,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        }
    )
    options = PlanOptions(name="small", host_memory=176 << 20, max_requests=1, max_model_len=512)
    plan = make_plan(spec, HardwareFacts(nodes=(node(),)), options)
    tiers = {unit.name: unit.tier for unit in plan.ranks[0].units}
    assert tiers["embed"] == tiers["head"] == "host"
    assert plan.num_kv_blocks * plan.block_tokens >= 512
