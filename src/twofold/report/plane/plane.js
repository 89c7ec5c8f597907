"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

  // One sheet at a time: the chosen task, read as chosen where it can be.
  const sheets = all(".sheet");
  const choice = { task: sheets[0].dataset.task, reading: "loss" };
  const show = () => {
    const ofTask = sheets.filter((sheet) => sheet.dataset.task === choice.task);
    const shown = ofTask.find((sheet) => sheet.dataset.reading === choice.reading) || ofTask[0];
    for (const sheet of sheets) sheet.hidden = sheet !== shown;
    for (const control of all(".switch")) {
      for (const button of all("button", control)) {
        button.setAttribute("aria-pressed", String(button.dataset.value === choice[control.dataset.choice]));
        if (control.dataset.choice === "reading") button.disabled = !ofTask.some((sheet) => sheet.dataset.reading === button.dataset.value);
      }
    }
  };
  for (const control of all(".switch")) {
    for (const button of all("button", control)) {
      button.addEventListener("click", () => { choice[control.dataset.choice] = button.dataset.value; show(); });
    }
  }
  show();

  // Marks: one stop of the Tab key per picture; an arrow goes to the nearest mark on that side.
  const tip = document.getElementById("tip");
  const tips = JSON.parse(document.getElementById("tips").textContent);
  const centre = (point) => {
    const box = point.querySelector(".marker").getBoundingClientRect();
    return [box.left + box.width / 2, box.top + box.height / 2];
  };
  const showTip = (point, event) => {
    tip.textContent = tips[point.dataset.tie];
    tip.hidden = false;
    const [cx, cy] = event ? [event.clientX, event.clientY] : centre(point);
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(cx - box.width / 2, window.innerWidth - box.width - 8))}px`;
    tip.style.top = `${cy - box.height - 14 > 60 ? cy - box.height - 14 : cy + 14}px`;
  };
  const hideTip = () => { tip.hidden = true; };
  const sides = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowDown: [0, 1], ArrowUp: [0, -1] };
  for (const svg of all("svg.plane")) {
    const points = all(".point", svg);
    points.forEach((point, index) => {
      point.setAttribute("tabindex", index ? "-1" : "0");
      point.addEventListener("pointerenter", (event) => showTip(point, event));
      point.addEventListener("pointerleave", hideTip);
      point.addEventListener("focus", () => { if (point.matches(":focus-visible")) showTip(point); });
      point.addEventListener("blur", hideTip);
      point.addEventListener("keydown", (event) => {
        if (event.key === "Escape") hideTip();
        const side = sides[event.key];
        if (!side) return;
        event.preventDefault();
        const [x, y] = centre(point);
        let best = null;
        let least = Infinity;
        for (const other of points) {
          const [u, v] = centre(other);
          const along = (u - x) * side[0] + (v - y) * side[1];
          const aside = Math.abs((u - x) * side[1]) + Math.abs((v - y) * side[0]);
          if (along > 1 && along + 2 * aside < least) { best = other; least = along + 2 * aside; }
        }
        if (!best) return;
        for (const other of points) other.setAttribute("tabindex", other === best ? "0" : "-1");
        best.focus();
      });
    });
  }
  window.addEventListener("scroll", hideTip, { passive: true });
})();
