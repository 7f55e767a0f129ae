"""`dist-infer check-arch …`: is a model type computed right, or refused?"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from launch.options import Json
from partition.errors import ConfigError

if TYPE_CHECKING:
    from dist_infer.check_arch.report import TypeReport

WRONG, REFUSED = 1, 3
_MOST_DEGREE = 8


def check_arch(
    targets: Annotated[
        list[str] | None,
        typer.Argument(help="Model types, or directories of models (only config.json is read).", metavar="TYPE|PATH"),
    ] = None,
    every_type: Annotated[
        bool, typer.Option("--all", help="Every causal type that the installed transformers knows.")
    ] = False,
    tensor: Annotated[
        list[int] | None, typer.Option("--tensor", help="Tensor degrees. Repeatable. Default: 1 and 2.")
    ] = None,
    pipeline: Annotated[
        list[int] | None, typer.Option("--pipeline", help="Numbers of stages. Repeatable. Default: 1 and 2.")
    ] = None,
    every_layout: Annotated[
        bool, typer.Option("--every-layout", help="Also with several tensor ranks every combination.")
    ] = False,
    jobs: Annotated[int, typer.Option("--jobs", help="Types checked at a time.")] = 1,
    deadline: Annotated[float, typer.Option("--deadline", help="Seconds that the check of one type may take.")] = 300.0,
    write: Annotated[
        Path | None, typer.Option("--write", metavar="OUT.md", help="With --all: write the table of all types.")
    ] = None,
    write_types: Annotated[
        Path | None, typer.Option("--write-types", metavar="OUT.json", help="With --all: write which types are equal.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare tiny random models with transformers' eager forward, through the path that real models take.

    Exit code 1: something is wrong or failed; 3: a type that was named is refused, or transformers has no such model.
    """
    named = list(targets or [])
    degrees, stages = tuple(tensor or (1, 2)), tuple(pipeline or (1, 2))
    _check_options(named, every_type, degrees, stages, jobs, deadline)
    for flag, path in (("--write", write), ("--write-types", write_types)):
        _check_output(flag, path, every_type)
    from dist_infer.check_arch.layout import layouts_of
    from dist_infer.check_arch.report import document, transcript
    from dist_infer.check_arch.walk import WalkOptions, walk, walk_all
    from launch.display import make_console

    layouts = layouts_of(degrees, stages, every=every_layout)
    options = WalkOptions(jobs=jobs, deadline_s=deadline)
    console = make_console(stderr=as_json)

    def show(report: TypeReport) -> None:
        for line in transcript(report):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its default configs warn of each other
    from dist_infer.check_arch.tiny_config import causal_types, is_directory, read_config, text_type

    if not every_type:
        for target in named:
            if is_directory(target):  # a typing error ends here, not in a process of its own
                read_config(Path(target))
        reports = walk(named, layouts, options, show)
    else:
        done: list[str] = []
        types = causal_types()

        def count(report: TypeReport) -> None:
            done.append(report.target)
            error = "" if report.error is None else f", {report.error:.0e}"
            words = f": {report.remark}" if report.verdict != "equal" else ""
            console.print(
                f"[{len(done)}] {report.target}: {report.verdict}{error}{words}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )

        reports = walk_all(types, layouts, options, count, text_type)
        _print_counts(reports)
    if as_json:
        print(document(reports))
    _write_all(reports, write, write_types)
    code = exit_code(reports, walked_all=every_type)
    if code:
        raise typer.Exit(code)


def exit_code(reports: Sequence[TypeReport], *, walked_all: bool) -> int:
    """0: all is equal, or among all types refused by name."""
    verdicts = {report.verdict for report in reports}
    if verdicts & {"wrong", "failed"}:
        return WRONG
    return REFUSED if not walked_all and verdicts & {"refused", "no-reference"} else 0


def _print_counts(reports: Sequence[TypeReport]) -> None:
    from launch.display import make_console

    counts: dict[str, int] = {}
    for report in reports:
        counts[report.verdict] = counts.get(report.verdict, 0) + 1
    words = ", ".join(f"{number} {verdict}" for verdict, number in sorted(counts.items()))
    make_console(stderr=True).print(f"{len(reports)} types: {words}", markup=False, highlight=False)


def _check_options(
    named: Sequence[str], every_type: bool, tensor: Sequence[int], pipeline: Sequence[int], jobs: int, deadline: float
) -> None:
    if every_type == bool(named):
        raise ConfigError("give model types or directories, or --all (and not both)")
    for flag, values in (("--tensor", tensor), ("--pipeline", pipeline)):
        if any(not 1 <= value <= _MOST_DEGREE for value in values):
            raise ConfigError(f"{flag} must be from 1 to {_MOST_DEGREE}, not {', '.join(map(str, values))}")
    if jobs < 1:
        raise ConfigError(f"--jobs must be at least 1, not {jobs}")
    if not deadline > 0:
        raise ConfigError(f"--deadline must be more than 0 seconds, not {deadline}")


def _check_output(flag: str, path: Path | None, every_type: bool) -> None:
    if path is None:
        return
    if not every_type:
        raise ConfigError(f"{flag} needs --all: the file is about every type")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"{flag} {path}: give the path of a file in a folder that is there")


def _write_all(reports: Sequence[TypeReport], page: Path | None, types: Path | None) -> None:
    from dist_infer.check_arch.models_page import checked_types, render

    if page is not None:
        from transformers import __version__

        _write(page, "--write", render(reports, __version__))
    if types is not None:
        _write(types, "--write-types", checked_types(reports))


def _write(path: Path, flag: str, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{flag} {path} cannot be written: {error.strerror or error}") from error
