// A text of the model on the page. While it grows only the blocks that changed are made again.

import { blocksOf } from "./blocks.js";
import { copyButton } from "./clipboard.js";
import { element } from "./dom.js";
import { inlineNodes } from "./inline.js";

export class Markdown {
  constructor(announce) {
    this.node = element("div", { class: "markdown" });
    this._announce = announce;
    this._shown = []; // what each child was made of
  }

  show(text) {
    const blocks = blocksOf(text);
    blocks.forEach((block, place) => {
      const source = JSON.stringify(block);
      if (this._shown[place] === source) return;
      const made = this._made(block);
      const old = this.node.children[place];
      if (old) old.replaceWith(made);
      else this.node.append(made);
      this._shown[place] = source;
    });
    while (this.node.children.length > blocks.length) this.node.lastElementChild.remove();
    this._shown.length = blocks.length;
  }

  _made(block) {
    switch (block.kind) {
      case "code":
        return this._code(block);
      case "heading": // the page has h1 and h2
        return element(`h${Math.min(6, block.level + 2)}`, {}, inlineNodes(block.text));
      case "rule":
        return element("hr");
      case "quote":
        return element("blockquote", {}, block.blocks.map((inner) => this._made(inner)));
      case "list":
        return this._list(block);
      case "table":
        return table(block);
      default:
        return element("p", {}, inlineNodes(block.text));
    }
  }

  _code({ language, text }) {
    const copy = copyButton(() => text, language ? `Copy this ${language} code` : "Copy this code", this._announce);
    const head = element("figcaption", {}, element("span", {}, language || "code"), copy);
    const body = element("pre", { tabindex: 0, "aria-label": `${language} code`.trim() }, element("code", {}, text));
    return element("figure", { class: "code" }, head, body);
  }

  /** An item of one paragraph has no space around it. */
  _list({ isOrdered, start, items }) {
    const made = items.map((blocks) => {
      const [first, ...rest] = blocks;
      const inner = first?.kind === "paragraph" ? inlineNodes(first.text) : first ? [this._made(first)] : [];
      return element("li", {}, inner, rest.map((block) => this._made(block)));
    });
    return element(isOrdered ? "ol" : "ul", { start: isOrdered && start !== 1 ? start : null }, made);
  }
}

function table({ head, rows }) {
  const row = (cells, tag) => element("tr", {}, cells.map((cell) => element(tag, {}, inlineNodes(cell))));
  const body = element("tbody", {}, rows.map((cells) => row(cells, "td")));
  const made = element("table", {}, element("thead", {}, row(head, "th")), body);
  return element("div", { class: "wide", tabindex: 0, role: "group", "aria-label": "Table" }, made);
}
