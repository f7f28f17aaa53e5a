/**
 * The tables of the results, in Markdown that is as readable on a terminal. Pure.
 *
 * @module
 */

import {
  type FigureName,
  FIGURES,
  formatCount,
  formatRatio,
  formatReached,
  formatTarget,
  type Goal,
  isMet,
  median,
  medianOf,
  type Outcome,
  ratio,
  reached,
  type Report,
} from "./statistics.ts";

/** What was measured with so many connections. */
export interface GrowthPoint {
  connections: number;
  reports: Map<string, Report[]>;
}

/** The first row is the heading; the first column is text, and the others are numbers. */
export function formatTable(rows: string[][]): string {
  const [heading = [], ...body] = rows;
  const widths = heading.map((_, column) => Math.max(MIN_WIDTH, ...rows.map((row) => (row[column] ?? "").length)));
  const line = (cells: string[]) => `| ${cells.join(" | ")} |`;
  const pad = (row: string[]) =>
    widths.map((width, column) =>
      column === 0 ? (row[column] ?? "").padEnd(width) : (row[column] ?? "").padStart(width)
    );
  const rule = widths.map((width, column) => column === 0 ? "-".repeat(width) : `${"-".repeat(width - 1)}:`);
  return [line(pad(heading)), line(rule), ...body.map((row) => line(pad(row)))].join("\n");
}

/** Markdown's shortest rule is "--:". */
const MIN_WIDTH = 3;

/** Ours first, under whatever name. */
function oursAmong(reports: Map<string, Report[]>): Report[] {
  return reports.values().next().value ?? [];
}

function show(figure: FigureName, reports: Report[]): string {
  return FIGURES[figure].format(medianOf(figure, reports));
}

function titleOf(figure: FigureName, unit: string): string {
  return figure === "rate" ? unit : FIGURES[figure].title;
}

const GOAL_HEADING = [
  "work",
  "figure",
  "ours",
  "theirs",
  "of",
  "reached",
  "target",
  "met",
  "CPU of ours",
  "CPU, ratio",
  "busy",
];

/** What ours is held to: a row for each goal. */
export function goalTable(outcomes: Outcome[]): string {
  const rows = outcomes.flatMap((outcome) => outcome.topic.goals.map((goal) => goalRow(outcome, goal)));
  return formatTable([GOAL_HEADING, ...rows]);
}

function goalRow({ topic, reports }: Outcome, goal: Goal): string[] {
  const ours = oursAmong(reports);
  const theirs = reports.get(goal.against ?? "") ?? [];
  const value = reached(goal, ours, theirs);
  return [
    topic.title,
    titleOf(goal.figure, topic.unit),
    show(goal.figure, ours),
    goal.against === undefined ? "" : show(goal.figure, theirs),
    goal.against ?? "",
    formatReached(goal, value),
    formatTarget(goal),
    Number.isNaN(value) ? "not measured" : isMet(goal, value) ? "yes" : "no",
    show("cpu", ours),
    formatRatio(median(ours.map((report, round) => ratio("cpu", report, theirs[round] ?? {})))),
    lessBusy(ours, theirs),
  ];
}

/** How busy the less busy one was; where that is little, something else was the limit. */
function lessBusy(...both: Report[][]): string {
  const parts = both.map((reports) => medianOf("busy", reports)).filter(Number.isFinite);
  return parts.length === 0 ? "-" : FIGURES.busy.format(Math.min(...parts));
}

/** The rates and more of `names`, ours first: a row for each figure of each topic that others than the first two were in. */
export function peerTable(outcomes: Outcome[], names: string[]): string {
  const shared = outcomes.filter(({ reports }) => names.filter((name) => reports.has(name)).length > 2);
  const rows = shared.flatMap(({ topic, reports }) =>
    topic.figures.map((figure) => [
      topic.title,
      titleOf(figure, topic.unit),
      ...names.map((name) => show(figure, reports.get(name) ?? [])),
    ])
  );
  return formatTable([["work", "figure", ...names], ...rows]);
}

/** What becomes of one figure with the number of connections: a row for each server. */
export function growthTable(figure: FigureName, points: GrowthPoint[]): string {
  const names = [...new Set(points.flatMap(({ reports }) => [...reports.keys()]))];
  const rows = names.map((name) => [name, ...points.map(({ reports }) => show(figure, reports.get(name) ?? []))]);
  return formatTable([["connections", ...points.map(({ connections }) => formatCount(connections))], ...rows]);
}
