"""What a run looks like to a person: progress, answers as they come, tables. Everything goes through one Console."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.table import Table

from dist_infer.messages import WorkerReport
from dist_infer.startup import Progress
from dist_infer.summary import RunSummary
from launch.runs.record import RunRecord
from partition.hardware import HardwareFacts
from partition.plan import Plan, describe_kv
from partition.plan_data import RankPlan
from partition.sizes import format_size

_PLAIN_WIDTH = 120
_PIECE_CHARS = 72  # off a terminal, an answer's text is printed in pieces of about this length


def make_console(*, stderr: bool = False) -> Console:
    """Tables keep their columns where the output is no terminal and so has no width of its own."""
    console = Console(stderr=stderr, highlight=False)
    return console if console.is_terminal else Console(stderr=stderr, highlight=False, width=_PLAIN_WIDTH)


class StartDisplay:
    """Progress of packing, starting and loading; a bar on a terminal, a line per phase (and tenth) elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console
        )
        self._tasks: dict[str, int] = {}
        self._printed: tuple[str, int] = ("", -1)

    def __enter__(self) -> StartDisplay:
        if self._console.is_terminal:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:  # elsewhere it was never started, and would print an empty line
            self._bars.stop()

    def show(self, progress: Progress) -> None:
        if self._console.is_terminal:
            if progress.phase not in self._tasks:
                self._tasks[progress.phase] = self._bars.add_task(progress.phase, total=progress.total or None)
            self._bars.update(
                self._tasks[progress.phase],  # type: ignore[arg-type]
                completed=progress.done,
                total=progress.total or None,
                description=f"{progress.phase} {progress.detail}"[:60].strip(),
            )
            return
        tenth = 10 * progress.done // progress.total if progress.total else 0
        if (progress.phase, tenth) != self._printed:
            self._printed = (progress.phase, tenth)
            count = f" {progress.done}/{progress.total}" if progress.total else ""
            self._console.print(f"{progress.phase}{count}", highlight=False, markup=False)


class AnswerDisplay:
    """Several answers at once: each line carries the number of its prompt; text appears as soon as a piece is ready.

    num_answers: to each prompt; with several, lines carry the number of the answer, too.
    """

    def __init__(self, console: Console, num_prompts: int, num_answers: int = 1) -> None:
        self._console = console
        self._pending = [[""] * num_answers for _ in range(num_prompts)]
        self._width = len(str(num_prompts))

    def add(self, prompt: int, answer: int, text: str) -> None:
        pending = self._pending[prompt]
        pending[answer] += text
        while (cut := _break_at(pending[answer])) is not None:
            self._line(prompt, answer, pending[answer][:cut])
            pending[answer] = pending[answer][cut:].lstrip(" \n")

    def end(self, prompt: int, answer: int, note: str) -> None:
        self._line(prompt, answer, self._pending[prompt][answer])
        self._pending[prompt][answer] = ""
        self._print(prompt, answer, f"({note})", style="dim")

    def _line(self, prompt: int, answer: int, text: str) -> None:
        if text.strip():
            self._print(prompt, answer, text.rstrip())

    def _print(self, prompt: int, answer: int, text: str, style: str | None = None) -> None:
        which = f".{answer + 1}" if len(self._pending[prompt]) > 1 else ""
        label = f"[{prompt + 1:>{self._width}}{which}]"
        self._console.print(f"{label} {text}", style=style, highlight=False, markup=False)


def _break_at(text: str) -> int | None:
    """Where to end a piece: after a newline, else at the last space once the text is long enough."""
    with suppress(ValueError):
        return text.index("\n") + 1
    if len(text) >= _PIECE_CHARS and (space := text.rfind(" ", 1)) > 0:
        return space
    return None


def plan_table(plan: Plan) -> Table:
    """Who owns what: a row per rank."""
    table = Table(title=f"plan: {plan.model.model_type}, tensor {plan.tensor} × pipeline {plan.pipeline}, {plan.dtype}")
    for name in ("rank", "node", "stage", "tp", "layers", "device", "host", "nvme", "slots", "KV", "activations"):
        table.add_column(name, justify="left" if name == "node" else "right")
    names = {budget.node: budget.name for budget in plan.budgets}
    for rank in plan.ranks:
        table.add_row(
            str(rank.rank),
            names[rank.node],
            str(rank.stage),
            str(rank.tp_rank),
            f"{rank.first_layer}–{rank.end_layer - 1}",
            format_size(rank.bytes_in("device")),
            format_size(rank.bytes_in("host")),
            format_size(rank.bytes_in("nvme")),
            _slots(rank),
            format_size(rank.kv_bytes),
            format_size(rank.activation_bytes),
        )
    return table


def _slots(rank: RankPlan) -> str:
    on_device = f" + {rank.num_device_slots}" if rank.num_device_slots else ""
    return f"{rank.num_slots}{on_device} × {format_size(rank.slot_bytes)}"


def plan_notes(plan: Plan) -> list[str]:
    """The plan's other facts, a line each."""
    notes = []
    for budget in plan.budgets:
        notes.append(
            f"{budget.name}: {format_size(budget.used_bytes)} of {format_size(budget.limit_bytes)} host memory "
            f"({budget.source}), processes {format_size(budget.footprint_bytes)}, together "
            f"{format_size(budget.used_bytes + budget.footprint_bytes)}"
        )
    streamed = sum(rank.streamed_bytes_per_pass for rank in plan.ranks)
    total = sum(unit.num_bytes for rank in plan.ranks for unit in rank.units)
    notes.append(
        f"weights {format_size(total)}, streamed per pass {format_size(streamed)} ({100 * streamed / total:.0f} %); "
        f"KV {plan.num_kv_blocks} blocks of {plan.block_tokens} tokens; up to {plan.max_requests} requests of "
        f"{plan.max_model_len} tokens; micro-batches {plan.max_micro_batches} × {plan.max_batch_tokens} tokens"
    )
    notes.append(describe_kv(plan))
    prediction = plan.prediction
    assumed = f"; assumed, not measured: {', '.join(prediction.assumed)}" if prediction.assumed else ""
    notes.append(
        f"predicted {prediction.decode_tokens_per_s:.1f} output tok/s at {prediction.tokens_per_pass} tokens per pass "
        f"({prediction.seconds_per_pass:.3f} s), bound by {prediction.bound_by}{assumed}"
    )
    return notes


def runs_table(records: Sequence[RunRecord]) -> Table:
    """What runs under which name: a row per run."""
    table = Table()
    for name in ("name", "state", "", "url", "pid", "since", "file"):
        table.add_column(name, overflow="fold")
    for record in records:
        count = f" {record.done}/{record.total}" if record.total else ""
        code = f" (exit code {record.exit_code})" if record.exit_code is not None else ""
        table.add_row(
            record.name,
            f"{record.state}{code}",
            f"{record.detail}{count}",
            record.url or "",
            str(record.process.pid),
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.started_s)),
            record.file,
        )
    return table


def summary_table(summary: RunSummary) -> Table:
    table = Table(title="run", show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    for name, value in _summary_rows(summary):
        table.add_row(name, value)
    return table


def _summary_rows(summary: RunSummary) -> Iterable[tuple[str, str]]:
    disk_share = summary.stream_bytes_per_s / summary.raw_disk_bytes_per_s if summary.raw_disk_bytes_per_s else 0.0
    yield "requests", str(summary.num_requests)
    yield "output tok/s", f"{summary.output_tokens_per_s:.1f}  ({summary.num_output_tokens} tokens)"
    yield "total tok/s", f"{summary.total_tokens_per_s:.1f}  (with {summary.num_prompt_tokens} prompt tokens)"
    yield "TTFT, median", _seconds(summary.ttft_s)
    yield "TPOT, median", _seconds(summary.tpot_s)
    yield "passes", f"{summary.num_passes}  ({summary.tokens_per_pass:.1f} tokens per pass)"
    yield "bytes per pass", format_size(summary.bytes_per_pass)
    yield (
        "streamed",
        f"{summary.stream_bytes_per_s / 1e9:.2f} GB/s  ({100 * disk_share:.0f} % of a raw O_DIRECT read, "
        f"{summary.raw_disk_bytes_per_s / 1e9:.2f} GB/s)",
    )
    yield "resident", f"{100 * summary.resident_fraction:.0f} % of the weights"
    yield "stalls", f"{summary.stall_s:.2f} s of {summary.wall_s:.2f} s"
    yield "bound by", summary.bound_by
    yield "predicted", f"{summary.predicted_tokens_per_s:.1f} output tok/s, bound by {summary.predicted_bound_by}"


def _seconds(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f} s"


def ready_line(
    reports: Sequence[WorkerReport], facts: HardwareFacts, num_written: int, pack_s: float, start_s: float
) -> str:
    """What was started, how its weights are read and why so."""
    packed = f"packed {num_written} blobs in {pack_s:.1f} s" if num_written else "packed nothing (the store is there)"
    readers = ", ".join(sorted({report.reader for report in reports}))
    reasons = "".join(f" ({why})" for why in sorted({node.reader_reason for node in facts.nodes} - {""}))
    kernels = "".join(f"; {text}" for text in sorted({report.kernels for report in reports} - {""}))
    sums = "".join(f"; {text}" for text in sorted({report.sums for report in reports} - {""}))
    return f"ready: {len(reports)} ranks in {start_s:.1f} s, {packed}; reader {readers}{reasons}{kernels}{sums}"
