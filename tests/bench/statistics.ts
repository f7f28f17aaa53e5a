/**
 * What is made of the numbers that were measured. Everything here is pure.
 *
 * @module
 */

/** What one run of the load has measured; a figure that it did not is missing. */
export type Report = Partial<Record<FigureName, number>>;

export type FigureName = keyof typeof FIGURES;

interface Figure {
  title: string;
  better: "more" | "less";
  /** The value as people read it. */
  format: (value: number) => string;
}

/** All that can be measured; the load generator uses the same names. Times are in microseconds, memory in bytes. */
export const FIGURES = {
  rate: { title: "rate", better: "more", format: formatCount },
  cpu: { title: "CPU for each", better: "less", format: formatTime },
  busy: { title: "server busy", better: "more", format: formatPercent },
  p50: { title: "p50", better: "less", format: formatTime },
  p99: { title: "p99", better: "less", format: formatTime },
  p999: { title: "p99.9", better: "less", format: formatTime },
  jain: { title: "Jain fairness", better: "more", format: formatPart },
  slowestFirstReply: { title: "slowest first reply", better: "less", format: formatTime },
  neverAnswered: { title: "connections never answered", better: "less", format: formatCount },
  newcomerP50: { title: "newcomer's wait, p50", better: "less", format: formatTime },
  newcomerMax: { title: "newcomer's wait, longest", better: "less", format: formatTime },
  memory: { title: "memory", better: "less", format: formatBytes },
  startUp: { title: "until it listens", better: "less", format: formatTime },
} satisfies Record<string, Figure>;

const FIGURE_NAMES = Object.keys(FIGURES).filter(isFigureName);

function isFigureName(name: string): name is FigureName {
  return name in FIGURES;
}

/** The report in what the load generator has printed; throws with the error that is in it instead. */
export function parseReport(text: string): Report {
  if (text === "") throw new TypeError("The load printed nothing");
  const printed: unknown = JSON.parse(text);
  if (typeof printed !== "object" || printed === null) throw new TypeError(`The load printed ${text}`);
  if ("error" in printed) throw new TypeError(String(printed.error));
  const values = new Map<string, unknown>(Object.entries(printed));
  const report: Report = {};
  for (const name of FIGURE_NAMES) {
    const value = values.get(name);
    if (typeof value === "number") report[name] = value;
  }
  return report;
}

/** The middle one of the numbers that are finite; NaN if there is none. */
export function median(numbers: number[]): number {
  const sorted = numbers.filter(Number.isFinite).sort((one, other) => one - other);
  const middle = sorted.length / 2;
  const [lower = NaN, upper = NaN] = [sorted[Math.ceil(middle) - 1], sorted[Math.floor(middle)]];
  return (lower + upper) / 2;
}

/** The median of a figure over the rounds. */
export function medianOf(figure: FigureName, reports: Report[]): number {
  return median(reports.map((report) => report[figure] ?? NaN));
}

/** How many times better `ours` is than `theirs`: 2 is twice the rate, or half the time. */
export function ratio(figure: FigureName, ours: Report, theirs: Report): number {
  const [one, other] = [ours[figure] ?? NaN, theirs[figure] ?? NaN];
  return FIGURES[figure].better === "more" ? one / other : other / one;
}

/** What ours is held to, and how it is compared with the other one's. */
export interface Goal {
  figure: FigureName;
  target: number;
  /** Whom ours is compared with. */
  against?: string;
  /** "value": the figure itself, with nobody's; "ratio": see {@linkcode ratio}; "difference": how much more ours is. */
  by: "value" | "ratio" | "difference";
}

/** What is measured. */
export interface Topic {
  /** What `--only` knows it by. */
  id: string;
  title: string;
  /** What its rate counts. */
  unit: string;
  goals: Goal[];
  /** What the table of the peers shows. */
  figures: FigureName[];
}

/** What came of it. */
export interface Outcome {
  topic: Topic;
  /** By name, ours first; one report for each round, which is empty if it failed. */
  reports: Map<string, Report[]>;
  failures: string[];
}

/** The figure that the goal is about; each round is compared in itself, as machines have better and worse moments. */
export function reached(goal: Goal, ours: Report[], theirs: Report[]): number {
  return median(ours.map((report, round) => {
    const other = theirs[round] ?? {};
    if (goal.by === "ratio") return ratio(goal.figure, report, other);
    const value = report[goal.figure] ?? NaN;
    return goal.by === "value" ? value : value - (other[goal.figure] ?? NaN);
  }));
}

/** Whether more is better of what {@linkcode reached} returns. */
function isFloor({ by, figure }: Goal): boolean {
  return by === "ratio" || FIGURES[figure].better === "more";
}

export function isMet(goal: Goal, value: number): boolean {
  return isFloor(goal) ? value >= goal.target : value <= goal.target;
}

export function formatTarget(goal: Goal): string {
  return `${isFloor(goal) ? "≥" : "≤"} ${formatReached(goal, goal.target)}`;
}

export function formatReached(goal: Goal, value: number): string {
  return goal.by === "ratio" ? formatRatio(value) : FIGURES[goal.figure].format(value);
}

export function formatRatio(value: number): string {
  return formatUnless(value, () => value.toFixed(value < 10 ? 2 : 1));
}

function formatPercent(part: number): string {
  return formatUnless(part, () => `${(part * PERCENT).toFixed(0)} %`);
}

const PERCENT = 100;

/** Something from 0 to 1 whose last thousandths matter. */
function formatPart(value: number): string {
  return formatUnless(value, () => value.toFixed(3));
}

export function formatCount(value: number): string {
  return formatUnless(value, () => Math.round(value).toLocaleString("en-US"));
}

const MICROSECONDS_PER_MS = 1_000;

export function formatTime(microseconds: number): string {
  const milliseconds = microseconds / MICROSECONDS_PER_MS;
  if (Math.abs(milliseconds) < 1) return formatUnless(microseconds, () => `${toThreeDigits(microseconds)} µs`);
  return formatUnless(milliseconds, () => `${toThreeDigits(milliseconds)} ms`);
}

const BYTES_PER_MIB = 2 ** 20;

export function formatBytes(bytes: number): string {
  return formatUnless(bytes, () => `${toThreeDigits(bytes / BYTES_PER_MIB)} MiB`);
}

/** At least three digits, and all that stand before the point. */
function toThreeDigits(value: number): string {
  const size = Math.abs(value);
  if (size >= 100) return formatCount(value);
  return value.toFixed(size >= 10 ? 1 : 2);
}

function formatUnless(value: number, format: () => string): string {
  return Number.isFinite(value) ? format() : "-";
}
