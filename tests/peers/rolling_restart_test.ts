/** Restarts that nobody notices: behind a balancer, and of the one process that serves a port. */

import { assert, assertEquals } from "../../deps.ts";
import { Load } from "../faults/load.ts";
import { Service } from "../programs.ts";
import { runningFile, startRunningHaproxy } from "./running_files.ts";
import { peerTest, scaled } from "../testing.ts";

const ROUNDS = scaled(1, 10);

/** A service that is started again at the same ports. */
class Restartable implements AsyncDisposable {
  readonly #args: string[];
  #service: Service;
  /** Bytes that those before have sent. */
  #bytesOut = 0;

  private constructor(args: string[], service: Service) {
    this.#args = args;
    this.#service = service;
  }

  static async start(args: string[]): Promise<Restartable> {
    return new Restartable(args, await Service.start(args));
  }

  get port(): number {
    return this.#service.port;
  }

  get opsPort(): number {
    return this.#service.opsPort;
  }

  get bytesOut(): number {
    return this.#bytesOut;
  }

  /** Ends it by SIGTERM; fails if it cuts anybody off. */
  async end(): Promise<void> {
    const { program } = this.#service;
    program.kill("SIGTERM");
    const { code, stderr } = await program.ended();
    const stopped = this.#service.events.at(-1);
    assertEquals({ code, stderr, cut: stopped?.cut }, { code: 0, stderr: "", cut: [] });
    this.#bytesOut += Number(stopped?.bytesWritten);
  }

  async restart(): Promise<void> {
    const { port, opsPort } = this.#service;
    await this.end();
    this.#service = await Service.start(this.#args, { port, opsPort });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#service[Symbol.asyncDispose]();
  }
}

/** What the unit says of a restart: how long a server accepts after SIGTERM, and how long the next restart has to wait. */
async function ruleOfUnit(): Promise<{ drainDelay: string; pauseMs: number }> {
  const unit = (await runningFile("socketserver@.service"))({});
  const [, drainDelay = ""] = /--drain-delay (\d+)/.exec(unit) ?? [];
  const [, seconds] = /^ExecStartPost=\/bin\/sleep (\d+)$/m.exec(unit) ?? [];
  return { drainDelay, pauseMs: Number(seconds) * 1_000 };
}

peerTest(
  ["haproxy"],
  `two servers behind HAProxy under load, each restarted in turn, ${ROUNDS} rounds: no exchange fails`,
  async (folder) => {
    const { drainDelay, pauseMs } = await ruleOfUnit();
    const args = ["--drain-delay", drainDelay, "--proxy-from", "127.0.0.1"];
    await using one = await Restartable.start(args);
    await using two = await Restartable.start(args);
    await using haproxy = await startRunningHaproxy(folder, one, two);
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
