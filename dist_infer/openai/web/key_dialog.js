// The dialog for the API key. It is kept in this tab's storage alone, and sent only to the server the page came from.

import { key, keepKey } from "./api.js";
import { byId } from "./dom.js";

export class KeyDialog {
  /** onChange() after a key was given or forgotten. */
  constructor(onChange) {
    this._dialog = byId("key-dialog");
    this._field = byId("key");
    this._reason = byId("key-reason");
    this._waiting = []; // resolvers of `ask`
    byId("key-form").addEventListener("submit", (event) => {
      event.preventDefault();
      keepKey(this._field.value.trim());
      this._finish(true);
      onChange();
    });
    byId("key-forget").addEventListener("click", () => {
      keepKey("");
      this._field.value = "";
      this._finish(false);
      onChange();
    });
    byId("key-cancel").addEventListener("click", () => this._dialog.close());
    this._dialog.addEventListener("close", () => this._finish(false));
  }

  /** True when a key was given. */
  ask(reason = "") {
    this._reason.textContent = reason;
    this._reason.hidden = reason === "";
    this._field.value = key();
    if (!this._dialog.open) this._dialog.showModal();
    return new Promise((resolve) => this._waiting.push(resolve));
  }

  _finish(isGiven) {
    for (const resolve of this._waiting.splice(0)) resolve(isGiven);
    if (this._dialog.open) this._dialog.close();
  }
}
