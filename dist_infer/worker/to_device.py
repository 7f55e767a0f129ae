"""Small arrays to the device that computes, without waiting for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def to_device(values: np.ndarray[Any, Any], device: torch.device) -> torch.Tensor:
    """On a CPU the tensor is the array's own memory, which nobody may change any more.

    torch keeps pinned memory until it is copied. A copy costs the same for one number as for thousands: join them.
    """
    tensor = torch.from_numpy(values)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
