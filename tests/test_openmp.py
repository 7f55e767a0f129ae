"""Pools of compute threads: more of them than cores made every step three times as long."""

from __future__ import annotations

import os
import subprocess
import sys

_COUNTS = """
import os, time, torch
from dist_infer.openmp import release_pool

def num_threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(2)
before = num_threads()
torch.randn(1 << 20).exp()
with_pool = num_threads()
found = release_pool()
deadline = 500
while num_threads() > before and deadline:
    time.sleep(0.01)
    deadline -= 1
print(with_pool - before, num_threads() - before, found, float(torch.ones(1 << 20).sum()))
"""


def test_a_pool_that_was_given_back_is_gone_and_comes_back() -> None:
    """Guards the ranks of this process against the pool of the thread that prepared the model."""
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", _COUNTS], capture_output=True, text=True, timeout=120, check=True, env=environment
    )
    grown, left, found, total = done.stdout.split()
    assert int(grown) >= 1
    assert (int(left), found, float(total)) == (0, "True", 2.0**20)


def test_a_process_without_torch_has_none() -> None:
    """Guards planning, which must not load torch, against doing so here."""
    script = "import sys; from dist_infer.openmp import release_pool; print(release_pool(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False", "False"]
