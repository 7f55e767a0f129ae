"""How fast pinned host memory can be copied to the device here: the limit that streaming is measured against."""

from __future__ import annotations

import torch

_BYTES = 1 << 30
_SECONDS = 0.7


def pinned_rate(device: str) -> float:
    """Bytes per second of copies back to back on one stream, for about 0.7 s; 0 where there is no device to copy to.

    Buffers are the driver's own pinned memory (torch's allocator), 1 GiB on each side, as no competitor has them.
    """
    if torch.device(device).type != "cuda":
        return 0.0
    source = torch.ones(_BYTES, dtype=torch.uint8).pin_memory()
    target = torch.empty(_BYTES, dtype=torch.uint8, device=device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.Stream(device=device)
    torch.cuda.synchronize(device)

    def copy(times: int) -> float:
        with torch.cuda.stream(stream):
            begin.record(stream)
            for _ in range(times):
                target.copy_(source, non_blocking=True)
            end.record(stream)
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)

    once = min(copy(1) for _ in range(3))
    times = max(4, round(_SECONDS / once))
    return times * _BYTES / copy(times)
