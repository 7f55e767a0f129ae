// The colours that were chosen last, before anything is drawn: a page that flashes hurts at night.

try {
  const kept = localStorage.getItem("dist-infer.theme");
  if (kept === "light" || kept === "dark") document.documentElement.dataset.theme = kept;
} catch {
  // the browser keeps nothing: the system's colours
}
