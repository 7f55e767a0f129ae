// Markdown within a line: text to nodes. One walk; a mark without its end is only text.

import { element } from "./dom.js";

const PAIRS = [
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "s"],
  ["*", "em"],
  ["_", "em"],
];
const SAFE = new Set(["http:", "https:", "mailto:"]);
const BARE = /^https?:\/\/[^\s<>"'`)\]]+/;
const DEEPEST = 6;

/** Nodes of one piece of text. Links lead to http, https and mailto alone; pictures are links, since nothing is fetched. */
export function inlineNodes(text, depth = 0) {
  const nodes = [];
  const missing = new Set(); // marks that have no end after here
  let plain = "";
  let at = 0;
  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  };
  while (at < text.length) {
    const found = spanAt(text, at, depth, missing);
    if (found === null) {
      plain += text[at];
      at += 1;
    } else {
      plain += found.text ?? "";
      if (found.node) {
        flush();
        nodes.push(found.node);
      }
      at = found.next;
    }
  }
  flush();
  return nodes;
}

function spanAt(text, at, depth, missing) {
  const letter = text[at];
  if (letter === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) return { text: text[at + 1], next: at + 2 };
  if (letter === "`") return codeAt(text, at, missing);
  if (depth >= DEEPEST) return null;
  if (letter === "[" || (letter === "!" && text[at + 1] === "[")) return linkAt(text, at, depth, missing);
  if (letter === "h" && !isWord(text[at - 1])) return bareAt(text, at);
  return pairAt(text, at, depth, missing);
}

function codeAt(text, at, missing) {
  const mark = /^`+/.exec(text.slice(at, at + 32))[0];
  const end = missing.has(mark) ? -1 : text.indexOf(mark, at + mark.length);
  if (end < 0) {
    missing.add(mark);
    return { text: mark, next: at + mark.length };
  }
  return { node: element("code", {}, text.slice(at + mark.length, end)), next: end + mark.length };
}

function pairAt(text, at, depth, missing) {
  for (const [mark, tag] of PAIRS) {
    if (!text.startsWith(mark, at)) continue;
    const opens = at + mark.length;
    if (missing.has(mark) || isSpace(text[opens]) || (mark[0] === "_" && isWord(text[at - 1]))) continue;
    const end = endOf(text, mark, opens);
    if (end < 0) {
      missing.add(mark);
      continue;
    }
    return { node: element(tag, {}, inlineNodes(text.slice(opens, end), depth + 1)), next: end + mark.length };
  }
  return null;
}

/** Where the same mark closes: after something, not before a word for underscores, not half of a double mark. */
function endOf(text, mark, from) {
  for (let end = text.indexOf(mark, from + 1); end >= 0; end = text.indexOf(mark, end + 1)) {
    const after = text[end + mark.length];
    const isDouble = mark.length === 1 && (after === mark || text[end - 1] === mark);
    if (!isSpace(text[end - 1]) && !isDouble && !(mark[0] === "_" && isWord(after))) return end;
  }
  return -1;
}

function linkAt(text, at, depth, missing) {
  const opens = text.indexOf("[", at);
  const middle = missing.has("](") ? -1 : text.indexOf("](", opens);
  if (middle < 0) {
    missing.add("](");
    return null;
  }
  const end = text.indexOf(")", middle);
  if (end < 0 || text.slice(opens + 1, middle).includes("[")) return null;
  const target = text.slice(middle + 2, end).trim().replace(/[ \t]+"[^"]*"$/, "");
  const label = text.slice(opens + 1, middle);
  const node = link(target, inlineNodes(label || target, depth + 1));
  return node === null ? null : { node, next: end + 1 };
}

function bareAt(text, at) {
  const found = BARE.exec(text.slice(at, at + 2048));
  if (found === null) return null;
  const target = found[0].replace(/[.,;:!?]+$/, "");
  const node = link(target, [document.createTextNode(target)]);
  return node === null ? null : { node, next: at + target.length };
}

/** Null for a target that is no whole address of a safe kind: it stays text. */
function link(target, children) {
  let address;
  try {
    address = new URL(target);
  } catch {
    return null;
  }
  if (!SAFE.has(address.protocol)) return null;
  return element("a", { href: address.href, target: "_blank", rel: "noopener noreferrer nofollow" }, children);
}

function isSpace(letter) {
  return letter === undefined || /\s/.test(letter);
}

function isWord(letter) {
  return letter !== undefined && /[\p{L}\p{N}_]/u.test(letter);
}
