// What the machine room shows, from two scrapes of /metrics. Rates and medians are of the time between them.

import { quantile, rate } from "./prometheus.js";

const TIERS = ["device", "host", "nvme", "rows"];

/** Plain data; null for what the server does not say, or what did not happen. */
export function roomFigures(before, after) {
  const value = (name, labels) => after.value(`dist_infer_${name}`, labels);
  const grown = (name, labels) => rate(before, after, `dist_infer_${name}`, labels);
  const info = after.series("dist_infer_build_info")[0]?.labels ?? {};
  return {
    phase: after.series("dist_infer_phase").find((each) => each.value === 1)?.labels.phase ?? null,
    steps: after.series("dist_infer_load_progress_ratio").map(({ labels, value }) => ({ step: labels.step, ratio: value })),
    model: info.model ?? null,
    executor: info.executor ?? null,
    tensor: info.tensor ?? null,
    pipeline: info.pipeline ?? null,
    version: info.version ?? null,
    startTime: value("start_time_seconds"),
    running: value("requests_running"),
    waiting: value("requests_waiting"),
    kvRatio: value("kv_used_ratio"),
    kvBlocks: value("kv_blocks"),
    kvFree: value("kv_blocks_free"),
    outRate: grown("generated_tokens_total"),
    inRate: grown("prompt_tokens_total"),
    firstToken: quantile(0.5, before, after, "dist_infer_time_to_first_token_seconds"),
    interToken: quantile(0.5, before, after, "dist_infer_inter_token_seconds"),
    preemptions: value("preemptions_total"),
    refused: value("http_refused_total"),
    failed: value("requests_total", { end: "failed" }),
    restarts: value("gang_restarts_total"),
    stages: stages(before, after),
  };
}

function stages(before, after) {
  const found = new Map();
  for (const { labels } of after.series("dist_infer_rank_info")) {
    const { stage } = labels;
    if (!found.has(stage)) {
      found.set(stage, {
        stage,
        overlap: after.value("dist_infer_stage_overlap_ratio", { stage }),
        boundBy: after.series("dist_infer_stage_bound_by", { stage }).find((each) => each.value === 1)?.labels.by ?? null,
        ranks: [],
      });
    }
    found.get(stage).ranks.push(rank(before, after, labels));
  }
  const byNumber = (name) => (one, other) => Number(one[name]) - Number(other[name]);
  for (const each of found.values()) each.ranks.sort(byNumber("rank"));
  return [...found.values()].sort(byNumber("stage"));
}

function rank(before, after, { stage, rank: number, host, pid, device }) {
  const of = { stage, rank: number };
  const grown = (name) => rate(before, after, `dist_infer_${name}`, of);
  const busy = grown("rank_busy_seconds_total");
  const share = (name) => (busy ? Math.min(1, (grown(name) ?? 0) / busy) : null);
  const tiers = (name) => Object.fromEntries(TIERS.map((tier) => [tier, after.value(name, { ...of, tier }) ?? 0]));
  return {
    rank: number,
    host,
    pid,
    device,
    bytes: tiers("dist_infer_rank_weight_bytes"),
    units: tiers("dist_infer_rank_units"),
    readRate: grown("stream_read_bytes_total"),
    copyRate: grown("stream_copied_bytes_total"),
    stall: share("stream_stall_seconds_total"),
    compute: share("rank_compute_seconds_total"),
    network: share("rank_communication_seconds_total"),
    retries: after.value("dist_infer_read_retries_total", of),
    slowReads: after.value("dist_infer_slow_reads_total", of),
  };
}
