"""`dist-infer bench …`: measurements of a run file on the machine at hand, and of an endpoint."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.bench_serve import serve
from launch.options import File, Json, Set
from partition.errors import ConfigError
from partition.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from dist_infer.stream_bench import StreamBatch, StreamBench

app = typer.Typer(help="Measure a run file on the machine at hand, or an endpoint.", no_args_is_help=True)
app.command()(serve)


@app.callback()
def bench() -> None:
    """Measure a run file on the machine at hand, or an endpoint."""


@app.command()
def stream(
    file: File,
    overrides: Set = None,
    batch: Annotated[
        list[int] | None,
        typer.Option("--batch", help="Requests decoded together. Repeatable. Default: 1, 8, 32 as far as they fit."),
    ] = None,
    rounds: Annotated[int, typer.Option("--rounds", help="Times that everything is measured; medians count.")] = 3,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of each (random) prompt.")] = 16,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens of each answer, at least 4.")] = 8,
    raw_seconds: Annotated[float, typer.Option("--raw-seconds", help="Seconds of each raw read.")] = 1.5,
    as_json: Json = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="OUT.html", help="Write a page with figures and timelines.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option("--trace", metavar="OUT.json", help="Write a Chrome trace, e.g. for Perfetto.")
    ] = None,
) -> None:
    """Compare streamed decoding with raw O_DIRECT reads of the same store and with the plan's prediction."""
    from dist_infer.config import load_config
    from dist_infer.llm import LLM
    from dist_infer.stream_bench import StreamBenchOptions, bench_stream
    from launch.display import StartDisplay, make_console

    config = load_config(file, overrides or [])
    options = StreamBenchOptions(
        batches=tuple(batch) if batch else None,
        rounds=rounds,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        raw_s=raw_seconds,
    )
    options.check(config)
    for flag, path in (("--report", report), ("--trace", trace)):
        if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
            raise ConfigError(f"{flag} {path}: give the path of a file in a folder that is there")
    console = make_console(stderr=as_json)
    with StartDisplay(console) as display:
        llm = LLM(config, on_progress=display.show, timeline=True)
    with llm:
        found = bench_stream(llm, config, options, lambda line: console.print(line, markup=False))
    console.print(_table(found))
    for line in _notes(found):
        console.print(line, markup=False)
    if as_json:
        print(json.dumps(found.as_dict()))
    if report is not None:
        from dist_infer.stream_report import stream_report

        _write(report, "--report", stream_report(found))
    if trace is not None:
        from dist_infer.stream_trace import chrome_trace

        _write(trace, "--trace", json.dumps(chrome_trace(found)))


def _table(found: StreamBench) -> Table:
    """A row per batch; medians of the rounds, times per pass."""
    from rich.table import Table

    table = Table(title=f"streamed decoding: {found.model_type}, {found.dtype}; medians, times per pass")
    for name in ("batch", "tok/s", "s/pass", "read", "GB/s", "raw", "of raw", "stall s", "compute s", "exposed s"):
        table.add_column(name, justify="right")
    table.add_column("predicted tok/s", justify="right")
    table.add_column("bound by")
    for each in found.batches:
        table.add_row(*_row(each))
    return table


def _row(each: StreamBatch) -> list[str]:
    median = each.median
    return [
        str(each.batch),
        f"{median.tokens_per_s:.2f}",
        f"{median.seconds_per_pass:.3f}",
        format_size(round(median.bytes_per_pass)),
        f"{median.bytes_per_s / 1e9:.2f}",
        f"{median.raw_bytes_per_s / 1e9:.2f}",
        "–" if median.percent_of_raw is None else f"{median.percent_of_raw:.0f} %",
        f"{median.stall_s:.3f}",
        f"{median.compute_s:.3f}",
        f"{median.exposed_s:.3f}",
        f"{each.predicted_tokens_per_s:.2f}",
        each.bound_by,
    ]


def _notes(found: StreamBench) -> Iterator[str]:
    streamed = found.planned_bytes_per_pass / found.total_bytes
    yield (
        f"weights {format_size(found.total_bytes)}, {100 * streamed:.0f} % streamed in every pass; reader "
        f"{found.reader}; prompts of {found.prompt_tokens} tokens, answers of {found.new_tokens}"
    )
    in_cache = statistics.median(rate.bytes_per_s for rate in found.raw_in_cache)
    yield f"raw reads into the same few buffers, which stay in the processor's cache: {in_cache / 1e9:.2f} GB/s"
    for name, rate in found.raw_assumed.items():
        yield f"{name}: {rate / 1e9:.2f} GB/s raw, measured at the start alone: it is another machine"
    if not found.raw_is_direct:
        yield "the store's file system refuses O_DIRECT: its raw reads went through the page cache and say little"
    for each in found.batches:
        yield f"batch {each.batch}: {100 * each.achieved_of_predicted:.0f} % of what was predicted; {each.verdict}"


def _write(path: Path, flag: str, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be written: {error.strerror or error}") from error
