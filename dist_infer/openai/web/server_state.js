// Whether the server is ready, from a health route, which needs no key. Asks often until it is, seldom after that. The
// route is that of startup: readiness may cost an idle engine a token, which a page that is only open must not.

const SOON_MS = 1000;
const LATER_MS = 10000;
const TIMEOUT_MS = 5000;

export class ServerState {
  /** onChange({phase, done, total}): phase as the server names it, or "unreachable"; detail while it loads. */
  constructor(onChange) {
    this._onChange = onChange;
    this._last = "";
    this._timer = null;
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) this.look();
    });
  }

  /** Ask now, and from then on by itself, while the page can be seen. */
  async look() {
    clearTimeout(this._timer);
    const found = await health();
    const text = JSON.stringify(found);
    if (text !== this._last) this._onChange(found);
    this._last = text;
    clearTimeout(this._timer);
    if (document.hidden) return;
    this._timer = setTimeout(() => this.look(), found.phase === "ready" ? LATER_MS : SOON_MS);
  }
}

async function health() {
  try {
    const response = await fetch("health/startup", { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT_MS) });
    const { status, phase, done = 0, total = 0 } = await response.json();
    return status === "loading" ? { phase: "loading", detail: phase, done, total } : { phase: status ?? "failed" };
  } catch {
    return { phase: "unreachable" };
  }
}
