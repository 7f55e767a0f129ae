"""`dist-infer status`, `logs`, `drain`, `down`: what is done with runs by their names."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from launch.options import Json
from launch.runs.record import RunRecord

Name = Annotated[str, typer.Argument(help="The run's name, as in its file.", metavar="NAME")]


def status(
    name: Annotated[str | None, typer.Argument(help="One run alone.", metavar="[NAME]")] = None, as_json: Json = False
) -> None:
    """Show the runs of this machine: where they answer, how far they are, how they ended."""
    from launch.runs.logs import require_record
    from launch.runs.place import state_directory
    from launch.runs.stop import all_records

    records = all_records(state_directory()) if name is None else [require_record(name)]
    if as_json:
        described = [describe(record) for record in records]
        print(json.dumps(described if name is None else described[0]))
        return
    from launch.display import make_console, runs_table

    if not records:
        print("no runs on this machine")
        return
    console = make_console()
    console.print(runs_table(records))
    for record in records:
        if record.error:
            console.print(f"{record.name}: {record.error}", markup=False)
        if record.log is not None:
            console.print(f"{record.name} writes to {record.log}", markup=False)


def logs(
    name: Name,
    which: Annotated[
        str | None, typer.Argument(help="A rank's number, or `replica`. Without it: the run itself.", metavar="[RANK]")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends.")] = False,
) -> None:
    """Print what a run wrote, or one of its ranks."""
    from launch.runs.logs import print_log, require_record

    print_log(require_record(name), which, follow=follow)


def drain(name: Name) -> None:
    """Let a serving run finish what it has and take nothing new; it stays there until `down`."""
    from launch.runs import stop

    stop.drain(name)
    print(f"{name}: drained")


def down(
    name: Name,
    now: Annotated[
        bool, typer.Option("--now", help="Let no request finish, and forget a Ray cluster that is gone.")
    ] = False,
) -> None:
    """End a run and all that it started, or what a killed one left. Drains first. Harmless when nothing is there."""
    from launch.runs import stop

    print(stop.down(name, now=now))


def run_detached(name: str, *, as_json: bool) -> None:
    """This command again, as a run of its own; what it is doing is shown here until it is ready."""
    from dist_infer.startup import Progress
    from launch.display import StartDisplay, make_console
    from launch.runs.announce import Notice
    from launch.runs.detach import launch_detached

    with StartDisplay(make_console(stderr=True)) as display:

        def show(notice: Notice) -> None:
            if notice.detail:
                display.show(Progress(notice.detail, notice.done, notice.total))

        record = launch_detached(name, sys.argv[1:], show)
    if as_json:
        print(json.dumps(describe(record)))
        return
    where = f" at {record.url}/v1" if record.url is not None else ""
    print(f"{name} runs{where} (pid {record.process.pid}); `dist-infer down {name}` ends it; its output: {record.log}")


def describe(record: RunRecord) -> dict[str, Any]:
    """A record as JSON for programs: its fields, its state instead of the phase, the pid alone of its process."""
    fields = asdict(record)
    del fields["phase"], fields["process"]
    return {"name": record.name, "state": record.state, "pid": record.process.pid, **fields}
