// The page's parts, put together: which view is shown, the server's phase, the key, the theme.

import { ask } from "./api.js";
import { ChatView } from "./chat_view.js";
import { byId } from "./dom.js";
import { count } from "./format.js";
import { KeyDialog } from "./key_dialog.js";
import { RoomView } from "./room_view.js";
import { ServerState } from "./server_state.js";
import { Settings } from "./settings.js";
import { wireTheme } from "./theme.js";

const PHASES = {
  ready: "Ready",
  loading: "Loading",
  degraded: "Restarting",
  draining: "Shutting down",
  failed: "Failed",
  unreachable: "Unreachable",
};
const WORDS = {
  degraded: "A part of the model was lost and is being replaced: answers pause and go on by themselves.",
  draining: "The server is shutting down: open answers finish, new ones are refused.",
  failed: "The engine has failed. Whoever runs the server finds the reason in its log.",
  unreachable: "The server cannot be reached. Trying again every second.",
};
const WIDE = matchMedia("(min-width: 64.01rem)"); // as chat.css has it: below, the settings cover the page

let phase = "";
const dialog = new KeyDialog(() => {
  openModel();
  room.restart();
});
const chat = new ChatView({ settings: new Settings(), announce, needKey: () => dialog.ask() });
const room = new RoomView({ needKey: (reason) => dialog.ask(reason) });

wireTheme(byId("theme"));
byId("key-open").addEventListener("click", () => dialog.ask());
wireSettings();
window.addEventListener("hashchange", showView);
showView();
new ServerState(onPhase).look();

/** To a screen reader. The same words twice are said twice. */
function announce(text) {
  const place = byId("announcer");
  place.textContent = "";
  setTimeout(() => {
    place.textContent = text;
  }, 50);
}

function showView() {
  const isRoom = location.hash === "#room";
  byId("chat").hidden = isRoom;
  byId("room").hidden = !isRoom;
  for (const [id, isShown] of [["to-chat", !isRoom], ["to-room", isRoom]]) {
    if (isShown) byId(id).setAttribute("aria-current", "page");
    else byId(id).removeAttribute("aria-current");
  }
  document.title = isRoom ? "Machine room · dist-infer" : "Chat · dist-infer";
  room.setShown(isRoom);
}

function wireSettings() {
  const panel = byId("settings");
  const toggle = byId("settings-toggle");
  const show = (isShown) => {
    panel.hidden = !isShown;
    toggle.setAttribute("aria-expanded", String(isShown));
    const isCover = isShown && !WIDE.matches;
    for (const id of ["top", "conversation"]) byId(id).inert = isCover;
    if (isCover) byId("settings-close").focus();
  };
  const close = () => {
    show(false);
    toggle.focus();
  };
  toggle.addEventListener("click", () => show(panel.hidden));
  byId("settings-close").addEventListener("click", close);
  panel.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || WIDE.matches) return;
    event.stopPropagation(); // the answer goes on
    close();
  });
  WIDE.addEventListener("change", () => show(WIDE.matches));
  show(WIDE.matches);
}

function onPhase(found) {
  const wasReady = phase === "ready";
  phase = found.phase;
  const pill = byId("phase");
  pill.textContent = PHASES[phase] ?? phase;
  pill.dataset.phase = phase;
  showBanner(found);
  chat.setReady(phase === "ready");
  if (phase === "ready" && !wasReady) openModel();
}

function showBanner({ detail = "", done = 0, total = 0 }) {
  byId("banner").hidden = phase === "ready";
  const isLoading = phase === "loading";
  const counted = total > 0 ? ` ${count(done)} of ${count(total)}` : "";
  const words = isLoading ? `The model is not ready yet: ${detail}${counted}.` : (WORDS[phase] ?? "");
  byId("banner-words").textContent = words;
  const bar = byId("progress");
  bar.hidden = !isLoading;
  if (total > 0) {
    bar.max = total;
    bar.value = done;
  } else {
    bar.removeAttribute("value");
  }
}

/** Who is served here; asks for a key when one is needed. */
async function openModel() {
  try {
    const { data } = await (await ask("v1/models")).json();
    const [{ id, max_model_len: longest }] = data;
    byId("model").textContent = id;
    byId("model").title = longest ? `${id}: up to ${count(longest)} tokens, question and answer together` : id;
    chat.setReady(phase === "ready", id);
    if (location.hash !== "#room") chat.focus();
  } catch (error) {
    if (error.status === 401) dialog.ask(`This server needs an API key. ${error.message}`);
    else announce(error.message);
  }
}
