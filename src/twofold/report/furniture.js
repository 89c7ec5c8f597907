"use strict";
// What every page has: a choice of theme, and buttons that copy. Who draws by itself hears of another theme by the event "themechange".
(() => {
  const root = document.documentElement;

  // As the system has it, light, dark; one choice for all pages.
  const theme = document.getElementById("theme");
  const showTheme = () => {
    const now = root.dataset.theme || "auto";
    theme.lastElementChild.textContent = now;
    theme.setAttribute("aria-label", `Theme: ${now}`);
  };
  theme.hidden = false;
  showTheme();
  theme.addEventListener("click", () => {
    const next = { auto: "light", light: "dark", dark: "auto" }[root.dataset.theme || "auto"];
    if (next === "auto") delete root.dataset.theme; else root.dataset.theme = next;
    try { localStorage.setItem("twofold-theme", next); } catch { /* no storage */ }
    showTheme();
    root.dispatchEvent(new Event("themechange"));
  });

  for (const button of document.querySelectorAll("button.copy")) {
    if (!navigator.clipboard) continue;
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(button.dataset.copy);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Not allowed";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }
})();
