/**
 * Runs the works: the servers of one are started together and measured in turns,
 * so that all see the same good and bad moments of the machine.
 *
 * @module
 */

import { type Kit, LOAD_CORE } from "./kit.ts";
import { type Contender, Server, timeStart } from "./servers.ts";
import { type Outcome, parseReport, type Report, type Topic } from "./statistics.ts";
import { type Load, rivals, type Work } from "./works.ts";

/** How much is measured. */
export interface Effort {
  rounds: number;
  /** Of each round, after a warm-up. */
  seconds: number;
}

/** So long a server has after a round, to see that its clients have left. */
const PAUSE_MS = 100;

/** Starts are short, and their times vary: so many are timed for each round. */
const STARTS_PER_ROUND = 4;

/** How long our own program needs until it listens, against a script that does nothing else. */
export const START_UP: Topic = {
  id: "start",
  title: "start-up of server.ts",
  unit: "starts/s",
  goals: [{ figure: "startUp", against: "empty script", by: "difference", target: 20_000 }],
  figures: [],
};

const START_UP_SCRIPTS = {
  ours: new URL("../../server.ts", import.meta.url).pathname,
  "empty script": new URL("peers/empty.ts", import.meta.url).pathname,
};

export async function runWork(work: Work, kit: Kit, effort: Effort): Promise<Outcome> {
  const contenders = work.contenders.filter((contender) => isPossible(contender, kit));
  const outcome: Outcome = { topic: work, reports: new Map(), failures: [] };
  const run = (server: Server) => runLoad(kit, server, work.load, effort.seconds * (work.length ?? 1));
  if (work.isFresh) await runOnce(contenders, kit, run, outcome);
  else await runInTurns(contenders, kit, takingTurns(rivals(work), effort.rounds), run, outcome);
  return outcome;
}

export async function runStartUp(kit: Kit, { rounds }: Effort): Promise<Outcome> {
  const outcome: Outcome = { topic: START_UP, reports: new Map(), failures: [] };
  for (let round = 0; round < rounds * STARTS_PER_ROUND; round++) {
    for (const [name, script] of rotated(Object.entries(START_UP_SCRIPTS), round)) {
      await note(outcome, name, async () => ({ startUp: await timeStart(script, kit) }));
    }
  }
  return outcome;
}

function isPossible({ peer, transport }: Contender, kit: Kit): boolean {
  return kit.has(peer.program) && (!transport.endsWith("tls") || kit.canTls);
}

type Run = (server: Server) => Promise<Report>;

/** For each round, whether somebody of that name is in it. */
type Turns = ((name: string) => boolean)[];

/** Whom nothing is held against needs no more rounds than show about where it stands. */
const SPECTATOR_ROUNDS = 3;

function takingTurns(rivals: Set<string>, rounds: number): Turns {
  return Array.from({ length: rounds }, (_, round) => (name) => round < SPECTATOR_ROUNDS || rivals.has(name));
}

async function runInTurns(contenders: Contender[], kit: Kit, turns: Turns, run: Run, outcome: Outcome): Promise<void> {
  await using started = new AsyncDisposableStack();
  const servers: Server[] = [];
  for (const contender of contenders) {
    outcome.reports.set(contender.name, []);
    const server = await attempt(outcome, contender.name, () => Server.start(contender, kit));
    if (server !== undefined) servers.push(started.use(server));
  }
  for (const [round, isIn] of turns.entries()) {
    const running = servers.filter(({ name }) => isIn(name));
    for (const server of rotated(running, round)) await note(outcome, server.name, () => run(server));
  }
}

/** For figures that remember what was before: a new server for each. They do not waver, so one round is enough. */
async function runOnce(contenders: Contender[], kit: Kit, run: Run, outcome: Outcome): Promise<void> {
  for (const contender of contenders) {
    outcome.reports.set(contender.name, []);
    await using server = await attempt(outcome, contender.name, () => Server.start(contender, kit));
    if (server !== undefined) await note(outcome, server.name, () => run(server));
  }
}

/** Another one begins each round, as the first may be the one that is disturbed. */
function rotated<T>(items: T[], by: number): T[] {
  const first = by % Math.max(items.length, 1);
  return [...items.slice(first), ...items.slice(0, first)];
}

async function note(outcome: Outcome, name: string, run: () => Promise<Report>): Promise<void> {
  const report = await attempt(outcome, name, run) ?? {};
  const reports = outcome.reports.get(name) ?? [];
  outcome.reports.set(name, [...reports, report]);
  await new Promise((resolve) => setTimeout(resolve, PAUSE_MS));
}

/** What `action` returns; if it rejects, that is noted as a failure of the peer. */
async function attempt<T>(outcome: Outcome, name: string, action: () => Promise<T>): Promise<T | undefined> {
  try {
    return await action();
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    outcome.failures.push(`${outcome.topic.title}, ${name}: ${error.message}`);
  }
}

async function runLoad(kit: Kit, server: Server, load: Load, seconds: number): Promise<Report> {
  const options = Object.entries({ ...load, seconds }).map(([name, value]) => `${name}=${value}`);
  const { stdout } = await kit.command([kit.load, ...options, ...server.loadArguments], LOAD_CORE).output();
  return parseReport(new TextDecoder().decode(stdout));
}
