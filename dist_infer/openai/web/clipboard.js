// Copying, with a word on whether it worked.

import { button, element } from "./dom.js";

const SHOWN_MS = 1500;

/** A button that copies what `text` returns when it is pressed. */
export function copyButton(text, label, announce) {
  const made = button("Copy", async () => {
    const worked = await copy(text());
    made.textContent = worked ? "Copied" : "Not copied";
    announce(worked ? "Copied" : "The browser did not allow copying");
    setTimeout(() => {
      made.textContent = "Copy";
    }, SHOWN_MS);
  }, { class: "quiet", "aria-label": label });
  return made;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

/** Over plain HTTP from another machine browsers have no clipboard but this. */
function copyBySelection(text) {
  const before = document.activeElement;
  const field = element("textarea", { class: "hidden", "aria-hidden": "true", tabindex: -1 });
  field.value = text;
  document.body.append(field);
  field.select();
  const worked = document.execCommand("copy");
  field.remove();
  before?.focus();
  return worked;
}
