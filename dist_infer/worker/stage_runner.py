"""One stage on one rank: the visible loop over its units.

Does not belong here: deciding what runs (engine), reading (offload), model internals (model.adapter), transport between
stages (rank_host), drawing tokens' parameters (sampler).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from dist_infer.messages import (
    Chunk,
    PromptLogprobs,
    SampledToken,
    StepPlan,
    StepResult,
    StreamReport,
    WorkerReport,
)
from dist_infer.model.adapter import DTYPES, LayerCalls, StageModel
from dist_infer.model.batch_view import use_batch
from dist_infer.model.kv_cache import KVCache
from dist_infer.model.sequence_cache import SequenceCaches, alone
from dist_infer.model.stand_ins import TensorParallel
from dist_infer.worker.grammar_masks import GrammarMasks
from dist_infer.worker.prompt_logprobs import prompt_spans, score
from dist_infer.worker.request_table import RequestTable
from dist_infer.worker.sampler import sample
from dist_infer.worker.setup import WorkerSetup, store_key
from dist_infer.worker.token_history import TokenHistories
from offload import kernels
from offload.format import open_store
from offload.readers.choose import make_reader
from offload.readers.threads import ThreadReader
from offload.streamer import Streamer
from offload.timeline import Timeline
from offload.views import Kept
from partition.errors import UnsupportedModelError
from partition.kv_layout import layers_kv
from partition.plan import Plan
from partition.plan_data import HEAD_ROWS
from partition.sharding import cut_axes

ROW_THREADS = 8  # a row read waits for what the disk is busy with: many wait at a time
ROW_BLOCK_BYTES = 64 << 10
_NOTE_EVERY_S = 0.25


@dataclass(frozen=True)
class _Times:
    """Cumulative, all as of one moment; replaced as a whole, so that any thread may read them."""

    busy_s: float = 0.0
    communication_s: float = 0.0
    stall_s: float = 0.0


class StageRunner:
    """Owns the stage's weights, KV cache and request table. Not thread-safe; steps come in order."""

    def __init__(
        self,
        setup: WorkerSetup,
        plan: Plan,
        rank: int,
        device: str,
        group: TensorParallel,
        timeline: Timeline | None = None,
    ) -> None:
        self.rank_plan = plan.ranks[rank]
        self.unit = ""  # that is being computed, for whoever reports an error
        self.dtype = DTYPES[plan.dtype]
        self.device = torch.device(device)
        if self.device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew, on the host, for every new context length
        self.hidden_size = plan.model.hidden_size
        spec, ours = plan.model, self.rank_plan
        self.model = StageModel(
            spec=spec,
            config=json.loads(setup.config_json),
            dtype=self.dtype,
            device=self.device,
            first_layer=ours.first_layer,
            end_layer=ours.end_layer,
            tp_rank=ours.tp_rank,
            group=group,
        )
        kept = layers_kv(spec, cut_axes(spec, plan.tensor), ours.tp_rank, plan.ring_rows)
        own_layers = range(ours.first_layer, ours.end_layer)
        self._sequences = SequenceCaches(self.model.config, own_layers) if spec.path != "packed" else None
        self._stepwise = spec.path == "stepwise"
        self._cache = KVCache(
            {} if spec.path != "packed" else {layer: kept[layer] for layer in own_layers},
            ours.num_kv_blocks * plan.block_tokens,
            plan.max_requests,
            self.dtype,
            self.device,
        )
        num_slots = plan.max_requests if any(plan.ring_rows) else 0
        self._table = RequestTable(plan.block_tokens, ours.num_kv_blocks, self.device, num_slots)
        self._draws = self.model.is_last and ours.tp_rank == 0
        self._histories = TokenHistories()
        self._grammars = GrammarMasks()
        self._most_rows = max(plan.max_requests, HEAD_ROWS)  # of logits at one time, as the plan has it
        self._units = [unit.name for unit in ours.units]
        manifest = open_store(Path(setup.store.directory), store_key(setup.store), self._units, [ours.tp_rank])
        self._encoded = any(array.encoded for blob in manifest.blobs for array in blob.tensors)
        entries = {blob.unit: blob for blob in manifest.blobs if blob.tp_rank == ours.tp_rank}
        self._reader = make_reader(setup.reader)
        by_rows = any(unit.tier == "rows" for unit in ours.units)
        self._row_reader = ThreadReader(num_threads=ROW_THREADS, block_bytes=ROW_BLOCK_BYTES) if by_rows else None
        try:
            self._streamer = Streamer(
                directory=Path(setup.store.directory),
                blobs=[entries[name] for name in self._units],
                tiers=[unit.tier for unit in ours.units],
                kept=[Kept(unit.kept_bytes, unit.streamed_from) for unit in ours.units],
                reader=self._reader,
                row_reader=self._row_reader,
                num_slots=ours.num_slots,
                num_device_slots=ours.num_device_slots,
                device=device,
                verify=setup.verify,
                read_timeout_s=setup.step_timeout_s,
                timeline=timeline,
            )
        except BaseException:
            self._close_readers()  # their threads have no other owner yet
            raise
        self._checked_layers = False
        self._group = group
        self._times = _Times()
        self._num_tokens = 0
        self._load_s = 0.0

    def load(self, progress: Callable[[int, int], None]) -> None:
        """Read the resident units; the first streamed ones are then already on their way."""
        started = time.monotonic()
        if self._encoded:
            kernels.prepare()
        self._streamer.load(progress)
        self._load_s = time.monotonic() - started

    @torch.inference_mode()
    def run(self, plan: StepPlan, hidden: torch.Tensor | None) -> torch.Tensor | StepResult:
        """One step. hidden [1, tokens of the step, H] from the stage before; None on the first.

        Returns hidden states of the same shape, or on the last stage the result (empty unless tp_rank 0).
        """
        before, started, communicated = self._times, time.monotonic(), self._group.seconds
        self.unit = ""
        self._take_in(plan)
        micro_batches = plan.micro_batches
        if self._sequences is not None:  # each sequence by itself, over its own cache
            micro_batches = tuple(
                single for chunks in micro_batches for single in alone(chunks, stepwise=self._stepwise)
            )
        caches = [self._sequences.of(chunks) if self._sequences is not None else None for chunks in micro_batches]
        batches = [self._table.micro_batch(chunks) for chunks in micro_batches]
        sizes = [batch.token_ids.shape[1] for batch in batches]
        calls: list[LayerCalls] = []
        tokens: list[SampledToken] = []
        prompt_logprobs: list[PromptLogprobs] = []
        if hidden is not None:
            for batch, part, cache in zip(batches, torch.split(hidden, sizes, dim=1), caches, strict=True):
                calls.append(self.model.begin(batch.token_ids, batch.position_ids, part, cache))
        layer, noted = self.rank_plan.first_layer, started
        for index, unit in enumerate(self._units):
            self.unit = unit
            self.model.bind(unit, self._streamer.wait(index))
            if unit == "embed":
                calls = [
                    self.model.begin(batch.token_ids, batch.position_ids, None, cache)
                    for batch, cache in zip(batches, caches, strict=True)
                ]
            elif unit == "head":
                for chunks, batch, call in zip(micro_batches, batches, calls, strict=True):
                    tokens += self._sample(batch.sample_requests, self.model.finish(call, batch.sample_rows))
                    prompt_logprobs += self._score_prompts(chunks, call)
            else:
                for batch, call in zip(batches, calls, strict=True):
                    with use_batch(batch.view, self._cache):
                        self.model.layer(layer, call)
                layer += 1
            self._streamer.release(index)
            if time.monotonic() >= noted + _NOTE_EVERY_S:  # a pass may take a minute, and somebody may watch
                noted = self._note_times(before, started, communicated)
        self._check_layers()
        self._num_tokens += sum(sizes)
        self._note_times(before, started, communicated)
        if self.model.is_last:
            return StepResult(plan.step_id, tuple(tokens), tuple(prompt_logprobs))
        return torch.cat([call.hidden for call in calls], dim=1)

    def worker_report(self, host: str, pid: int, rss_bytes: int) -> WorkerReport:
        plan = self.rank_plan
        return WorkerReport(
            rank=plan.rank,
            host=host,
            pid=pid,
            num_kv_blocks=plan.num_kv_blocks,
            resident_bytes=plan.resident_bytes,
            slot_bytes=plan.num_slots * plan.slot_bytes,
            kv_bytes=self._cache.num_bytes,
            rss_bytes=rss_bytes,
            reader=f"{self._reader.name}, {'O_DIRECT' if self._reader.direct else 'buffered'}",
            kernels=kernels.status() if self._encoded else "",
            load_s=self._load_s,
        )

    def stream_report(self) -> StreamReport:
        """Any thread may ask, also while a step runs; waits for nothing. Counts only grow, `compute_s` too."""
        stats, times = self._streamer.snapshot(), self._times
        return StreamReport(
            rank=self.rank_plan.rank,
            num_passes=stats.num_passes,
            bytes_read=stats.bytes_read,
            bytes_copied=stats.bytes_copied,
            stall_s=times.stall_s,
            busy_s=times.busy_s,
            communication_s=times.communication_s,
            compute_s=max(0.0, times.busy_s - times.stall_s - times.communication_s),
            num_tokens=self._num_tokens,
            stall_s_per_unit=dict(stats.stall_s_per_unit),
            num_read_retries=stats.num_read_retries,
            num_slow_reads=stats.num_slow_reads,
        )

    def close(self) -> None:
        self._grammars.close()
        self._streamer.close()
        self._close_readers()

    def _close_readers(self) -> None:
        self._reader.close()
        if self._row_reader is not None:
            self._row_reader.close()

    def _take_in(self, plan: StepPlan) -> None:
        """What the ranks know from now on, and the rows a fork does not share with its origin."""
        self._table.apply(plan)
        if self._sequences is not None:
            self._sequences.drop(plan.finished)
        if self._draws:
            self._histories.apply(plan, self._table.token_ids)
            self._grammars.apply(plan)
        for new in plan.new:
            if new.fork_of is None:
                continue
            copies = self._table.fork(new)
            if copies.rows is not None:
                self._cache.copy_rows(*copies.rows)
            if copies.slots is not None:
                self._cache.copy_slot(*copies.slots)

    def _note_times(self, before: _Times, started: float, communicated: float) -> float:
        """At the end of a unit, where stalls and work add up; now, in monotonic seconds."""
        now = time.monotonic()
        self._times = _Times(
            busy_s=before.busy_s + now - started,
            communication_s=before.communication_s + self._group.seconds - communicated,  # it serves other stages, too
            stall_s=self._streamer.snapshot().stall_s,
        )
        return now

    def _sample(self, request_ids: tuple[str, ...], logits: torch.Tensor) -> list[SampledToken]:
        if not self._draws or not request_ids:
            return []
        rows = [self._table.sampling(request_id) for request_id in request_ids]
        histories = self._histories.of(request_ids)
        specs, positions = [spec for spec, _ in rows], [position for _, position in rows]
        if not self._grammars:
            return sample(logits, request_ids, specs, positions, histories)
        masks = self._grammars.of(request_ids)
        return self._grammars.take_in(sample(logits, request_ids, specs, positions, histories, masks))

    def _score_prompts(self, chunks: tuple[Chunk, ...], call: LayerCalls) -> list[PromptLogprobs]:
        found = [
            score(
                span,
                lambda rows: self.model.finish(call, rows),
                most_rows=self._most_rows,
                device=self.device,
                answers=self._draws,
            )
            for span in prompt_spans(chunks, self._table)
        ]
        return [logprobs for logprobs in found if logprobs is not None]

    def _check_layers(self) -> None:
        """A layer that never used the KV cache is computed wrongly on this path: refuse, once, at the first step."""
        if self._checked_layers:
            return
        missing = self._cache.untouched()
        if missing:
            raise UnsupportedModelError(
                f"layers {missing} do not use the attention interface; the family cannot be run"
            )
        self._checked_layers = True
