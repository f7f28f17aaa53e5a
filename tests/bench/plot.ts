/**
 * The plot of the results, a picture that needs nothing else and is legible on
 * light and on dark ground. Pure.
 *
 * @module
 */

/** A server; the first one is drawn the most boldly. */
export interface Series {
  name: string;
  points: Point[];
}

export interface Point {
  connections: number;
  /** Replies in a second. */
  rate: number;
  /** The 99.9th percentile of the latency, in microseconds. */
  p999: number;
}

interface Panel {
  title: string;
  /** Where it begins. */
  left: number;
  valueOf: (point: Point) => number;
  scale: Scale;
}

interface Scale {
  /** 0 for the least value that is drawn, 1 for the greatest. */
  place: (value: number) => number;
  ticks: { value: number; label: string }[];
}

const WIDTH = 960;
const HEIGHT = 460;
const PANEL = { width: 390, height: 290, top: 50, left: 66, gap: 90 };
const LEGEND = { top: 400, columns: 5, rowHeight: 24, line: 26 };
const MARKER = 3.5;

/** Told apart by people who do not see all colours, on white and on black. */
const COLOURS = [
  "#d9480f",
  "#1c7ed6",
  "#2b8a3e",
  "#ae3ec9",
  "#868e96",
  "#e0a800",
  "#0ca678",
  "#f06595",
  "#7048e8",
  "#5c940d",
];
/** Lines that come close are told apart by these too. */
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];

/** Grey that is legible on both, and better where the picture is told which it is. */
const STYLE = `
    text { font: 13px system-ui, sans-serif; fill: #6c757d; }
    .title { font-size: 15px; font-weight: 600; }
    .grid { stroke: #adb5bd; stroke-opacity: 0.4; }
    .series { fill: none; stroke-width: 1.8; stroke-linejoin: round; }
    .first { stroke-width: 3.6; }
    @media (prefers-color-scheme: dark) { text { fill: #ced4da; } .grid { stroke: #868e96; } }
  `;

/** An SVG of two panels: p99.9 and rate by the number of connections. */
export function plot(series: Series[]): string {
  const points = series.flatMap((one) => one.points);
  const across = logScale(points.map((point) => point.connections), (value) => value.toLocaleString("en-US"));
  const panels: Panel[] = [
    { title: "p99.9 latency: less is better", left: PANEL.left, ...latency(points) },
    { title: "replies in a second: more is better", left: PANEL.left + PANEL.width + PANEL.gap, ...throughput(points) },
  ];
  const description = `p99.9 latency and replies in a second by number of connections, of ${listed(series)}`;
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 ${WIDTH} ${HEIGHT}" role="img" aria-label="${description}">`,
    `  <style>${STYLE}</style>`,
    ...panels.flatMap((panel) => drawPanel(panel, across, series)),
    ...series.map(drawKey),
    "</svg>\n",
  ].join("\n");
}

function listed(series: Series[]): string {
  return escape(series.map(({ name }) => name).join(", "));
}

function latency(points: Point[]): Pick<Panel, "valueOf" | "scale"> {
  const valueOf = (point: Point) => point.p999;
  return { valueOf, scale: logScale(points.map(valueOf), formatLatency) };
}

function throughput(points: Point[]): Pick<Panel, "valueOf" | "scale"> {
  const valueOf = (point: Point) => point.rate;
  return { valueOf, scale: linearScale(points.map(valueOf)) };
}

function formatLatency(microseconds: number): string {
  if (microseconds >= 1_000_000) return `${microseconds / 1_000_000} s`;
  return microseconds >= 1_000 ? `${microseconds / 1_000} ms` : `${microseconds} µs`;
}

/** From the power of ten that is not above the least value to the one that is not below the greatest. */
function logScale(values: number[], label: (value: number) => string): Scale {
  const drawn = values.filter(isDrawable);
  const least = Math.floor(Math.log10(Math.min(...drawn)));
  const greatest = Math.max(Math.ceil(Math.log10(Math.max(...drawn))), least + 1);
  const ticks = Array.from({ length: greatest - least + 1 }, (_, step) => 10 ** (least + step));
  return {
    place: (value) => (Math.log10(value) - least) / (greatest - least),
    ticks: ticks.map((value) => ({ value, label: label(value) })),
  };
}

/** From 0 to the round number above the greatest value. */
function linearScale(values: number[]): Scale {
  const greatest = Math.max(...values.filter(isDrawable));
  const step = roundStep(greatest / TICKS);
  const count = Math.ceil(greatest / step);
  const ticks = Array.from({ length: count + 1 }, (_, index) => index * step);
  return {
    place: (value) => value / (count * step),
    ticks: ticks.map((value) => ({ value, label: value.toLocaleString("en-US") })),
  };
}

/** About so many lines across a panel. */
const TICKS = 5;

/** 1, 2 or 5 times a power of ten, and not below `step`. */
function roundStep(step: number): number {
  const power = 10 ** Math.floor(Math.log10(step));
  return power * ([1, 2, 5].find((factor) => factor * power >= step) ?? 10);
}

/** What was not measured is NaN, and a logarithm of 0 has no place. */
function isDrawable(value: number): boolean {
  return Number.isFinite(value) && value > 0;
}

function drawPanel(panel: Panel, across: Scale, series: Series[]): string[] {
  const { left, title, scale } = panel;
  const [right, bottom] = [left + PANEL.width, PANEL.top + PANEL.height];
  const x = (value: number) => round(left + across.place(value) * PANEL.width);
  const y = (value: number) => round(bottom - scale.place(value) * PANEL.height);
  return [
    `  <text class="title" x="${left}" y="${PANEL.top - 22}">${title}</text>`,
    ...scale.ticks.flatMap(({ value, label }) => [
      `  <line class="grid" x1="${left}" x2="${right}" y1="${y(value)}" y2="${y(value)}"/>`,
      `  <text x="${left - 8}" y="${y(value) + 4}" text-anchor="end">${label}</text>`,
    ]),
    ...across.ticks.map(({ value, label }) =>
      `  <text x="${x(value)}" y="${bottom + 20}" text-anchor="middle">${label}</text>`
    ),
    `  <text x="${(left + right) / 2}" y="${bottom + 40}" text-anchor="middle">connections</text>`,
    ...series.toReversed().flatMap((one) => drawSeries(one, series.indexOf(one), panel, x, y)), // The first one on top.
  ];
}

type Place = (value: number) => number;

function drawSeries({ points }: Series, index: number, { valueOf }: Panel, x: Place, y: Place): string[] {
  const places = points
    .filter((point) => isDrawable(point.connections) && isDrawable(valueOf(point)))
    .map((point) => ({ x: x(point.connections), y: y(valueOf(point)) }));
  const corners = places.map((place) => `${place.x},${place.y}`).join(" ");
  return [
    `  <polyline ${strokeOf(index)} points="${corners}"/>`,
    ...places.map((place) => `  <circle cx="${place.x}" cy="${place.y}" r="${MARKER}" fill="${colourOf(index)}"/>`),
  ];
}

function drawKey({ name }: Series, index: number): string {
  const width = (WIDTH - PANEL.left) / LEGEND.columns;
  const x = round(PANEL.left + (index % LEGEND.columns) * width);
  const y = LEGEND.top + Math.floor(index / LEGEND.columns) * LEGEND.rowHeight;
  return `  <line ${strokeOf(index)} x1="${x}" x2="${x + LEGEND.line}" y1="${y}" y2="${y}"/>` +
    `<text x="${x + LEGEND.line + 8}" y="${y + 4}">${escape(name)}</text>`;
}

function strokeOf(index: number): string {
  const dash = DASHES[Math.floor(index / 3) % DASHES.length];
  const dashes = dash ? ` stroke-dasharray="${dash}"` : "";
  return `class="series${index === 0 ? " first" : ""}" stroke="${colourOf(index)}"${dashes}`;
}

function colourOf(index: number): string {
  return COLOURS[index % COLOURS.length] ?? "gray";
}

/** A tenth of a pixel is finer than anybody sees. */
function round(pixels: number): number {
  return Math.round(pixels * 10) / 10;
}

function escape(text: string): string {
  return text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll('"', "&quot;");
}
