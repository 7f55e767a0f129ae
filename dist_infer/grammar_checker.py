"""Grammars tried out before anything depends on them: in a process of their own, under a deadline and a memory limit.

submit ──> GrammarChecker.check ──JSON line──> dist_infer.grammar_process
                 │  <──ok, or what is wrong──        │
                 └── deadline: kill ─────────────────┘   the next grammar starts a new one
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from dist_infer.grammar import Grammar
from dist_infer.grammar_matcher import require_llguidance
from dist_infer.line_process import LineEndedError, LineProcess, LineTimeoutError
from dist_infer.vocabulary import Vocabulary
from partition.errors import ClusterError, ConfigError

_TURN_TIMEOUT_S = 60.0  # for other threads' grammars before this one
_VOCABULARY_TIMEOUT_S = 60.0  # to be taken in: tenths of a second on an idle machine
_MAX_ANSWER_BYTES = 1 << 16
_NUM_REMEMBERED = 4096
_TOO_SLOW_FOR_S = 30.0
_CLOSED = "the engine is closed and takes no grammar"


@dataclass(frozen=True, kw_only=True)
class GrammarLimits:
    """What one grammar may take to be compiled. max_memory_bytes: beyond what the process has when it is ready."""

    timeout_s: float = 1.0
    max_memory_bytes: int = 512 << 20


@dataclass(frozen=True, slots=True)
class _Found:
    """What is wrong with a grammar (None: nothing), and until when that holds, of time.monotonic."""

    error: str | None
    until_s: float = math.inf


class GrammarChecker:
    """Owns at most one process, started at the first grammar. `close` leaves none behind.

    Any thread may call; grammars come one after the other. What was found of one is remembered and told at once,
    whoever's turn it is; that it took too long, for half a minute, since the machine may have been busy.
    make_vocabulary is called once, when it is needed; its ConfigError is what every grammar then gets.
    """

    def __init__(self, make_vocabulary: Callable[[], Vocabulary], limits: GrammarLimits | None = None) -> None:
        self._make_vocabulary = make_vocabulary
        self._limits = limits or GrammarLimits()
        self._turn = threading.Lock()  # guards what is below
        self._vocabulary: Vocabulary | None = None
        self._child: LineProcess | None = None
        self._closed = False
        self._memory = threading.Lock()  # guards the next one; never held for longer than a look
        self._found: OrderedDict[bytes, _Found] = OrderedDict()  # by digest

    @property
    def vocabulary(self) -> Vocabulary:
        """What the ranks need to follow a grammar that was checked; after a check nobody waits for it."""
        if (known := self._vocabulary) is not None:
            return known
        with self._turn:
            return self._known_vocabulary()

    def check(self, grammar: Grammar) -> None:
        """ConfigError: it cannot be compiled, goes beyond a limit, or this model's tokens know no grammars.

        Takes milliseconds, the first time about a second, and nothing for one that `knows`. ClusterError: closed, or
        the process cannot be started.
        """
        line = TypeAdapter(Grammar).dump_json(grammar) + b"\n"
        digest = hashlib.sha256(line).digest()
        if self._is_good(digest):
            return
        if not self._turn.acquire(timeout=_TURN_TIMEOUT_S):
            raise ClusterError(f"no turn to check a grammar within {_TURN_TIMEOUT_S:g} s: others take too long")
        try:
            if self._is_good(digest):
                return
            require_llguidance()
            found = self._try(line)
        finally:
            self._turn.release()
        with self._memory:
            self._found[digest] = found
            if len(self._found) > _NUM_REMEMBERED:
                self._found.popitem(last=False)
        if found.error is not None:
            raise ConfigError(found.error)

    def knows(self, grammar: Grammar) -> bool:
        """`check` of it takes no time."""
        digest = hashlib.sha256(TypeAdapter(Grammar).dump_json(grammar) + b"\n").digest()
        with self._memory:
            return digest in self._found and time.monotonic() < self._found[digest].until_s

    def close(self) -> None:
        """End the process, and with it a check that is under way in another thread. Idempotent."""
        self._closed = True
        if (child := self._child) is not None:
            child.kill()
        with self._turn:  # soon: whoever has it or waits for it sees the above
            self._end_child()

    def _is_good(self, digest: bytes) -> bool:
        """False: not known. ConfigError: known to be wrong."""
        with self._memory:
            found = self._found.get(digest)
            if found is None or time.monotonic() >= found.until_s:
                return False
            self._found.move_to_end(digest)
        if found.error is not None:
            raise ConfigError(found.error)
        return True

    def _try(self, line: bytes) -> _Found:
        if self._closed:
            raise ClusterError(_CLOSED)
        if self._child is not None and self._child.has_ended:
            self._end_child()  # somebody killed it while it was idle
        child = self._child or self._start()
        try:
            error = child.ask(line, self._limits.timeout_s, _MAX_ANSWER_BYTES).get("error")
            return _Found(None if error is None else str(error))
        except LineTimeoutError:
            self._end_child()
            error = f"the grammar cannot be used: it takes longer than {self._limits.timeout_s:g} s to be compiled"
            return _Found(error, time.monotonic() + _TOO_SLOW_FOR_S)
        except LineEndedError:
            self._end_child()
            if self._closed:
                raise ClusterError(_CLOSED) from None
            error = "the grammar cannot be used: it takes too much memory, or ended the process that compiled it"
            return _Found(error, time.monotonic() + _TOO_SLOW_FOR_S)
        except BaseException:  # Ctrl-C, for one: what it answers later must not be taken for another's answer
            self._end_child()
            raise

    def _start(self) -> LineProcess:
        vocabulary = TypeAdapter(Vocabulary).dump_json(self._known_vocabulary()) + b"\n"
        child = LineProcess("dist_infer.grammar_process", json.dumps(asdict(self._limits)), "checks grammars")
        self._child = child
        try:
            child.wait_until_ready()
            child.ask(vocabulary, _VOCABULARY_TIMEOUT_S, _MAX_ANSWER_BYTES)
        except (LineTimeoutError, LineEndedError) as error:
            self._end_child()
            raise ClusterError(
                _CLOSED if self._closed else "the process that checks grammars did not take in the vocabulary"
            ) from error
        except BaseException:
            self._end_child()
            raise
        if self._closed:
            raise ClusterError(_CLOSED)
        return child

    def _known_vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            self._vocabulary = self._make_vocabulary()
        return self._vocabulary

    def _end_child(self) -> None:
        """It holds nothing that a kill could damage."""
        child, self._child = self._child, None
        if child is not None:
            child.end()
