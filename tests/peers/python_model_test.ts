/**
 * Python's `socketserver` against mod.ts: each scenario runs against a program on
 * each (model/server.py, model/server.ts). What the clients saw and which hooks ran, in
 * which order, has to be the same. Where the two differ on purpose, the scenario says
 * how and why.
 *
 * @module
 */

import { assertEquals } from "../../deps.ts";
import { freePort, Peer, Program, programTestIn } from "../programs.ts";
import { programTest } from "../testing.ts";
import { DATAGRAMS } from "./model/datagrams.ts";
import { ENDINGS } from "./model/endings.ts";
import { Model, PATIENCE_MS, Play } from "./model/play.ts";
import { isDatagram, KINDS } from "./model/scenario.ts";
import { SERVING } from "./model/serving.ts";
import { STREAMS } from "./model/streams.ts";
import { startPython } from "./python.ts";

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
  programTest(`Python's ${kind.python} and ${kind.here} do the same`, async (t) => {
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

programTestIn("the two programs of the migration guide do the same", async (folder) => {
  const root = new URL("../../", import.meta.url);
  const readme = await Deno.readTextFile(new URL("README.md", root));
  const [, guide = ""] = readme.split("## Coming from Python's socketserver");
  const answers = [];
  for (
    const [language, command, args] of [["py", "python3", []], ["ts", Deno.execPath(), ["run", "--allow-net"]]] as const
  ) {
    const [, program = ""] = guide.match(new RegExp(`\`\`\`${language}[^\\n]*\\n([^]*?)\`\`\``)) ?? [];
    const port = freePort();
    const file = `${folder}/server.${language}`;
    await Deno.writeTextFile(file, program.replace("8010", String(port)).replace("./mod.ts", `${root}mod.ts`));
    await using _server = Program.start(command, [...args, file]);
    using client = await dialUntilAnswered(port);
    await client.send("one\r\ntwo\n\nlast");
    await client.closeWrite();
    answers.push(new TextDecoder().decode(await client.receiveAll()));
  }
  assertEquals(answers, ["ONE\nTWO\n\nLAST\n", "ONE\nTWO\n\nLAST\n"]);
});

/** The programs say nothing when they listen. */
async function dialUntilAnswered(port: number): Promise<Peer> {
  for (const deadline = performance.now() + PATIENCE_MS;;) {
    try {
      return await Peer.connect(port);
    } catch (error) {
      if (!(error instanceof Deno.errors.ConnectionRefused) || performance.now() > deadline) throw error;
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  }
}
