"""The process that renders chat templates: `python -P -m dist_infer.template_process LIMITS`.

A template is a program out of a downloaded file. Jinja's sandbox keeps it from what it must not touch; this process
keeps it from taking all time and memory: its address space is limited, its owner kills it at the deadline, and if the
owner is gone the kernel's alarm does. LIMITS is JSON: {"timeout_s", "max_memory_bytes", "max_text_bytes"}.

On standard input and output, a line of JSON each: first it says {"ready": true}; then every request (the arguments of
`_answer`) gets {"text": ...} or {"error": "refused" | "failed" | "memory" | "size", "message": ...}. No torch.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import resource
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

_MAX_MESSAGE_CHARS = 2000
_ALARM_MARGIN_S = 1.0  # the owner comes first
Render = Callable[..., tuple[list[str], Any]]


def main() -> None:
    """Serve until standard input ends."""
    limits = json.loads(sys.argv[1])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    render, refusal = _transformers_render()
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):  # whatever prints must not speak on the wire
        os.dup2(nothing, fd)
    limit_memory(int(limits["max_memory_bytes"]))
    _send(answers, {"ready": True})
    os.dup2(nothing, 2)
    for line in requests:
        signal.setitimer(signal.ITIMER_REAL, float(limits["timeout_s"]) + _ALARM_MARGIN_S)
        _send(answers, _answer(render, refusal, int(limits["max_text_bytes"]), line))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _answer(render: Render, refusal: type[Exception], max_text_bytes: int, line: bytes) -> dict[str, object]:
    try:
        request = json.loads(line.decode("utf-8", "surrogatepass"))
        (text,), _ = render(
            conversations=[request["messages"]],
            tools=request["tools"],
            documents=request["documents"],
            chat_template=request["template"],
            add_generation_prompt=request["add_generation_prompt"],
            continue_final_message=request["continue_final_message"],
            **request["variables"],
        )
        num_bytes = len(text.encode("utf-8", "surrogatepass"))
    except MemoryError:
        return {"error": "memory", "message": ""}
    except Exception as error:  # whatever the template and the sandbox raise
        if type(error) is refusal:  # a subclass is a fault of the template, not what it says about the messages
            return {"error": "refused", "message": str(error)[:_MAX_MESSAGE_CHARS]}
        return {"error": "failed", "message": f"{type(error).__name__}: {error}"[:_MAX_MESSAGE_CHARS]}
    if num_bytes > max_text_bytes:
        return {"error": "size", "message": str(num_bytes)}
    return {"text": text}


def _transformers_render() -> tuple[Render, type[Exception]]:
    """transformers' own renderer, and what its `raise_exception` raises, without the second that importing it takes.

    The two packages above the module are stood in for, so that only what it imports itself is loaded. Should that
    fail with some release, the ordinary import does the same, later.
    """
    name = "transformers.utils.chat_template_utils"
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        raise ImportError("transformers is not installed")
    root = Path(found.origin).parent
    for package, directory in (("transformers", root), ("transformers.utils", root / "utils")):
        stand_in = types.ModuleType(package)
        stand_in.__path__ = [str(directory)]
        sys.modules[package] = stand_in
    try:
        module = importlib.import_module(name)
    except Exception:  # some release may need what the packages set up
        for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == "transformers"]:
            del sys.modules[loaded]
        module = importlib.import_module(name)
    render: Render = module.render_jinja_template
    refusal: type[Exception] = importlib.import_module("jinja2.exceptions").TemplateError
    return render, refusal


def limit_memory(max_memory_bytes: int) -> None:
    """From here on: so much more memory, no file written, no core dumped."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    ceiling = pages * resource.getpagesize() + max_memory_bytes
    for limit, value in (
        (resource.RLIMIT_AS, ceiling),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (value, value))


def _send(answers: Any, answer: dict[str, object]) -> None:
    answers.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
