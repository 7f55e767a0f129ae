// The machine room: asks for /metrics every second while it is shown, and draws what they say.

import { ask } from "./api.js";
import { byId, element } from "./dom.js";
import { age, bytes, count, figure, gigabytesPerSecond, percent, seconds } from "./format.js";
import { Scrape } from "./prometheus.js";
import { roomDrawing } from "./room_drawing.js";
import { roomFigures } from "./room_figures.js";
import { sparkline } from "./sparkline.js";

const EVERY_MS = 1000;
const TIMEOUT_MS = 5000;
const KEPT = 180; // scrapes: three minutes
const LEAST_LINE = 30; // a line begins with room for half a minute
const INTERVAL_S = 5; // what rates and medians are of

// [title, figure, small print, what its line shows]
const TILES = [
  ["Output", (f) => `${figure(f.outRate)} tok/s`, (f) => `prompts ${figure(f.inRate)} tok/s`, (f) => f.outRate],
  ["Requests", (f) => `${count(f.running)} running`, (f) => `${count(f.waiting)} waiting`, (f) => f.running],
  ["KV cache", (f) => percent(f.kvRatio), (f) => `${count(f.kvFree)} / ${count(f.kvBlocks)} free`, (f) => f.kvRatio],
  ["Streamed", (f) => gigabytesPerSecond(streamed(f)), (f) => `${count(numRanks(f))} ranks together`, streamed],
  ["First token", (f) => seconds(f.firstToken), () => "median", (f) => f.firstToken],
  ["Between tokens", (f) => seconds(f.interToken), () => "median", (f) => f.interToken],
];
const COLUMNS = [
  ["Stage", (rank, stage) => stage.stage],
  ["Rank", (rank) => rank.rank],
  ["Host", (rank) => rank.host],
  ["Process", (rank) => rank.pid],
  ["Device", (rank) => rank.device],
  ["In device", (rank) => bytes(rank.bytes.device)],
  ["In host", (rank) => bytes(rank.bytes.host)],
  ["On NVMe", (rank) => bytes(rank.bytes.nvme + rank.bytes.rows)],
  ["Read", (rank) => gigabytesPerSecond(rank.readRate)],
  ["Copied", (rank) => gigabytesPerSecond(rank.copyRate)],
  ["Waited", (rank) => percent(rank.stall)],
  ["Computed", (rank) => percent(rank.compute)],
  ["Network", (rank) => percent(rank.network)],
  ["Retries", (rank) => count(rank.retries)],
  ["Slow reads", (rank) => count(rank.slowReads)],
];

export class RoomView {
  /** needKey(reason) asks the user for one. */
  constructor({ needKey }) {
    this._needKey = needKey;
    this._scrapes = [];
    this._history = TILES.map(() => []);
    this._figures = null;
    this._isShown = false;
    this._timer = null;
    this._round = 0; // an answer to an older one is too late
    this._place = byId("drawing");
    new ResizeObserver(() => this._draw()).observe(this._place);
    document.addEventListener("visibilitychange", () => this.restart());
  }

  setShown(isShown) {
    this._isShown = isShown;
    this.restart();
  }

  /** Ask at once, if it is shown. */
  restart() {
    clearTimeout(this._timer);
    this._round += 1;
    if (this._isShown && !document.hidden) this._look();
  }

  async _look() {
    const round = this._round;
    try {
      const response = await ask("metrics", { signal: AbortSignal.timeout(TIMEOUT_MS) });
      this._take(new Scrape(await response.text(), performance.now() / 1000));
      this._say("");
    } catch (error) {
      this._say(error.name === "TimeoutError" ? "The server is slow to answer." : `${error.message} ${error.advice ?? ""}`);
      if (error.status === 401) {
        this._needKey("The machine room needs an API key."); // whoever gives one restarts this
        return;
      }
    }
    if (round === this._round) this._timer = setTimeout(() => this._look(), EVERY_MS);
  }

  _take(scrape) {
    const before = this._scrapes.findLast((each) => scrape.at - each.at >= INTERVAL_S) ?? this._scrapes[0] ?? scrape;
    this._figures = roomFigures(before, scrape);
    this._scrapes.push(scrape);
    if (this._scrapes.length > 2 * INTERVAL_S + 2) this._scrapes.shift();
    TILES.forEach(([, , , value], place) => {
      const line = this._history[place];
      line.push(value(this._figures));
      if (line.length > KEPT) line.shift();
    });
    this._draw();
  }

  _say(words) {
    const place = byId("room-error");
    if (place.textContent !== words) place.textContent = words;
    place.hidden = words === "";
  }

  _draw() {
    const figures = this._figures;
    if (figures === null || byId("room").hidden) return;
    byId("room-about").textContent = about(figures);
    byId("room-counts").textContent = counts(figures);
    this._drawTiles(figures);
    byId("steps").replaceChildren(...(figures.phase === "loading" ? figures.steps.map(step) : []));
    byId("ranks").hidden = figures.stages.length === 0;
    byId("no-ranks").hidden = figures.stages.length > 0;
    if (figures.stages.length === 0) return;
    byId("rows-colour").hidden = figures.stages.every(({ ranks }) => ranks.every((rank) => rank.bytes.rows === 0));
    this._place.replaceChildren(roomDrawing(figures.stages, Math.floor(this._place.clientWidth)));
    byId("rank-table").replaceChildren(...table(figures.stages));
  }

  _drawTiles(figures) {
    const nodes = TILES.map(([title, big, small], place) =>
      element(
        "div",
        { class: "tile" },
        element("dt", {}, title),
        element("dd", { class: "big" }, big(figures)),
        element("dd", { class: "small" }, small(figures)),
        element("dd", { class: "line" }, sparkline(this._history[place], LEAST_LINE)),
      ),
    );
    byId("tiles").replaceChildren(...nodes);
  }
}

function step({ step: name, ratio }) {
  return element("li", {}, `${name} ${percent(ratio)} `, element("progress", { max: 1, value: ratio, "aria-label": name }));
}

function streamed({ stages }) {
  const rates = stages.flatMap(({ ranks }) => ranks.map((rank) => rank.readRate)).filter((rate) => rate !== null);
  return rates.length === 0 ? null : rates.reduce((sum, rate) => sum + rate, 0);
}

function numRanks({ stages }) {
  return stages.reduce((sum, { ranks }) => sum + ranks.length, 0);
}

/** What is served, and since when. */
function about(f) {
  const executor = f.executor ? `, ${f.executor} executor` : "";
  const shape = f.pipeline ? `${f.pipeline} stages × ${f.tensor} tensor ranks${executor}` : "";
  const up = f.startTime === null ? "" : `up ${age(Date.now() / 1000 - f.startTime)}`;
  const version = f.version === null ? "" : `dist-infer ${f.version}`;
  return [f.model, f.phase, shape, up, version].filter(Boolean).join(" · ");
}

function counts(f) {
  return [
    `preemptions ${count(f.preemptions)}`,
    `refused at the door ${count(f.refused ?? 0)}`,
    `failed ${count(f.failed)}`,
    `gang restarts ${count(f.restarts)}`,
  ].join(" · ");
}

function table(stages) {
  const head = element("tr", {}, COLUMNS.map(([title]) => element("th", { scope: "col" }, title)));
  const rows = stages.flatMap((stage) =>
    stage.ranks.map((rank) => element("tr", {}, COLUMNS.map(([, value]) => element("td", {}, String(value(rank, stage)))))),
  );
  return [element("thead", {}, head), element("tbody", {}, rows)];
}
