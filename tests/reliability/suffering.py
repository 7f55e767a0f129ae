"""One injection under load, and what must hold of every one of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from named_runs import until
from reliability.clients import NUM_STREAMING, NUM_WHOLE, Asked, Clients
from reliability.figures import Figures, count
from reliability.system import READY_S, Held, System
from reliability.watch import ReadyWatch

_BEGUN_S, _NOTICED_S, _AGAIN_S = 60.0, 40.0, 60.0
_SETTLED_S = 20.0  # for what was used in the case to be given back
_MORE_MEMORY, _MORE_MEMORY_BYTES = 1.1, 24 << 20
_MORE_DESCRIPTORS, _MORE_THREADS = 16, 8  # pools grow to their size under the first load


@dataclass(frozen=True, kw_only=True)
class Hurt:
    """What was done to a system, just now. mend: called once it was noticed. is_back: where readiness does not tell."""

    mend: Callable[[], None] = lambda: None
    is_back: Callable[[], bool] | None = None
    at_s: float = field(default_factory=time.monotonic)


@dataclass(frozen=True, kw_only=True)
class Case:
    """inject: hurts a system that has that load. is_noticed: it is not ready meanwhile.

    may_fail: an explicit error is an end that is allowed. may_cut: what held the client's socket dies. num_clients: who
    stream, and who do not.
    """

    id: str
    injected: str
    inject: Callable[[System, Clients], Hurt]
    is_noticed: bool = True
    may_fail: bool = False
    may_cut: bool = False
    leave_every: int = 0
    num_clients: tuple[int, int] = (NUM_STREAMING, NUM_WHOLE)
    note: str = ""


def suffer(system: System, case: Case) -> Figures:
    """Inject, wait until all is well again, judge. AssertionError says what the case has broken."""
    before = system.held()
    detected_s = ready_s = None
    with (
        ReadyWatch(system.url) as watch,
        Clients(
            system.url,
            system.questions,
            num_streaming=case.num_clients[0],
            num_whole=case.num_clients[1],
            leave_every=case.leave_every,
        ) as clients,
    ):
        until(lambda: clients.num_busy >= case.num_clients[0] // 2, _BEGUN_S)
        in_flight = clients.num_in_flight
        hurt = case.inject(system, clients)
        if case.is_noticed:
            noticed_s = watch.until(False, hurt.at_s, _NOTICED_S)
            hurt.mend()
            back_s = watch.until(True, noticed_s, READY_S)
            detected_s, ready_s = noticed_s - hurt.at_s, back_s - hurt.at_s
        else:
            hurt.mend()
            if hurt.is_back is not None:
                until(hurt.is_back, READY_S)
                ready_s = time.monotonic() - hurt.at_s
        again_s = time.monotonic()
        until(lambda: clients.num_answered_since(again_s) >= sum(case.num_clients) // 2, _AGAIN_S)
        asked = clients.finish()
    figures = count(
        case.id, case.injected, asked, in_flight=in_flight, detected_s=detected_s, ready_s=ready_s, note=case.note
    )
    assert_ends(asked, may_fail=case.may_fail, may_cut=case.may_cut)
    assert_well(system, before)
    return figures


def assert_ends(asked: list[Asked], *, may_fail: bool, may_cut: bool) -> None:
    """Every request has come to an end that it may come to. may_cut: also, nobody may listen for a while."""
    bad = {"lost", "wrong"} | (set() if may_fail else {"errored"}) | (set() if may_cut else {"cut"})
    found = [f"{one.end}: {one.detail[:500]}" for one in asked if one.end in bad and one.was_sent]
    assert may_cut or all(one.was_sent for one in asked), "nobody listened"
    assert not found, found


def assert_told(asked: list[Asked], since_s: float) -> None:
    """Of a run that was told to end then: what it had is answered or told so. Who comes later may find a closing door:
    a connection that the kernel took and nobody has accepted is reset.
    """
    had = [one for one in asked if one.sent_s < since_s]
    assert_ends(had, may_fail=True, may_cut=False)
    assert_ends(asked, may_fail=True, may_cut=True)
    errors = {json.loads(one.detail)["error"]["code"] for one in asked if one.end == "errored"}
    assert errors <= {"draining"}, errors


def assert_well(system: System, before: dict[int, Held]) -> None:
    """What must hold after every fault: ready, idle, a golden request, and nobody holds more than before."""
    until(system.is_ready, READY_S)
    golden = system.questions[0]
    assert system.ask(golden.body) == golden.answer

    def is_idle() -> bool:
        seen = system.scrape()
        busy = seen.sum("dist_infer_requests_running") + seen.sum("dist_infer_requests_waiting")
        return not busy and seen.sum("dist_infer_kv_blocks") == seen.sum("dist_infer_kv_blocks_free")

    until(is_idle, _SETTLED_S)
    left: list[str] = []

    def is_given_back() -> bool:
        now = system.held()
        left[:] = [f"{held.role}: {held} -> {now[pid]}" for pid, held in before.items() if _grew(held, now.get(pid))]
        return not left

    try:
        until(is_given_back, _SETTLED_S)
    except AssertionError:
        raise AssertionError(f"not given back: {left}") from None


def _grew(before: Held, now: Held | None) -> bool:
    return now is not None and (
        now.rss_bytes > before.rss_bytes * _MORE_MEMORY + _MORE_MEMORY_BYTES
        or now.num_descriptors > before.num_descriptors + _MORE_DESCRIPTORS
        or now.num_threads > before.num_threads + _MORE_THREADS
    )
