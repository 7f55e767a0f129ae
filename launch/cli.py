"""The command line. Exit codes: 0 ok, 2 config or usage, 3 checkpoint, store or disk, 4 cluster, 130 interrupted."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dist_infer.chat_messages import make_conversation
from dist_infer.config import RunConfig, load_config
from dist_infer.generate_config import GenerateConfig
from dist_infer.prompt_config import ChatPrompt, Prompt
from dist_infer.prompts_file import read_prompts
from dist_infer.serve_config import ServeConfig
from launch import bench
from launch.check_arch import check_arch
from launch.doctor.command import doctor
from launch.interrupt import EXIT_CODE, end_on_interrupt
from launch.options import File, Json, Set
from launch.root_guard import check_one_root
from launch.runs.announce import Announcer
from launch.runs.commands import down, drain, logs, run_detached, status
from launch.runs.run import Run
from launch.top import top
from partition.errors import ConfigError, DistInferError

if TYPE_CHECKING:
    from rich.console import Console

    from dist_infer.llm import LLM
    from dist_infer.outputs import RequestOutput
    from dist_infer.summary import RunSummary

app = typer.Typer(
    help="Distributed inference for models that do not fit.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(bench.app, name="bench")
app.command(name="check-arch")(check_arch)
app.command()(top)
app.command()(doctor)


app.command()(status)
app.command()(logs)
app.command()(drain)
app.command()(down)


@app.command()
def launch(
    file: File,
    overrides: Set = None,
    as_json: Json = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Return when it is ready, and leave it running: see status, logs, down.")
    ] = False,
    no_preflight: Annotated[
        bool, typer.Option("--no-preflight", help="Start without looking first for what could stop it.")
    ] = False,
) -> None:
    """Do what the file's `run:` section says."""
    with Announcer.from_environment() as announcer:
        config = load_config(file, overrides or [])
        if config.run is None:
            raise ConfigError(f"{file} has no `run:` section: add e.g. `run: {{kind: generate, prompts: [...]}}`")
        if detach and not announcer.is_detached:
            run_detached(config.name, as_json=as_json)
            return
        with Run(config, file, announcer) as entry:
            if not no_preflight:
                _preflight(config)
            if isinstance(config.run, ServeConfig):
                from launch.serve import serve_until_signal

                serve_until_signal(config, config.run, entry)
                return
            _generate(config, config.run, as_json and not detach, entry)


@app.command()
def generate(
    file: File,
    prompt: Annotated[list[str], typer.Option("--prompt", help="A prompt. Repeatable.")],
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Answer prompts given here, with the model, cluster and sampling of the file."""
    config = load_config(file, overrides or [])
    if not all(prompt):
        raise ConfigError("--prompt is empty: write a text")
    run = config.run if isinstance(config.run, GenerateConfig) else None
    run = run or GenerateConfig(kind="generate", prompts=list(prompt))
    _generate(config, run.model_copy(update={"prompts": list(prompt), "prompts_file": None}), as_json)


@app.command()
def plan(
    file: File,
    overrides: Set = None,
    as_json: Json = False,
    hardware: Annotated[
        Path | None, typer.Option("--hardware", help="Plan for this hardware (YAML) instead of the machine here.")
    ] = None,
) -> None:
    """Print which rank owns what, in which tier, and what it should cost. Reads no weights, starts nothing."""
    from dist_infer.backend import make_backend
    from dist_infer.startup import open_model, plan_run
    from launch.display import make_console, plan_notes, plan_table
    from partition.hardware import load_hardware
    from partition.plan import plan_to_json

    config = load_config(file, overrides or [])
    model = open_model(config, weights=False)
    backend = make_backend(config.cluster, config.name)
    try:
        footprint = backend.footprint(config.parallel.tensor, config.parallel.pipeline)
        if hardware is not None:
            facts = load_hardware(hardware)
        else:
            facts = backend.facts(with_devices=config.cluster.device != "cpu", sample=None, dtype=None)
        result = plan_run(config, model, facts, footprint)
    finally:
        backend.close()
    if as_json:
        print(plan_to_json(result))
        return
    console = make_console()
    console.print(plan_table(result))
    for note in plan_notes(result):
        console.print(note, markup=False)


@app.command()
def pack(file: File, overrides: Set = None, as_json: Json = False) -> None:
    """Make the packed store of the file's model, dtype and tensor degree; resumes what was begun."""
    from dist_infer.startup import open_model, pack_model
    from launch.display import StartDisplay, make_console

    config = load_config(file, overrides or [])
    model = open_model(config)
    console = make_console(stderr=True)
    with StartDisplay(console) as display:
        location, report = pack_model(config, model, display.show)
    if as_json:
        print(json.dumps({"store": location.directory, **asdict(report)}))
        return
    what = f"wrote {report.num_written} blobs, {report.bytes_written / 1e6:.0f} MB" if report.num_written else "nothing"
    print(f"{location.directory}: {what} in {report.seconds:.1f} s, {report.num_reused} blobs were there")


@app.command()
def verify(
    target: Annotated[
        Path, typer.Argument(help="A run file, or the directory of a packed store.", metavar="FILE|STORE")
    ],
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Re-read a packed store against its checksums. Exit code 3 when a blob is bad."""
    from dist_infer.startup import Progress
    from launch.display import StartDisplay, make_console
    from offload.pack import verify_store

    directory = target if target.is_dir() else _store_of(load_config(target, overrides or []))
    console = make_console(stderr=True)

    with StartDisplay(console) as display:
        report = verify_store(directory, lambda done, total: display.show(Progress("verifying", done, total)))
    bad = [asdict(blob) for blob in report.bad]
    if as_json:
        print(json.dumps({"store": str(directory), "num_checked": report.num_checked, "bad": bad}))
    else:
        for blob in report.bad:
            print(f"BAD {blob.unit} of tensor rank {blob.tp_rank}: digest {blob.actual}, packed as {blob.expected}")
        print(f"{directory}: {report.num_checked - len(bad)} of {report.num_checked} blobs are as they were packed")
    if bad:
        raise typer.Exit(3)


@app.command()
def schema() -> None:
    """Print the JSON Schema of the run file, for editors."""
    print(json.dumps(RunConfig.model_json_schema(), indent=2))


@app.command()
def version() -> None:
    """Print the version."""
    from dist_infer import __version__

    print(f"dist-infer {__version__}")


def _store_of(config: RunConfig) -> Path:
    from dist_infer.startup import open_model, store_location

    return Path(store_location(config, open_model(config)).directory)


def _preflight(config: RunConfig) -> None:
    """What the doctor finds, if it is a problem, before anything is started."""
    from launch.display import make_console
    from launch.doctor.preflight import preflight

    preflight(config, make_console(stderr=True))


def _generate(config: RunConfig, run: GenerateConfig, as_json: bool, entry: Run | None = None) -> None:
    """Start, answer, print. With --json stdout holds one JSON document, and what people read goes to stderr.

    entry: is told how it stands.
    """
    from dist_infer.llm import LLM
    from dist_infer.startup import Progress
    from launch.display import StartDisplay, make_console, plan_notes, plan_table, ready_line, summary_table
    from partition.plan import plan_to_json

    if run.prompts_file is not None:  # a bad line is better known now than when all is loaded
        run = run.model_copy(update={"prompts": read_prompts(run.prompts_file), "prompts_file": None})
    console = make_console(stderr=as_json)
    started = time.monotonic()
    with StartDisplay(console) as display:

        def show(progress: Progress) -> None:
            display.show(progress)
            if entry is not None:
                entry.progress(progress)

        llm = LLM(config, on_progress=show)
    with llm:
        pack_report = llm.gang.pack_report
        written, pack_s = pack_report.num_written, pack_report.seconds
        ready = ready_line(llm.gang.reports, llm.gang.facts, written, pack_s, time.monotonic() - started)
        console.print(ready, markup=False)
        if entry is not None:
            entry.note("ready")
        outputs, summary = _answer(llm, run, console)
        console.print(plan_table(llm.plan))
        for note in plan_notes(llm.plan):
            console.print(note, markup=False)
        console.print(summary_table(summary))
        if as_json:
            document = {
                "outputs": [asdict(output) for output in outputs],
                "summary": summary.as_dict(),
                "pack": asdict(pack_report),
                "plan": json.loads(plan_to_json(llm.plan)),
            }
            print(json.dumps(document))


def _answer(llm: LLM, run: GenerateConfig, console: Console) -> tuple[list[RequestOutput], RunSummary]:
    from dist_infer.outputs import Failed, TokenEvent
    from launch.display import AnswerDisplay

    prompts = []
    for index, prompt in enumerate(run.prompts):
        try:
            prompts.append(_prompt_ids(llm, run, prompt))
        except ConfigError as error:
            raise ConfigError(f"prompt {index + 1} of {len(run.prompts)}: {error}") from error
    width = len(str(len(prompts)))
    for index, (text, _) in enumerate(prompts):
        console.print(f"[{index + 1:>{width}}] > {text}", style="bold", markup=False)
    answers = AnswerDisplay(console, len(prompts), run.n)
    outputs: dict[int, RequestOutput] = {}
    before, started = llm.stream_reports(), time.monotonic()
    for index, event in llm.events(prompts, [run.sampling_params()] * len(prompts)):
        if isinstance(event, TokenEvent):
            answers.add(index, event.index, event.text)
        elif isinstance(event, Failed):
            raise event.error
        else:
            outputs[index] = event.output
            for answer in event.output.outputs:
                answers.end(index, answer.index, f"{answer.finish_reason}, {len(answer.token_ids)} tokens")
    summary = llm.summarise(list(outputs.values()), before, started)
    return [outputs[index] for index in range(len(prompts))], summary


def _prompt_ids(llm: LLM, run: GenerateConfig, prompt: Prompt) -> tuple[str, list[int]]:
    """What is shown of a prompt, and its token ids."""
    if isinstance(prompt, str):
        if not run.chat:
            return prompt, llm.encode(prompt)
        system = [{"role": "system", "content": run.system}] if run.system is not None else []
        return prompt, llm.chat_prompt([*system, {"role": "user", "content": prompt}])[1]
    chat = prompt if isinstance(prompt, ChatPrompt) else ChatPrompt(messages=prompt)
    messages = [message.model_dump(exclude_none=True) for message in chat.messages]
    _, token_ids = llm.chat_prompt(messages, tools=chat.tools, documents=chat.documents)
    content = make_conversation(messages).messages[-1].get("content", "")
    return str(content), token_ids


def main() -> None:
    """Entry point: errors of the tree become one line on stderr and their exit code."""
    code = 0
    with end_on_interrupt():
        try:
            check_one_root()
            code = app(standalone_mode=False) or 0  # what a command raised as typer.Exit comes back as its value
            if code == EXIT_CODE:
                print("interrupted", file=sys.stderr)
        except DistInferError as error:
            print(f"error: {error}", file=sys.stderr)
            code = error.exit_code
        except KeyboardInterrupt:  # outside of a command; inside, the command-line library turns it into the code
            print("interrupted", file=sys.stderr)
            code = EXIT_CODE
        except Exception as error:
            code = _usage_error(error)
    sys.exit(code)


def _usage_error(error: Exception) -> int:
    """Usage errors of the command-line library print themselves; anything else is our bug and keeps its trace."""
    show = getattr(error, "show", None)
    if show is None:
        raise error
    show()
    return int(getattr(error, "exit_code", 2))


if __name__ == "__main__":
    main()
