"""What a blob holds: the order the packer lays out, the bytes the planner counts."""

import math

import pytest

from partition.blob_spec import blob_arrays, blob_bytes, decoded_bytes, unit_bytes
from partition.cut_points import cut_points
from partition.encoding import EncodingChoice
from partition.layout import blob_layout
from partition.model_spec import ModelSpec
from partition.sharding import ParameterSpec, UnitSpec, cut_axes, units_of

SPEC = ModelSpec.from_config(
    {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "hidden_size": 256,
        "vocab_size": 1024,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 640,
        "max_position_embeddings": 512,
    }
)
EMBED, LAYER, _, HEAD = units_of(SPEC)
ONE = cut_axes(SPEC, 1)


def test_a_float_unit_is_its_parameters_in_order():
    arrays = blob_arrays(LAYER, ONE, 0, "bfloat16")
    assert [array.parameter for array in arrays] == [parameter.name for parameter in LAYER.parameters]
    assert {(array.encoding, array.part, array.dtype) for array in arrays} == {("raw", "", "bfloat16")}
    sizes = [2 * math.prod(parameter.shape) for parameter in LAYER.parameters]
    assert unit_bytes(LAYER, ONE, 0, "bfloat16") == blob_layout(sizes)[1] == blob_bytes(arrays)


def test_an_encoded_parameter_stands_there_as_its_parts():
    """The packer and the planner must agree on this order to the byte."""
    arrays = blob_arrays(LAYER, ONE, 0, "bfloat16", EncodingChoice(wished="int4", group_size=32))
    first = LAYER.parameters[0].name
    assert [(a.parameter, a.encoding, a.part, a.dtype, a.shape, a.num_bytes) for a in arrays[:2]] == [
        (first, "int4-g32", "codes", "uint8", (16, 32, 64), 256 * 256 // 2),
        (first, "int4-g32", "scales", "float16", (16, 8, 2, 16), 256 * 8 * 2 * 2),
    ]
    norms = [array for array in arrays if array.parameter.endswith("norm.weight")]
    assert [(array.encoding, array.part, array.dtype, array.num_bytes) for array in norms] == [
        ("raw", "", "bfloat16", 512)
    ] * 2
    parameters = list(dict.fromkeys(array.parameter for array in arrays))
    assert parameters == [parameter.name for parameter in LAYER.parameters]


def test_only_layers_are_encoded():
    for unit in (EMBED, HEAD):
        assert unit_bytes(unit, ONE, 0, "bfloat16", EncodingChoice(wished="int4")) == unit_bytes(
            unit, ONE, 0, "bfloat16"
        )


@pytest.mark.parametrize(("wished", "bits"), [("int8", 8.15), ("int4", 4.55), ("fp8", 8.35)])
def test_encoded_bytes_are_about_their_bits(wished, bits):
    encoded = unit_bytes(LAYER, ONE, 0, "bfloat16", EncodingChoice(wished=wished))
    whole = unit_bytes(LAYER, ONE, 0, "bfloat16")
    assert bits / 16 * 0.95 < encoded / whole < bits / 16 * 1.05


def test_ranks_may_differ_in_what_they_can_encode():
    """640 columns cut in three: 224, 208 and 208, of which no group of 32 divides the latter. Cuts still agree."""
    cut = cut_axes(SPEC, 3)
    blobs = [blob_arrays(LAYER, cut, rank, "bfloat16", EncodingChoice(wished="int4")) for rank in range(3)]
    down = [[a for a in arrays if a.parameter.endswith("down_proj.weight")] for arrays in blobs]
    assert [[(a.encoding, a.part) for a in own] for own in down] == [
        [("int4-g32", "codes"), ("int4-g32", "scales")],
        [("raw", "")],
        [("raw", "")],
    ]
    for place in cut_points(blobs):
        kept = [
            {
                array.parameter
                for array, offset in zip(arrays, blob_layout([a.num_bytes for a in arrays])[0], strict=True)
                if offset < start
            }
            for arrays, start in zip(blobs, place.streamed_from, strict=True)
        ]
        assert kept[0] == kept[1] == kept[2]


@pytest.mark.parametrize(
    "name",
    [
        "self_attn.kv_b_proj.weight",  # multiplied with from both sides at every step
        "mlp.gate.weight",
        "ffn.router.layer.weight",  # dbrx and jetmoe: a flipped expert is not a small error
        "mlp.shared_expert_gate.weight",  # one row would take a tile of sixteen
    ],
)
@pytest.mark.parametrize("wished", ["int8", "int4", "fp8", "as-is"])
def test_routers_and_latent_expansions_stay_floats(name, wished):
    parameter = ParameterSpec(name=f"model.layers.0.{name}", shape=(64, 128))
    choice = EncodingChoice(wished=wished, stored={parameter.name: "int8-g32"})
    assert choice.of("layers.0", parameter, parameter.shape) == "raw"


def test_as_is_weighs_what_the_checkpoint_holds():
    name = LAYER.parameters[0].name
    some = EncodingChoice(wished="as-is", stored={name: "int8-g32"})
    kinds = {array.parameter: array.encoding for array in blob_arrays(LAYER, ONE, 0, "bfloat16", some)}
    assert {parameter for parameter, kind in kinds.items() if kind != "raw"} == {name}
    saved = 256 * 256 * 2 - (256 * 256 + 256 * 8 * 2)
    assert unit_bytes(LAYER, ONE, 0, "bfloat16") - unit_bytes(LAYER, ONE, 0, "bfloat16", some) == saved


def test_the_largest_decoded_matrix_is_one_matrix():
    """A stack of experts is decoded an expert at a time; counting the stack would cost gigabytes of residency."""
    unit = UnitSpec(
        name="layers.0",
        parameters=(
            ParameterSpec(name="q", shape=(64, 96)),
            ParameterSpec(name="experts", shape=(8, 128, 64)),
            ParameterSpec(name="norm", shape=(4096,)),
        ),
    )
    assert decoded_bytes(unit, ONE, 0, "float32", EncodingChoice(wished="int8")) == 128 * 64 * 4
    assert decoded_bytes(unit, ONE, 0, "float32") == 0
