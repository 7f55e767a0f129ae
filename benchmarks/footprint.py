"""Memory of the processes themselves, which the planner keeps out of the budgets.

Run: python benchmarks/footprint.py FILE [a.b=c ...]

Starts the file's ranks and prints, per process, what it holds (PSS: shared pages divided among their sharers) beside
what dist-infer allocated in it. The constants in dist_infer/backend.py and launch/backend.py come from here.
"""

from __future__ import annotations

import sys
from pathlib import Path

import psutil

from dist_infer import LLM, SamplingParams
from partition.sizes import format_size


def pss(pid: int) -> int:
    """Proportional set size in bytes."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no Pss for {pid}")


def main() -> None:
    with LLM(sys.argv[1], overrides=sys.argv[2:]) as llm:
        params = SamplingParams(max_tokens=16, temperature=0, ignore_eos=True)
        llm.generate([list(range(10, 200))] * llm.plan.max_requests, params)
        ours: dict[int, int] = {}
        for report in llm.gang.reports:
            plan = llm.plan.ranks[report.rank]
            ours[report.pid] = ours.get(report.pid, 0) + plan.host_bytes + plan.device_bytes
        total = 0
        me = psutil.Process()
        for process in [me, *me.children(recursive=True)]:
            size = pss(process.pid)
            total += size
            mine = ours.get(process.pid, 0)
            name = " ".join(process.cmdline())[:60]
            print(
                f"{process.pid:>7} {format_size(size):>12}  planned {format_size(mine):>12}  beside it "
                f"{format_size(size - mine):>12}  {name}"
            )
        print(f"together {format_size(total)}, planned {format_size(sum(ours.values()))}")


if __name__ == "__main__":
    main()
