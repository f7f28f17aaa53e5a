/**
 * A pool for the tests: the test makes it with {@linkcode makePool}, and its workers
 * make it again as they load this module. Clients send commands, a line each.
 *
 * @module
 */

import { createHash } from "node:crypto";
import {
  type MakeServer,
  StreamRequestHandler,
  TcpServer,
  type WorkerCrash,
  WorkerPool,
  type WorkerPoolOptions,
} from "../mod.ts";

/** The number of this thread, which `makeServer` is told. */
let ownNumber = 0;

/** Ways for a worker to end that no server can catch. */
const CRASHES: Record<string, () => void> = {
  throw: () =>
    void setTimeout(() => {
      throw new TypeError("thrown by a timer");
    }),
  reject: () => void Promise.reject(new TypeError("nobody awaits this")),
  close: () => self.close(),
  exit: () => Deno.exit(3),
};

class Commands extends StreamRequestHandler {
  override async handle() {
    for await (const line of this.request.lines()) {
      const [command = "", argument = ""] = line.split(" ");
      if (command === "shutdown") this.server.shutdown();
      if (command === "hang") { while (true); }
      if (command === "compute") compute(Number(argument));
      if (command === "stall") await new Promise(() => {});
      const limit = this.server.maxConnections;
      await this.request.send(`${ownNumber} ${line} ${command === "limit" ? limit : ""}\n`);
      if (command === "crash") CRASHES[argument]?.();
    }
  }
}

/** Keeps the thread to itself for `ms`. */
function compute(ms: number): void {
  const end = performance.now() + ms;
  while (performance.now() < end) createHash("sha256").update("work").digest();
}

/** Makes the server of thread `number`. */
export function makeServer(number: number): TcpServer {
  ownNumber = number;
  return new TcpServer({ port: 0 }, Commands, { grace: 60_000 });
}

/** A pool that keeps what its main thread is told. */
export class NotedPool extends WorkerPool {
  readonly crashes: WorkerCrash[] = [];

  override handleCrash(crash: WorkerCrash) {
    this.crashes.push(crash);
  }
}

/** Makes the pool of this module. */
export function makePool(options: WorkerPoolOptions = {}, make: MakeServer = makeServer): NotedPool {
  return new NotedPool(import.meta.url, make, options);
}

/** As a program: `pool_server.ts [WORKERS] [FAILURE]` prints its port, and after SIGTERM its report; it waits 100 ms for handlers. */
async function main([workers = "2", failure = ""]: string[]): Promise<void> {
  const module = failure === "module is missing" ? import.meta.resolve("./missing.ts") : import.meta.url;
  const make = async (number: number) => {
    if (number > 0 && failure === "worker cannot make its server") throw new RangeError("there is no database");
    if (number > 0 && failure === "worker takes its time") {
      console.log("preparing");
      await new Promise((resolve) => setTimeout(resolve, 300));
    }
    return makeServer(number);
  };
  const pool = new WorkerPool(module, make, { workers: Number(workers) });
  if (pool.isWorker) return await pool.serveForever();
  const reported = Promise.withResolvers<void>();
  Deno.addSignalListener("SIGTERM", async () => {
    console.log(JSON.stringify(await pool.shutdown({ grace: 100 })));
    reported.resolve();
  });
  const { port } = await pool.listen();
  console.log(port);
  try {
    await pool.serveForever();
    await reported.promise;
  } catch (error) {
    console.log(String(error));
    await pool.serveForever(); // A pool that is closed does not serve again.
    Deno.listen({ port }).close();
    console.log(`closed, with ${pool.activeWorkers} workers and a free port`);
    Deno.exit(1);
  }
  Deno.exit();
}

if (import.meta.main) await main(Deno.args);
