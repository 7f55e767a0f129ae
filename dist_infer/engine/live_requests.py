"""The requests that have no end yet, and the one way out for each of them."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from dist_infer.engine.generation import Generation
from dist_infer.outputs import Failed, Finished
from partition.errors import ConfigError

_log = logging.getLogger(__name__)


class LiveRequests:
    """Gives every request exactly one end: the first who ends it takes it out, a second end is none.

    Any thread may call; callbacks run in the caller's thread with no lock held. What a callback raises at the end of
    its request is logged, since there is nobody left to tell.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.num_finished = 0
        self.num_aborted = 0
        self.num_failed = 0
        self._clock = clock
        self._lock = threading.Lock()  # guards the two below
        self._by_client_id: dict[str, Generation] = {}
        self._by_rank_id: dict[str, Generation] = {}

    def add(self, generation: Generation) -> None:
        """ConfigError when the client's id is in use."""
        with self._lock:
            if generation.request_id in self._by_client_id:
                raise ConfigError(f"request id {generation.request_id!r} is in use: wait for its end or choose another")
            self._by_client_id[generation.request_id] = generation
            for request in generation.requests:
                self._by_rank_id[request.id] = generation

    def by_client_id(self, request_id: str) -> Generation | None:
        with self._lock:
            return self._by_client_id.get(request_id)

    def by_rank_id(self, rank_id: str) -> Generation | None:
        with self._lock:
            return self._by_rank_id.get(rank_id)

    def all(self) -> list[Generation]:
        """Oldest first."""
        with self._lock:
            return list(self._by_client_id.values())

    def finish(self, generation: Generation) -> None:
        """All its answers have ended."""
        if self._take_out(generation) and self._end(generation):
            self.num_finished += 1

    def abort(self, generation: Generation) -> None:
        """With what its answers have so far, text that was held back included."""
        if self._take_out(generation) and self._end(generation):
            self.num_aborted += 1

    def fail(self, generation: Generation, error: Exception) -> None:
        if self._take_out(generation):
            self.num_failed += 1
            self._emit(generation, Failed(request_id=generation.request_id, error=error))

    def _take_out(self, generation: Generation) -> bool:
        with self._lock:
            if self._by_client_id.get(generation.request_id) is not generation:
                return False
            del self._by_client_id[generation.request_id]
            for request in generation.requests:
                del self._by_rank_id[request.id]
            return True

    def _end(self, generation: Generation) -> bool:
        """False: its text or its callback failed there, and so has the request."""
        last: Finished | Failed
        try:
            for event in generation.last_events():
                generation.on_event(event)
            last = generation.finished(self._clock())
        except Exception as error:
            last = Failed(request_id=generation.request_id, error=error)
            self.num_failed += 1
        self._emit(generation, last)
        return isinstance(last, Finished)

    def _emit(self, generation: Generation, event: Finished | Failed) -> None:
        try:
            generation.on_event(event)
        except Exception:
            _log.exception("on_event of request %r raised at its end", generation.request_id)
