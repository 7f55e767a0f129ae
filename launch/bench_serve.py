"""`dist-infer bench serve URL`: load on any OpenAI endpoint, measured at the client."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from launch.options import Json
from partition.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from dist_infer.load.arrivals import Load
    from dist_infer.load.client import Target
    from dist_infer.load.figures import LoadFigures
    from dist_infer.load.prompts import Question
    from dist_infer.load.run import Measured


def serve(
    url: Annotated[str, typer.Argument(help="The endpoint, e.g. http://127.0.0.1:8000.", metavar="URL")],
    rate: Annotated[
        float | None, typer.Option("--rate", help="Open loop: requests a second, at random (Poisson) times.")
    ] = None,
    concurrency: Annotated[
        int | None, typer.Option("--concurrency", help="Closed loop: requests that are open at any time.")
    ] = None,
    max_requests: Annotated[int | None, typer.Option("--max-requests", help="End after this many.")] = None,
    duration: Annotated[float | None, typer.Option("--duration", help="Start none after this many seconds.")] = None,
    prompt_words: Annotated[
        str, typer.Option("--prompt-words", help="fixed:N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA random words.")
    ] = "fixed:64",
    prompts: Annotated[
        Path | None, typer.Option("--prompts", metavar="FILE.jsonl", help="Prompts of a file instead of random words.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", help="Of each answer.")] = 128,
    api: Annotated[str, typer.Option("--api", help="chat or completions.")] = "chat",
    model: Annotated[str | None, typer.Option("--model", help="Default: the first that the endpoint lists.")] = None,
    api_key_env: Annotated[
        str, typer.Option("--api-key-env", help="The environment variable that holds the API key.")
    ] = "DIST_INFER_API_KEY",
    extra: Annotated[
        str, typer.Option("--extra", metavar="JSON", help='More fields of each request, e.g. {"ignore_eos": true}.')
    ] = '{"temperature": 0}',
    usage: Annotated[bool, typer.Option("--usage/--no-usage", help="Ask the server for its count of tokens.")] = True,
    warmup: Annotated[int, typer.Option("--warmup", help="Requests before, at once, that do not count.")] = 1,
    timeout: Annotated[float, typer.Option("--timeout", help="Seconds that one request may take.")] = 600.0,
    slo: Annotated[
        str | None, typer.Option("--slo", help="Objectives for goodput, e.g. ttft=500ms,tpot=50ms,e2e=10s.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of arrival times and prompts.")] = 0,
    as_json: Json = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="OUT.html", help="Write a page with plots.")
    ] = None,
) -> None:
    """Put load on an OpenAI endpoint and measure rates, TTFT, TPOT, ITL, whole requests and goodput."""
    from dist_infer.load.arrivals import Load
    from dist_infer.load.client import Target, base_url
    from dist_infer.load.figures import load_figures, read_slo
    from dist_infer.load.prompts import prompts_of_file, random_prompts, read_lengths
    from dist_infer.load.report import load_report
    from launch.display import make_console

    load = Load(rate_per_s=rate, concurrency=concurrency, max_requests=max_requests, duration_s=duration)
    slo_s = read_slo(slo) if slo is not None else {}
    for option, value, least in (("--max-tokens", max_tokens, 1), ("--warmup", warmup, 0)):
        if value < least:
            raise ConfigError(f"{option} is {value}: it must be at least {least}")
    if not 0 < timeout < float("inf"):
        raise ConfigError(f"--timeout is {timeout}: it must be above 0, and finite")
    if report is not None and (report.is_dir() or not report.absolute().parent.is_dir()):
        raise ConfigError(f"--report {report}: give the path of a file in a folder that is there")
    where, kind, fields = base_url(url), _api(api), _fields(extra)
    questions = prompts_of_file(prompts, seed) if prompts else random_prompts(read_lengths(prompt_words), seed)
    target = Target(
        url=where,
        model=model or "",
        api=kind,
        max_tokens=max_tokens,
        timeout_s=timeout,
        extra=fields,
        with_usage=usage,
    )
    console = make_console(stderr=as_json)
    key = os.environ.get(api_key_env)
    target, measured = asyncio.run(_measure(target, load, questions, warmup, seed, key, console))
    found = load_figures(measured, slo_s)
    console.print(_table(found))
    for line in _notes(found, measured):
        console.print(line, markup=False)
    loop = f"open loop, {rate:g} requests a second" if rate is not None else f"closed loop, {concurrency} at a time"
    asked = f"prompts of {prompts}" if prompts else f"prompts of {prompt_words} words"
    facts = [where, f"model {target.model}", f"{kind}, streamed", loop, asked, f"at most {max_tokens} tokens an answer"]
    if as_json:
        print(json.dumps({"url": where, "model": target.model, "load": facts[2:], **found.as_dict()}))
    if report is not None:
        try:
            report.write_text(load_report(measured, found, facts), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--report {report} cannot be written: {error.strerror or error}") from error


async def _measure(
    target: Target,
    load: Load,
    questions: Iterator[Question],
    num_warmup: int,
    seed: int,
    api_key: str | None,
    console: Console,
) -> tuple[Target, Measured]:
    """The target with its model's name, and the records. Leaves no connection open, also when it is interrupted."""
    from dist_infer.load.client import first_model, make_client
    from dist_infer.load.run import run_load, warm_up

    async with make_client(api_key, target.timeout_s) as client:
        if not target.model:
            target = replace(target, model=await first_model(client, target.url))
        await warm_up(client, target, questions, num_warmup)
        with console.status("measuring") as status:
            measured = await run_load(
                client,
                target,
                load,
                questions,
                seed=seed,
                on_end=lambda count: status.update(f"{count} requests ended"),
            )
    return target, measured


def _api(text: str) -> Literal["chat", "completions"]:
    if text == "chat":
        return "chat"
    if text == "completions":
        return "completions"
    raise ConfigError(f"--api {text!r}: there are chat and completions")


def _fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise ConfigError(f"--extra is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise ConfigError('--extra must be a JSON object, e.g. {"ignore_eos": true}')
    if fields.get("stream") is False or fields.get("n", 1) != 1:
        raise ConfigError("--extra: answers are measured as they stream, one each: leave stream and n out")
    return fields


def _table(found: LoadFigures) -> Table:
    from rich.table import Table

    table = Table(title=f"{found.num_completed} of {found.num_requests} requests in {found.seconds:.1f} s")
    table.add_column("milliseconds")
    for name in ("mean", "median", "p90", "p99", "highest"):
        table.add_column(name, justify="right")
    rows = (
        ("TTFT", found.ttft),
        ("TPOT", found.tpot),
        ("ITL", found.itl),
        ("E2E", found.e2e),
        ("sent late", found.late),
    )
    for name, spread in rows:
        if spread is not None:
            values = (spread.mean, spread.median, spread.p90, spread.p99, spread.highest)
            table.add_row(name, *(f"{1e3 * value:.2f}" for value in values))
    return table


def _notes(found: LoadFigures, measured: Measured) -> Iterator[str]:
    total = "" if found.total_tokens_per_s is None else f", {found.total_tokens_per_s:.1f} with prompts"
    yield (
        f"{found.requests_per_s:.2f} requests/s, {found.output_tokens_per_s:.1f} output tok/s{total}; "
        f"{found.peak_in_flight} open at most"
    )
    if found.token_source == "pieces":
        yield "the server did not count tokens: each piece of a stream was taken for one"
    if found.goodput_per_s is not None and found.good_share is not None:
        yield f"goodput: {found.goodput_per_s:.2f} requests/s, {100 * found.good_share:.1f} % of all"
    if found.late is not None and found.ttft is not None and found.late.p99 > 0.1 * found.ttft.median:
        yield "the client was behind its own schedule: send less from here, or run it on another machine"
    for kind, count in found.errors.items():
        details = [record.detail for record in measured.records if record.error == kind and record.detail]
        yield f"{count} × {kind}{': ' + details[0][:200] if details else ''}"
