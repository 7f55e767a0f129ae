// A line of the last minutes, without axes; the figure beside it has the value.

import { drawn } from "./dom.js";

const WIDTH = 120;
const HEIGHT = 28;

/** values: the oldest first, null where nothing is known; room for `length` of them at least. Hidden from readers. */
export function sparkline(values, least) {
  const length = Math.max(least, values.length);
  const top = Math.max(1e-9, ...values.filter((value) => value !== null));
  const step = WIDTH / (length - 1);
  const start = length - values.length;
  let path = "";
  let isOpen = false;
  values.forEach((value, place) => {
    if (value === null) {
      isOpen = false;
      return;
    }
    const x = ((start + place) * step).toFixed(1);
    const y = (HEIGHT - 2 - (value / top) * (HEIGHT - 4)).toFixed(1);
    path += `${isOpen ? "L" : "M"}${x} ${y}`;
    isOpen = true;
  });
  const attributes = { class: "sparkline", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": true };
  return drawn("svg", attributes, drawn("path", { d: path || "M0 0" }));
}
