"""Limits of a process: open files, locked memory. Those of Ray's workers come from the shell of `ray start`."""

from __future__ import annotations

import resource
from dataclasses import dataclass

from launch.doctor.finding import Finding, error, ok, warning
from partition.sizes import format_size

_CHECK = "limits"
_RAY_FILES = 4096  # Ray's own processes have some connections to every worker of their node
_OTHER_FILES = 256  # libraries, logs, the sockets of a rank
_RDMA_MEMLOCK_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class LimitFacts:
    """Soft and hard limit; None: there is none. `memlock_bytes` is the soft one."""

    files: int | None
    most_files: int | None
    memlock_bytes: int | None


def read_limits() -> LimitFacts:
    files, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
    memlock, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return LimitFacts(files=_number(files), most_files=_number(most_files), memlock_bytes=_number(memlock))


def judge_limits(
    node: str,
    facts: LimitFacts,
    *,
    num_blobs: int,
    num_connections: int,
    uses_ray: bool,
    is_raised: bool,
    uses_rdma: bool,
) -> list[Finding]:
    """num_blobs: files of the store that one process of this node holds open. num_connections: of clients, at most.

    is_raised: what is started here raises the soft limit to the hard one, as Ray does. uses_rdma: GPUs of several nodes
    talk to each other.
    """
    findings = []
    need = _OTHER_FILES + num_blobs
    most = max(need + num_connections, _RAY_FILES if uses_ray else 0)
    files = facts.most_files if is_raised else facts.files
    raise_it = f"`ulimit -n {max(most, 65536)}` in the shell that starts dist-infer"
    raise_it += " and in that of `ray start`" if uses_ray else ""
    if facts.most_files is not None and facts.most_files < most:
        raise_it += f" (the hard limit is {facts.most_files}: root raises it, in /etc/security/limits.conf)"
    words = f"a process may have {files} files open, and needs {need} ({num_blobs} of the store, {_OTHER_FILES} others)"
    if files is not None and files < need:
        why = "opening one more fails in the middle of the run"
        findings.append(error(_CHECK, node, words, why=why, do=raise_it))
    elif files is not None and files < most:
        words += f" beside {num_connections} connections of clients" if num_connections else ""
        why = "a connection more is refused, of a client or of Ray, whose processes end when they cannot open one"
        findings.append(warning(_CHECK, node, words, why=why, do=raise_it))
    if uses_rdma and facts.memlock_bytes is not None and facts.memlock_bytes < _RDMA_MEMLOCK_BYTES:
        findings.append(
            warning(
                _CHECK,
                node,
                f"a process may lock {format_size(facts.memlock_bytes)} of memory",
                why="over InfiniBand NCCL locks its buffers, and fails with `ibv_reg_mr` where it may not (pinned "
                "slots of the streamer do not count, nor does TCP)",
                do="`ulimit -l unlimited` in the shell of `ray start`, or LimitMEMLOCK=infinity in its unit",
            )
        )
    if not findings:
        memlock = "any" if facts.memlock_bytes is None else format_size(facts.memlock_bytes)
        number = "any number of" if files is None else str(files)
        findings.append(ok(_CHECK, node, f"{number} open files ({most} may be needed), {memlock} of locked memory"))
    return findings


def _number(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit
