"""Who runs what: every row of the table is one competitor at one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

# What accelerate takes beside resident weights: the interpreter and its libraries, the module at work, activations.
# Measured at 3 GiB; what it leaves is page cache, which accelerate reads through.
ACCELERATE_BESIDE_BYTES = 1100 << 20


@dataclass(frozen=True, kw_only=True)
class Competitor:
    """name: in the table. environment: None is dist-infer's own. model: of the checkpoint's forms. capped: runs in the
    memory group. limit_s: for one run. packs: has a store, made by a run of its own.
    """

    name: str
    runner: str
    environment: str | None
    model: str
    setting: str
    weights: str
    batches: tuple[int, ...]
    capped: bool = True
    limit_s: float = 900.0
    packs: bool = False

    def key(self, batch: int) -> str:
        return f"{self.name}, batch {batch}"


def competitors(memory_bytes: int) -> dict[str, Competitor]:
    """By name, in the table's order."""
    resident = max(0, memory_bytes - ACCELERATE_BESIDE_BYTES)
    found = [
        Competitor(
            name="accelerate, disk",
            runner="accelerate_disk.py",
            environment="accelerate",
            model="safetensors",
            setting="disk",
            weights="bf16",
            batches=(1, 32),
        ),
        Competitor(
            name="accelerate, memory and disk",
            runner="accelerate_disk.py",
            environment="accelerate",
            model="safetensors",
            setting=str(resident),
            weights="bf16",
            batches=(1, 32),
        ),
        Competitor(
            name="DeepSpeed ZeRO-Inference, NVMe",
            runner="deepspeed_nvme.py",
            environment="deepspeed",
            model="safetensors",
            setting="nvme",
            weights="bf16",
            batches=(1,),
        ),
        *(
            Competitor(
                name=f"llama.cpp mmap, {kind.upper()}",
                runner="llama_cpp_mmap.py",
                environment="llama.cpp",
                model=f"{kind}.gguf",
                setting=setting,
                weights=kind,
                batches=batches,
            )
            for kind, setting, batches in (
                ("bf16", "mmap", (1, 32)),
                ("q8_0", "mmap", (1,)),
                ("q4_0", "mmap-repack", (1, 32)),
            )
        ),
        Competitor(
            name="llama.cpp in RAM, Q4_0",
            runner="llama_cpp_mmap.py",
            environment="llama.cpp",
            model="q4_0.gguf",
            setting="ram-repack",
            weights="q4_0",
            batches=(1,),
            capped=False,
        ),
        *(
            Competitor(
                name=f"dist-infer, {encoding}",
                runner="dist_infer_stream.py",
                environment=None,
                model="safetensors",
                setting=encoding,
                weights=weights,
                batches=(1, 32),
                packs=True,
            )
            for encoding, weights in (("float", "bf16"), ("int8", "int8"), ("int4", "int4"))
        ),
    ]
    return {competitor.name: competitor for competitor in found}


def chosen(every: Mapping[str, Competitor], only: Sequence[str]) -> list[Competitor]:
    """Those whose name holds one of the texts, all without any. Raises ValueError naming all when there is none."""
    picked = [c for c in every.values() if not only or any(text.lower() in c.name.lower() for text in only)]
    if not picked:
        raise ValueError(f"--only {' '.join(only)}: no competitor is called so; there are: {'; '.join(every)}")
    return picked


def model_path(work: Path, model_name: str, competitor: Competitor) -> Path:
    return work / "models" / model_name / competitor.model


def scratch_path(work: Path, model_name: str, competitor: Competitor) -> Path:
    """Where it may write: kept between runs for a store, removed after each run otherwise."""
    return work / "stores" / model_name / competitor.setting if competitor.packs else work / "scratch"
