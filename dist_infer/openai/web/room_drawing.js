// The drawing of the machine room: stages from left to right as a token passes them, their ranks below each other.
//
//   ┌ Stage 0 ── bound by disk ┐      ┌ Stage 1 ...
//   │ rank 0           1.2 GB/s│  ──> │
//   │ ▇▇▇▇▇▇▇▇ bytes by tier   │
//   │ ▇▇▇▇ time by what for    │

import { drawn } from "./dom.js";
import { bytes, gigabytesPerSecond, percent } from "./format.js";

const GAP = 36;
const PAD = 14;
const HEAD = 52;
const CARD = 112;
const CARD_GAP = 10;
const LEAST_WIDTH = 250;
const MOST_WIDTH = 640;

/** stages: of room_figures. width: of what it is drawn into, in CSS pixels. */
export function roomDrawing(stages, width) {
  const columns = Math.max(1, Math.min(stages.length, Math.floor((width + GAP) / (LEAST_WIDTH + GAP))));
  const wide = Math.min(MOST_WIDTH, (width - (columns - 1) * GAP) / columns);
  const tall = HEAD + Math.max(...stages.map(({ ranks }) => ranks.length)) * (CARD + CARD_GAP) - CARD_GAP + PAD;
  const rows = Math.ceil(stages.length / columns);
  const height = rows * tall + (rows - 1) * GAP;
  const place = (index) => ({ x: (index % columns) * (wide + GAP), y: Math.floor(index / columns) * (tall + GAP) });
  const nodes = stages.map((stage, index) => {
    const { x, y } = place(index);
    return drawn("g", { transform: `translate(${x} ${y})` }, stageNodes(stage, wide, tall));
  });
  const arrows = stages.slice(1).map((_, index) => arrow(place(index), place(index + 1), wide, tall));
  const attributes = { role: "img", "aria-label": words(stages), width, height, viewBox: `0 0 ${width} ${height}` };
  return drawn("svg", { class: "drawing", ...attributes }, arrows, nodes);
}

function stageNodes({ stage, overlap, boundBy, ranks }, wide, tall) {
  const bound = boundBy === null ? "idle" : `bound by ${boundBy}`;
  return [
    drawn("rect", { class: "stage", width: wide, height: tall, rx: 12 }),
    text(`Stage ${stage}`, PAD, 24, "stage-name"),
    text(`overlap ${percent(overlap)}`, PAD, 41, "small"),
    text(bound, wide - PAD, 24, `bound ${boundBy ?? "none"} end`),
    ...ranks.map((rank, index) => {
      const at = `translate(${PAD} ${HEAD + index * (CARD + CARD_GAP)})`;
      return drawn("g", { transform: at }, rankNodes(rank, wide - 2 * PAD));
    }),
  ];
}

function rankNodes(rank, wide) {
  const inner = wide - 20;
  const tiers = Object.entries(rank.bytes);
  const whole = tiers.reduce((sum, [, size]) => sum + size, 0);
  const named = tiers.filter(([, size]) => size > 0).map(([tier, size]) => `${tier} ${bytes(size)}`);
  const times = [["compute", rank.compute ?? 0], ["network", rank.network ?? 0], ["stall", rank.stall ?? 0]];
  const spent = rank.stall === null ? "no pass in this time" : `waited for weights ${percent(rank.stall)}`;
  return [
    drawn("title", {}, `${rank.host}, process ${rank.pid}`),
    drawn("rect", { class: "rank", width: wide, height: CARD, rx: 8 }),
    text(`Rank ${rank.rank} · ${rank.device}`, 10, 21, "rank-name"),
    text(gigabytesPerSecond(rank.readRate), wide - 10, 21, "speed end"),
    drawn("g", { transform: "translate(10 32)" }, bar(tiers, whole, inner, 12)),
    text(named.join(" · ") || "no weights", 10, 60, "small"),
    drawn("g", { transform: "translate(10 72)" }, bar(times, 1, inner, 7)),
    text(spent, 10, 97, "small"),
  ];
}

/** Parts of a whole, side by side; what is left is the track. */
function bar(parts, whole, wide, tall) {
  let x = 0;
  const nodes = [drawn("rect", { class: "track", width: wide, height: tall, rx: 3 })];
  for (const [kind, size] of parts) {
    const width = whole > 0 ? Math.max(0, Math.min(wide - x, (size / whole) * wide)) : 0;
    if (width > 0) nodes.push(drawn("rect", { class: kind, x, width, height: tall, rx: Math.min(3, width / 2) }));
    x += width;
  }
  return nodes;
}

function arrow(from, to, wide, tall) {
  const isBeside = from.y === to.y;
  const [x1, y1] = isBeside ? [from.x + wide + 5, from.y + 24] : [from.x + wide / 2, from.y + tall + 5];
  const [x2, y2] = isBeside ? [to.x - 5, to.y + 24] : [to.x + wide / 2, to.y - 5];
  const head = isBeside ? `M${x2 - 6} ${y2 - 5}L${x2} ${y2}L${x2 - 6} ${y2 + 5}` : `M${x2 - 5} ${y2 - 6}L${x2} ${y2}L${x2 + 5} ${y2 - 6}`;
  return drawn("path", { class: "arrow", d: `M${x1} ${y1}L${x2} ${y2}${head}` });
}

function text(words, x, y, kind) {
  return drawn("text", { x, y, class: kind }, words);
}

function words(stages) {
  const ranks = stages.reduce((sum, stage) => sum + stage.ranks.length, 0);
  return `${stages.length} stages with ${ranks} ranks; the table below has every figure of this drawing.`;
}
