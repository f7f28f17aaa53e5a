/**
 * Helpers for the tests of pools: a pool that serves, its clients, and timers that are changed.
 *
 * @module
 */

import { connect, type SocketStream, StreamRequestHandler, TcpServer } from "../../mod.ts";
import { assert, assertEquals } from "../../deps.ts";
import { freePort, Program } from "../programs.ts";
import { until } from "../testing.ts";
import { makePool } from "./pool_program.ts";

/** Longer than anything takes on a busy machine, the check of the workers' types included; a test that passes does not wait for it. */
export const PATIENCE_MS = 60_000;

export const SCRIPT = new URL("pool_program.ts", import.meta.url).pathname;

export class Unused extends StreamRequestHandler {
  override handle() {}
}

export const makeUnused = (address: { port: number }) => new TcpServer(address, Unused);

/** Starts a pool whose workers all serve when this resolves; `await using` shuts it down. */
export async function startPool(workers: number) {
  const pool = makePool(workers, await freePort()); // The tests look whether it is free again.
  const { port } = await pool.listen();
  const served = pool.serveForever();
  await until(() => pool.activeWorkers === workers, PATIENCE_MS);
  const end = async () => {
    const report = await pool.shutdown();
    await served;
    return report;
  };
  return { pool, port, served, end, [Symbol.asyncDispose]: () => end().then(() => {}, () => {}) };
}

/** Starts the pool as a program. */
export function startProgram(args: string[], permissions = ["--allow-net", "--allow-read"]): Program {
  return Program.start(Deno.execPath(), ["run", "--no-prompt", ...permissions, SCRIPT, ...args]);
}

/** A client, and the number of the worker that serves it. */
export interface Client {
  stream: SocketStream;
  number: number;
}

export async function dial(port: number): Promise<Client> {
  const stream = await connect({ port, timeout: PATIENCE_MS });
  return { stream, number: await ask(stream, "who") };
}

/** Sends a command; resolves to the number of the worker that answers. */
export async function ask(stream: SocketStream, command: string): Promise<number> {
  await stream.send(command + "\n");
  const [number, ...echoed] = (await stream.readLine() ?? "nobody").split(" ");
  assertEquals(echoed.join(" "), command);
  return Number(number);
}

/** Dials until each of the numbers serves a client. */
export async function dialAll(port: number, numbers: number[]): Promise<Client[]> {
  const clients: Client[] = [];
  while (!numbers.every((number) => clients.some((client) => client.number === number))) {
    // Many at once, as an idle worker takes all that come one by one.
    clients.push(...await Promise.all(Array.from({ length: 10 }, () => dial(port))));
    assert(clients.length < 2_000, `2,000 clients were served by ${new Set(clients.map(({ number }) => number)).size}`);
  }
  return clients;
}

/** A client of worker `number`. */
export function clientOf(clients: Client[], number: number): SocketStream {
  const client = clients.find((client) => client.number === number);
  assert(client !== undefined);
  return client.stream;
}

export function closeAll(clients: Client[]): void {
  for (const { stream } of clients) stream.close();
}

/** Waits until the server has hung up. */
export async function hangUp(stream: SocketStream): Promise<void> {
  assertEquals(await stream.readLine().catch(() => null), null);
  stream.close();
}

/** Runs `run` with timers whose milliseconds `change` changes; "now" calls back at once. */
export async function withTimers(
  change: (ms: number, callback: () => void) => number | "now",
  run: () => void | Promise<void>,
): Promise<void> {
  const { setTimeout } = globalThis;
  const changed = (callback: () => void, ms = 0) => {
    const wait = change(ms, callback);
    if (wait === "now") callback();
    return setTimeout(wait === "now" ? () => {} : callback, wait === "now" ? 0 : wait);
  };
  globalThis.setTimeout = Object.assign(changed, setTimeout);
  try {
    await run();
  } finally {
    globalThis.setTimeout = setTimeout;
  }
}

/** No back-off takes its time. */
export const withoutBackoff = (ms: number) => ms >= 100 && ms <= 10_000 ? 0 : ms;
