"""What a streamer did since it was made: bytes, waits, checks. One writer (the streamer), snapshots for others."""

from __future__ import annotations

from dataclasses import dataclass

from offload.slow_reads import SlowReads


@dataclass(frozen=True, kw_only=True)
class StreamSnapshot:
    """Cumulative figures; subtract two to get an interval. Seconds are wall-clock."""

    bytes_read: int  # from disk, loading included
    bytes_copied: int  # host -> device, loading included
    num_passes: int
    num_waits: int
    stall_s: float  # `wait` took this long
    longest_stall_s: float
    stall_s_per_unit: dict[str, float]
    num_read_retries: int
    num_slow_reads: int  # slower than 10 medians and than 100 ms; loading not included
    num_verified: int  # blobs whose checksum was compared


class StreamStats:
    """The counters behind a StreamSnapshot."""

    def __init__(self) -> None:
        self.bytes_read = 0
        self.bytes_copied = 0
        self.num_passes = 0
        self.num_read_retries = 0
        self.slow_reads = SlowReads()
        self.num_verified = 0
        self._num_waits = 0
        self._longest_stall_s = 0.0
        self._stall_s_per_unit: dict[str, float] = {}

    def add_stall(self, unit: str, seconds: float) -> None:
        """One `wait` for a streamed unit."""
        self._num_waits += 1
        self._longest_stall_s = max(self._longest_stall_s, seconds)
        self._stall_s_per_unit[unit] = self._stall_s_per_unit.get(unit, 0.0) + seconds

    def snapshot(self) -> StreamSnapshot:
        """The figures as they are now."""
        return StreamSnapshot(
            bytes_read=self.bytes_read,
            bytes_copied=self.bytes_copied,
            num_passes=self.num_passes,
            num_waits=self._num_waits,
            stall_s=sum(self._stall_s_per_unit.values()),
            longest_stall_s=self._longest_stall_s,
            stall_s_per_unit=dict(self._stall_s_per_unit),
            num_read_retries=self.num_read_retries,
            num_slow_reads=self.slow_reads.count,
            num_verified=self.num_verified,
        )
