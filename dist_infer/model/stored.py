"""What `encoding: as-is` means for a checkpoint. No torch: plans are made with it."""

from __future__ import annotations

from partition.checkpoint_index import CheckpointIndex
from partition.gguf_names import gguf_sources
from partition.gguf_types import AS_IS, FLOAT_TYPES
from partition.model_spec import ModelSpec


def stored_encodings(index: CheckpointIndex, spec: ModelSpec) -> dict[str, str]:
    """For `encoding: as-is`: what keeps each quantized parameter nearest to how the checkpoint has it.

    A parameter that is not listed is a float there; a safetensors checkpoint has none that is listed.
    """
    if index.kind != "gguf":
        return {}
    found: dict[str, str] = {}
    for parameter, names in gguf_sources(spec, index.tensors).items():
        types = {index.tensors[name].dtype for name in names if name in index.tensors}
        encodings = {AS_IS[kind] for kind in types - FLOAT_TYPES}
        if not encodings or types & FLOAT_TYPES:
            continue
        # experts whose gate and up differ in type: the wider of the two
        found[parameter] = encodings.pop() if len(encodings) == 1 else "int8-g32"
    return found
