"""`dist-infer doctor FILE`."""

from __future__ import annotations

import json

import typer

from dist_infer.config import load_config
from launch.options import File, Json, Set


def doctor(file: File, overrides: Set = None, as_json: Json = False) -> None:
    """Look for what could stop a run, on every node; say why it matters and what to do. Changes nothing."""
    from launch.display import make_console
    from launch.doctor.examine import examine
    from launch.doctor.report import report_table, report_title

    report = examine(load_config(file, overrides or []))
    if as_json:
        print(json.dumps(report.as_dict()))
    else:
        make_console().print(report_table(report.findings, report_title(report)))
    if report.exit_code:
        raise typer.Exit(report.exit_code)
