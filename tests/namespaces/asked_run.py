"""A run that is asked line by line, for hosts to be cut off meanwhile. python asked_run.py RUN_FILE

crowd    many requests at once: {"begun": true}, then {"tokens": [...]} or {"errors": [...]}; {"refused": "…"}
state    {"gang": …}: how its ranks stand

Ends with its standard input; an answer is one line of JSON.
"""

from __future__ import annotations

import faulthandler
import json
import signal
import sys
import threading
from typing import Any

from request_crowd import Crowd

from dist_infer import LLM
from dist_infer.gang_state import Ready
from dist_infer.outputs import Failed
from partition.errors import ClusterError

faulthandler.register(signal.SIGUSR1)  # where it hangs, if it does
_saying = threading.Lock()


def say(**answer: Any) -> None:
    with _saying:
        print(json.dumps(answer), flush=True)


def follow(crowd: Crowd) -> None:
    if crowd.has_begun.wait(60):
        say(begun=True)
    errors = [str(end.error) for end in crowd.ends() if isinstance(end, Failed)]
    if errors:
        say(errors=errors)
    else:
        say(tokens=crowd.tokens())


def state_of(llm: LLM) -> dict[str, Any]:
    state = llm.state
    return {
        "state": type(state).__name__,
        "note": state.note if isinstance(state, Ready) else "",
        "cause": getattr(state, "cause", ""),
        "hosts": [report.host for report in llm.worker_reports],
        "pids": [report.pid for report in llm.worker_reports],
        "restarts": llm.stats.num_gang_restarts,
        "packed": llm.gang.pack_report.num_written,
    }


with LLM(sys.argv[1]) as llm:
    say(ready=True)
    for line in sys.stdin:
        if line.strip() == "crowd":
            try:
                crowd = Crowd(llm)
            except ClusterError as error:
                say(refused=str(error))
            else:
                threading.Thread(target=follow, args=(crowd,), daemon=True).start()
        else:
            say(gang=state_of(llm))
