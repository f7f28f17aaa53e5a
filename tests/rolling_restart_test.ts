/** Restarts that nobody notices: behind a balancer, and of the one process that serves a port. */

import { assert, assertEquals } from "../deps.ts";
import { startHaproxy } from "./balancers.ts";
import { Load } from "./faults/load.ts";
import { type Program, programTestIn, startScript } from "./programs.ts";
import { runningFile } from "./running_files.ts";
import { scaled } from "./testing.ts";

const ROUNDS = scaled(1, 20);

/** A server that is started again at the same ports. */
class Restartable implements AsyncDisposable {
  readonly #args: string[];
  #program: Program;
  /** Bytes that those before have sent. */
  #bytesOut = 0;
  readonly port: number;
  readonly health: number;

  private constructor(args: string[], program: Program, port: number, health: number) {
    this.#args = args;
    this.#program = program;
    this.port = port;
    this.health = health;
  }

  static async start(args: string[]): Promise<Restartable> {
    const program = startScript("server.ts", ["--port", "0", "--health", "0", ...args]);
    const ports = await program.printed(/connection... on 127\.0\.0\.1:(\d+)\nhealth is told on 127\.0\.0\.1:(\d+)\n/);
    return new Restartable(args, program, Number(ports[1]), Number(ports[2]));
  }

  get bytesOut(): number {
    return this.#bytesOut;
  }

  /** Ends it by SIGTERM; fails if it cuts anybody off. */
  async end(): Promise<void> {
    this.#program.kill("SIGTERM");
    const { code, stdout, stderr } = await this.#program.ended();
    const [, cut, bytesOut] = /cut off: (\d+), bytes in: \d+, bytes out: (\d+)\n$/.exec(stdout) ?? [];
    assertEquals({ code, stderr, cut }, { code: 0, stderr: "", cut: "0" });
    this.#bytesOut += Number(bytesOut);
  }

  async restart(): Promise<void> {
    await this.end();
    this.#program = startScript("server.ts", ["--port", `${this.port}`, "--health", `${this.health}`, ...this.#args]);
    await this.#program.printed("health is told on");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#program[Symbol.asyncDispose]();
  }
}

/** What the unit says of a restart: how long a server accepts after SIGTERM, and how long the next restart has to wait. */
async function ruleOfUnit(): Promise<{ drainDelay: string; pauseMs: number }> {
  const unit = (await runningFile("socketserver@.service"))({});
  const [, drainDelay = ""] = /--drain-delay (\d+)/.exec(unit) ?? [];
  const [, seconds] = /^ExecStartPost=\/bin\/sleep (\d+)$/m.exec(unit) ?? [];
  return { drainDelay, pauseMs: Number(seconds) * 1_000 };
}

programTestIn(
  `two servers behind HAProxy under load, each restarted in turn, ${ROUNDS} rounds: no exchange fails`,
  async (folder) => {
    const { drainDelay, pauseMs } = await ruleOfUnit();
    const args = ["--lines", "--drain-delay", drainDelay, "--proxy-from", "127.0.0.1"];
    await using one = await Restartable.start(args);
    await using two = await Restartable.start(args);
    const config = await runningFile("haproxy.cfg");
    await using haproxy = await startHaproxy(folder, (claim) =>
      config({
        "0.0.0.0:8000": `127.0.0.1:${claim("front")}`,
        "127.0.0.1:8009": `127.0.0.1:${one.port}`,
        "port 18009": `port ${one.health}`,
        "127.0.0.1:8019": `127.0.0.1:${two.port}`,
        "port 18019": `port ${two.health}`,
      }));
    const load = new Load(haproxy.port("front"), { brief: 30, lasting: 10, exchanges: 3 });
    for (let round = 1; round <= ROUNDS; round++) {
      for (const server of [one, two]) {
        await server.restart();
        // The rule itself is tried, which looks at no balancer: it has noticed by then.
        await new Promise((resolve) => setTimeout(resolve, pauseMs));
      }
    }
    const { failures, answered, bytes, ended } = await load.end();
    assertEquals(failures, []);
    assert(!haproxy.log.includes("no server available"), haproxy.log);
    await Promise.all([one.end(), two.end()]);
    // What was answered has arrived, and what was asked twice was answered once. A handler that was given a question
    // which crossed the end would have answered it, or complained of a client that is gone, which end() would have seen.
    assertEquals(one.bytesOut + two.bytesOut, bytes);
    assert(answered > 100 * ROUNDS && ended > 0, `${answered} answers, ${ended} ends`);
  },
);
