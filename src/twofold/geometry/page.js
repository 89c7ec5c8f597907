"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, inside = document) => [...inside.querySelectorAll(selector)];
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("geometry-data").textContent);
  const still = matchMedia("(prefers-reduced-motion: reduce)");

  // Colours are drawn by this script, so it follows the theme.
  root.addEventListener("themechange", () => recolour());
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => recolour());

  // A canvas knows no custom properties: a probe resolves them.
  const colours = {};
  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  const recolour = () => {
    for (const name of ["ground", "ink", "quiet", "rule", "front", "colour-1", "colour-2", "colour-3", "colour-4"]) {
      probe.style.color = `var(--${name})`;
      colours[name] = getComputedStyle(probe).color;
    }
    draw();
  };

  // One head at a time is unpacked, and kept.
  const unpacked = new Map();
  const unpack = async (index) => {
    if (!unpacked.has(index)) {
      const packed = document.querySelector(`script[data-head="${index}"]`).textContent.trim();
      const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
      const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
      unpacked.set(index, JSON.parse(await new Response(stream).text()));
    }
    return unpacked.get(index);
  };

  const tokens = data.pieces.length;
  const state = { head: data.first.head, query: data.first.token, step: 1, shownStep: 1, touched: -1, yaw: 0.6, pitch: 0.35, zoom: 1, axes: "all", off: new Set() };
  let head = null; // the unpacked numbers of state.head
  const about = () => data.heads[state.head];
  const layer = () => data.layers[about().layer];
  const view = () => head.views[state.axes];
  const steps = () => head.later.length + 1;

  const shownPiece = (token) => {
    const text = data.pieces[token];
    return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replace(/^ $/, "␣") || "∅";
  };
  // Weights in thousandths by key, of the query and step that are shown: step 0 and 1 are the model's own.
  const weights = () => {
    const row = new Float64Array(tokens);
    if (state.step < 2) head.map[state.query].forEach((weight, key) => { row[key] = weight; });
    else {
      const kept = head.later[state.step - 2][state.query];
      for (let i = 0; i < kept.length; i += 2) row[kept[i]] = kept[i + 1];
    }
    return row;
  };

  // The cloud
  const canvas = byId("cloud");
  const SHAPES = {
    Q: (c, x, y, r) => { c.moveTo(x, y - 1.25 * r); c.lineTo(x + 1.15 * r, y + 0.8 * r); c.lineTo(x - 1.15 * r, y + 0.8 * r); c.closePath(); },
    K: (c, x, y, r) => c.arc(x, y, r, 0, 2 * Math.PI),
    V: (c, x, y, r) => c.rect(x - 0.9 * r, y - 0.9 * r, 1.8 * r, 1.8 * r),
  };
  // A cloud that holds keys looks like keys, else one that holds queries like queries.
  const shapeOf = (name) => (name.includes("K") ? "K" : name[0]);
  const colourOf = (name) => colours[{ Q: "colour-2", K: "colour-1", V: "colour-3" }[shapeOf(name)]];
  const valuesOf = () => Object.keys(view().clouds).find((name) => name.includes("V"));
  const keysOf = () => Object.keys(view().clouds).find((name) => name.includes("K"));
  const queriesOf = () => Object.keys(view().clouds).find((name) => name.includes("Q"));

  const fit = (element) => {
    const ratio = window.devicePixelRatio || 1;
    const box = element.getBoundingClientRect();
    const [width, height] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
    if (element.width !== width || element.height !== height) { element.width = width; element.height = height; }
    const context = element.getContext("2d");
    context.setTransform(ratio, 0, 0, ratio, 0, 0);
    context.clearRect(0, 0, box.width, box.height);
    context.lineJoin = "round";
    return [context, box.width, box.height];
  };
  const turned = ([x, y, z]) => {
    const [cy, sy, cp, sp] = [Math.cos(state.yaw), Math.sin(state.yaw), Math.cos(state.pitch), Math.sin(state.pitch)];
    const [a, c] = [cy * x + sy * z, cy * z - sy * x];
    return [a, cp * y - sp * c, cp * c + sp * y];
  };
  const projector = (width, height) => {
    const size = 0.55 * Math.min(width, height) * state.zoom;
    return (flat, index) => {
      const [x, y, z] = turned([flat[3 * index] / data.grid, flat[3 * index + 1] / data.grid, flat[3 * index + 2] / data.grid]);
      const near = 3.2 / (3.2 + z);
      return { x: width / 2 + size * near * x, y: height / 2 - size * near * y, z, near };
    };
  };
  let drawn = []; // what can be pointed at: {x, y, token, name}

  const line = (c, a, b) => { c.beginPath(); c.moveTo(a.x, a.y); c.lineTo(b.x, b.y); c.stroke(); };
  const label = (c, text, at, colour) => {
    c.font = "12px system-ui, sans-serif";
    c.lineWidth = 3.5;
    c.strokeStyle = colours.ground;
    const width = c.measureText(text).width;
    const x = at.x + 8 + width > canvas.clientWidth - 4 ? at.x - 8 - width : at.x + 8;
    c.strokeText(text, x, at.y - 7);
    c.fillStyle = colour;
    c.fillText(text, x, at.y - 7);
  };

  const drawHull = (c, at) => {
    const hull = view().hulls[view().hullOf[state.query]];
    if (!hull || state.off.has("hull")) return;
    const points = view().clouds[valuesOf()];
    const edges = new Set();
    c.fillStyle = c.strokeStyle = colourOf(valuesOf());
    c.globalAlpha = 0.05;
    for (let i = 0; i < hull.length; i += 3) {
      const corners = [hull[i], hull[i + 1], hull[i + 2]];
      c.beginPath();
      corners.forEach((corner, n) => { const p = at(points, corner); if (n) c.lineTo(p.x, p.y); else c.moveTo(p.x, p.y); });
      c.fill();
      for (const [m, n] of [[0, 1], [1, 2], [0, 2]]) edges.add(`${corners[m]} ${corners[n]}`);
    }
    c.globalAlpha = 0.3;
    c.lineWidth = 0.8;
    for (const edge of edges) { const [m, n] = edge.split(" ").map(Number); line(c, at(points, m), at(points, n)); }
    c.globalAlpha = 1;
  };
  const drawAxes = (c, width, height) => {
    const center = { x: 34, y: height - 34 };
    c.font = "11px system-ui, sans-serif";
    c.lineWidth = 1;
    [[1, 0, 0], [0, 1, 0], [0, 0, 1]].forEach((axis, n) => {
      const [x, y] = turned(axis);
      c.strokeStyle = colours.front;
      line(c, center, { x: center.x + 22 * x, y: center.y - 22 * y });
      c.fillStyle = colours.quiet;
      c.fillText(String(n + 1), center.x + 29 * x - 3, center.y - 29 * y + 4);
    });
  };
  const drawPoints = (c, at, row) => {
    const points = [];
    for (const [name, flat] of Object.entries(view().clouds)) {
      if (state.off.has(name)) continue;
      for (let token = 0; token < tokens; token++) points.push({ ...at(flat, token), token, name });
    }
    points.sort((a, b) => b.z - a.z);
    const holdsKeys = (name) => name.includes("K");
    for (const point of points) {
      const isKey = holdsKeys(point.name) || point.name.includes("V");
      const weight = isKey ? row[point.token] / data.units : 0;
      const radius = point.near * (2.6 + (isKey ? 8 * Math.sqrt(weight) : 0));
      c.globalAlpha = point.token > state.query ? 0.16 : point.name === "Q" && point.token !== state.query ? 0.4 : 0.45 + 0.5 * Math.min(1, 4 * weight);
      c.fillStyle = colourOf(point.name);
      c.beginPath();
      SHAPES[shapeOf(point.name)](c, point.x, point.y, radius);
      c.fill();
      if (point.token === state.touched) { c.globalAlpha = 1; c.strokeStyle = colours.ink; c.lineWidth = 2; c.stroke(); }
    }
    c.globalAlpha = 1;
    return points;
  };
  const stateAt = (at, step) => {
    const [floor, part] = [Math.floor(step), step - Math.floor(step)];
    const start = 3 * (state.query * (steps() + 1) + floor);
    const mixed = [0, 1, 2].map((n) => view().states[start + n] + (part ? part * (view().states[start + 3 + n] - view().states[start + n]) : 0));
    return at(mixed, 0);
  };
  const drawPull = (c, at, row) => {
    const now = stateAt(at, state.shownStep);
    if (!state.off.has("lines")) {
      const keys = view().clouds[keysOf()];
      const from = stateAt(at, state.step < 2 ? 0 : state.step - 1);
      c.strokeStyle = colourOf(keysOf());
      row.forEach((weight, key) => {
        if (weight < 15) return;
        c.globalAlpha = 0.2 + 0.6 * (weight / data.units);
        c.lineWidth = 0.5 + 5 * (weight / data.units);
        line(c, from, at(keys, key));
      });
    }
    c.globalAlpha = 1;
    c.strokeStyle = c.fillStyle = colours["colour-4"];
    c.lineWidth = 2;
    c.beginPath();
    for (let step = 0; step <= state.shownStep + 0.999; step++) {
      const p = stateAt(at, Math.min(step, state.shownStep));
      if (step) c.lineTo(p.x, p.y); else c.moveTo(p.x, p.y);
    }
    c.stroke();
    for (let step = 1; step < state.shownStep; step++) { const p = stateAt(at, step); c.beginPath(); c.arc(p.x, p.y, 2.5, 0, 2 * Math.PI); c.fill(); }
    const start = stateAt(at, 0);
    c.fillStyle = colours["colour-2"];
    c.strokeStyle = colours.ink;
    c.lineWidth = 1.5;
    c.beginPath();
    SHAPES.Q(c, start.x, start.y, 6);
    c.fill();
    c.stroke();
    if (state.shownStep > 0) {
      c.fillStyle = colours["colour-4"];
      c.strokeStyle = colours.ground;
      c.beginPath();
      c.moveTo(now.x, now.y - 7); c.lineTo(now.x + 7, now.y); c.lineTo(now.x, now.y + 7); c.lineTo(now.x - 7, now.y); c.closePath();
      c.fill();
      c.stroke();
    }
    label(c, `query ${shownPiece(state.query)}`, start, colours["colour-2"]);
    if (state.shownStep >= 1) label(c, state.shownStep === 1 ? "output" : `step ${Math.floor(state.shownStep)}`, now, colours["colour-4"]);
    const named = [...row.keys()].filter((key) => row[key] >= 60).sort((m, n) => row[n] - row[m]).slice(0, 4);
    for (const key of named) label(c, shownPiece(key), at(view().clouds[keysOf()], key), colourOf(keysOf()));
    if (state.touched >= 0 && !named.includes(state.touched)) label(c, shownPiece(state.touched), at(view().clouds[keysOf()], state.touched), colours.ink);
  };
  const drawCloud = () => {
    const [c, width, height] = fit(canvas);
    const at = projector(width, height);
    const row = weights();
    drawAxes(c, width, height);
    drawHull(c, at);
    drawn = drawPoints(c, at, row);
    drawPull(c, at, row);
  };

  // The map: a row for each query, a column for each key.
  const map = byId("map");
  const drawMap = () => {
    const [c, width] = fit(map);
    const cell = width / tokens;
    const ground = colourOf(keysOf());
    c.fillStyle = ground;
    head.map.forEach((row, query) => row.forEach((weight, key) => {
      if (!weight) return;
      c.globalAlpha = Math.sqrt(weight / data.units);
      c.fillRect(key * cell, query * cell, cell + 0.3, cell + 0.3);
    }));
    c.globalAlpha = 1;
    c.strokeStyle = colours.rule;
    c.lineWidth = 1;
    line(c, { x: 0, y: 0 }, { x: width, y: width });
    c.strokeStyle = colours["colour-2"];
    c.lineWidth = 1.5;
    c.strokeRect(0.75, state.query * cell - 0.75, (state.query + 1) * cell, cell + 1.5);
    if (state.touched >= 0) { c.strokeStyle = colours.ink; c.lineWidth = 1; c.strokeRect(state.touched * cell - 0.5, 0.5, cell + 1, width - 1); }
  };

  // The text
  const text = byId("text");
  const spans = data.pieces.map((piece, token) => {
    const span = document.createElement("span");
    span.setAttribute("role", "option");
    span.id = `token-${token}`;
    if (/^\n+$/.test(piece)) {
      const sign = document.createElement("i");
      sign.className = "sign";
      sign.textContent = "⏎";
      span.append(sign, piece);
    } else span.textContent = piece || "∅";
    span.addEventListener("click", () => choose(token));
    span.addEventListener("pointerenter", () => touch(token));
    span.addEventListener("pointerleave", () => touch(-1));
    text.append(span);
    return span;
  });
  const walk = (event) => {
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1, Home: -tokens, End: tokens }[event.key];
    if (!move) return;
    event.preventDefault();
    choose(Math.min(tokens - 1, Math.max(0, state.query + move)));
  };
  text.addEventListener("keydown", walk);
  map.addEventListener("keydown", walk);

  const percent = (weight) => (weight >= 995 ? "100%" : weight < 10 ? "<1%" : `${Math.round(weight / 10)}%`);
  const tell = () => {
    const row = weights();
    const top = [...row.keys()].filter((key) => row[key] >= 10).sort((m, n) => row[n] - row[m]).slice(0, 5);
    const told = byId("told");
    told.replaceChildren();
    const bold = (words) => { const b = document.createElement("b"); b.textContent = words; return b; };
    told.append("Query ", bold(`“${shownPiece(state.query)}”`), ` (token ${state.query}) ${state.step < 2 ? "looks at" : `after ${state.step - 1} step${state.step > 2 ? "s" : ""} looks at`} `);
    top.forEach((key, n) => told.append(n ? ", " : "", bold(`“${shownPiece(key)}”`), ` (${key}) ${percent(row[key])}`));
    if (!top.length) told.append("all keys alike");
    told.append(".");
    if (state.touched >= 0) {
      const known = state.step < 2 || row[state.touched] > 0;
      told.append(` Key “${shownPiece(state.touched)}” (${state.touched}): ${state.touched > state.query ? "not seen" : known ? percent(row[state.touched]) : "<1%"}.`);
    }
    spans.forEach((span, token) => {
      span.style.setProperty("--w", `${Math.min(85, 90 * Math.sqrt(row[token] / data.units))}%`);
      span.setAttribute("aria-selected", String(token === state.query));
      span.classList.toggle("later", token > state.query);
      span.classList.toggle("touched", token === state.touched);
    });
    text.setAttribute("aria-activedescendant", `token-${state.query}`);
  };
  const draw = () => { if (!head) return; drawCloud(); drawMap(); };
  const show = () => { if (!head) return; tell(); draw(); tellStep(); };
  const touch = (token) => { if (token !== state.touched) { state.touched = token; show(); } };
  const choose = (token) => {
    stop();
    state.query = token;
    show();
    const span = spans[token];
    if (span.offsetTop < text.scrollTop) text.scrollTop = span.offsetTop - 8;
    else if (span.offsetTop + span.offsetHeight > text.scrollTop + text.clientHeight) text.scrollTop = span.offsetTop + span.offsetHeight - text.clientHeight + 8;
  };

  // Steps
  const slider = byId("step");
  const play = byId("play");
  let running = 0;
  const tellStep = () => {
    slider.max = String(steps());
    slider.value = String(state.step);
    const words = state.step === 0 ? "Step 0: the query, before it has looked."
      : state.step === 1 ? "Step 1: the head’s output, the mean of the values by these weights."
      : `Step ${state.step}: asked again with what it had after step ${state.step - 1}. The model itself takes one step.`;
    byId("step-words").textContent = words;
    slider.setAttribute("aria-valuetext", words);
  };
  const stop = () => { cancelAnimationFrame(running); running = 0; state.shownStep = state.step; play.textContent = "Play"; };
  const go = (step) => { stop(); state.step = state.shownStep = step; show(); };
  slider.addEventListener("input", () => go(Number(slider.value)));
  play.addEventListener("click", () => {
    if (running) { stop(); show(); return; }
    play.textContent = "Stop";
    state.step = state.shownStep = 0;
    show();
    let begun = null;
    const length = still.matches ? 400 : 900;
    const frame = (now) => {
      begun ??= now;
      const at = Math.min(steps(), (now - begun) / length);
      const whole = Math.min(steps(), Math.ceil(at));
      state.shownStep = still.matches ? Math.floor(at) : at;
      if (whole !== state.step) { state.step = whole; tell(); tellStep(); drawMap(); }
      drawCloud();
      if (at < steps()) running = requestAnimationFrame(frame);
      else { stop(); show(); }
    };
    running = requestAnimationFrame(frame);
  });

  // Layer, head, what is shown
  const pressed = (buttons, chosen) => { for (const button of buttons) button.setAttribute("aria-pressed", String(button === chosen)); };
  const chip = (words, label, act) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = words;
    button.setAttribute("aria-label", label);
    button.addEventListener("click", act);
    return button;
  };
  const pick = async (index) => {
    stop();
    const numbers = await unpack(index);
    state.head = index;
    head = numbers;
    state.step = state.shownStep = Math.min(Math.max(state.step, 0), steps());
    pressed(all("#layers button"), byId("layers").children[about().layer]);
    const heads = byId("heads");
    heads.replaceChildren(...data.heads.flatMap((one, n) => (one.layer === about().layer ? [chip(String(one.head), `Head ${one.head}`, () => pick(n))] : [])));
    pressed([...heads.children], [...heads.children].find((button) => button.textContent === String(about().head)));
    describe();
    show();
  };
  const NAMES = { Q: "queries", K: "keys", V: "values" };
  const describe = () => {
    const total = view().held.all.reduce((a, b) => a + b, 0);
    const parts = Object.keys(view().clouds).map((name) => `${name.split("=").map((role) => NAMES[role]).join(" = ")} ${Math.round(100 * view().held[name].reduce((a, b) => a + b, 0))}%`);
    byId("held").textContent = `These three axes hold ${Math.round(100 * total)}% of the variance of all points (${view().held.all.map((share) => `${Math.round(100 * share)}%`).join(", ")}), and of each cloud’s own: ${parts.join(", ")}. ${layer().remark}`;
    const own = byId("own");
    own.replaceChildren(...about().measures.map((one) => {
      const row = document.createElement("tr");
      const name = document.createElement("th");
      name.scope = "row";
      name.textContent = one.name;
      const [value, random] = [one.value, one.random].map((words) => {
        const cell = document.createElement("td");
        cell.className = "number";
        cell.textContent = words;
        return cell;
      });
      value.classList.toggle("outside", one.outside);
      random.classList.add("quiet");
      row.append(name, value, random);
      return row;
    }));
    byId("tie").textContent = layer().tie;
    const marks = { Q: "M7 1 13 12 1 12Z", K: "M7 2a5 5 0 1 0 .01 0Z", V: "M2 2H12V12H2Z", hull: "M1 12 5 2 13 6Z", lines: "M1 12 13 2 13 3.5 2.5 12Z" };
    const tools = [...Object.keys(view().clouds).map((name) => [name, name.split("=").map((role) => NAMES[role]).join(" = "), shapeOf(name), colourVar(name)]),
      ["hull", "hull that holds the output", "hull", colourVar(valuesOf())], ["lines", "lines to keys", "lines", colourVar(keysOf())]];
    byId("legend").replaceChildren(...tools.map(([key, words, mark, colour]) => {
      const item = document.createElement("li");
      const button = chip(words, words, () => {
        if (!state.off.delete(key)) state.off.add(key);
        button.setAttribute("aria-pressed", String(!state.off.has(key)));
        draw();
      });
      button.setAttribute("aria-pressed", String(!state.off.has(key)));
      const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      svg.setAttribute("viewBox", "0 0 14 14");
      svg.setAttribute("width", "12");
      svg.setAttribute("aria-hidden", "true");
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("d", marks[mark]);
      path.style.fill = colour;
      if (mark === "hull") { path.style.fillOpacity = "0.15"; path.style.stroke = colour; }
      svg.append(path);
      button.prepend(svg);
      item.append(button);
      return item;
    }));
  };
  byId("axes").replaceChildren(...[["all", "all points"], ["values", "values"]].map(([axes, words]) => {
    const button = chip(words, `Axes of ${words}`, () => {
      stop();
      state.axes = axes;
      pressed(all("#axes button"), button);
      describe();
      show();
    });
    button.setAttribute("aria-pressed", String(axes === state.axes));
    return button;
  }));
  const colourVar = (name) => `var(--${{ Q: "colour-2", K: "colour-1", V: "colour-3" }[shapeOf(name)]})`;
  byId("layers").replaceChildren(...data.layers.map((one, n) => chip(String(one.index), `Layer ${one.index}, ${one.tie}`, () => {
    const same = data.heads.findIndex((other) => other.layer === n && other.head === about().head);
    pick(same >= 0 ? same : data.heads.findIndex((other) => other.layer === n));
  })));

  // Turning: mouse, touch, keys
  const held = new Map();
  let moved = 0;
  canvas.addEventListener("pointerdown", (event) => {
    held.set(event.pointerId, event);
    canvas.setPointerCapture(event.pointerId);
    canvas.classList.add("held");
    moved = 0;
  });
  const spread = () => { const [a, b] = [...held.values()]; return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY); };
  const nearest = (event) => {
    const box = canvas.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    let best = null;
    for (const point of drawn) {
      const distance = Math.hypot(point.x - x, point.y - y);
      if (distance < 14 && (!best || distance < best.distance)) best = { ...point, distance };
    }
    return best;
  };
  canvas.addEventListener("pointermove", (event) => {
    const before = held.get(event.pointerId);
    if (!before) { touch(nearest(event)?.token ?? -1); return; }
    const [dx, dy] = [event.clientX - before.clientX, event.clientY - before.clientY];
    moved += Math.abs(dx) + Math.abs(dy);
    if (held.size === 2) {
      const was = spread();
      held.set(event.pointerId, event);
      zoom(spread() / Math.max(1, was));
      return;
    }
    held.set(event.pointerId, event);
    turn(0.008 * dx, 0.008 * dy);
  });
  const release = (event) => {
    if (!held.delete(event.pointerId)) return;
    if (!held.size) canvas.classList.remove("held");
    if (event.type === "pointerup" && moved < 6) { const point = nearest(event); if (point) choose(point.token); }
  };
  canvas.addEventListener("pointerup", release);
  canvas.addEventListener("pointercancel", release);
  canvas.addEventListener("pointerleave", () => { if (!held.size) touch(-1); });
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey) return; // the page scrolls; two fingers of a touchpad zoom
    event.preventDefault();
    zoom(Math.exp(-0.01 * event.deltaY));
  }, { passive: false });
  const turn = (yaw, pitch) => {
    state.yaw += yaw;
    state.pitch = Math.min(Math.PI / 2, Math.max(-Math.PI / 2, state.pitch + pitch));
    drawCloud();
  };
  const zoom = (factor) => { state.zoom = Math.min(12, Math.max(0.4, state.zoom * factor)); drawCloud(); };
  const reset = () => { state.yaw = 0.6; state.pitch = 0.35; state.zoom = 1; drawCloud(); };
  canvas.addEventListener("keydown", (event) => {
    const act = {
      ArrowLeft: () => turn(-0.1, 0), ArrowRight: () => turn(0.1, 0), ArrowUp: () => turn(0, -0.1), ArrowDown: () => turn(0, 0.1),
      "+": () => zoom(1.2), "=": () => zoom(1.2), "-": () => zoom(1 / 1.2), 0: reset,
    }[event.key];
    if (!act || !head) return;
    event.preventDefault();
    act();
  });
  byId("nearer").addEventListener("click", () => zoom(1.25));
  byId("farther").addEventListener("click", () => zoom(1 / 1.25));
  byId("front").addEventListener("click", reset);

  const place = (event) => {
    const box = map.getBoundingClientRect();
    const cell = (at, size) => Math.min(tokens - 1, Math.max(0, Math.floor((at / size) * tokens)));
    return [cell(event.clientY - box.top, box.height), cell(event.clientX - box.left, box.width)];
  };
  map.addEventListener("pointermove", (event) => touch(place(event)[1]));
  map.addEventListener("pointerleave", () => touch(-1));
  map.addEventListener("click", (event) => { const [query, key] = place(event); choose(key <= query ? query : key); });

  // Where one is.
  const links = new Map(all("nav a").map((link) => [link.hash.slice(1), link]));
  const here = () => {
    let now = [...links.keys()][0];
    for (const id of links.keys()) if (byId(id).getBoundingClientRect().top < 140) now = id;
    for (const [id, link] of links) { if (id === now) link.setAttribute("aria-current", "true"); else link.removeAttribute("aria-current"); }
  };
  window.addEventListener("scroll", here, { passive: true });
  here();

  if (typeof DecompressionStream === "undefined") {
    byId("told").textContent = "This browser cannot unpack the points that the page holds: use a newer one. The tables below need nothing.";
    return;
  }
  new ResizeObserver(draw).observe(canvas);
  window.addEventListener("resize", draw);
  recolour();
  pick(state.head).then(() => { root.dataset.ready = "yes"; });
})();
