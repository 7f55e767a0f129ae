// Light or dark: the system's choice, until the button makes another. theme_start.js puts back what was chosen.

const PLACE = "dist-infer.theme";
const system = matchMedia("(prefers-color-scheme: dark)");

/** Wire the button; it says what pressing it does. */
export function wireTheme(button) {
  const label = () => {
    button.textContent = isDark() ? "Light" : "Dark";
    button.setAttribute("aria-label", isDark() ? "Use light colours" : "Use dark colours");
  };
  button.addEventListener("click", () => {
    choose(isDark() ? "light" : "dark");
    label();
  });
  system.addEventListener("change", label);
  label();
}

function isDark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen === undefined ? system.matches : chosen === "dark";
}

function choose(theme) {
  document.documentElement.dataset.theme = theme;
  try {
    localStorage.setItem(PLACE, theme);
  } catch {
    // the browser keeps nothing: it holds for this page
  }
}
