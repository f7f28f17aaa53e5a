/**
 * What the tests share: tests that name the permissions they need, and handlers
 * that are named by what they do.
 *
 * @module
 */

import {
  connect,
  type ServerOptions,
  type SocketStream,
  StreamRequestHandler,
  type StreamRequestHandlerClass,
  TcpServer,
} from "../mod.ts";
import { missingPackages } from "./packages.ts";

/** The permissions that a kind of test needs; it is left out where they are not granted. */
type Needs = Partial<Record<"net" | "read" | "write" | "run", true>>;

let hasSaidSo = false;

/**
 * How much of something a test does: `short` of it in `deno task test`, `full` of it under `deno task soak`, and a tenth
 * of that under `SOCKETSERVER_SOAK=0.1 deno task soak`. The task hands the variable on, empty where nobody has set it.
 */
export function scaled(short: number, full: number): number {
  const variable = "SOCKETSERVER_SOAK";
  if (Deno.permissions.querySync({ name: "env", variable }).state !== "granted") return short;
  const share = Deno.env.get(variable);
  if (share === undefined) return short;
  if (!(Number(share || 1) > 0)) throw new RangeError(`${variable} must be a number above 0: it is ${share}`);
  return Math.max(1, Math.round(full * Number(share || 1)));
}

/** Several times what the longest test takes on a busy machine. */
const LIMIT_MS = scaled(120_000, 3_600_000);

/**
 * `fn`, which rejects if it takes too long. A test that waits for ever would say nothing, or let Deno 2.9.6 panic at the
 * next test: it does not give back the permissions of one whose event loop has run dry.
 */
function inTime(name: string, fn: (t: Deno.TestContext) => void | Promise<void>): typeof fn {
  const late = new Deno.errors.TimedOut(`"${name}" has not ended within ${LIMIT_MS} ms`); // Its stack names the file.
  return async (t) => {
    const { promise, reject } = Promise.withResolvers<never>();
    const timer = setTimeout(() => reject(late), LIMIT_MS);
    try {
      await Promise.race([fn(t), promise]);
    } finally {
      clearTimeout(timer);
    }
  };
}

function testNeeding(needs: Needs, name: string, fn: (t: Deno.TestContext) => void | Promise<void>): void {
  const names = Object.keys(needs) as (keyof Needs)[];
  const missing = names.filter((name) => Deno.permissions.querySync({ name }).state !== "granted");
  if (missing.length > 0 && !hasSaidSo) {
    hasSaidSo = true;
    const flags = missing.map((name) => `--allow-${name}`).join(" ");
    console.log(`Tests that need ${flags} are left out; "deno task test" runs all.`);
  }
  const permissions = missing.length > 0 ? {} : { permissions: needs };
  Deno.test({ name, fn: inTime(name, fn), ignore: missing.length > 0, ...permissions });
}

/** A test over real sockets of 127.0.0.1. */
export function networkTest(name: string, fn: (t: Deno.TestContext) => void | Promise<void>): void {
  testNeeding({ net: true }, name, fn);
}

/** A test with threads that load their module, over real sockets of 127.0.0.1. */
export function poolTest(name: string, fn: (t: Deno.TestContext) => void | Promise<void>): void {
  testNeeding({ net: true, read: true }, name, fn);
}

/** A test over Unix sockets, whose files lie in a folder of its own. */
export function unixTest(name: string, fn: (folder: string) => Promise<void>): void {
  testNeeding({ net: true, read: true, write: true }, name, () => inFolder(fn));
}

/** A test that starts other programs. */
export function programTest(name: string, fn: (t: Deno.TestContext) => void | Promise<void>): void {
  testNeeding({ net: true, read: true, write: true, run: true }, name, fn);
}

/** A test that starts programs, with a folder of its own. */
export function programTestIn(name: string, fn: (folder: string, t: Deno.TestContext) => Promise<void>): void {
  programTest(name, (t) => inFolder((folder) => fn(folder, t)));
}

/**
 * A test with `programs` that are not ours, in a folder of its own. It is ignored where one is missing; its name then
 * says which Debian package brings it.
 */
export function peerTest(
  programs: readonly string[],
  name: string,
  fn: (folder: string, t: Deno.TestContext) => Promise<void>,
): void {
  const packages = missingPackages(programs);
  if (packages.length === 0) return programTestIn(name, fn);
  Deno.test({ name: `${name} (apt-get install ${packages.join(" ")})`, ignore: true, fn: () => {} });
}

async function inFolder(fn: (folder: string) => Promise<void>): Promise<void> {
  const folder = await Deno.makeTempDir({ prefix: "socketserver-" });
  try {
    await fn(folder);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

/** Whether there is a file of any kind at `path`; a link counts as itself. */
export function exists(path: string): boolean {
  try {
    Deno.lstatSync(path);
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false;
    throw error;
  }
}

/** What `promise` rejects with; fails the test if it resolves. */
export async function rejectionOf(promise: Promise<unknown>): Promise<Error> {
  let value: unknown;
  try {
    value = await promise;
  } catch (error) {
    if (error instanceof Error) return error;
    throw error;
  }
  throw new TypeError(`Expected a rejection, got ${Deno.inspect(value)}`);
}

/** Resolves as soon as `condition` holds, for what tells nobody when it changes; rejects when it takes too long. */
export async function until(condition: () => boolean, patience = 10_000): Promise<void> {
  const deadline = performance.now() + patience;
  while (!condition()) {
    if (performance.now() > deadline) throw new Deno.errors.TimedOut(`Waited in vain for ${condition}`);
    await new Promise((resolve) => setTimeout(resolve, 1));
  }
}

// The test files are threads of one process. A program that one of them starts has the sockets of all until it runs, and
// keeps a closed one open for that moment.

/** Dials until nobody has the closed listener any more: the port is free then. */
export async function untilRefused(dial: () => Promise<{ close(): void }>, patience = 10_000): Promise<void> {
  const deadline = performance.now() + patience;
  while (performance.now() < deadline) {
    try {
      (await dial()).close();
    } catch (error) {
      if (error instanceof Deno.errors.ConnectionRefused) return;
    }
  }
  throw new Deno.errors.TimedOut("Somebody still answers");
}

/** Listens at an address that was given back. */
export async function listenAgain<T>(listen: () => T, patience = 10_000): Promise<T> {
  const deadline = performance.now() + patience;
  for (;;) {
    try {
      return listen();
    } catch (error) {
      if (!(error instanceof Deno.errors.AddrInUse) || performance.now() > deadline) throw error;
      await new Promise((resolve) => setTimeout(resolve, 1));
    }
  }
}

/** How many listeners `signal` has from now on. */
export function countListeners(signal: AbortSignal): () => number {
  const listeners = new Set<unknown>();
  const { addEventListener, removeEventListener } = signal;
  signal.addEventListener = (type: string, listener: EventListenerOrEventListenerObject) => {
    listeners.add(listener);
    addEventListener.call(signal, type, listener);
  };
  signal.removeEventListener = (type: string, listener: EventListenerOrEventListenerObject) => {
    listeners.delete(listener);
    removeEventListener.call(signal, type, listener);
  };
  return () => listeners.size;
}

/** Sends back what it is sent. */
export class Echo extends StreamRequestHandler {
  override async handle() {
    for await (const data of this.request) await this.request.send(data);
  }
}

/** Greets, and stays until its client leaves. */
export class Greeter extends StreamRequestHandler {
  override async handle() {
    await this.request.send("hello\n");
    await this.request.recv();
  }
}

/** How a hook may fail, and one that does. */
export const FAULTS: [how: string, hook: () => Promise<never>][] = [
  ["throws", () => {
    throw new TypeError("a bug in the hook");
  }],
  ["rejects", () => Promise.reject(new TypeError("a bug in the hook"))],
];

/** Runs `test` with a server that serves, and with clients of it; ends them all. */
export async function withServer<Server extends TcpServer>(
  server: Server,
  test: (server: Server, dial: () => Promise<SocketStream>) => Promise<void>,
): Promise<void> {
  const { port } = server.listen();
  const serving = server.serveForever();
  const clients: SocketStream[] = [];
  try {
    await test(server, async () => {
      const client = await connect({ port });
      clients.push(client);
      return client;
    });
  } finally {
    for (const client of clients) client.close();
    await server.shutdown();
    await serving;
  }
}

/**
 * Runs `action`, which sees the list grow; resolves to the arguments of each `console.error()` meanwhile, which prints
 * nothing.
 */
export async function printedBy(action: (printed: unknown[][]) => unknown): Promise<unknown[][]> {
  const printed: unknown[][] = [];
  const { error } = console;
  console.error = (...args) => void printed.push(args);
  try {
    await action(printed);
  } finally {
    console.error = error;
  }
  return printed;
}

/** Runs `test` while the runtime's `name` is `replacement`. */
export async function withDeno(
  name: keyof typeof Deno,
  replacement: (...args: never[]) => unknown,
  test: () => Promise<void>,
): Promise<void> {
  const original = Deno[name];
  Reflect.set(Deno, name, replacement);
  try {
    await test();
  } finally {
    Reflect.set(Deno, name, original);
  }
}

/** A listener that answers `accept()` with what a script says, and then waits until it is closed. */
export class FakeListener implements Deno.Listener {
  readonly addr: Deno.Addr = { transport: "tcp", hostname: "127.0.0.1", port: 1 };
  accepts = 0;
  closed = false;
  readonly #script: (Error | Deno.Conn)[];
  readonly #drained = Promise.withResolvers<void>();
  #pending: PromiseWithResolvers<Deno.Conn> | undefined;

  constructor(script: (Error | Deno.Conn)[]) {
    this.#script = [...script];
  }

  /** Resolves when the script is over and the server waits for more. */
  get drained(): Promise<void> {
    return this.#drained.promise;
  }

  accept(): Promise<Deno.Conn> {
    this.accepts++;
    const next = this.#script.shift();
    if (next instanceof Error) return Promise.reject(next);
    if (next !== undefined) return Promise.resolve(next);
    if (this.closed) return Promise.reject(new Deno.errors.BadResource("Listener has been closed"));
    this.#drained.resolve();
    this.#pending = Promise.withResolvers();
    return this.#pending.promise;
  }

  close(): void {
    if (this.closed) throw new Deno.errors.BadResource("Bad resource ID");
    this.closed = true;
    this.#pending?.reject(new Deno.errors.BadResource("Listener has been closed"));
  }

  /** Ends the wait with a connection. */
  give(conn: Deno.Conn): void {
    this.#pending?.resolve(conn);
  }

  /** Ends the wait with an error. */
  fail(error: Error): void {
    this.#pending?.reject(error);
  }

  ref(): void {}
  unref(): void {}

  [Symbol.dispose](): void {
    this.close();
  }

  async *[Symbol.asyncIterator](): AsyncIterableIterator<Deno.Conn> {
    while (true) yield await this.accept();
  }
}

/** Serves the connections that a listener of the test gives out. */
export class FakeServer extends TcpServer {
  readonly #listener: FakeListener;

  constructor(listener: FakeListener, Handler: StreamRequestHandlerClass = Echo, options: ServerOptions = {}) {
    super({ port: 0 }, Handler, options);
    this.#listener = listener;
  }

  override listen(): Deno.NetAddr {
    return this.adopt(this.#listener, { transport: "tcp", hostname: "127.0.0.1", port: 1 });
  }
}
