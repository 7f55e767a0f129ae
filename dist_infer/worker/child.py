"""A process of the local executor: `python -m dist_infer.worker.child WORK_FD CONTROL_FD HEART_FD`, inherited sockets.

Work (set-up, steps) is answered in order on the first; the second asks for figures at any time, also during a step;
the third whether the process is there, and its thread does nothing else.
Each message is one frame: a JSON header line, then the body. The parent's death is an end of file, and ends it.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

from dist_infer.messages import StepPlan, decode, encode
from dist_infer.worker.setup import WorkerSetup
from partition.errors import ClusterError

if TYPE_CHECKING:  # it imports torch, which takes a second that the parent need not wait for
    from dist_infer.worker.rank_host import RankHost

STREAM_REPORTS, TIMELINES = b"stream", b"timeline"  # what the control socket can be asked for
HEARTBEAT = b"there?"
_OOM_SCORE_ADJUSTMENT = 500  # of memory that runs out the kernel takes a rank, about which the parent can tell


def pack_frame(kind: str, body: bytes = b"", **fields: object) -> bytes:
    return json.dumps({"kind": kind, **fields}).encode() + b"\n" + body


def unpack_frame(data: bytes) -> tuple[dict[str, object], bytes]:
    header, _, body = data.partition(b"\n")
    fields: dict[str, object] = json.loads(header)
    return fields, body


def main() -> None:
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(_OOM_SCORE_ADJUSTMENT))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the parent decides
    connection, control, heart = (Connection(int(fd)) for fd in sys.argv[1:4])
    threading.Thread(target=_beat, args=(heart,), daemon=True).start()
    try:
        _serve(connection, control)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the parent is gone or has let go
    finally:
        # No orderly teardown: peers may be gone, and a collective's destructor could wait for them.
        os._exit(0)


def _beat(heart: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        while True:
            heart.send_bytes(heart.recv_bytes())


def _report(control: Connection, host: RankHost) -> None:
    """Answer every frame on `control` with the ranks' reports of the kind it names, until the parent closes it."""
    with contextlib.suppress(EOFError, OSError):
        while wanted := control.recv_bytes():
            found = host.timelines() if wanted == TIMELINES else host.stream_reports()
            control.send_bytes(json.dumps([encode(report).decode() for report in found]).encode())


def _serve(connection: Connection, control: Connection) -> None:
    from dist_infer.worker.rank_host import RankHost

    host: RankHost | None = None
    while True:
        fields, body = unpack_frame(connection.recv_bytes())
        try:
            if fields["kind"] == "setup":
                host = RankHost(decode(WorkerSetup, body))
                threading.Thread(target=_report, args=(control, host), daemon=True).start()
                connection.send_bytes(pack_frame("ok"))
            elif fields["kind"] == "close":
                raise EOFError
            elif host is None:
                raise RuntimeError("setup comes first")
            elif fields["kind"] == "bind":
                connection.send_bytes(pack_frame("ok", port=host.bind("127.0.0.1")))
            elif fields["kind"] == "connect":
                host.connect("127.0.0.1", int(str(fields["port"])), "127.0.0.1")
                connection.send_bytes(pack_frame("ok"))
            elif fields["kind"] == "load":

                def progress(done: int, total: int) -> None:
                    connection.send_bytes(pack_frame("progress", done=done, total=total))

                reports = host.load(progress)
                gc.freeze()  # what is there now stays: no search through it between steps
                connection.send_bytes(pack_frame("ok", json.dumps([encode(r).decode() for r in reports]).encode()))
            elif fields["kind"] == "step":
                result = host.step(decode(StepPlan, body))
                connection.send_bytes(pack_frame("step", encode(result) if result is not None else b""))
            else:
                raise RuntimeError(f"unknown message {fields['kind']!r}")
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise
        except Exception as error:
            text = str(error) if isinstance(error, ClusterError) else f"{type(error).__name__}: {error}"
            connection.send_bytes(pack_frame("error", traceback.format_exc().encode(), message=text))


if __name__ == "__main__":
    main()
