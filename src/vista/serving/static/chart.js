// Small charts as SVG. Each is said in words as well, for those who do not see it.

import { svg } from "./dom.js";

const HEIGHT = 120;
const LEVELS = 8;

const figure = (width, height, label, ...parts) =>
  svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, preserveAspectRatio: "none", height }, ...parts);

/** Bars from the left to the right, the highest as high as the chart. */
export function bars(values, label, height = 64) {
  const most = Math.max(...values, 0) || 1;
  const path = values.map((value, i) => {
    const h = value ? Math.max((value / most) * height, 1) : 0;
    return `M${i + 0.06} ${height}v${-h}h.88v${h}z`;
  });
  return figure(values.length, height, label, svg("path", { class: "bar", d: path.join("") }));
}

/** Rows of cells; the darker, the larger the share of its row. One path per shade, however many cells there are. */
export function heat(rows, label) {
  const most = Math.max(...rows.flat(), 0) || 1;
  const paths = Array.from({ length: LEVELS }, () => []);
  rows.forEach((row, y) => row.forEach((value, x) => {
    const level = Math.ceil(Math.sqrt(value / most) * LEVELS) - 1;
    if (level >= 0) paths[Math.min(level, LEVELS - 1)].push(`M${x} ${y}h1v1h-1z`);
  }));
  const height = Math.max(96, Math.min(rows.length * 7, 420));
  const cells = paths.map((path, level) => svg("path", { class: "cell", "fill-opacity": (level + 1) / LEVELS, d: path.join("") }));
  const chart = figure(rows[0]?.length ?? 1, rows.length, label, svg("g", { "shape-rendering": "crispEdges" }, cells));
  chart.setAttribute("height", height);
  return chart;
}

/** A round number at or above a value: 1, 2 or 5 times a power of ten. */
export function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

const S = 1, MIN = 60, H = 3600, D = 86400, Y = 31557600;
const SPANS = [S, 2 * S, 10 * S, 30 * S, MIN, 2 * MIN, 10 * MIN, 30 * MIN, H, 2 * H, 6 * H, 12 * H, D, 2 * D, 7 * D, 14 * D, 30 * D,
  90 * D, 180 * D, Y, 2 * Y];

/** A round duration at or above some seconds. */
export const roundUpSpan = (seconds) => SPANS.find((span) => span >= seconds) ?? roundUp(seconds / Y) * Y;

/** Lines over the last `spanS` seconds. series: [{ points: [[age in s, value or null]] }]; write: a value as text; up: to a round value. */
export function lines(series, spanS, room, write, label, up = roundUp) {
  const width = Math.max(room, 240), left = 58, right = 6, top = 8, bottom = 6;
  const values = series.flatMap((one) => one.points.map(([, value]) => value)).filter((value) => value !== null);
  const most = up(Math.max(...values, 0));
  const x = (age) => left + (1 - age / spanS) * (width - left - right);
  const y = (value) => top + (1 - value / most) * (HEIGHT - top - bottom);
  const grid = [0, 0.5, 1].map((part) => [
    svg("line", { class: "grid", x1: left, x2: width - right, y1: y(part * most), y2: y(part * most) }),
    svg("text", { x: left - 8, y: y(part * most) + 4, "text-anchor": "end" }, write(part * most)),
  ]);
  const curves = series.map((one, number) => {
    let pen = false;
    const d = one.points.map(([age, value]) => {
      if (value === null || age > spanS) { pen = false; return ""; }
      const step = `${pen ? "L" : "M"}${x(age).toFixed(1)} ${y(value).toFixed(1)}`;
      pen = true;
      return step;
    });
    return svg("path", { class: `curve s${number}`, d: d.join("") });
  });
  const chart = figure(width, HEIGHT, label, grid, curves.reverse());
  chart.setAttribute("preserveAspectRatio", "xMidYMid meet");
  chart.removeAttribute("height");
  return chart;
}
