"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];

  // What is remembered until the page is closed, so that a reload changes nothing but the numbers.
  const key = `twofold-report-${root.dataset.study}`;
  const read = (storage, name) => { try { return window[storage].getItem(name); } catch { return null; } };
  const write = (storage, name, value) => { try { window[storage].setItem(name, value); } catch { /* no storage */ } };
  let state = {};
  try { state = JSON.parse(read("sessionStorage", key)) || {}; } catch { state = {}; }
  const remember = (part, name, value) => {
    (state[part] ||= {})[name] = value;
    write("sessionStorage", key, JSON.stringify(state));
  };
  const remembered = (part, name) => (state[part] || {})[name];

  // Details keep their state over a reload.
  for (const details of all("details[id]")) {
    if (remembered("open", details.id)) details.open = true;
    details.addEventListener("toggle", () => remember("open", details.id, details.open));
  }

  // Curves: which of them, which variants, and the axis.
  const bend = (svg, bent) => {
    const { start, end, high, first } = svg.dataset;
    const [a, b, top] = [Number(start), Number(end), Number(high)];
    const low = Math.min(Number(first), top / 2);
    const at = (x) => {
      const tokens = Math.max(((x - a) / (b - a)) * top, low);
      return a + (Math.log(tokens / low) / Math.log(top / low)) * (b - a);
    };
    for (const path of all(".series path", svg)) {
      path.dataset.d ||= path.getAttribute("d");
      const moved = path.dataset.d.replace(/(-?[\d.]+),(-?[\d.]+)/g, (_, x, y) => `${at(Number(x)).toFixed(2)},${y}`);
      path.setAttribute("d", bent ? moved : path.dataset.d);
    }
    for (const dot of all(".series circle", svg)) {
      dot.dataset.cx ||= dot.getAttribute("cx");
      dot.setAttribute("cx", bent ? at(Number(dot.dataset.cx)).toFixed(2) : dot.dataset.cx);
    }
    svg.classList.toggle("bent", bent);
  };
  for (const figure of all(".curves-figure")) {
    const choose = (name) => {
      for (const button of all(".switch button", figure)) button.setAttribute("aria-pressed", String(button.dataset.panel === name));
      for (const panel of all(".panel", figure)) panel.hidden = panel.dataset.panel !== name;
    };
    const names = all(".switch button", figure).map((button) => button.dataset.panel);
    const before = remembered("panel", figure.id);
    choose(names.includes(before) ? before : names[0]);
    for (const button of all(".switch button", figure)) {
      button.addEventListener("click", () => { choose(button.dataset.panel); remember("panel", figure.id, button.dataset.panel); });
    }

    const logarithm = figure.querySelector(".log-axis");
    const turn = (bent) => {
      logarithm.setAttribute("aria-pressed", String(bent));
      for (const svg of all("svg.lines", figure)) bend(svg, bent);
    };
    if (remembered("log", figure.id)) turn(true);
    logarithm.addEventListener("click", () => {
      const bent = logarithm.getAttribute("aria-pressed") !== "true";
      turn(bent);
      remember("log", figure.id, bent);
    });

    for (const button of all(".legend button", figure)) {
      const series = all(".series", figure).filter((item) => item.dataset.variant === button.dataset.variant);
      const show = (shown) => {
        button.setAttribute("aria-pressed", String(shown));
        for (const item of series) item.classList.toggle("off", !shown);
      };
      const light = (lit) => {
        for (const curves of all(".curves", figure)) curves.classList.toggle("dimmed", lit && button.getAttribute("aria-pressed") === "true");
        for (const item of series) item.classList.toggle("lit", lit);
      };
      const name = `${figure.id}/${button.dataset.variant}`;
      if (remembered("hidden", name)) show(false);
      button.addEventListener("click", () => {
        const shown = button.getAttribute("aria-pressed") !== "true";
        show(shown);
        light(shown);
        remember("hidden", name, !shown);
      });
      for (const [event, lit] of [["pointerenter", true], ["pointerleave", false], ["focus", true], ["blur", false]]) {
        button.addEventListener(event, () => light(lit));
      }
    }
  }

  // Points: one stop of the Tab key per figure, arrows from point to point, a tip beside the point.
  const tip = document.getElementById("tip");
  const showTip = (point) => {
    tip.textContent = point.dataset.tip;
    tip.hidden = false;
    const at = point.querySelector(".marker").getBoundingClientRect();
    const box = tip.getBoundingClientRect();
    const x = Math.min(Math.max(at.left + at.width / 2 - box.width / 2, 8), window.innerWidth - box.width - 8);
    const y = at.top - box.height - 8 > 60 ? at.top - box.height - 8 : at.bottom + 8;
    tip.style.left = `${x}px`;
    tip.style.top = `${y}px`;
  };
  const hideTip = () => { tip.hidden = true; };
  for (const svg of all("svg.frontier")) {
    const points = all(".point", svg);
    points.forEach((point, index) => {
      point.setAttribute("tabindex", index ? "-1" : "0");
      point.addEventListener("pointerenter", () => showTip(point));
      point.addEventListener("pointerleave", hideTip);
      point.addEventListener("focus", () => showTip(point));
      point.addEventListener("blur", hideTip);
      point.addEventListener("keydown", (event) => {
        const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
        if (event.key === "Escape") hideTip();
        if (!step) return;
        event.preventDefault();
        const next = points[(index + step + points.length) % points.length];
        for (const other of points) other.setAttribute("tabindex", other === next ? "0" : "-1");
        next.focus();
      });
    });
  }
  // Focus may scroll the page: the tip of a point that has it goes along.
  window.addEventListener("scroll", () => {
    const point = document.activeElement?.closest?.(".point");
    if (point && !tip.hidden) showTip(point); else hideTip();
  }, { passive: true });

  // Where one is.
  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  const place = () => {
    let here = null;
    for (const id of links.keys()) {
      const section = document.getElementById(id);
      if (section && section.getBoundingClientRect().top < 140) here = id;
    }
    for (const [id, link] of links) {
      if (id === (here || "answer")) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current");
    }
  };
  window.addEventListener("scroll", place, { passive: true });
  place();

  // Save a table that this page holds.
  const held = async (name) => {
    const script = all("script[data-content]").find((item) => item.dataset.content === name);
    const bytes = Uint8Array.from(atob(script.textContent.trim()), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Blob([await new Response(stream).arrayBuffer()], { type: script.dataset.type });
  };
  for (const link of all("a[data-file]")) {
    if (typeof DecompressionStream === "undefined") continue;
    link.addEventListener("click", async (event) => {
      event.preventDefault();
      const url = URL.createObjectURL(await held(link.dataset.file));
      const saved = document.createElement("a");
      saved.href = url;
      saved.download = link.dataset.file;
      saved.click();
      setTimeout(() => URL.revokeObjectURL(url), 10000);
    });
  }

  // While runs go on, the page loads itself again: not while somebody uses it, not in the background, and not when told not to.
  if (root.dataset.reload) {
    const updates = document.getElementById("updates");
    let touched = 0;
    for (const event of ["pointerdown", "pointermove", "keydown", "wheel", "touchmove"]) {
      window.addEventListener(event, () => { touched = Date.now(); }, { passive: true });
    }
    const show = (on) => {
      updates.setAttribute("aria-pressed", String(on));
      updates.textContent = on ? "Updating" : "Paused";
      updates.setAttribute("aria-label", on ? "Updating while runs go on" : "Updating is paused");
    };
    updates.hidden = false;
    show(!remembered("updates", "paused"));
    updates.addEventListener("click", () => {
      const on = updates.getAttribute("aria-pressed") !== "true";
      show(on);
      remember("updates", "paused", !on);
    });
    const scrolled = remembered("scroll", "y");
    if (scrolled) window.scrollTo({ top: scrolled, behavior: "instant" });
    remember("scroll", "y", 0);
    setInterval(() => {
      const busy = Date.now() - touched < 4000 || String(window.getSelection());
      if (updates.getAttribute("aria-pressed") !== "true" || document.hidden || busy) return;
      remember("scroll", "y", window.scrollY);
      for (const details of all("details[id]")) remember("open", details.id, details.open);
      location.reload();
    }, Number(root.dataset.reload) * 1000);
  }
})();
