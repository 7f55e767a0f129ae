"""Memory against the plan: what each node has free, its cgroups counted, and what the ranks placed there will take."""

from __future__ import annotations

from launch.doctor.finding import Finding, ok, warning
from partition.plan import Plan
from partition.sizes import format_size

_CHECK = "memory"
_TIGHT_SHARE = 0.97


def judge_memory(plan: Plan, available: dict[int, tuple[str, int, str]]) -> list[Finding]:
    """available: by index of the node its name, bytes, and whose limit that is."""
    findings = []
    for budget in plan.budgets:
        name, num_bytes, source = available[budget.node]
        need = budget.used_bytes + budget.footprint_bytes
        what = f"{format_size(need)} of {format_size(num_bytes)} ({source}): "
        what += f"weights, KV and activations {format_size(budget.used_bytes)}, processes "
        what += f"{format_size(budget.footprint_bytes)}"
        if need > _TIGHT_SHARE * num_bytes:
            findings.append(
                warning(
                    _CHECK,
                    name,
                    what,
                    why="what else runs there may take the little that is left, and the kernel then ends a rank",
                    do=f"set offload.host_memory to less than {format_size(budget.limit_bytes)}, or use this node for "
                    "nothing else",
                )
            )
        else:
            findings.append(ok(_CHECK, name, what))
    return findings
