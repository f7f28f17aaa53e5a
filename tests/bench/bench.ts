/**
 * `deno task bench`: the servers of `mod.ts` beside the loop that a person writes
 * by hand in Deno, and beside other servers. README.md here says what is measured.
 *
 * @module
 */

import os from "node:os";
import { parseArgs } from "node:util";
import { Kit } from "./kit.ts";
import { type Effort, runStartUp, runWork, START_UP } from "./measure.ts";
import { plot, type Series } from "./plot.ts";
import { ALL_PEERS, OURS } from "./servers.ts";
import { type FigureName, FIGURES, medianOf, type Outcome } from "./statistics.ts";
import { goalTable, type GrowthPoint, growthTable, peerTable } from "./table.ts";
import { allWorks, GROWTH_ID, type Work } from "./works.ts";

const USAGE = `Measures the servers of mod.ts beside a loop written by hand and other servers.

Usage: deno task bench [options]

  --quick          a rough idea within a minute: short rounds, few peers
  --only WORK,..   these works only
  --rounds N       measure each server so often, by turns (5; quick: 1)
  --seconds S      for so long each time (1; quick: 0.3)
  --write          keep the results in tests/bench/results.md and results.svg
  --help           print this and end`;

const FLAGS = {
  quick: { type: "boolean", default: false },
  only: { type: "string" },
  rounds: { type: "string" },
  seconds: { type: "string" },
  write: { type: "boolean", default: false },
  help: { type: "boolean", default: false },
} as const;

const FULL: Effort = { rounds: 5, seconds: 1 };
const QUICK: Effort = { rounds: 1, seconds: 0.3 };

/** What the tables of the growth show. */
const GROWTH_FIGURES: FigureName[] = ["rate", "p50", "p99", "p999", "memory", "cpu"];

const HERE = new URL(".", import.meta.url).pathname;

/** What the command line asks for. */
interface Settings extends Effort {
  works: Work[];
  isStartTimed: boolean;
  isWritten: boolean;
}

/** What was measured. */
interface Results {
  outcomes: Outcome[];
  growth: GrowthPoint[];
  failures: string[];
}

async function main(args: string[]): Promise<void> {
  const settings = parse(args);
  if (settings === null) return console.log(USAGE);
  const begun = performance.now();
  await using kit = await Kit.make();
  const machine = describe(kit, settings);
  console.log(machine);
  const results = await measure(settings, kit);
  const text = formatResults(results);
  const seconds = Math.round((performance.now() - begun) / MS_PER_SECOND);
  console.log(`\n${text}\nIt took ${seconds} s.`);
  if (settings.isWritten) await write(machine, text, results);
}

const MS_PER_SECOND = 1_000;

/** `null` if the usage is asked for. */
function parse(args: string[]): Settings | null {
  const { values: flags } = parseArgs({ args, options: FLAGS });
  if (flags.help) return null;
  const works = allWorks(flags.quick);
  const effort = flags.quick ? QUICK : FULL;
  const ids = new Set([...works.map(({ id }) => id), START_UP.id]);
  const wanted = new Set(flags.only?.split(",") ?? ids);
  const [unknown] = wanted.difference(ids);
  if (unknown !== undefined) throw new TypeError(`There is no work "${unknown}"; there are ${[...ids].join(", ")}`);
  return {
    works: works.filter(({ id }) => wanted.has(id)),
    isStartTimed: wanted.has(START_UP.id),
    isWritten: flags.write,
    rounds: Math.ceil(positive("--rounds", flags.rounds) ?? effort.rounds),
    seconds: positive("--seconds", flags.seconds) ?? effort.seconds,
  };
}

function positive(flag: string, text: string | undefined): number | undefined {
  const value = text === undefined ? undefined : Number(text);
  if (value === undefined || (value > 0 && value < Infinity)) return value;
  throw new TypeError(`${flag} must be a number above 0: it is "${text}"`);
}

async function measure(settings: Settings, kit: Kit): Promise<Results> {
  const results: Results = { outcomes: [], growth: [], failures: [] };
  for (const work of settings.works) {
    console.error(`... ${work.title}`);
    const outcome = await runWork(work, kit, settings);
    results.failures.push(...outcome.failures);
    if (work.id !== GROWTH_ID) results.outcomes.push(outcome);
    else results.growth.push({ connections: work.load.connections, reports: outcome.reports });
  }
  if (!settings.isStartTimed) return results;
  console.error(`... ${START_UP.title}`);
  const outcome = await runStartUp(kit, settings);
  results.failures.push(...outcome.failures);
  results.outcomes.push(outcome);
  return results;
}

function describe(kit: Kit, { rounds, seconds }: Effort): string {
  const cores = navigator.hardwareConcurrency;
  const model = os.cpus()[0]?.model ?? "unknown processor";
  return [
    `${model}, ${cores} cores, Linux ${os.release()}, ${new Date().toISOString().slice(0, 10)}`,
    kit.canPin ? "the server has one core, the load another" : "the server and the load share all cores",
    `rounds: ${rounds}, each of ${seconds} s`,
    ...kit.versions,
    ...kit.missing.map((name) => `missing: ${name}`),
  ].map((line) => `- ${line}`).join("\n");
}

function formatResults({ outcomes, growth, failures }: Results): string {
  const sections: string[] = [];
  const add = (title: string, body: string) => sections.push(`## ${title}\n\n${body}\n`);
  if (outcomes.length > 0) {
    add("What ours is held to", goalTable(outcomes));
    add("Beside the others", peerTable(outcomes, [OURS, ...ALL_PEERS].map(({ name }) => name)));
  }
  for (const figure of growth.length > 0 ? GROWTH_FIGURES : []) {
    add(`How it grows: ${figure === "rate" ? "replies/s" : FIGURES[figure].title}`, growthTable(figure, growth));
  }
  if (failures.length > 0) add("What failed", failures.map((failure) => `- ${failure}`).join("\n"));
  return sections.join("\n");
}

async function write(machine: string, text: string, { growth }: Results): Promise<void> {
  const head = "# Results\n\nWritten by `deno task bench --write`; [README.md](README.md) says what the words mean.";
  await Deno.writeTextFile(`${HERE}results.md`, `${head}\n\n${machine}\n\n${text}`);
  if (growth.length > 0) await Deno.writeTextFile(`${HERE}results.svg`, plot(seriesOf(growth)));
}

function seriesOf(growth: GrowthPoint[]): Series[] {
  const names = new Set(growth.flatMap(({ reports }) => [...reports.keys()]));
  return [...names].map((name) => ({
    name,
    points: growth.map(({ connections, reports }) => {
      const own = reports.get(name) ?? [];
      return { connections, rate: medianOf("rate", own), p999: medianOf("p999", own) };
    }),
  }));
}

if (import.meta.main) {
  try {
    await main(Deno.args);
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    console.error(`bench.ts: ${error.message}`);
    Deno.exitCode = 1;
  }
}
