"use strict";
// Draws the charts of the page with uPlot from plain data. Switching an axis to or from
// logarithmic builds the chart anew; hiding a line and zooming are uPlot's own.
const DARK = matchMedia("(prefers-color-scheme: dark)");
const PLOTS = [];

function amount(value) {
  const size = Math.abs(value);
  for (const [unit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit * 0.9995) return parseFloat((value / unit).toPrecision(4)) + name;
  if (value === 0) return "0";
  if (size < 0.01) return value.toExponential(2).replace(/\.?0+e/, "e");
  return String(parseFloat(value.toPrecision(4)));
}

function html(parent, name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

// What a logarithmic axis cannot show.
function drawable(line, xlog, ylog) {
  const rows = line.x.map((x, i) => i).filter((i) => (!xlog || line.x[i] > 0) && (!ylog || line.y[i] > 0));
  return [rows.map((i) => line.x[i]), rows.map((i) => line.y[i])];
}

// The range that holds all visible lines; faint ones, single steps, may leap out of it.
function rangeY(plot, lines, log) {
  let low = Infinity, high = -Infinity;
  lines.forEach((line, i) => {
    const series = plot.series[i + 1], [first, last] = series.idxs ?? [];
    if (!series.show || first == null) return;
    let values = plot.data[i + 1].slice(first, last + 1).filter((v) => v != null);
    if (line.kind === "faint" && values.length > 50) {
      values.sort((a, b) => a - b);
      values = [values[Math.floor(values.length * 0.005)], values[Math.ceil(values.length * 0.995) - 1]];
    }
    for (const v of values) { low = Math.min(low, v); high = Math.max(high, v); }
  });
  if (low > high) return log ? [1, 10] : [0, 1];
  if (log) {
    const margin = low === high ? 1.5 : (high / low) ** 0.05;
    return [low / margin, high * margin];
  }
  if (low >= 0 && low < high * 0.6) low = 0;
  const margin = (high - low) * 0.05 || Math.abs(high) * 0.1 || 1;
  return [low === 0 ? 0 : low - margin, high + margin];
}

// Round numbers between two ends; a logarithmic axis of less than a decade has them too.
function ticks(low, high, count, log) {
  const values = [], decades = Math.log10(high / low);
  if (log && decades >= 1) {
    const every = Math.ceil(decades / count), digits = decades < count / 2.5 ? [1, 2, 5] : [1];
    for (let d = Math.floor(Math.log10(low)); d <= Math.log10(high); d += every)
      for (const m of digits) values.push(parseFloat(`${m}e${d}`));
  } else {
    const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
    for (let i = Math.ceil(low / step); i * step <= high; i++) values.push(i * step);
  }
  return values.filter((v) => v >= low && v <= high);
}

// 70B bytes are 70G.
const label = (unit, value) => (unit === "bytes" ? amount(value).replace("B", "G") : amount(value));

function axis(scale, log, unit, name) {
  return {
    scale, label: name, labelSize: 16, labelFont: "12px system-ui, sans-serif", labelGap: 0,
    font: "11.5px system-ui, sans-serif", size: scale === "y" ? 54 : 24, gap: 5,
    stroke: () => ink("--faint"), grid: { stroke: () => ink("--line"), width: 1 }, ticks: { show: false },
    splits: (plot, i, low, high) => ticks(low, high, scale === "y" ? 6 : plot.width / 110, log),
    filter: (plot, values) => values, values: (plot, values) => values.map((value) => label(unit, value)),
  };
}

function series(line, points, unit) {
  const last = line.y[line.y.length - 1] ?? null, faint = line.kind === "faint";
  return {
    label: line.name, stroke: line.colour + (faint ? "55" : ""), width: faint ? 1 : 2, spanGaps: true,
    dash: line.kind === "dash" ? [6, 5] : undefined,
    points: { show: line.kind === "dots" && points < 200, size: 6, fill: line.colour },
    // A step's value was in force from the end of the step before.
    paths: line.kind === "step" ? uPlot.paths.stepped({ align: -1 }) : uPlot.paths.linear(),
    // Without a pointer the legend tells the last values.
    value: (plot, value) => ((value ??= faint ? null : last) === null ? "" : label(unit, value)),
  };
}

// The last point that a line has at or before the pointer, or its first after it.
function nearest(plot, line, at) {
  const values = plot.data[line];
  let before = at, after = at;
  while (before >= 0 && values[before] == null) before--;
  while (after < values.length && values[after] == null) after++;
  if (before < 0) return after < values.length ? after : null;
  if (after >= values.length) return before;
  const x = plot.data[0];
  return x[at] - x[before] < x[after] - x[at] ? before : after;
}

// Dashed lines across the chart; marks close together share the name of the first of them.
function drawMarks(plot, marks) {
  const { ctx, bbox } = plot, ratio = devicePixelRatio;
  let named = -Infinity;
  ctx.save();
  ctx.font = `${11.5 * ratio}px system-ui, sans-serif`;
  ctx.textAlign = "left";
  ctx.textBaseline = "alphabetic";
  ctx.setLineDash([4 * ratio, 4 * ratio]);
  ctx.lineWidth = 1.3 * ratio;
  for (const mark of marks) {
    const x = Math.round(plot.valToPos(mark.x, "x", true));
    if (!(x >= bbox.left && x <= bbox.left + bbox.width)) continue;
    ctx.strokeStyle = ctx.fillStyle = mark.kind === "spike" ? "#c53030" : "#8a94a0";
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    if (x < named + 56 * ratio) continue;
    named = x;
    ctx.fillText(mark.kind, x + 4 * ratio, bbox.top + 11 * ratio);
  }
  ctx.restore();
}

function build(chart, state, box, note) {
  const lines = chart.lines, drawn = lines.map((line) => drawable(line, state.xlog, state.ylog));
  const data = uPlot.join(drawn), height = chart.wide || chart.first ? 310 : 210;
  const marks = chart.marks.filter((mark) => !state.xlog || mark.x > 0);
  const first = data[0][0], last = data[0][data[0].length - 1];
  const options = {
    width: Math.max(260, box.clientWidth), height, padding: [10, 14, 0, 0],
    scales: {
      x: {
        time: false, distr: state.xlog ? 3 : 1,
        range: (plot, low, high) => [!state.xlog && low === first ? Math.min(0, low) : low,
          high > low ? high : low + (Math.abs(low) || 1)],
      },
      y: { distr: state.ylog ? 3 : 1, range: (plot) => rangeY(plot, lines, state.ylog) },
    },
    axes: [axis("x", state.xlog, chart.x, chart.x), axis("y", state.ylog, chart.unit)],
    series: [{ label: chart.x, value: (plot, x) => amount(x ?? last) },
      ...lines.map((line, i) => ({ ...series(line, drawn[i][0].length, chart.unit), show: !state.hidden.has(i) }))],
    cursor: { y: false, points: { size: 7 }, dataIdx: (plot, i, at) => (i ? nearest(plot, i, at) : at) },
    hooks: {
      draw: [(plot) => drawMarks(plot, marks)],
      setSeries: [(plot, i) => i && (plot.series[i].show ? state.hidden.delete(i - 1) : state.hidden.add(i - 1))],
      setCursor: [(plot) => {
        const close = marks.filter((m) => Math.abs(plot.valToPos(m.x, "x") - plot.cursor.left) < 6);
        note.textContent = close.map((mark) => mark.text).join(", ") || chart.note;
      }],
    },
  };
  return new uPlot(options, data, box);
}

function card(parent, chart) {
  const state = { hidden: new Set(), xlog: chart.xlog, ylog: chart.ylog };
  const outer = html(parent, "section", chart.wide || chart.first ? "card wide" : "card");
  const header = html(outer, "header");
  html(header, "h3", "", chart.title);
  html(header, "small", "", chart.unit);
  html(header, "span", "gap");
  const box = html(outer, "div", "chart"), note = html(outer, "p", "note", chart.note);
  const index = PLOTS.length;
  const draw = () => { PLOTS[index]?.destroy(); PLOTS[index] = build(chart, state, box, note); };
  for (const name of ["x", "y"]) {
    const choice = html(header, "label"), check = html(choice, "input");
    check.type = "checkbox";
    check.checked = state[name + "log"];
    choice.append(`log ${name}`);
    check.addEventListener("change", () => { state[name + "log"] = check.checked; draw(); });
  }
  draw();
  DARK.addEventListener("change", () => PLOTS[index].redraw());
  new ResizeObserver(() => {
    const width = Math.max(260, box.clientWidth), plot = PLOTS[index];
    if (width !== plot.width) plot.setSize({ width, height: plot.height });
  }).observe(outer);
}

const CHARTS = JSON.parse(document.getElementById("data").textContent);
CHARTS.forEach((chart, i) => { chart.first = i === 0; card(document.getElementById("charts"), chart); });
