/**
 * Lets one process after the other take a port over under load, and prints what
 * was lost: `takeover.ts HANDOVERS BRIEF LASTING`. It runs by itself, so that it
 * can be started in a network of its own:
 *
 * ```sh
 * deno run --unstable-net --allow-net --allow-run --allow-read --allow-env tests/faults/takeover.ts 20 30 10
 * ```
 *
 * @module
 */

import { assertEquals } from "../../deps.ts";
import { Load } from "./load.ts";
import { Program } from "../programs.ts";
import { until } from "../testing.ts";

/** Exchanges between two handovers. */
const EXCHANGES = 100;

async function startOn(port: number): Promise<Program> {
  const script = new URL("takeover_server.ts", import.meta.url).pathname;
  const permissions = ["--unstable-net", "--no-config", "--no-prompt", "--allow-net=127.0.0.1"];
  const program = Program.start(Deno.execPath(), ["run", ...permissions, script, `${port}`]);
  await program.printed(/on 127\.0\.0\.1:\d+\n/);
  return program;
}

/** Ends it by SIGTERM; fails if it cuts anybody off. Resolves to the bytes that it has sent. */
async function end(program: Program): Promise<number> {
  program.kill("SIGTERM");
  const { code, stdout, stderr } = await program.ended();
  const [, cut, bytesOut] = /cut off: (\d+), bytes out: (\d+)\n$/.exec(stdout) ?? [];
  assertEquals({ code, stderr, cut }, { code: 0, stderr: "", cut: "0" });
  return Number(bytesOut);
}

const [handovers = 1, brief = 1, lasting = 1] = Deno.args.map(Number);
await using programs = new AsyncDisposableStack();
let old = programs.use(await startOn(0));
const port = Number(/:(\d+)\n/.exec(old.stdout)?.[1]);
const load = new Load(port, { brief, lasting });
let bytesOut = 0;
for (let count = 1; count <= handovers; count++) {
  const next = programs.use(await startOn(port));
  const { answered } = load.report;
  await until(() => load.report.answered > answered + EXCHANGES);
  bytesOut += await end(old);
  old = next;
  console.log(`handover ${count}`);
}
const report = await load.end();
bytesOut += await end(old);
console.log(JSON.stringify({ ...report, bytesOut }));
