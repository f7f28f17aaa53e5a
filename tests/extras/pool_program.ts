/**
 * A pool for the tests: a test makes it with {@linkcode makePool}, and its workers make
 * it again as they load this module. Clients send commands, a line each.
 *
 * @module
 */

import { createHash } from "node:crypto";
import { type MakeServer, WorkerPool } from "../../extras/worker_pool.ts";
import { StreamRequestHandler, TcpServer, UnixServer } from "../../mod.ts";

/** The number of this worker, which only its name tells. */
const [ownNumber = "0"] = /\d+/.exec(String(Reflect.get(globalThis, "name"))) ?? [];

/** Ways for a worker to end that no server can catch. */
const CRASHES: Record<string, () => void> = {
  throw: () =>
    void setTimeout(() => {
      throw new TypeError("thrown by a\ntimer");
    }),
  reject: () => void Promise.reject(new TypeError("not awaited")),
  handled: () => void Promise.reject("handled"),
  string: () => void Promise.reject("no error"),
  close: () => Reflect.get(globalThis, "close")(),
  exit: () => Deno.exit(3),
};

/** An error that this module deals with itself. */
globalThis.addEventListener("unhandledrejection", (event) => {
  if (event.reason === "handled") event.preventDefault();
});

class Commands extends StreamRequestHandler {
  override async handle() {
    for await (const line of this.request.lines()) {
      const [command = "", argument = ""] = line.split(" ");
      if (command === "shutdown") this.server.shutdown();
      if (command === "pool-shutdown") pool?.shutdown();
      if (command === "pool-close") pool?.close();
      if (command === "hang") { while (true); }
      if (command === "compute") compute(Number(argument));
      if (command === "stall") await new Promise(() => {});
      await this.request.send(`${ownNumber} ${line}\n`);
      if (command === "crash") CRASHES[argument]?.();
    }
  }
}

/** Keeps the thread to itself for `ms`. */
function compute(ms: number): void {
  const end = performance.now() + ms;
  while (performance.now() < end) createHash("sha256").update("work").digest();
}

/** Is a kind of server of its own. */
class CommandServer extends TcpServer {}

const makeServer: MakeServer = (address) => new CommandServer(address, Commands, { grace: 60_000 });

/** Other factories, by what they do. */
const FACTORIES: Record<string, MakeServer> = {
  "throws": () => {
    throw new RangeError("there is no database");
  },
  "ignores the port": () => new TcpServer({ port: 0 }, Commands),
  "ignores loadBalanced": ({ port }) => new TcpServer({ port }, Commands),
  "makes a Unix server": () => new UnixServer({ path: "\0socketserver-pool" }, Commands),
  // @ts-expect-error Plain JavaScript may do it.
  "makes none": () => undefined,
  // The test says when to go on, by a byte, and whether there is a database.
  "asks the test": async (address) => {
    using gate = await Deno.connect({ port: Number(Deno.args[2]) });
    const answer = new Uint8Array(1);
    await gate.read(answer);
    if (answer[0] === 0) throw new RangeError("there is no database");
    return makeServer(address);
  },
};

/** A pool that keeps what `handleCrash()` is called with. */
export class NotedPool extends WorkerPool {
  readonly crashes: { number: number; reason: string; delay: number | undefined }[] = [];

  override handleCrash(number: number, reason: string, delay: number | undefined) {
    this.crashes.push({ number, reason, delay });
  }
}

let pool: WorkerPool | undefined;

/** Makes the pool of this module. */
export function makePool(workers: number, port = 0): NotedPool {
  return new NotedPool(import.meta.url, makeServer, { workers, port });
}

const { setTimeout } = globalThis;

/** A timer that does not wait where a pool waits to replace a worker. */
function withoutBackoff(callback: () => void, ms = 0) {
  return setTimeout(callback, ms >= 100 && ms <= 10_000 ? 0 : ms);
}

/** As a program: `pool_program.ts [WORKERS] [MODE] [GATE]` prints its port, and after SIGTERM its report; it waits 100 ms for handlers. */
async function main([workers = "2", mode = ""]: string[]): Promise<void> {
  const module = mode === "module is missing" ? import.meta.resolve("./missing.ts") : import.meta.url;
  pool = new WorkerPool(module, FACTORIES[mode] ?? makeServer, { port: 0, workers: Number(workers) });
  if (mode === "without back-off") globalThis.setTimeout = Object.assign(withoutBackoff, globalThis.setTimeout);
  if (mode === "makes two pools") new WorkerPool(module, makeServer, { port: 0 });
  const { port } = await pool.listen(); // A worker knows the port, too.
  if (pool.isWorker) {
    if (mode === "module throws") throw new TypeError(`no configuration for port ${typeof port}`);
    return await pool.serveForever();
  }
  const reported = Promise.withResolvers<void>();
  Deno.addSignalListener("SIGTERM", async () => {
    const report = pool?.shutdown({ grace: mode === "asks the test" ? 10_000 : 100 });
    console.log("stopping");
    console.log(JSON.stringify(await report));
    reported.resolve();
  });
  console.log(port);
  try {
    await pool.serveForever();
    await reported.promise;
  } catch (error) {
    console.log(String(error));
    await pool.serveForever(); // A pool that is closed does not serve again.
    Deno.listen({ hostname: "127.0.0.1", port }).close();
    console.log(`closed, with ${pool.activeWorkers} workers and a free port`);
    Deno.exit(1);
  }
  Deno.exit();
}

if (import.meta.main) await main(Deno.args);
