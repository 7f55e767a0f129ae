"""dist-infer beside accelerate, DeepSpeed ZeRO-Inference and llama.cpp, on one checkpoint in one memory cgroup.

    python benchmarks/peers.py setup     an environment for each peer (once; compiles llama.cpp and async_io)
    python benchmarks/peers.py model     the checkpoint: safetensors, and GGUF in BF16, Q8_0 and Q4_0 (once)
    python benchmarks/peers.py run --rounds 3 --memory 3GiB
    python benchmarks/peers.py report RESULTS.json --plot docs/benchmarks/peers.svg

Everything is kept below --work (about 35 GB of disk at the end). Needs root, or the right to make memory cgroups.
Competitors take turns, round after round, each in a process of its own, with a cold page cache and two readings of the
raw disk around it. Results are written after every run, so an interrupted measurement is not lost.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import shlex
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peers import competitors as field
from peers.disk import drop_page_cache
from peers.environments import python_of, recipes, set_up
from peers.facts import machine_facts, revision
from peers.report import markdown
from peers.runs import WORK, Record, Shared, pack_once, run_once
from peers.shape import SHAPES

from partition.errors import DistInferError
from partition.sizes import parse_size

PLOT = Path(__file__).resolve().parent / "peers" / "runners" / "plot.py"
_PLOT_TIMEOUT_S = 120.0
_KERNELS_TIMEOUT_S = 180.0


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def setup(arguments: argparse.Namespace) -> None:
    names = tuple(arguments.only or recipes())
    unknown = [name for name in names if name not in recipes()]
    if unknown:
        raise ValueError(f"no environment is called {', '.join(unknown)}; there are: {', '.join(recipes())}")
    set_up(arguments.work, names, say)


def model(arguments: argparse.Namespace) -> None:
    from peers.checkpoint import (  # torch and gguf, which nothing else here needs
        GGUF_TYPES,
        write_checkpoint,
        write_gguf,
    )

    shape = SHAPES[arguments.shape]
    folder = arguments.work / "models" / shape.name
    write_checkpoint(shape, folder / "safetensors", say)
    for kind in GGUF_TYPES:
        write_gguf(shape, folder / "safetensors", folder / f"{kind}.gguf", kind, say)
    say(f"{folder}: complete, {shape.num_bytes / 1e9:.2f} GB in bfloat16")


def run(arguments: argparse.Namespace) -> None:
    arguments.work.mkdir(parents=True, exist_ok=True)
    with open(arguments.work / "run.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(
                f"another measurement runs in {arguments.work}: wait for it, or give another --work"
            ) from None
        measure(arguments)


def measure(arguments: argparse.Namespace) -> None:
    shape = SHAPES[arguments.shape]
    memory = parse_size(arguments.memory)
    shared = Shared(
        work=arguments.work, model_name=shape.name, vocab=shape.vocab, memory_bytes=memory, threads=arguments.threads
    )
    if not (arguments.work / "models" / shape.name / "q4_0.gguf").is_file():
        raise FileNotFoundError(f"no checkpoint in {arguments.work}: run `peers.py model --shape {arguments.shape}`")
    taking_part = field.chosen(field.competitors(memory), arguments.only)
    for competitor in taking_part:
        if competitor.environment is not None:
            python_of(arguments.work, competitor.environment)
    if not drop_page_cache():
        say("the page cache cannot be dropped without root: loads may come from memory (recorded as cold: false)")
    batches = [int(text) for text in arguments.batch.split(",")]
    if any(batch not in WORK for batch in batches):
        raise ValueError(f"--batch {arguments.batch}: of {', '.join(map(str, WORK))}")
    document: dict[str, Any] = {
        "machine": machine_facts(arguments.work),
        "command": shlex.join(["python", "benchmarks/peers.py", *sys.argv[1:]]),
        "revision": revision(),
        "started": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        "model": {**asdict(shape), "num_bytes": shape.num_bytes},
        "memory_bytes": memory,
        "threads": arguments.threads,
        "work": {str(batch): asdict(WORK[batch]) for batch in batches},
        "kernels": built_kernels() if any(c.environment is None for c in taking_part) else "",
        "packs": [],
        "runs": [],
    }

    def keep(kind: str, record: Record) -> None:
        document[kind].append(record.as_dict())
        temporary = arguments.out.with_suffix(".tmp")
        temporary.write_text(json.dumps(document, indent=1))
        os.replace(temporary, arguments.out)
        last = f": {record.error.strip().splitlines()[-1]}" if record.error.strip() else ""
        say(f"{kind} {record.competitor}, batch {record.batch}: {record.ended} in {record.wall_s:.1f} s{last}")

    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for competitor in taking_part:
        kept = arguments.keep_stores and field.scratch_path(arguments.work, shape.name, competitor).exists()
        if competitor.packs and not kept:
            keep("packs", pack_once(shared, competitor, 1))
    given_up: set[str] = set()  # runs that cannot end well are not repeated
    for number in range(1, arguments.rounds + 1):
        for batch in batches:
            for competitor in taking_part:
                key = competitor.key(batch)
                if batch not in competitor.batches or key in given_up:
                    continue
                record = run_once(shared, competitor, WORK[batch], number, capped=competitor.capped)
                keep("runs", record)
                if record.ended != "ok":
                    given_up.add(key)
                if record.ended == "killed":  # without the cap, marked so in the table
                    keep("runs", run_once(shared, competitor, WORK[batch], number, capped=False))
    say(f"{arguments.out}: complete")


def built_kernels() -> str:
    """Compile dist-infer's kernels, once a machine, before anything is timed; which ones they are."""
    command = [sys.executable, "-c", "from offload.kernels import status; print(status())"]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, timeout=_KERNELS_TIMEOUT_S
    ).stdout.strip()


def report(arguments: argparse.Namespace) -> None:
    document = json.loads(arguments.results.read_text())
    text = markdown(document)
    if arguments.markdown is None:
        print(text)
    else:
        arguments.markdown.parent.mkdir(parents=True, exist_ok=True)
        arguments.markdown.write_text(text)
    if arguments.plot is not None:
        arguments.plot.parent.mkdir(parents=True, exist_ok=True)
        python = python_of(arguments.work, "plot")
        command = [str(python), str(PLOT), str(arguments.results), str(arguments.plot)]
        subprocess.run(command, check=True, timeout=_PLOT_TIMEOUT_S)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, action in (("setup", setup), ("model", model), ("run", run), ("report", report)):
        command = commands.add_parser(name)
        command.set_defaults(action=action)
        command.add_argument("--work", type=Path, default=Path("~/.cache/dist-infer/benchmarks").expanduser())
        if name == "setup":
            command.add_argument("--only", nargs="+", help=f"of {', '.join(recipes())}")
        if name in ("model", "run"):
            command.add_argument("--shape", choices=tuple(SHAPES), default="full", help="tiny: to try the script")
        if name == "run":
            command.add_argument("--rounds", type=int, default=3)
            command.add_argument("--memory", default="3GiB", help="of the cgroup: process tree and page cache together")
            command.add_argument("--batch", default="1,32")
            command.add_argument("--only", nargs="+", default=[], help="texts that a competitor's name holds")
            command.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
            command.add_argument("--keep-stores", action="store_true", help="do not pack where a store is there")
            command.add_argument("--out", type=Path, default=Path("peers.json"))
        if name == "report":
            command.add_argument("results", type=Path)
            command.add_argument("--markdown", type=Path, help="file for the text; without it, stdout")
            command.add_argument("--plot", type=Path, help="SVG file (needs the environment `plot`)")
    arguments = parser.parse_args()
    arguments.work = arguments.work.absolute()
    try:
        arguments.action(arguments)
    except (DistInferError, ValueError, RuntimeError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
