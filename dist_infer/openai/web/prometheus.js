// Prometheus text: parsed, and asked.

export class Scrape {
  /** at: seconds, of any clock that does not jump. */
  constructor(text, at) {
    this.at = at;
    this._series = new Map(); // name -> [{labels, value}]
    for (const line of text.split("\n")) {
      const found = line === "" || line[0] === "#" ? null : sample(line);
      if (found === null) continue;
      if (!this._series.has(found.name)) this._series.set(found.name, []);
      this._series.get(found.name).push(found);
    }
  }

  /** All samples of a name that have these labels. */
  series(name, labels = {}) {
    const wanted = Object.entries(labels);
    return (this._series.get(name) ?? []).filter((each) => wanted.every(([key, value]) => each.labels[key] === value));
  }

  /** The sum of them; null when there is none. */
  value(name, labels = {}) {
    const found = this.series(name, labels);
    return found.length === 0 ? null : found.reduce((sum, each) => sum + each.value, 0);
  }

  /** [upper bound, how many are at or below it], rising, of all label sets together. */
  buckets(name) {
    const sums = new Map();
    for (const { labels, value } of this.series(`${name}_bucket`)) {
      const bound = number(labels.le);
      sums.set(bound, (sums.get(bound) ?? 0) + value);
    }
    return [...sums].sort(([one], [other]) => one - other);
  }
}

/** What a counter grew by a second; null when it was not there, or began anew. */
export function rate(before, after, name, labels = {}) {
  const [from, to] = [before.value(name, labels) ?? 0, after.value(name, labels)];
  const spent = after.at - before.at;
  return to === null || to < from || spent <= 0 ? null : (to - from) / spent;
}

/** The quantile of what came between two scrapes, interpolated within its bucket; null when nothing came. */
export function quantile(share, before, after, name) {
  const old = new Map(before.buckets(name));
  const grown = after.buckets(name).map(([bound, value]) => [bound, value - (old.get(bound) ?? 0)]);
  const total = grown.at(-1)?.[1] ?? 0;
  if (total <= 0) return null;
  const wanted = share * total;
  let [low, below] = [0, 0];
  for (const [bound, upTo] of grown) {
    if (upTo >= wanted) {
      if (bound === Infinity) return low;
      return upTo === below ? bound : low + ((bound - low) * (wanted - below)) / (upTo - below);
    }
    [low, below] = [bound, upTo];
  }
  return low;
}

/** `name{key="value",...} 1.5` with an optional time at its end; null for what is none. */
function sample(line) {
  const name = /^[a-zA-Z_:][\w:]*/.exec(line)?.[0];
  if (name === undefined) return null;
  const labels = {};
  let at = name.length;
  if (line[at] === "{") {
    const label = /\s*([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)",?/y;
    label.lastIndex = at + 1;
    for (let found; (found = label.exec(line)); ) {
      labels[found[1]] = found[2].replace(/\\(.)/g, (_, letter) => (letter === "n" ? "\n" : letter));
      at = label.lastIndex;
    }
    at = line.indexOf("}", at) + 1;
  }
  const value = number(line.slice(at).trim().split(/\s+/)[0]);
  return Number.isNaN(value) ? null : { name, labels, value };
}

function number(text) {
  if (text === "+Inf") return Infinity;
  return text === "-Inf" ? -Infinity : Number.parseFloat(text);
}
