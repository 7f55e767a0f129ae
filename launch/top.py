"""`dist-infer top URL`: an endpoint that runs, live in the terminal, from nothing but its `/metrics`."""

from __future__ import annotations

import os
import threading
import time
from contextlib import nullcontext
from typing import TYPE_CHECKING, Annotated

import typer

from partition.errors import ClusterError, ConfigError
from partition.sizes import format_size

if TYPE_CHECKING:
    import httpx2
    from rich.console import Console, Group, RenderableType
    from rich.table import Table

    from dist_infer.metrics.live import Frame
    from dist_infer.metrics.scraped import Scraped

_ANSWER_S = 10.0  # for one scrape
_MAX_BYTES = 64 << 20
_LEAST_S, _MOST_S = 0.5, 3600.0
_EXAMPLE = "write e.g. http://127.0.0.1:8000"


def top(
    url: Annotated[str, typer.Argument(help="The endpoint, e.g. http://127.0.0.1:8000.", metavar="URL")],
    key_env: Annotated[
        str, typer.Option("--key-env", help="The environment variable that holds the API key.")
    ] = "DIST_INFER_API_KEY",
    interval: Annotated[float, typer.Option("--interval", help="Seconds between two looks.")] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one interval and end.")] = False,
) -> None:
    """Watch an endpoint: requests, tokens, latencies, KV cache, and what every rank's time goes to."""
    from launch.display import make_console

    if not _LEAST_S <= interval <= _MOST_S:
        raise ConfigError(f"--interval is {interval}: it must be between {_LEAST_S} and {_MOST_S:g} seconds")
    where, console = _metrics_url(url), make_console()
    with _client(os.environ.get(key_env)) as client:
        watched = _Watched(client, where, key_env)
        if once:
            _wait(interval)
            console.print(_view(watched.look(), ""))
        else:
            _watch(watched, interval, console)


class _Watched:
    """The endpoint from its first scrape on. ClusterError: no answer. ConfigError: the key, or another server."""

    def __init__(self, client: httpx2.Client, where: str, key_env: str) -> None:
        from dist_infer.metrics.window import WorkWindow

        self._client, self._where, self._key_env = client, where, key_env
        self._window: WorkWindow[Scraped] = WorkWindow()
        self._last: Scraped | None = None
        self.look()

    def look(self) -> Frame:
        """What happened since the look before."""
        from dist_infer.metrics.live import busy_s, frame

        after = _scrape(self._client, self._where, self._key_env)
        before, self._last = self._last or after, after
        self._window.add(after.at_s, busy_s(after), after)
        try:
            return frame(before, after, self._window.span(after.at_s))
        except (ValueError, KeyError) as error:
            raise ConfigError(f"{self._where} is not of a dist-infer endpoint ({error}); {_EXAMPLE}") from error


def _watch(watched: _Watched, interval: float, console: Console) -> None:
    """Until Ctrl-C. An endpoint that does not answer for a while keeps its last figures, with a word about it."""
    from rich.live import Live

    found, note = watched.look(), "the first interval"
    with Live(console=console, auto_refresh=False, screen=True) if console.is_terminal else nullcontext() as live:
        while True:
            if live is not None:
                live.update(_view(found, note), refresh=True)
            _wait(interval)
            note = ""
            try:
                found = watched.look()
            except ClusterError as error:
                note = str(error)
            if live is None:  # a file or a pipe: one after the other
                console.print(_view(found, note))


def _wait(seconds: float) -> None:
    """A signal ends it; nothing else does."""
    threading.Event().wait(seconds)


def _client(key: str | None) -> httpx2.Client:
    import httpx2

    if key and not key.isascii():
        raise ConfigError("the API key has characters that no key can have: look at the variable of --key-env")
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx2.Client(headers=headers, timeout=_ANSWER_S, trust_env=False, follow_redirects=False)


def _metrics_url(url: str) -> str:
    """With `/metrics`, whether or not the URL is that of the API. Raises ConfigError."""
    import httpx2

    try:
        read = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"{url!r} is no URL ({error}): {_EXAMPLE}") from None
    if read.scheme not in ("http", "https") or not read.host or read.query or read.userinfo:
        raise ConfigError(f"{read.copy_with(userinfo=b'')} cannot be watched: {_EXAMPLE}")
    base = str(read).rstrip("/")
    for end in ("/metrics", "/v1"):
        base = base.removesuffix(end)
    return f"{base}/metrics"


def _scrape(client: httpx2.Client, where: str, key_env: str) -> Scraped:
    """ClusterError: no answer, or not now. ConfigError: the key, or no scrape."""
    import httpx2

    from dist_infer.metrics.scraped import read_scrape

    try:
        answer = client.get(where)
    except httpx2.HTTPError as error:
        words = str(error) or type(error).__name__
        raise ClusterError(f"{where} does not answer ({words}): is the server up, and the URL right?") from error
    if answer.status_code in (401, 403):
        state = "is not the right one" if os.environ.get(key_env) else "is not set"
        raise ConfigError(f"{where} needs an API key and {key_env} {state}: set it, or name another with --key-env")
    if answer.status_code >= 500:
        raise ClusterError(f"{where} answered {answer.status_code}")
    if answer.status_code != 200 or len(answer.content) > _MAX_BYTES:
        raise ConfigError(f"{where} answered {answer.status_code}: it is not a dist-infer endpoint; {_EXAMPLE}")
    try:
        return read_scrape(answer.text, time.monotonic())
    except (ValueError, KeyError, IndexError) as error:
        raise ConfigError(f"{where} is no scrape: it is not a dist-infer endpoint; {_EXAMPLE}") from error


def _view(found: Frame, note: str) -> Group:
    from rich.console import Group
    from rich.text import Text

    state = found.phase
    if found.phase == "loading" and found.progress is not None:
        state = f"loading: {found.progress[0]} {100 * found.progress[1]:.0f} %"
    color = {"ready": "green", "failed": "red"}.get(found.phase, "yellow")
    head = Text.assemble((found.model, "bold"), "  ", (state, f"bold {color}"), f"  dist-infer {found.version}")
    lines: list[RenderableType] = [head, _figures(found), _ranks(found)]
    if note:
        lines.append(Text(note, style="yellow"))
    return Group(*lines)


def _figures(found: Frame) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows = (
        ("requests", f"{found.num_running} running, {found.num_waiting} waiting, {found.num_open} answers open"),
        ("tokens", f"{found.output_tokens_per_s:.1f} out/s, {found.prompt_tokens_per_s:.1f} in/s"),
        ("passes", f"{found.steps_per_s:.2f}/s"),
        ("KV cache", f"{100 * found.kv_used_share:.0f} % of {found.num_kv_blocks} blocks"),
        ("TTFT", _times(found.ttft)),
        ("between tokens", _times(found.inter_token)),
        (
            "trouble",
            f"{found.num_preemptions} preempted, {found.num_failed} failed, {found.num_refused} refused "
            f"in {found.seconds:.1f} s",
        ),
    )
    for name, value in rows:
        table.add_row(name, value)
    return table


def _ranks(found: Frame) -> Table:
    from rich.table import Table

    shown = [tier for tier in ("device", "host", "nvme") if any(row.bytes_by_tier[tier] for row in found.ranks)]
    table = Table()
    table.add_column("rank", justify="right")
    table.add_column("stage", justify="right")
    table.add_column("host")
    for name in (*shown, "GB/s", "stall", "compute", "network"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for row in found.ranks:
        table.add_row(
            str(row.rank),
            str(row.stage),
            f"{row.host} {row.device}",
            *(format_size(int(row.bytes_by_tier[tier])) for tier in shown),
            f"{row.bytes_per_s / 1e9:.3f}",
            *(_percent(share) for share in (row.stall_share, row.compute_share, row.network_share)),
            row.bound_by or "idle",
        )
    return table


def _times(found: tuple[float, float] | None) -> str:
    return "none in this interval" if found is None else f"p50 {_time(found[0])}, p99 {_time(found[1])}"


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.0f} %"
