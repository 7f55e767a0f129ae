"""int4 groups by least squared error: which scale and minimum, and the codes for them.

For every shrunken or widened range: codes for that range, the least-squares scale and minimum for these codes, both
rounded to float16, codes for the rounded ones, and their squared error. The best of all wins, the plain range
included; what won is refitted twice more. All sums are float32 in one order: every fourth column of a group one by one,
then the four. So the C kernel, which does the same for 16 rows at once, gives the same bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from offload.kernels.layout import pack_codes, pack_scales

_SHRINKS = (-0.02, 0.02, 0.06, 0.1)  # of the range, at either end: nearly as good as a grid of 256
_REFITS = 2
_LEVELS = 15.0
_LANES = 4


def search(chunk: Tensor, group: int, codes: Tensor, scales: Tensor) -> None:
    """float32 [n, K], |w| <= 65504, into the int4 codes and scales of its tiles, by torch operations."""
    rows, columns = chunk.shape
    w = chunk.view(-1, group).t().contiguous()  # [g, groups]: a column of all groups at a time
    low, high = w.amin(0), w.amax(0)
    width = high - low
    best = _Fit(w, _half(width * (1.0 / _LEVELS)), _half(low))
    for left in _SHRINKS:
        for right in _SHRINKS:
            start = low + left * width
            scale = (width * (1.0 - left - right)) * (1.0 / _LEVELS)
            best.keep_better(_refitted(w, _codes(w, scale, start)))
    for _ in range(_REFITS):
        best.keep_better(_refitted(w, best.codes))
    shape = (rows, columns // group)
    codes.copy_(pack_codes("int4", best.codes.t().reshape(rows, columns).to(torch.uint8)))
    pair = [pack_scales(part.view(shape).half()) for part in (best.scale, best.minimum)]
    scales.copy_(torch.stack(pair, 2))


class _Fit:
    """Codes [g, groups] for given float16-exact scales and minima [groups], and their squared error."""

    def __init__(self, w: Tensor, scale: Tensor, minimum: Tensor) -> None:
        self.scale, self.minimum = scale, minimum
        self.codes = _codes(w, scale, minimum)
        self.error = _sum((w - (self.codes * scale + minimum)).square_())

    def keep_better(self, other: _Fit) -> None:
        """Takes over those groups in which the other one's error is less."""
        better = other.error < self.error
        self.scale = torch.where(better, other.scale, self.scale)
        self.minimum = torch.where(better, other.minimum, self.minimum)
        self.codes = torch.where(better, other.codes, self.codes)
        self.error = torch.where(better, other.error, self.error)


def _refitted(w: Tensor, codes: Tensor) -> _Fit:
    """Least-squares scale and minimum for the codes, rounded to float16, and the codes for these."""
    sum_w, sum_q, sum_qq, sum_qw = _sum(w), _sum(codes), _sum(codes * codes), _sum(codes * w)
    count = float(len(w))
    spread = count * sum_qq - sum_q * sum_q
    covered = count * sum_qw - sum_q * sum_w
    scale = torch.where(spread > 0, covered / spread.clamp_min(1.0), 0.0).clamp_min(0.0)
    scale = _half(scale)
    return _Fit(w, scale, _half((sum_w - scale * sum_q) * (1.0 / count)))


def _codes(w: Tensor, scale: Tensor, minimum: Tensor) -> Tensor:
    """The nearest codes 0..15, as float32 [g, groups]; 0 where the scale is."""
    inverse = torch.where(scale > 0, 1.0 / torch.where(scale > 0, scale, 1.0), 0.0)
    return ((w - minimum) * inverse).round_().clamp_(0.0, _LEVELS)


def _sum(values: Tensor) -> Tensor:
    """[g, groups] to [groups], in the order that the C kernel keeps."""
    fours = values.view(-1, _LANES, values.shape[-1])
    total = fours[0].clone()
    for four in fours[1:]:
        total += four
    return (total[0] + total[1]) + (total[2] + total[3])


def _half(values: Tensor) -> Tensor:
    """Rounded to what float16 holds, never to inf; + 0: there is one zero."""
    return values.clamp(-65504.0, 65504.0).half().float() + 0.0
