"use strict";
// Draws the charts of the page with uPlot from plain data. Switching an axis builds the chart anew;
// hiding a line and zooming are uPlot's own.
const DARK = matchMedia("(prefers-color-scheme: dark)");
const { charts: CHARTS, runs: RUNS } = JSON.parse(document.getElementById("data").textContent);
const PLOTS = [];
// Charts over tokens can be drawn over steps and hours as well.
const AXES = ["tokens", "steps", "hours"].filter((name) => RUNS.every((run) => run[name]));
const LONGEST_H = AXES.includes("hours") ? Math.max(...RUNS.map((run) => run.hours[run.hours.length - 1])) : 0;
const SHORT = LONGEST_H < 1;
let over = "tokens";

// In as few figures as given, 70B, 1.5k, 2.5e-4.
function amount(value, figures = 4) {
  const size = Math.abs(value), round = (v) => parseFloat(v.toPrecision(figures));
  for (const [unit, name] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (size >= unit * (1 - 0.5 * 10 ** -figures)) return round(value / unit) + name;
  if (value === 0) return "0";
  if (size < 0.01) return scientific(value, figures);
  return String(round(value));
}

const scientific = (value, figures) => value.toExponential(figures - 1).replace(/\.?0*e/, "e");

// 70B bytes are 70G.
const label = (unit, value, figures) =>
  (unit === "bytes" ? amount(value, figures).replace("B", "G") : amount(value, figures));

// The labels of an axis, in as few figures as tell each value.
function labels(unit, values) {
  const step = Math.min(...values.slice(1).map((v, i) => v - values[i]));
  let figures = 4;
  while (figures < 15 && values.some((v) => Math.abs(parseFloat(v.toPrecision(figures)) - v) > 0.01 * step)) figures++;
  // One way of writing for all: 5e-3 and 1e-2, not 5e-3 and 0.01.
  const sizes = values.map(Math.abs).filter((v) => v > 0), small = Math.min(...sizes) < 0.01 && Math.max(...sizes) < 1;
  return values.map((v) => (small && v ? scientific(v, figures) : label(unit, v, figures)));
}

function html(parent, name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  parent.appendChild(made);
  return made;
}

const ink = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
// A colour of the data as it is on the paper of now.
const shade = (colour) => ink("--" + colour.slice(1)) || colour;

// --- axes ---------------------------------------------------------------------------------------

// A place in tokens on the axis that is chosen: between two steps of its run on a straight line.
function placed(tokens, number) {
  const run = RUNS[number], values = run[over];
  if (over === "tokens") return tokens;
  let low = 0, high = run.tokens.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (run.tokens[middle] <= tokens) low = middle; else high = middle;
  }
  const share = (tokens - run.tokens[low]) / (run.tokens[high] - run.tokens[low] || 1);
  const value = values[low] + Math.min(1, share) * (values[high] - values[low]);
  return over === "hours" && SHORT ? value * 60 : value;
}

const nameOf = (chart) => (chart.x !== "tokens" ? chart.x : over === "hours" && SHORT ? "minutes" : over);

// The points of a line on the axes of now, without what a logarithmic axis cannot show.
function points(chart, line, state) {
  const xs = chart.x === "tokens" ? line.x.map((x) => placed(x, line.run)) : line.x;
  const rows = xs.map((x, i) => i).filter((i) => (!state.xlog || xs[i] > 0) && (!state.ylog || line.y[i] > 0));
  return [rows.map((i) => xs[i]), rows.map((i) => line.y[i])];
}

// Each line upon those after it that are shown.
function stacked(data, lines, hidden) {
  let below = null;
  for (let i = lines.length - 1; i >= 0; i--) {
    if (lines[i].kind !== "area" || hidden.has(i)) continue;
    const base = below;
    below = data[i + 1].map((v, row) => (v == null ? v : v + (base?.[row] ?? 0)));
    data[i + 1] = below;
  }
  return data;
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
    if (line.kind === "area") low = Math.min(low, 0);
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
    for (let i = Math.ceil(low / step); i * step <= high; i++) values.push(parseFloat((i * step).toPrecision(12)));
  }
  return values.filter((v) => v >= low && v <= high);
}

function axis(scale, log, unit, name) {
  return {
    scale, label: name, labelSize: 16, labelFont: "12px system-ui, sans-serif", labelGap: 0,
    font: "11.5px system-ui, sans-serif", size: scale === "y" ? 54 : 24, gap: 5,
    stroke: () => ink("--faint"), grid: { stroke: () => ink("--line"), width: 1 }, ticks: { show: false },
    splits: (plot, i, low, high) => ticks(low, high, scale === "y" ? 6 : Math.max(2, plot.width / 110), log),
    filter: (plot, values) => values, values: (plot, values) => labels(unit, values),
  };
}

// --- lines --------------------------------------------------------------------------------------

function series(line, drawn, unit, told) {
  const last = line.y[line.y.length - 1] ?? null, faint = line.kind === "faint", area = line.kind === "area";
  return {
    label: line.name, width: faint ? 1 : area ? 0 : 2, spanGaps: true,
    stroke: () => shade(line.colour) + (faint ? "70" : ""), fill: area ? () => shade(line.colour) : undefined,
    // A line that would hide others has gaps, the wider the more it hides; over hours it hides none.
    dash: line.kind === "dash" ? [6, 5] :
      line.over && over !== "hours" ? [8 / line.over, 16 - 8 / line.over] : undefined,
    points: { show: line.kind === "dots" && drawn < 200, size: 6, fill: () => shade(line.colour) },
    // A step's value was in force from the end of the step before.
    paths: line.kind === "step" ? uPlot.paths.stepped({ align: -1 }) : uPlot.paths.linear(),
    // Without a pointer the legend tells the last values; of what is stacked its own part.
    value: (plot, value, i, row) => {
      if (area && row != null && value != null) value = told[i][row];
      return (value ??= faint ? null : last) === null ? "" : label(unit, value);
    },
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
  ctx.textBaseline = "alphabetic";
  ctx.setLineDash([4 * ratio, 4 * ratio]);
  ctx.lineWidth = 1.3 * ratio;
  for (const mark of marks) {
    const x = Math.round(plot.valToPos(mark.at, "x", true));
    if (!(x >= bbox.left && x <= bbox.left + bbox.width)) continue;
    ctx.strokeStyle = ctx.fillStyle = shade(mark.colour);
    ctx.beginPath();
    ctx.moveTo(x, bbox.top);
    ctx.lineTo(x, bbox.top + bbox.height);
    ctx.stroke();
    if (x < named + 56 * ratio) continue;
    named = x;
    // At the right end there is no room behind the line.
    const left = x + 56 * ratio > bbox.left + bbox.width;
    ctx.textAlign = left ? "right" : "left";
    ctx.fillText(mark.kind, x + (left ? -4 : 4) * ratio, bbox.top + 11 * ratio);
  }
  ctx.restore();
}

// --- a chart ------------------------------------------------------------------------------------

function build(chart, state, box, note, again) {
  const lines = chart.lines, drawn = lines.map((line) => points(chart, line, state));
  const told = uPlot.join(drawn), data = stacked([...told], lines, state.hidden);
  const height = chart.wide || chart.first ? 310 : 210, x = nameOf(chart);
  const marks = chart.marks.map((mark) => ({ ...mark, at: chart.x === "tokens" ? placed(mark.x, mark.run) : mark.x }))
    .filter((mark) => !state.xlog || mark.at > 0);
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
    axes: [axis("x", state.xlog, x, x), axis("y", state.ylog, chart.unit)],
    series: [{ label: x, value: (plot, value) => amount(value ?? last) },
      ...lines.map((line, i) => ({ ...series(line, drawn[i][0].length, chart.unit, told), show: !state.hidden.has(i) }))],
    cursor: { y: false, points: { size: 7 }, dataIdx: (plot, i, at) => (i ? nearest(plot, i, at) : at) },
    hooks: {
      draw: [(plot) => drawMarks(plot, marks)],
      setSeries: [(plot, i) => {
        // The pointer's nearest line is told here too, without a change.
        if (!i || plot.series[i].show === !state.hidden.has(i - 1)) return;
        if (plot.series[i].show) state.hidden.delete(i - 1); else state.hidden.add(i - 1);
        if (faintBefore(lines, i - 1)) plot.setSeries(i - 1, { show: plot.series[i].show });
        if (lines[i - 1].kind === "area") setTimeout(again);
      }],
      setCursor: [(plot) => {
        const close = marks.filter((m) => Math.abs(plot.valToPos(m.at, "x") - plot.cursor.left) < 6);
        note.textContent = close.map((mark) => mark.text).join(", ") || chart.note;
      }],
    },
  };
  const plot = new uPlot(options, data, box);
  lines.forEach((line, i) => {
    if (faintBefore(lines, i + 1)) plot.root.querySelectorAll(".u-series")[i + 1].style.display = "none";
  });
  return plot;
}

// Of several runs, whether the line before is the faint one of the same run, which goes with it.
const faintBefore = (lines, i) => RUNS.length > 1 && i > 0 && i < lines.length && lines[i - 1].kind === "faint" && lines[i - 1].run === lines[i].run;

function card(parent, chart) {
  const state = { hidden: new Set(), xlog: chart.xlog, ylog: chart.ylog };
  const outer = html(parent, "section", chart.wide || chart.first ? "card wide" : "card");
  const header = html(outer, "header");
  html(header, "h3", "", chart.title);
  html(header, "small", "", chart.unit);
  const switches = html(header, "span", "switches");
  const box = html(outer, "div", "chart"), note = html(outer, "p", "note", chart.note);
  const index = PLOTS.length;
  const draw = () => { PLOTS[index]?.destroy(); PLOTS[index] = build(chart, state, box, note, draw); };
  const stack = chart.lines.some((line) => line.kind === "area");
  for (const name of stack ? ["x"] : ["x", "y"]) {
    const choice = html(switches, "label"), check = html(choice, "input");
    check.type = "checkbox";
    check.checked = state[name + "log"];
    choice.append(`log ${name}`);
    check.addEventListener("change", () => { state[name + "log"] = check.checked; draw(); });
  }
  draw();
  // The legend's marks keep the colour that they were made in.
  DARK.addEventListener("change", draw);
  new ResizeObserver(() => {
    const width = Math.max(260, box.clientWidth), plot = PLOTS[index];
    if (width !== plot.width) plot.setSize({ width, height: plot.height });
  }).observe(outer);
  return draw;
}

const redraw = [], choices = document.getElementById("axis");
if (AXES.length > 1) {
  html(choices, "span", "", "over");
  for (const name of AXES) {
    const choice = html(choices, "label"), radio = html(choice, "input");
    radio.type = "radio";
    radio.name = "axis";
    radio.checked = name === over;
    html(choice, "span", "", name);
    radio.addEventListener("change", () => { over = name; redraw.forEach((draw) => draw()); });
  }
}
CHARTS.forEach((chart, i) => {
  chart.first = i === 0;
  const draw = card(document.getElementById("charts"), chart);
  if (chart.x === "tokens") redraw.push(draw);
});
