"use strict";
// Draws the charts of the page from plain data. A chart keeps nothing but which lines are hidden
// and which axes are logarithmic; every change draws it anew.
const NS = "http://www.w3.org/2000/svg";
const LEFT = 58, RIGHT = 14, TOP = 10, BOTTOM = 34;

function amount(value) {
  const size = Math.abs(value);
  for (const [unit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit * 0.9995) return parseFloat((value / unit).toPrecision(4)) + name;
  if (value === 0) return "0";
  if (size < 0.01) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(parseFloat(value.toPrecision(4)));
}

function linearTicks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-9) + 1e-300; i++) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high, count) {
  const decades = Math.log10(high / low);
  if (decades < 1) return linearTicks(low, high, count).filter((t) => t > 0);
  const every = Math.ceil(decades / count), few = decades < count / 2.5;
  const ticks = [];
  for (let d = Math.floor(Math.log10(low)); d <= Math.ceil(Math.log10(high)); d += every)
    for (const m of few ? [1, 2, 5] : [1])
      if (m * 10 ** d >= low * 0.999 && m * 10 ** d <= high * 1.001) ticks.push(m * 10 ** d);
  return ticks;
}

function element(parent, name, attributes, text) {
  const made = document.createElementNS(NS, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

function html(parent, name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

// The range that holds all visible lines; faint ones, single steps, may leap out of it.
function range(lines, axis, log, marginShare) {
  let low = Infinity, high = -Infinity;
  for (const line of lines) {
    let values = line[axis].filter((v) => !log || v > 0);
    if (axis === "y" && line.kind === "faint" && values.length > 50) {
      values = [...values].sort((a, b) => a - b);
      values = [values[Math.floor(values.length * 0.005)], values[Math.ceil(values.length * 0.995) - 1]];
    }
    for (const v of values) { if (v < low) low = v; if (v > high) high = v; }
  }
  if (low > high) return log ? [1, 10] : [0, 1];
  if (log) {
    const margin = Math.max((high / low) ** marginShare, low === high ? 1.5 : 1);
    return [low / margin, high * margin];
  }
  if (axis === "x") return [Math.min(0, low), high];
  if (low >= 0 && low < high * 0.6) low = 0;
  const margin = (high - low) * marginShare || Math.abs(high) * 0.1 || 1;
  return [low === 0 ? 0 : low - margin, high + margin];
}

function scale(low, high, log, from, to) {
  const f = log ? Math.log : (v) => v, a = f(low), b = f(high);
  const forward = (v) => from + ((f(v) - a) / (b - a)) * (to - from);
  forward.back = (p) => { const t = a + ((p - from) / (to - from)) * (b - a); return log ? Math.exp(t) : t; };
  return forward;
}

function path(line, sx, sy, xlog, ylog) {
  let d = "", last = null;
  for (let i = 0; i < line.x.length; i++) {
    if ((xlog && line.x[i] <= 0) || (ylog && line.y[i] <= 0)) continue;
    const x = sx(line.x[i]).toFixed(1), y = sy(line.y[i]).toFixed(1);
    // A step's value was in force from the end of the step before: up first, then right.
    d += last === null ? `M${x},${y}` : line.kind === "step" ? `V${y}H${x}` : `L${x},${y}`;
    last = y;
  }
  return d;
}

function nearest(values, x) {
  let low = 0, high = values.length - 1;
  while (high - low > 1) { const mid = (low + high) >> 1; if (values[mid] < x) low = mid; else high = mid; }
  return x - values[low] < values[high] - x ? low : high;
}

let clips = 0;

function draw(chart, state, box) {
  box.textContent = "";
  const width = Math.max(280, box.clientWidth), height = chart.wide || chart.first ? 330 : 230;
  const shown = chart.lines.filter((_, i) => !state.hidden.has(i));
  const svg = element(box, "svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": chart.title });
  const [x0, x1] = range(shown, "x", state.xlog, 0), [y0, y1] = range(shown, "y", state.ylog, 0.05);
  const sx = scale(x0, x1, state.xlog, LEFT, width - RIGHT), sy = scale(y0, y1, state.ylog, height - BOTTOM, TOP);
  for (const t of (state.ylog ? logTicks : linearTicks)(y0, y1, 6)) {
    element(svg, "line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: sy(t), y2: sy(t) });
    element(svg, "text", { x: LEFT - 8, y: sy(t) + 4, "text-anchor": "end" }, amount(t));
  }
  for (const t of (state.xlog ? logTicks : linearTicks)(x0, x1, width / 110)) {
    element(svg, "line", { class: "grid", x1: sx(t), x2: sx(t), y1: TOP, y2: height - BOTTOM });
    element(svg, "text", { x: sx(t), y: height - BOTTOM + 16, "text-anchor": "middle" }, amount(t));
  }
  element(svg, "text", { x: width - RIGHT, y: height - 3, "text-anchor": "end" }, chart.x);
  const clip = `clip${++clips}`;
  const hole = element(element(svg, "clipPath", { id: clip }), "rect",
    { x: LEFT - 5, y: TOP - 5, width: width - LEFT - RIGHT + 10, height: height - TOP - BOTTOM + 10 });
  const plot = element(svg, "g", { "clip-path": `url(#${clip})` });
  let named = -Infinity;
  for (const mark of chart.marks) {
    if (state.xlog && mark.x <= 0) continue;
    const colour = mark.kind === "spike" ? "#c53030" : "#8a94a0";
    const line = element(plot, "line", { x1: sx(mark.x), x2: sx(mark.x), y1: TOP, y2: height - BOTTOM,
      stroke: colour, "stroke-dasharray": "4 4", "stroke-width": 1.3 });
    element(line, "title", {}, mark.text);
    // Marks close together share the name of the first of them.
    if (sx(mark.x) < named + 56) continue;
    named = sx(mark.x);
    element(svg, "text", { x: named + 4, y: TOP + 10, style: `fill:${colour}` }, mark.kind);
  }
  for (const line of shown) {
    element(plot, "path", { d: path(line, sx, sy, state.xlog, state.ylog), fill: "none", stroke: line.colour,
      "stroke-width": line.kind === "faint" ? 1 : 2, "stroke-opacity": line.kind === "faint" ? 0.3 : 1,
      "stroke-linejoin": "round", "stroke-dasharray": line.kind === "dash" ? "6 5" : "none" });
    if (line.kind === "dots" && line.x.length < 200)
      for (let i = 0; i < line.x.length; i++)
        if (!(state.xlog && line.x[i] <= 0))
          element(plot, "circle", { cx: sx(line.x[i]), cy: sy(line.y[i]), r: 3, fill: line.colour });
  }
  hover(chart, box, svg, shown, sx, width, height);
}

function hover(chart, box, svg, shown, sx, width, height) {
  const cursor = element(svg, "line", { class: "cursor", y1: TOP, y2: height - BOTTOM, visibility: "hidden" });
  const tip = html(box, "div", "tip");
  tip.hidden = true;
  const leave = () => { tip.hidden = true; cursor.setAttribute("visibility", "hidden"); };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect(), p = ((event.clientX - frame.left) / frame.width) * width;
    if (p < LEFT || p > width - RIGHT || !shown.length) return leave();
    const at = sx.back(p);
    cursor.setAttribute("x1", p); cursor.setAttribute("x2", p); cursor.setAttribute("visibility", "visible");
    tip.textContent = "";
    html(tip, "b", "", `${amount(at)} ${chart.x}`);
    for (const line of shown) {
      if (!line.x.length) continue;
      const row = html(tip, "div", ""), dot = html(row, "span", "", "\u25cf ");
      dot.style.color = line.colour;
      row.append(`${line.name}: ${amount(line.y[nearest(line.x, at)])}`);
    }
    tip.hidden = false;
    const x = (p / width) * frame.width, right = x > frame.width / 2;
    tip.style.left = right ? "" : `${x + 12}px`;
    tip.style.right = right ? `${frame.width - x + 12}px` : "";
    tip.style.top = "12px";
  });
}

function card(parent, chart) {
  const state = { hidden: new Set(), xlog: chart.xlog, ylog: chart.ylog };
  const outer = html(parent, "section", chart.wide || chart.first ? "card wide" : "card");
  const header = html(outer, "header");
  html(header, "h3", "", chart.title);
  html(header, "small", "", chart.unit);
  html(header, "span", "gap");
  const box = document.createElement("div");
  for (const axis of ["x", "y"]) {
    const label = html(header, "label"), check = html(label, "input");
    check.type = "checkbox";
    check.checked = state[axis + "log"];
    label.append(`log ${axis}`);
    check.addEventListener("change", () => { state[axis + "log"] = check.checked; draw(chart, state, box); });
  }
  const key = html(outer, "div", "key");
  chart.lines.forEach((line, i) => {
    const button = html(key, "button"), swatch = html(button, "i", line.kind === "dash" ? "dash" : "");
    swatch.style.borderColor = line.colour;
    swatch.style.opacity = line.kind === "faint" ? 0.4 : 1;
    button.append(line.name);
    if (line.y.length && line.kind !== "faint") html(button, "em", "", amount(line.y[line.y.length - 1]));
    button.addEventListener("click", () => {
      if (!state.hidden.delete(i)) state.hidden.add(i);
      button.classList.toggle("off");
      draw(chart, state, box);
    });
  });
  box.className = "chart";
  outer.appendChild(box);
  if (chart.note) html(outer, "p", "note", chart.note);
  draw(chart, state, box);
  new ResizeObserver(() => draw(chart, state, box)).observe(outer);
}

const CHARTS = JSON.parse(document.getElementById("data").textContent);
CHARTS.forEach((chart, i) => { chart.first = i === 0; card(document.getElementById("charts"), chart); });
