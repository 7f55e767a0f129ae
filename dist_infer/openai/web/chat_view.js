// The chat: messages, the composer, and one answer at a time.

import { emptyAnswer, receive } from "./answer.js";
import { Refused } from "./api.js";
import { Conversation } from "./conversation.js";
import { byId } from "./dom.js";
import { count } from "./format.js";
import { action, AnswerView, PlainView } from "./message_view.js";
import { WrongSetting } from "./settings.js";

const NEAR_END_PX = 80;
const KEEP_EVERY_MS = 1000;
const MOST_ROWS = 8;

export class ChatView {
  /** needKey() asks the user for one and resolves when there is one to try. */
  constructor({ settings, announce, needKey }) {
    this._settings = settings;
    this._announce = announce;
    this._needKey = needKey;
    this._conversation = Conversation.kept();
    this._stop = null; // AbortController of the answer that is coming
    this._keptAt = 0;
    this._views = new WeakMap(); // message -> its view
    this._isReady = false;
    this._model = null;
    this._list = byId("messages");
    this._scroller = byId("scroller");
    this._prompt = byId("prompt");
    this._send = byId("send");
    this._stopButton = byId("stop");
    this._editing = byId("editing");
    this._wire();
    this._render();
    this._toEnd();
  }

  setReady(isReady, model) {
    this._isReady = isReady;
    this._model = model ?? this._model;
    this._sync();
  }

  focus() {
    this._prompt.focus();
  }

  _wire() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this._submit();
    });
    this._prompt.addEventListener("input", () => this._sync());
    this._prompt.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this._submit();
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape" && !event.target.closest("dialog")) this._escape();
    });
    this._stopButton.addEventListener("click", () => this._escape());
    byId("new-chat").addEventListener("click", () => this._begin());
    window.addEventListener("pagehide", () => this._conversation.keep());
  }

  _escape() {
    if (this._stop !== null) this._stop.abort();
    else if (!this._editing.hidden) this._endEditing("");
  }

  _begin() {
    this._stop?.abort();
    this._stop = null;
    this._conversation = new Conversation();
    this._keep();
    this._endEditing("");
    this._render();
    this.focus();
  }

  _submit() {
    const text = this._prompt.value;
    if (this._stop !== null || !this._isReady || text.trim() === "") return;
    if (!this._editing.hidden) this._conversation.dropTurn();
    this._conversation.add({ role: "user", content: text });
    this._endEditing("");
    this._answer();
  }

  _regenerate() {
    this._conversation.dropAnswer();
    this._answer();
  }

  _edit() {
    this._endEditing(this._conversation.messages.findLast((message) => message.role === "user").content);
    this._editing.hidden = false;
    this.focus();
  }

  _endEditing(text) {
    this._editing.hidden = true;
    this._prompt.value = text;
    this._sync();
  }

  _sendResults(results) {
    for (const result of results) this._conversation.add(result);
    this._answer();
  }

  /** Ask for the next answer and show it while it comes. */
  async _answer() {
    let options;
    try {
      options = this._settings.request();
    } catch (error) {
      this._refuseSetting(error);
      return;
    }
    const conversation = this._conversation;
    const messages = conversation.asSent(this._settings.system);
    const answer = emptyAnswer();
    conversation.add(answer);
    this._stop = new AbortController();
    this._render();
    this._toEnd();
    const view = this._viewOf(answer);
    const request = { model: this._model, messages, ...options };
    try {
      await receive(answer, request, this._stop.signal, () => this._grew(view));
      this._announce(`The answer is complete: ${count(answer.figures.tokens)} tokens.`);
    } catch (error) {
      if (error.name === "AbortError") {
        answer.finish = "stopped";
        this._announce("Stopped.");
      } else {
        answer.error = wordsOf(error);
        this._announce(`${answer.error.message} ${answer.error.advice}`);
      }
    } finally {
      answer.calls = answer.calls.filter(Boolean);
      if (conversation === this._conversation) this._end();
    }
  }

  _grew(view) {
    const isAtEnd = this._isAtEnd();
    view.grow();
    if (isAtEnd) requestAnimationFrame(() => this._toEnd());
    if (performance.now() - this._keptAt > KEEP_EVERY_MS) this._keep();
  }

  _end() {
    const isAtEnd = this._isAtEnd();
    this._stop = null;
    this._keep();
    this._render();
    if (isAtEnd) this._toEnd();
    if (document.activeElement === document.body) this.focus();
  }

  _keep() {
    this._keptAt = performance.now();
    if (!this._conversation.keep()) this._announce("This chat is too long to be kept over a reload.");
  }

  /** After a change of which messages there are, or of what can be done with them. */
  _render() {
    const { messages } = this._conversation;
    const nodes = messages.map((message) => this._viewOf(message).node);
    if (nodes.length !== this._list.children.length || nodes.some((node, place) => node !== this._list.children[place])) {
      this._list.replaceChildren(...nodes);
    }
    const lastUser = messages.findLastIndex((message) => message.role === "user");
    messages.forEach((message, place) => {
      const isLast = place === messages.length - 1;
      const isOpen = isLast && this._stop !== null;
      this._views.get(message).draw({ isOpen, isLast, ...this._offers(message, isLast, place === lastUser) });
    });
    byId("welcome").hidden = messages.length > 0;
    this._sync();
  }

  _viewOf(message) {
    if (!this._views.has(message)) {
      const parts = { announce: this._announce, sendResults: (results) => this._sendResults(results) };
      this._views.set(message, message.role === "assistant" ? new AnswerView(message, parts) : new PlainView(message));
    }
    return this._views.get(message);
  }

  /** The buttons of a message. */
  _offers(message, isLast, isLastOfUser) {
    if (this._stop !== null) return { actions: [], help: null };
    if (isLastOfUser) {
      return { actions: [action("Edit", () => this._edit(), "Edit this message and send it again")], help: null };
    }
    if (!isLast || message.role !== "assistant") return { actions: [], help: null };
    const help = message.error?.status === 401 ? action("Enter a key", () => this._tryKey()) : null;
    return { actions: [action("Regenerate", () => this._regenerate(), "Regenerate the answer")], help };
  }

  async _tryKey() {
    if (await this._needKey()) this._regenerate();
  }

  _refuseSetting(error) {
    if (!(error instanceof WrongSetting)) throw error;
    const panel = byId("settings");
    if (panel.hidden) byId("settings-toggle").click();
    this._conversation.add({ ...emptyAnswer(), error: { message: error.message, advice: "" } });
    this._render();
    this._toEnd();
    this._announce(error.message);
    error.field.focus();
  }

  _sync() {
    const isBusy = this._stop !== null;
    this._send.hidden = isBusy;
    this._stopButton.hidden = !isBusy;
    this._send.disabled = !this._isReady || this._prompt.value.trim() === "";
    this._prompt.rows = Math.min(MOST_ROWS, this._prompt.value.split("\n").length); // where CSS cannot size it
    byId("new-chat").disabled = this._conversation.messages.length === 0;
    this._prompt.placeholder = this._isReady ? "Write a message" : "The model is not ready yet";
  }

  _isAtEnd() {
    const { scrollTop, clientHeight, scrollHeight } = this._scroller;
    return scrollHeight - scrollTop - clientHeight < NEAR_END_PX;
  }

  _toEnd() {
    this._scroller.scrollTop = this._scroller.scrollHeight;
  }
}

function wordsOf(error) {
  if (error instanceof Refused) return { message: error.message, advice: error.advice, status: error.status };
  return { message: `The page has failed: ${error.message}`, advice: "Reload it.", status: 0 };
}
