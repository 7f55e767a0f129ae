// Markdown's blocks: text to plain data, in one walk over its lines. What it does not know stays a paragraph.
//
//   {kind: "code", language, text}   {kind: "heading", level, text}   {kind: "paragraph", text}   {kind: "rule"}
//   {kind: "quote", blocks}   {kind: "list", isOrdered, start, items: [blocks]}   {kind: "table", head, rows}

const FENCE = /^ {0,3}(`{3,}|~{3,})([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}(?:(?:\*[ \t]*){3,}|(?:-[ \t]*){3,}|(?:_[ \t]*){3,})$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])[ \t]+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const TABLE_LINE = /^ {0,3}\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*$/;
const DEEPEST = 8; // of quotes and lists in each other

/** All blocks of a text. An open fence (the answer is still coming) is a block already. */
export function blocksOf(text, depth = 0) {
  const lines = typeof text === "string" ? text.split(/\r?\n/) : text;
  const found = [];
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    if (line.trim() === "") {
      at += 1;
    } else {
      const { block, next } = blockAt(lines, at, depth);
      found.push(block);
      at = next;
    }
  }
  return found;
}

function blockAt(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) return code(lines, at, fence);
  const heading = HEADING.exec(line);
  if (heading) {
    const text = heading[2].replace(/[ \t]+#+[ \t]*$/, "");
    return { block: { kind: "heading", level: heading[1].length, text }, next: at + 1 };
  }
  if (RULE.test(line)) return { block: { kind: "rule" }, next: at + 1 };
  if (depth < DEEPEST && QUOTE.test(line)) return quote(lines, at, depth);
  if (depth < DEEPEST && ITEM.test(line)) return list(lines, at, depth);
  if (isTable(lines, at)) return table(lines, at);
  return paragraph(lines, at);
}

function code(lines, at, [, mark, info]) {
  const isEnd = (line) => line.trim().startsWith(mark) && line.trim().replaceAll(mark[0], "") === "";
  let next = at + 1;
  while (next < lines.length && !isEnd(lines[next])) next += 1;
  const text = lines.slice(at + 1, next).join("\n");
  return { block: { kind: "code", language: info.trim().split(/\s/)[0], text }, next: next + 1 };
}

function quote(lines, at, depth) {
  const inner = [];
  let next = at;
  for (let found; next < lines.length && (found = QUOTE.exec(lines[next])); next += 1) inner.push(found[1]);
  return { block: { kind: "quote", blocks: blocksOf(inner, depth + 1) }, next };
}

/** An item has its first line and all that are indented deeper than its mark. */
function list(lines, at, depth) {
  const [, indent, mark] = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(mark);
  const items = [];
  let next = at;
  while (next < lines.length) {
    const found = ITEM.exec(lines[next]);
    if (!found || found[1].length !== indent.length || /\d/.test(found[2]) !== isOrdered || RULE.test(lines[next])) break;
    const inner = [found[3]];
    next += 1;
    while (next < lines.length && belongs(lines, next, indent.length)) {
      inner.push(lines[next].slice(Math.min(indentOf(lines[next]), indent.length + found[2].length + 1)));
      next += 1;
    }
    items.push(blocksOf(inner, depth + 1));
    while (next + 1 < lines.length && lines[next].trim() === "" && ITEM.test(lines[next + 1])) next += 1;
  }
  return { block: { kind: "list", isOrdered, start: isOrdered ? parseInt(mark, 10) : 1, items }, next };
}

/** Deeper lines, and an empty one before a deeper one. */
function belongs(lines, at, indent) {
  const line = lines[at].trim() === "" && at + 1 < lines.length ? lines[at + 1] : lines[at];
  return line.trim() !== "" && indentOf(line) > indent;
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("|") && TABLE_LINE.test(lines[at + 1]);
}

function table(lines, at) {
  const head = cells(lines[at]);
  const rows = [];
  let next = at + 2;
  for (; next < lines.length && lines[next].includes("|"); next += 1) {
    const row = cells(lines[next]);
    rows.push(head.map((_, column) => row[column] ?? ""));
  }
  return { block: { kind: "table", head, rows }, next };
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split("|").map((cell) => cell.trim());
}

function paragraph(lines, at) {
  let next = at + 1;
  while (next < lines.length && !interrupts(lines, next)) next += 1;
  return { block: { kind: "paragraph", text: lines.slice(at, next).join("\n") }, next };
}

function interrupts(lines, at) {
  const line = lines[at];
  return [FENCE, HEADING, RULE, ITEM, QUOTE].some((mark) => mark.test(line)) || line.trim() === "" || isTable(lines, at);
}
