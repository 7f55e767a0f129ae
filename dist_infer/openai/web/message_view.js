// One message of the chat on the page.

import { copyButton } from "./clipboard.js";
import { button, element } from "./dom.js";
import { count, figure, seconds } from "./format.js";
import { Markdown } from "./markdown.js";

const FRAME_MS = 50; // a growing answer is drawn at most so often

/** What the user wrote, or the result of a tool. */
export class PlainView {
  constructor(message) {
    const isTool = message.role === "tool";
    this._actions = element("div", { class: "actions" });
    this.node = element(
      "li",
      { class: `message ${isTool ? "tool" : "user"}` },
      element("div", { class: "head" }, element("h2", {}, isTool ? "Tool result" : "You"), this._actions),
      element("p", { class: "plain" }, message.content),
    );
  }

  /** actions: buttons. */
  draw({ actions }) {
    this._actions.replaceChildren(...actions);
  }
}

/** An answer: `draw` it, and `grow` while it comes. */
export class AnswerView {
  /** announce(text) speaks to a screen reader. sendResults(messages) is called with the results of its calls. */
  constructor(answer, { announce, sendResults }) {
    this._answer = answer;
    this._announce = announce;
    this._sendResults = sendResults;
    this._text = new Markdown(announce);
    this._thought = new Markdown(announce);
    this._thoughtLabel = element("summary", {}, "Reasoning");
    this._reasoning = element("details", { class: "reasoning" }, this._thoughtLabel, this._thought.node);
    this._calls = element("div", { class: "calls" });
    this._error = element("div", { class: "error" });
    this._figures = element("p", { class: "figures" });
    this._actions = element("div", { class: "actions" });
    this.node = element(
      "li",
      { class: "message assistant" },
      element("h2", {}, "Assistant"),
      this._reasoning,
      this._text.node,
      this._calls,
      this._error,
      element("div", { class: "foot" }, this._figures, this._actions),
    );
    this._timer = null;
  }

  /** Something was added: it is drawn soon, once for all that comes until then. */
  grow() {
    this._timer ??= setTimeout(() => this.draw({ isOpen: true, isLast: true, actions: [], help: null }), FRAME_MS);
  }

  /** isOpen: more is coming. actions: buttons for when it has ended. help: a button beside the error, or null. */
  draw({ isOpen, isLast, actions, help }) {
    clearTimeout(this._timer);
    this._timer = null;
    const answer = this._answer;
    this.node.classList.toggle("open", isOpen);
    this.node.setAttribute("aria-busy", String(isOpen));
    this._text.show(answer.content);
    this._reasoning.hidden = answer.reasoning === "";
    this._thought.show(answer.reasoning);
    this._thoughtLabel.textContent = isOpen && !answer.content ? "Reasoning …" : "Reasoning";
    this._showCalls(isLast && !isOpen);
    this._showError(answer.error, help);
    this._figures.textContent = isOpen ? "" : figuresOf(answer);
    const copy = answer.content ? [copyButton(() => answer.content, "Copy the answer", this._announce)] : [];
    this._actions.replaceChildren(...(isOpen ? [] : [...copy, ...actions]));
  }

  _showError(error, help) {
    this._error.hidden = error === null;
    if (error === null) return;
    const words = element("p", {}, element("strong", {}, error.message), error.advice ? ` ${error.advice}` : "");
    this._error.replaceChildren(words, ...(help === null ? [] : [help]));
  }

  _showCalls(takesResults) {
    const calls = this._answer.calls.filter(Boolean);
    this._calls.replaceChildren(...calls.map((call) => callNode(call)));
    if (takesResults && calls.length > 0) this._calls.append(this._resultForm(calls));
  }

  _resultForm(calls) {
    const fields = calls.map(() => element("textarea", { rows: 2, required: true }));
    const labels = calls.map((call, place) => element("label", {}, `Result of ${call.name}`, fields[place]));
    const send = (event) => {
      event.preventDefault();
      this._sendResults(calls.map((call, place) => ({ role: "tool", id: call.id, content: fields[place].value })));
    };
    return element("form", { class: "results", on: { submit: send } }, labels, element("button", {}, "Send results"));
  }
}

function callNode(call) {
  return element(
    "figure",
    { class: "code call" },
    element("figcaption", {}, element("span", {}, "Tool call ", element("strong", {}, call.name))),
    element("pre", { tabindex: 0, "aria-label": `Arguments of ${call.name}` }, element("code", {}, pretty(call.arguments))),
  );
}

/** Half a call is no JSON yet: it is shown as it comes. */
function pretty(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

function figuresOf({ figures, finish }) {
  if (!figures) return "";
  const parts = [];
  if (figures.tokens > 0) parts.push(`${figures.isExact ? "" : "≈ "}${count(figures.tokens)} tokens`);
  if (figures.promptTokens !== null) parts.push(`prompt ${count(figures.promptTokens)}`);
  if (figures.firstToken !== null) parts.push(`first token ${seconds(figures.firstToken)}`);
  if (figures.rate !== null) parts.push(`${figure(figures.rate)} tok/s`);
  if (finish === "length") parts.push("cut at the token limit");
  if (finish === "stopped") parts.push("stopped");
  return parts.join(" · ");
}

/** For a message's own actions. */
export function action(label, onClick, name = label) {
  return button(label, onClick, { class: "quiet", "aria-label": name });
}
