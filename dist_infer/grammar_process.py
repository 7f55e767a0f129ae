"""The process that tries grammars out: `python -P -m dist_infer.grammar_process LIMITS`.

A grammar comes from whoever can send a request. What it could take here, time, memory or the process itself, the ranks
and the coordinator do not lose: the owner ends this process at the deadline. LIMITS is JSON: {"timeout_s",
"max_memory_bytes"}.

On standard input and output, a line of JSON each: first it says {"ready": true}; the first request is a Vocabulary and
gets {"ok": true}, every other one a Grammar, which gets {"ok": true} or {"error": MESSAGE}. No torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from pydantic import TypeAdapter

from dist_infer.grammar import Grammar
from dist_infer.grammar_matcher import GrammarTokens, Matcher
from dist_infer.template_process import limit_memory
from dist_infer.vocabulary import Vocabulary
from partition.errors import ConfigError

_ALARM_MARGIN_S = 1.0  # the owner comes first


def main() -> None:
    """Serve until standard input ends."""
    limits = json.loads(sys.argv[1])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    requests, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1):  # whatever prints must not speak on the wire
        os.dup2(nothing, fd)
    _send(answers, {"ready": True})
    os.dup2(nothing, 2)
    tokens = GrammarTokens(TypeAdapter(Vocabulary).validate_json(requests.readline()))
    _send(answers, {"ok": True})
    limit_memory(int(limits["max_memory_bytes"]))
    grammars = TypeAdapter(Grammar)
    for line in requests:
        signal.setitimer(signal.ITIMER_REAL, float(limits["timeout_s"]) + _ALARM_MARGIN_S)
        _send(answers, _try(grammars.validate_json(line), tokens))
        signal.setitimer(signal.ITIMER_REAL, 0)


def _try(grammar: Grammar, tokens: GrammarTokens) -> dict[str, object]:
    """Compile it and find its first tokens, which is where an explosive one explodes."""
    try:
        matcher = Matcher(grammar, tokens)
        if not any(matcher.mask()) and not matcher.may_end:
            return {"error": "the grammar cannot be used: there is no answer that it allows"}
    except ConfigError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "the grammar cannot be used: it takes too much memory"}
    return {"ok": True}


def _send(answers: Any, answer: dict[str, object]) -> None:
    answers.write(json.dumps(answer).encode() + b"\n")
    answers.flush()


if __name__ == "__main__":
    main()
