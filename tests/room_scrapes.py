"""/metrics of a larger machine than tests have: two stages of two ranks each, as they would be after some seconds."""

from __future__ import annotations

import math

_BOUNDS = (0.001, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
_GB = 10**9
TOKENS_PER_S = 96.0
FIRST_TOKEN_S = 0.4  # all of them; the median is interpolated within 0.25 .. 0.5
READ_BYTES_PER_S = (3.1e9, 2.9e9, 2.4e9, 2.6e9)
STALL_SHARE = (0.12, 0.15, 0.58, 0.52)


def scrape(seconds: float) -> str:
    """The text `seconds` after the server began to be busy."""
    running = 12 + round(3 * math.sin(seconds / 7))
    wave = 12 * (1 - math.cos(seconds / 5))  # of tokens: the rate goes up and down with it
    lines = [
        *(f'dist_infer_phase{{phase="{name}"}} {float(name == "ready")}' for name in ("loading", "ready", "draining")),
        'dist_infer_build_info{version="0.1.0",model="llama-3.1-70b",executor="ray",tensor="2",pipeline="2"} 1.0',
        "dist_infer_start_time_seconds 1.7e9",
        f"dist_infer_requests_running {running}",
        "dist_infer_requests_waiting 3.0",
        "dist_infer_kv_blocks 4096.0",
        f"dist_infer_kv_blocks_free {4096 - 200 * running}",
        f"dist_infer_kv_used_ratio {200 * running / 4096}",
        f"dist_infer_generated_tokens_total {TOKENS_PER_S * seconds + wave}",
        f"dist_infer_prompt_tokens_total {410.0 * seconds}",
        "dist_infer_preemptions_total 2.0",
        'dist_infer_http_refused_total{reason="queue_full"} 4.0',
        'dist_infer_http_refused_total{reason="401"} 1.0',
        'dist_infer_requests_total{end="failed"} 0.0',
        "dist_infer_gang_restarts_total 0.0",
        *_histogram("time_to_first_token_seconds", FIRST_TOKEN_S, 2 * seconds),
        *_histogram("inter_token_seconds", 0.11, TOKENS_PER_S * seconds),
    ]
    for rank, (read, stall) in enumerate(zip(READ_BYTES_PER_S, STALL_SHARE, strict=True)):
        lines += _rank(rank, read, stall, seconds)
    for stage, by in enumerate(("compute", "disk")):
        lines.append(f'dist_infer_stage_overlap_ratio{{stage="{stage}"}} {1 - STALL_SHARE[2 * stage]}')
        for name in ("disk", "network", "compute"):
            lines.append(f'dist_infer_stage_bound_by{{stage="{stage}",by="{name}"}} {float(name == by)}')
    return "\n".join(["# HELP dist_infer_phase 1 for the phase it is in", "# TYPE dist_infer_phase gauge", *lines, ""])


def _histogram(name: str, value: float, count: float) -> list[str]:
    bounds = [f'dist_infer_{name}_bucket{{le="{bound}"}} {count if bound >= value else 0.0}' for bound in _BOUNDS]
    return [*bounds, f'dist_infer_{name}_bucket{{le="+Inf"}} {count}', f"dist_infer_{name}_count {count}"]


def _rank(rank: int, read: float, stall: float, seconds: float) -> list[str]:
    labels = f'stage="{rank // 2}",rank="{rank}"'
    host, network = f"node-{rank // 2}", 0.08
    tiers = {"device": 14 * _GB, "host": 6 * _GB, "nvme": 15 * _GB}
    return [
        f'dist_infer_rank_info{{{labels},host="{host}",pid="{4100 + rank}",device="cuda"}} 1.0',
        *(f'dist_infer_rank_weight_bytes{{{labels},tier="{tier}"}} {size}' for tier, size in tiers.items()),
        *(f'dist_infer_rank_units{{{labels},tier="{tier}"}} {size // _GB}' for tier, size in tiers.items()),
        f"dist_infer_stream_read_bytes_total{{{labels}}} {read * seconds}",
        f"dist_infer_stream_copied_bytes_total{{{labels}}} {1.4 * read * seconds}",
        f"dist_infer_rank_busy_seconds_total{{{labels}}} {0.97 * seconds}",
        f"dist_infer_stream_stall_seconds_total{{{labels}}} {0.97 * stall * seconds}",
        f"dist_infer_rank_communication_seconds_total{{{labels}}} {0.97 * network * seconds}",
        f"dist_infer_rank_compute_seconds_total{{{labels}}} {0.97 * (1 - stall - network) * seconds}",
        f"dist_infer_read_retries_total{{{labels}}} 0.0",
        f"dist_infer_slow_reads_total{{{labels}}} {float(rank == 2)}",
    ]
