"""The endpoint on Ray Serve: one replica that owns the model, its ranks and its HTTP connections.

    dist-infer launch FILE     Ray and Serve for this run alone (or at cluster.address); the replica listens itself
    serve run SERVE_FILE       `build_app` in a Serve that is there already, behind Serve's own proxies

The replica listens itself because Serve's proxies do not end clients that stop half way: docs/serve.md.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import partition.errors
from dist_infer.config import ClusterConfig, RunConfig, load_config
from dist_infer.llm import LLM
from dist_infer.messages import decode, encode
from dist_infer.openai.endpoint import Endpoint, Status
from dist_infer.openai.keys import ENVIRONMENT, ApiKey, load_keys
from dist_infer.serve_config import ServeConfig
from dist_infer.startup import OnProgress, Progress
from launch.backend import RayBackend
from launch.display import StartDisplay, make_console, ready_line
from launch.interrupt import Signals
from launch.ray_start import listen_on_own_address
from launch.root_guard import check_one_root
from launch.runs.cluster import logs_directory
from launch.runs.mark import MARK, REPLICA, current_run_id, first_line, is_label_of, run_label
from launch.runs.run import Run
from partition.errors import ClusterError, ConfigError, DistInferError

if TYPE_CHECKING:
    from rich.console import Console

_ANSWER_S = 30.0  # for a call to the replica that has nothing to wait for
_INTERRUPTED_DRAIN_S = 2.0
_NO_LIMIT = 1_000_000  # of Serve's own admission: ours refuses with a status and a Retry-After
_HEALTH_S = 5.0
_LOOK_S = 2.0  # from one look at a serving replica to the next
_GIVE_UP_S = 60.0  # a replica whose start has failed is not replaced by Serve; one whose engine is lost is, much sooner
# Serve's controller looks ten times a second by default: 3 % of a core, for one replica that never moves
_CONTROLLER = {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1"}


class Replica:
    """Serve's deployment: an Endpoint in an actor. Arguments are JSON, so that nothing of ours is pickled."""

    async def __init__(self, config_json: str, keys_json: str, run_id: str, listen: bool) -> None:  # type: ignore[misc]
        check_one_root()
        listen_on_own_address()
        os.environ[MARK] = run_id  # in a cluster that was there it is not inherited
        config = load_config(json.loads(config_json))
        if not isinstance(config.run, ServeConfig):
            raise ConfigError("a replica needs `run: {kind: serve}`")
        print(first_line(run_label(config.name), REPLICA), flush=True)
        keys = tuple(ApiKey(**entry) for entry in json.loads(keys_json))
        started_s = time.monotonic()
        self._endpoint = Endpoint(config, config.run, keys, ready_line=lambda llm: _ready_line(llm, started_s))
        await self._endpoint.start(listen=listen)

    def __serve_build_asgi_app__(self) -> Any:
        return self._endpoint.app

    async def status(self, seen: bytes | None = None) -> bytes:
        return encode(await self._endpoint.status(None if seen is None else decode(Status, seen)))

    async def drain(self, timeout_s: float) -> bool:
        return await self._endpoint.drain(timeout_s)

    async def close(self) -> None:
        await self._endpoint.close()

    def check_health(self) -> None:
        """Serve replaces a replica whose engine is lost."""
        self._endpoint.raise_if_lost()


def make_deployment(config: RunConfig, keys: tuple[ApiKey, ...], *, listen: bool) -> Any:
    """The bound application. listen: the replica has a socket of its own, on the node that calls this."""
    import ray
    from ray import serve

    here = {f"node:{ray.util.get_node_ip_address()}": 0.001} if listen else {}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="dist-infer",
        num_replicas=1,
        max_ongoing_requests=_NO_LIMIT,
        health_check_period_s=_HEALTH_S,
        ray_actor_options={"num_cpus": 0, "resources": here},
    )
    # the ranks' Ray is the one the replica is in
    cluster = config.cluster
    if cluster.executor == "ray":
        cluster = cluster.model_copy(update={"address": "auto"})
    data = config.model_copy(update={"cluster": cluster}).model_dump(mode="json")
    return deployment.bind(json.dumps(data), json.dumps([asdict(key) for key in keys]), current_run_id(), listen)


def build_app(args: Mapping[str, Any]) -> Any:
    """For `serve run` and Serve's config files. args: `config`, a run file; `overrides`, `a.b=c` texts; `open: true`.

    Where Serve listens is Serve's to say, so keys are needed, unless `open` says that none are wanted.
    """
    check_one_root()
    unknown = set(args) - {"config", "overrides", "open"}
    if unknown or "config" not in args:
        raise ConfigError(f"args are config, overrides and open, not {', '.join(sorted(args)) or 'nothing'}")
    config = load_config(str(args["config"]), list(args.get("overrides", [])))
    run = _serve_section(config)
    keys = load_keys(run.api_keys_file, os.environ)
    if not keys and args.get("open") is not True:
        raise ConfigError(f"no API key: set run.api_keys_file or {ENVIRONMENT}, or give `open: true` in args")
    return make_deployment(config, keys, listen=False)


class _RayLost(ClusterError):
    """The Ray that was started for the run; another may take its place."""


def serve_until_signal(config: RunConfig, run: ServeConfig, entry: Run) -> None:
    """Start, say where, serve. SIGTERM drains and returns; Ctrl-C drains for a moment and raises KeyboardInterrupt.

    SIGUSR1 drains and stays. entry: is told how it stands. When a Ray that was started for this run loses its head,
    open requests have a moment to finish, and all is started again, as often as ranks may be replaced.
    """
    starts: deque[float] = deque(maxlen=config.cluster.max_restarts + 1)
    while True:
        starts.append(time.monotonic())
        try:
            _serve_until_signal(config, run, entry)
            return
        except _RayLost:
            if len(starts) == starts.maxlen and starts[-1] - starts[0] < config.cluster.restart_window:
                raise


def _serve_until_signal(config: RunConfig, run: ServeConfig, entry: Run) -> None:
    keys = load_keys(run.api_keys_file, os.environ)
    if not keys and not run.is_local:
        raise ConfigError(
            f"run.host: {run.host} can be reached from elsewhere and there is no API key: set run.api_keys_file or "
            f"{ENVIRONMENT}, or use run.host: 127.0.0.1"
        )
    try:
        from ray import serve
    except ImportError as error:
        raise ConfigError(f"`run: {{kind: serve}}` needs `pip install 'dist-infer[ray]'` ({error})") from error
    from ray.serve.config import ProxyLocation
    from ray.serve.context import _set_global_client

    console = make_console(stderr=True)
    parallel, label = config.parallel, run_label(config.name)
    has_run = False
    backend = RayBackend(ClusterConfig(executor="ray", address=config.cluster.address), config.name)
    try:
        with StartDisplay(console) as display:

            def show(progress: Progress) -> None:
                display.show(progress)
                entry.progress(progress)

            show(Progress(phase="starting Ray Serve"))
            if config.cluster.address is None:
                for variable, value in _CONTROLLER.items():
                    os.environ.setdefault(variable, value)
            backend.start(parallel.tensor * parallel.pipeline)
            logging.getLogger("ray.serve").setLevel(logging.WARNING)
            quiet = {"log_level": "WARNING", "enable_access_log": False}
            # where a Serve is there already it keeps its proxies; with a host of None Serve cannot say its own status
            nowhere = {"host": "127.0.0.1"}
            serve.start(proxy_location=ProxyLocation.Disabled, http_options=nowhere, logging_config=quiet)
            if config.cluster.address is not None:
                _refuse_second(config.name, serve.status().applications)
                entry.note_logs(logs_directory())
            application = make_deployment(config, keys, listen=True)
            has_run = True
            try:
                handle = serve.run(application, name=label, route_prefix=None, logging_config=quiet)
            except RuntimeError as error:
                raise ClusterError(
                    f"Serve could not start the replica: {error} `dist-infer logs {config.name} replica` may say why"
                ) from error
            status = _wait_until_ready(handle, show, config.cluster.start_timeout)
        try:
            with Signals() as signals:
                console.print(status.ready_line, markup=False)
                door = f"{len(keys)} API keys" if keys else "no API key is needed"
                model = run.model_name or config.name
                console.print(f"serving {model} at {status.url}/v1 ({door})", markup=False)
                entry.note("ready", url=status.url)
                _serve(handle, backend, run.limits.drain_time, signals, entry, console)
                entry.note("draining")
                console.print(f"draining for up to {run.limits.drain_time:g} s", markup=False)
                _close(handle, run.limits.drain_time)
        except KeyboardInterrupt:
            _close(handle, min(run.limits.drain_time, _INTERRUPTED_DRAIN_S))
            raise
        except ClusterError as error:
            if not backend.is_lost:
                raise
            entry.note("degraded", detail=str(error))
            drain_s = min(run.limits.drain_time, backend.grace_s)
            if drain_s:
                console.print(f"{error}. Open requests have {drain_s:g} s to finish", markup=False)
                _close(handle, drain_s)
            else:  # the replica is gone as well, and Ray would wait for it longer than it lets this process live
                console.print(f"{error}. Open requests are cut", markup=False)
            if config.cluster.address is not None:
                raise
            raise _RayLost(str(error)) from error
        if config.cluster.address is not None:
            _remove(config.name, label)
    except BaseException:
        if config.cluster.address is not None and has_run and not backend.is_lost:
            with contextlib.suppress(ClusterError):  # the first error is the one that says what happened
                _remove(config.name, label)
        raise
    finally:
        if backend.is_lost:
            _set_global_client(None)  # Serve would ask a controller that is gone
        backend.close()


def _refuse_second(name: str, applications: Mapping[str, Any]) -> None:
    """One of the same name may have been launched on another machine."""
    if (found := next((label for label in applications if is_label_of(label, name)), None)) is not None:
        raise ConfigError(
            f"the cluster serves a run named {name} already, as the application {found}: end it with `dist-infer down "
            f"{name}` on the machine that launched it, or give this one another name with --set name=NAME"
        )


def _remove(name: str, label: str) -> None:
    """From a cluster that was there. Raises ClusterError."""
    from ray import serve

    try:
        serve.delete(label)  # waits: who hears that the run has ended finds nothing of it
    except Exception as error:  # Serve's own, and Ray's where it is gone
        raise ClusterError(
            f"could not remove the endpoint from the cluster: {error}. `dist-infer down {name}` tries it again"
        ) from error


def _serve(handle: Any, backend: RayBackend, drain_s: float, signals: Signals, entry: Run, console: Console) -> None:
    """Until SIGTERM. What becomes of the replica meanwhile is noted, and said when it changes.

    Raises ClusterError when Ray itself is lost, and what the engine has failed with when Serve does not replace it.
    """
    drained, failed_s = False, None
    while (came := signals.wait(_LOOK_S)) != signal.SIGTERM:
        if backend.is_lost:  # looked at now: a call into a Ray without a raylet may end this process
            backend.raise_if_lost()
        if came == signal.SIGUSR1 and not drained:
            entry.note("draining")
            _drain(handle, drain_s)
            drained = True
            entry.note("drained")
            console.print("drained: nothing new is taken; SIGTERM ends the run", markup=False)
        status = _look(handle)
        if status.phase != "failed":
            failed_s = None
        elif failed_s is None:
            failed_s = time.monotonic()
        elif time.monotonic() > failed_s + _GIVE_UP_S:
            raise _error_of(status)
        if drained:
            continue
        phase = "ready" if status.phase == "ready" else "degraded"
        detail = status.error or status.detail or status.phase if phase == "degraded" else ""
        if entry.note(phase, detail=detail, done=status.done, total=status.total, url=status.url) and not status.done:
            console.print(f"{phase} {detail or status.url}".strip(), markup=False)


def _look(handle: Any) -> Status:
    """What the replica says of itself, in the words of one that says nothing where it does not answer."""
    try:
        return decode(Status, handle.status.remote(None).result(timeout_s=_LOOK_S))
    except Exception as error:  # Serve's own are many; each means that Serve is about to replace it
        return Status(phase="lost", detail=f"the replica does not answer ({type(error).__name__})")


def _serve_section(config: RunConfig) -> ServeConfig:
    if not isinstance(config.run, ServeConfig):
        raise ConfigError("the run file has no `run: {kind: serve}`")
    return config.run


def _wait_until_ready(handle: Any, show: OnProgress, start_timeout_s: float) -> Status:
    """Packing may take as long as it takes; each step of it, and all after it, has the start deadline."""
    seen: Status | None = None
    deadline = time.monotonic() + start_timeout_s
    while True:
        answer = handle.status.remote(None if seen is None else encode(seen)).result(timeout_s=_ANSWER_S)
        status = decode(Status, answer)
        if status.phase == "failed":
            raise _error_of(status)
        if status.phase == "ready":
            return status
        if status != seen:
            deadline = time.monotonic() + start_timeout_s
            show(Progress(phase=status.detail, done=status.done, total=status.total))
        elif time.monotonic() > deadline:
            raise ClusterError(f"{status.detail}: nothing new for {start_timeout_s:g} s (cluster.start_timeout)")
        seen = status


def _error_of(status: Status) -> DistInferError:
    kind = getattr(partition.errors, status.error_kind, None)
    if isinstance(kind, type) and issubclass(kind, DistInferError) and kind is not partition.errors.WorkerError:
        return kind(status.error)
    return ClusterError(status.error if kind is not None else f"{status.error_kind}: {status.error}")


def _drain(handle: Any, drain_s: float) -> None:
    """Serve's errors at the end are no errors of the run: what is left is ended with Ray."""
    with contextlib.suppress(Exception):
        handle.drain.remote(drain_s).result(timeout_s=drain_s + _ANSWER_S)


def _close(handle: Any, drain_s: float) -> None:
    _drain(handle, drain_s)
    with contextlib.suppress(Exception):
        handle.close.remote().result(timeout_s=_ANSWER_S)


def _ready_line(llm: LLM, started_s: float) -> str:
    gang = llm.gang
    written, pack_s = gang.pack_report.num_written, gang.pack_report.seconds
    return ready_line(gang.reports, gang.facts, written, pack_s, time.monotonic() - started_s)
