/**
 * Python's `socketserver` against mod.ts: each scenario runs against a program on
 * each (model/server.py, model/server.ts). What the clients saw and which hooks ran, in
 * which order, has to be the same. Where the two differ on purpose, the scenario says
 * how and why.
 *
 * @module
 */

import { assertEquals } from "../../deps.ts";
import { Program } from "../programs.ts";

import { DATAGRAMS } from "./model/datagrams.ts";
import { ENDINGS } from "./model/endings.ts";
import { Model, Play } from "./model/play.ts";
import { isDatagram, KINDS } from "./model/scenario.ts";
import { SERVING } from "./model/serving.ts";
import { STREAMS } from "./model/streams.ts";
import { startPython } from "./python.ts";
import { peerTest } from "../testing.ts";

const SCENARIOS = [...STREAMS, ...SERVING, ...ENDINGS, ...DATAGRAMS];

/** The lines of `lines` that `others` has not, or not as often. */
function only(lines: string[], others: string[]): string[] {
  const rest = [...others];
  return lines.filter((line) => {
    const at = rest.indexOf(line);
    if (at >= 0) rest.splice(at, 1);
    return at < 0;
  });
}

function startHere(): Program {
  const script = new URL("model/server.ts", import.meta.url).pathname;
  // Nothing less than all permissions lets it count its descriptors.
  return Program.start(Deno.execPath(), ["run", "--allow-all", "--v8-flags=--expose-gc", script]);
}

for (const kind of KINDS) {
  peerTest(["python3"], `Python's ${kind.python} and ${kind.here} do the same`, async (_folder, t) => {
    const folder = await Deno.makeTempDir({ prefix: "socketserver-" });
    try {
      await using pythonProgram = startPython("model/server.py");
      await using hereProgram = startHere();
      const [python, here] = [new Model(pythonProgram), new Model(hereProgram)];
      for (const [i, scenario] of SCENARIOS.entries()) {
        if ((scenario.datagrams ?? false) !== isDatagram(kind) || scenario.on?.(kind) === false) continue;
        const differences = scenario.differs?.filter(({ on }) => on?.(kind) ?? true) ?? [];
        const reasons = differences.map(({ reason }) => `; differs: ${reason}`);
        await t.step(scenario.name + reasons.join(""), async () => {
          const plays = [
            new Play(python, kind, "python", i, `${folder}/python${i}.sock`, scenario),
            new Play(here, kind, "here", i, `${folder}/here${i}.sock`, scenario),
          ];
          const [there = [], ours = []] = await Promise.all(plays.map((play) => play.run()));
          const actual = { python: only(there, ours), here: only(ours, there) };
          const expected = {
            python: differences.flatMap((difference) => difference.python).sort(),
            here: differences.flatMap((difference) => difference.here).sort(),
          };
          assertEquals(actual, expected);
        });
      }
    } finally {
      await Deno.remove(folder, { recursive: true });
    }
  });
}
