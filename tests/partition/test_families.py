"""The family table against the library's own models: current, of the same shapes, and computing the same when split."""

import importlib.util
import threading
from pathlib import Path

import pytest

from partition.families import family_table
from partition.model_spec import ModelSpec
from partition.sharding import AxisCut, collectives_of, cut_axes, local_heads, shard_intervals, units_of

pytestmark = pytest.mark.slow
torch = pytest.importorskip("torch")

ROOT = Path(__file__).parents[2]
FAMILIES = sorted(family_table())
DEADLINE_S = 60.0


def config_of(family, **changes):
    """A small model with 6 heads in 3 groups, three layers, and nothing at its default."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    values = {
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 72,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    rule = family_table()[family]["layer_rule"]
    if "head_dim" in family_table()[family]["defaults"] and rule != "first_k_dense":
        values["head_dim"] = 16
    if rule != "dense":
        values |= {"num_experts_per_tok": 2, "moe_intermediate_size": 40}
    if rule == "moe":
        values |= {"num_local_experts": 4, "intermediate_size": 40}
    elif rule == "sparse_step":
        values |= {"num_experts": 4, "mlp_only_layers": [1]}
    elif rule == "first_k_dense":
        values |= {"n_routed_experts": 4, "num_key_value_heads": 6, "first_k_dense_replace": 1, "n_shared_experts": 2}
        values |= {"q_lora_rank": 20, "kv_lora_rank": 12, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
        values |= {"v_head_dim": 10, "n_group": 1, "topk_group": 1}
    return CONFIG_MAPPING[family](**values | changes)


def model_of(config, device):
    from transformers import AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def test_the_table_is_current():
    script = ROOT / "scripts" / "generate_families.py"
    loader = importlib.util.spec_from_file_location("generate_families", script)
    module = importlib.util.module_from_spec(loader)
    loader.loader.exec_module(module)
    assert (ROOT / "partition" / "families.json").read_text() == module.render(module.build_table())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_has_the_librarys_shape(family):
    flags = family_table()[family]["flags"]
    variants = [{}, {"num_attention_heads": 8, "num_key_value_heads": 8 if "deepseek" in family else 2}]
    variants += [{flag: True} for flag in flags if flag != "q_lora"]
    variants += [{"q_lora_rank": None, "attention_bias": True}] if "q_lora" in flags else []
    for changes in variants:
        config = config_of(family, **changes)
        spec = ModelSpec.from_config(config.to_diff_dict() | {"model_type": family})
        ours = {p.name: p.shape for unit in units_of(spec) for p in unit.parameters}
        theirs = {name: tuple(tensor.shape) for name, tensor in model_of(config, "meta").state_dict().items()}
        assert ours == theirs


class Ring:
    """Exchange of tensors among threads that stand for ranks."""

    def __init__(self, size):
        self.slots = [None] * size
        self.barrier = threading.Barrier(size, timeout=DEADLINE_S)

    def all_gather(self, rank, tensor):
        self.slots[rank] = tensor
        self.barrier.wait()
        found = list(self.slots)
        self.barrier.wait()
        return found


def shard(parameter, tensor, cut: AxisCut, rank):
    if parameter.once and rank > 0:
        return torch.zeros_like(tensor)
    if parameter.split is None:
        return tensor
    pieces = [tensor.narrow(parameter.split.dim, a, b - a) for a, b in shard_intervals(parameter, cut, rank)]
    return torch.cat(pieces, parameter.split.dim)


def make_rank(config, whole, spec, cut, rank, ring):
    """The library's model with this rank's shards, and our collectives as hooks: nothing else."""
    model = model_of(config, "cpu")
    if model.config.tie_word_embeddings:
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
    for parameter in (p for unit in units_of(spec) for p in unit.parameters):
        module, _, leaf = parameter.name.rpartition(".")
        owner = model.get_submodule(module)
        value = shard(parameter, whole[parameter.name], cut, rank)
        if leaf in owner._buffers:
            owner._buffers[leaf] = value
        else:
            owner._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
    q_heads, kv_heads = local_heads(spec, cut, rank)
    start, end = cut.intervals["vocab"][rank]

    def all_reduce(module, args, output):
        return sum(ring.all_gather(rank, output))

    def gather_vocab(module, args, output):
        return torch.cat(ring.all_gather(rank, output), -1)

    def local_ids(module, args):
        return ((args[0] - start).clamp(0, end - start - 1),)

    def mask(module, args, output):
        ids = model.asked_ids
        return sum(ring.all_gather(rank, output * ((ids >= start) & (ids < end))[..., None]))

    for collective in collectives_of(spec):
        layers = [i for i, kind in enumerate(spec.layer_kinds) if kind in collective.layer_kinds]
        for name in [collective.module.replace("{i}", str(i)) for i in layers] or [collective.module]:
            module = model.get_submodule(name)
            if collective.kind == "mask_all_reduce":
                module.padding_idx = None
                module.register_forward_pre_hook(local_ids)
                module.register_forward_hook(mask)
            else:
                module.register_forward_hook(all_reduce if collective.kind == "all_reduce" else gather_vocab)
    for layer in model.model.layers:
        layer.self_attn.num_key_value_groups = q_heads // kv_heads
    return model


@pytest.mark.parametrize("tensor", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_ranks_together_compute_what_one_does(family, tensor):
    """Splits and collectives are right together; four ranks are more than there are KV heads."""
    flags = {flag: True for flag in family_table()[family]["flags"] if flag != "q_lora"}
    config = config_of(family, **flags)
    torch.manual_seed(0)
    reference = model_of(config, "cpu")
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.normal_(0, 0.2)
    whole = {name: value.detach().clone() for name, value in reference.state_dict().items()}
    spec = ModelSpec.from_config(config.to_diff_dict() | {"model_type": family})
    cut, ring = cut_axes(spec, tensor), Ring(tensor)
    ids = torch.randint(3, 96, (2, 9))
    with torch.no_grad():
        expected = reference(input_ids=ids, use_cache=False).logits
    found = [None] * tensor

    def run(rank):
        try:
            model = make_rank(config, whole, spec, cut, rank, ring)
            model.asked_ids = ids
            with torch.no_grad():
                found[rank] = model(input_ids=ids, use_cache=False).logits
        except BaseException as error:
            found[rank] = error
            ring.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(tensor)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    errors = [value for value in found if not torch.is_tensor(value)]
    assert not errors, errors
    for logits in found:
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
