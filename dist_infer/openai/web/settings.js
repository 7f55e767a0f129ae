// The system prompt and the sampling options. An empty field is left to the server.

import { byId } from "./dom.js";

const PLACE = "dist-infer.settings";
const NUMBERS = [
  "temperature",
  "top_p",
  "top_k",
  "min_p",
  "max_tokens",
  "seed",
  "presence_penalty",
  "frequency_penalty",
  "repetition_penalty",
];
const TEXTS = ["system", "stop", "tools"];
const ESCAPES = { n: "\n", t: "\t", "\\": "\\" };

/** A field that cannot be used; `field` is where to look. */
export class WrongSetting extends Error {
  constructor(message, field) {
    super(message);
    this.field = field;
  }
}

export class Settings {
  constructor() {
    this._form = byId("settings-form");
    this._restore();
    this._form.addEventListener("input", () => this._keep());
    this._form.addEventListener("submit", (event) => event.preventDefault());
    this._form.addEventListener("reset", () => setTimeout(() => this._keep()));
  }

  get system() {
    return this._field("system").value.trim();
  }

  /** Fields of a request. WrongSetting for what the browser or JSON finds wrong. */
  request() {
    const found = {};
    for (const name of NUMBERS) {
      const field = this._field(name);
      if (!field.checkValidity()) throw new WrongSetting(`${labelOf(field)}: ${field.validationMessage}`, field);
      if (field.value !== "") found[name] = Number(field.value);
    }
    const stops = this._field("stop").value.split("\n").filter((line) => line !== "");
    if (stops.length > 0) found.stop = stops.map(unescaped);
    const tools = this._tools();
    if (tools !== null) found.tools = tools;
    return found;
  }

  _tools() {
    const field = this._field("tools");
    if (field.value.trim() === "") return null;
    try {
      const tools = JSON.parse(field.value);
      if (Array.isArray(tools)) return tools;
    } catch {
      // said below
    }
    throw new WrongSetting("Tools must be a JSON list, as OpenAI's API takes it.", field);
  }

  _field(name) {
    return this._form.elements.namedItem(name);
  }

  _keep() {
    const values = Object.fromEntries([...NUMBERS, ...TEXTS].map((name) => [name, this._field(name).value]));
    try {
      sessionStorage.setItem(PLACE, JSON.stringify(values));
    } catch {
      // a full storage: they hold until the next reload
    }
  }

  _restore() {
    try {
      const values = JSON.parse(sessionStorage.getItem(PLACE) ?? "{}");
      for (const name of [...NUMBERS, ...TEXTS]) {
        if (typeof values[name] === "string") this._field(name).value = values[name];
      }
    } catch {
      sessionStorage.removeItem(PLACE);
    }
  }
}

function labelOf(field) {
  return field.labels[0]?.firstChild.textContent.trim() ?? field.name;
}

function unescaped(line) {
  return line.replace(/\\([nt\\])/g, (_, letter) => ESCAPES[letter]);
}
