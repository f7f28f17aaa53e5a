/**
 * One port, every core: {@linkcode WorkerPool}, which is Python's `ForkingMixIn`.
 *
 * @module
 */

import { printable, StreamRequestHandler, StreamServer, TcpServer } from "../mod.ts";
import type { ServerStats, ShutdownReport, TcpServerAddress } from "../mod.ts";

const START_MS = 60_000; // For a thread to load its module and to begin to serve.
const BACKOFF_MIN_MS = 100; // Before a worker that ended is replaced; doubles with each further end.
const BACKOFF_MAX_MS = 10_000;
const STABLE_MS = 30_000; // A worker that served for this long resets the back-off.
const HANG_MS = 5_000; // After `grace`. A worker that has not reported by then is computing without end.
const STATS_INTERVAL_MS = 250; // Between the reports of a worker's counts, if they changed.
const MAX_TIMER_MS = 2_147_483_647; // A longer timer fires at once.

// --- Between the threads ------------------------------------------------------

/** All that a worker has to know: `worker 2 of file:///srv/server.ts on 127.0.0.1:8009`. It is also its lock's name. */
const WORKER_NAME = /^worker \d+ of (.*) on (.*):(\d+)$/;

/** From a worker. The last has the report of its shutdown, or the error that it did not catch. */
interface News {
  readonly news: "serving" | "counted" | "stopping" | "ended";
  readonly stats: ServerStats;
  readonly report?: ShutdownReport;
  readonly reason?: string;
}

/** Web Locks, which the runtime (2.9.6) has and its types lack. A thread's are released when it ends, whatever ended it. */
const locks: { request(name: string, callback: () => void | Promise<never>): void } = Reflect.get(navigator, "locks");

class Nobody extends StreamRequestHandler {
  override handle(): void {}
}

const NO_STATS: ServerStats = new TcpServer({ port: 0 }, Nobody).stats;

function sumOf(a: ServerStats, b: ServerStats): ServerStats {
  const counts = new Map(Object.entries(b));
  const sums = Object.entries(a).map(([name, count]) => [name, count + (counts.get(name) ?? 0)] as const);
  return { ...a, ...Object.fromEntries(sums) };
}

/** An error with the lines of its stack. The runtime opens files to make them, and panics if it cannot. */
function textOf(thrown: unknown, isExhausted: boolean): string {
  if (!(thrown instanceof Error)) return printable(String(thrown));
  const frames = isExhausted ? [] : thrown.stack?.match(/\n {4}at .*/g) ?? [];
  return printable(`${thrown.name}: ${thrown.message}`) + frames.join("");
}

// --- A worker, seen from the main thread --------------------------------------

class WorkerThread {
  readonly serving = Promise.withResolvers<void>(); // Or over.
  readonly ended = Promise.withResolvers<void>();
  stats = NO_STATS;
  servingSince = Infinity;
  isHung = false;
  report: ShutdownReport | undefined;
  reason: string | undefined; // Why it ended without a report.
  readonly #worker: Worker;
  readonly #onStopping: () => void;
  readonly #port = Promise.withResolvers<MessagePort>();
  #timer: ReturnType<typeof setTimeout>;
  #isOver = false;

  /** Starts the thread; calls `onStopping` when its server begins to shut down. */
  constructor(readonly number: number, module: string, name: string, onStopping: () => void) {
    this.#onStopping = onStopping;
    this.#worker = new Worker(module, { type: "module", name });
    this.#worker.onmessage = ({ data: port }: MessageEvent<unknown>) => {
      if (!(port instanceof MessagePort)) return; // The module has sent it.
      port.onmessage = ({ data }: MessageEvent<News>) => this.#hear(data);
      this.#port.resolve(port);
      locks.request(name, () => this.#end("its thread ended, by Deno.exit() or self.close()"));
    };
    this.#worker.onerror = (event) => {
      event.preventDefault();
      const [line = ""] = event.message.replace(/^Uncaught (\(in promise\) )?/, "").split("\n");
      this.#end(printable(line));
    };
    const late = `its module did not call serveForever() within ${START_MS} ms`;
    this.#timer = setTimeout(() => this.servingSince === Infinity && this.#end(late), START_MS);
  }

  /** Orders a shutdown, or with `null` a close, once the worker can hear it; gives it up if it still computes after `grace`. */
  stop(grace: number | null): void {
    this.#port.promise.then((port) => port.postMessage(grace));
    if (grace === Infinity) return; // One that never starts to serve still has its deadline.
    clearTimeout(this.#timer);
    const patience = Math.min((grace ?? 0) + HANG_MS, MAX_TIMER_MS);
    this.#timer = setTimeout(() => this.#end(), patience);
  }

  #hear({ news, stats, report, reason }: News): void {
    this.stats = stats;
    this.report ??= report;
    this.reason ??= reason;
    if (news === "stopping") this.#onStopping();
    if (news === "ended") this.#worker.terminate();
    if (news !== "serving") return;
    this.servingSince = performance.now();
    this.serving.resolve();
  }

  /** Notes that the thread is over. Without a `reason` it is not, and given up. */
  #end(reason?: string): void {
    if (this.#isOver) return;
    this.#isOver = true;
    this.isHung = reason === undefined;
    if (this.report === undefined) this.reason ??= reason;
    this.stats = { ...this.stats, active: 0 };
    clearTimeout(this.#timer);
    this.#worker.terminate();
    this.#port.promise.then((port) => port.close());
    this.serving.resolve();
    this.ended.resolve();
  }
}

// --- A worker, seen from inside -----------------------------------------------

/** Makes the server of a worker on `address`, which the threads share. */
export type MakeServer = (address: TcpServerAddress) => StreamServer | Promise<StreamServer>;

/** A worker's `serveForever()` rejects with it; it need not be caught. */
const WORKER_ENDED = new DOMException("The worker has ended", "AbortError");

let hasPool = false; // A worker with two could not tell which one is its own.

class PoolMember {
  readonly address: Deno.NetAddr;
  readonly #makeServer: MakeServer;
  readonly #channel = new MessageChannel();
  readonly #serving = Promise.withResolvers<StreamServer>();
  readonly #ended = Promise.withResolvers<never>();
  #server: StreamServer | undefined;

  constructor([, owner, hostname = "", port]: RegExpExecArray, module: string, makeServer: MakeServer) {
    if (owner !== module) {
      throw new TypeError(`Cannot make a pool of ${module} in a worker of ${owner}: make it in the main thread only`);
    }
    if (hasPool) throw new TypeError(`Cannot make a second pool of ${module}: give each pool a module of its own`);
    hasPool = true;
    this.address = { transport: "tcp", hostname, port: Number(port) };
    this.#makeServer = makeServer;
  }

  get stats(): ServerStats {
    return this.#server?.stats ?? NO_STATS;
  }

  /** Rejects at the end: a thread that is ended while its module awaits leaves 2 descriptors and 1.6 MB behind (Deno 2.9.6). */
  serveForever(): Promise<never> {
    this.#catchErrors();
    const { port1, port2 } = this.#channel;
    port1.onmessage = ({ data }: MessageEvent<number | null>) => void this.stop(data);
    locks.request(Reflect.get(globalThis, "name"), () => {
      Reflect.get(globalThis, "postMessage")(port2, [port2]); // The types of the main thread do not have it.
      return new Promise<never>(() => {});
    });
    this.#serve().catch((error) => this.#fail(error));
    return this.#ended.promise;
  }

  /** Shuts its server down, or with `null` closes it; the main thread then shuts down the others. */
  async stop(grace: number | null): Promise<PoolShutdownReport> {
    const server = await this.#serving.promise; // Only a server that serves also serves the backlog.
    if (grace === null) server.close();
    return { ...await server.shutdown({ grace: grace ?? 0 }), hung: [] };
  }

  /** Turns an error that would end the thread into a report, unless the module itself handles it. */
  #catchErrors(): void {
    const handle = (event: Event, error: unknown) => {
      if (event.defaultPrevented) return;
      event.preventDefault();
      if (error !== WORKER_ENDED) this.#fail(error);
    };
    globalThis.addEventListener("error", (event) => handle(event, event.error));
    globalThis.addEventListener("unhandledrejection", (event) => handle(event, event.reason));
  }

  async #serve(): Promise<void> {
    const { hostname, port } = this.address;
    const server = await this.#makeServer({ hostname, port, loadBalanced: true });
    await listenOn(port, server);
    this.#server = server;
    server.signal.addEventListener("abort", () => this.#tell({ news: "stopping" }));
    let last = "";
    setInterval(() => {
      const counts = JSON.stringify(this.stats);
      if (counts !== last) this.#tell({ news: "counted" });
      last = counts;
    }, STATS_INTERVAL_MS);
    const served = server.serveForever();
    this.#serving.resolve(server);
    this.#tell({ news: "serving" });
    await served;
    this.#leave({ report: await server.shutdown() });
  }

  #tell(news: Omit<News, "stats">): void {
    this.#channel.port1.postMessage({ ...news, stats: this.stats });
  }

  #fail(error: unknown): void {
    this.#leave({ reason: textOf(error, this.stats.overloads > 0) });
  }

  /** Lets the module come to its end before the main thread ends this one. */
  #leave(how: Pick<News, "report" | "reason">): void {
    this.#ended.reject(WORKER_ENDED);
    setTimeout(() => this.#tell({ news: "ended", ...how }));
  }
}

async function listenOn(port: number, server: unknown): Promise<void> {
  const mistake = new TypeError("the factory must return a StreamServer that listens on the address it is called with");
  try {
    const address = server instanceof StreamServer ? await server.listen() : undefined;
    if (address?.transport !== "tcp" || address.port !== port) throw mistake;
  } catch (error) {
    // The pool holds the port: only a server that is not `loadBalanced` finds it in use.
    throw error instanceof Deno.errors.AddrInUse ? mistake : error;
  }
}

// --- The pool -----------------------------------------------------------------

/** Where a {@linkcode WorkerPool} listens, and how many threads serve. */
export interface WorkerPoolOptions extends Pick<TcpServerAddress, "hostname" | "port"> {
  /** Threads that serve, 1 or more. @default {navigator.hardwareConcurrency} */
  workers?: number;
}

/** How the shutdown of a {@linkcode WorkerPool} went: the sums of its workers. */
export interface PoolShutdownReport extends ShutdownReport {
  /**
   * The workers that still computed 5 s after `grace`. They keep the port and a processor until their code returns or the
   * process calls `Deno.exit()`, as the runtime (2.9.6) cannot stop them. Their clients are not in `cut`.
   */
  readonly hung: readonly number[];
}

/**
 * A server on every core: threads that share one port and one queue of clients.
 *
 * The module that makes the pool runs in the main thread and again in each worker, where `serveForever()` calls the
 * factory, serves until the pool shuts down, and rejects with an `AbortError` that need not be caught. Other code at the
 * top of the module runs in each thread: ask `isWorker`. Signals reach the main thread only.
 *
 * The main thread holds the port and serves no client. A worker that ends (by an error that is not caught, or
 * `Deno.exit()`) loses its connections; a new one takes its place after 100 ms, doubling up to 10 s until one has served
 * for 30 s. Clients wait in the queue meanwhile. Each worker has its own variables and limits (`maxConnections`).
 *
 * Workers load the module from its file: it needs `--allow-read` of it and of the local files that it imports;
 * `deno compile` needs `--include=server.ts`.
 *
 * @example
 * ```ts ignore
 * import { StreamRequestHandler, TcpServer } from "@socketserver/socketserver";
 * import { WorkerPool } from "@socketserver/socketserver/worker_pool";
 *
 * class Echo extends StreamRequestHandler {
 *   override async handle() {
 *     for await (const data of this.request) await this.request.send(data);
 *   }
 * }
 *
 * const pool = new WorkerPool(import.meta.url, (address) => new TcpServer(address, Echo), { port: 8009 });
 * if (!pool.isWorker) Deno.addSignalListener("SIGTERM", () => pool.shutdown());
 * await pool.serveForever();
 * ```
 */
export class WorkerPool implements AsyncDisposable {
  readonly #module: string;
  readonly #address: TcpServerAddress & { hostname: string };
  readonly #size: number;
  readonly #member: PoolMember | undefined; // In a worker.
  readonly #threads = new Set<WorkerThread>();
  readonly #stopping = Promise.withResolvers<void>();
  #holder: TcpServer; // Holds the port and never accepts.
  #past = NO_STATS; // The counts of the threads that ended.
  #isListening = false;
  #isServing = false;
  #draining: Promise<PoolShutdownReport> | undefined;

  /**
   * Makes a pool of `module`, which is `import.meta.url`; starts nothing. Each worker calls `makeServer` with the address
   * for a `TcpServer`, or for another `StreamServer` that hands it on, such as `TlsServer`. Throws `RangeError` if a number
   * is out of its range, and `TypeError` if an option does not exist, or in a worker of another module or with a pool.
   */
  constructor(module: string | URL, makeServer: MakeServer, options: WorkerPoolOptions) {
    const { workers = navigator.hardwareConcurrency, hostname = "127.0.0.1", ...address } = options;
    if (!Number.isSafeInteger(workers) || workers < 1) {
      throw new RangeError(`Option "workers" must be whole, 1 or more: it is ${workers}`);
    }
    this.#module = new URL(module).href;
    this.#size = workers;
    this.#address = { ...address, hostname, loadBalanced: true };
    this.#holder = new TcpServer(this.#address, Nobody); // Checks the address.
    const worker = WORKER_NAME.exec(Reflect.get(globalThis, "name"));
    if (worker !== null) this.#member = new PoolMember(worker, this.#module, makeServer);
  }

  /** Whether this thread is a worker of the pool. */
  get isWorker(): boolean {
    return this.#member !== undefined;
  }

  /** The bound address. Throws `TypeError` before `listen()`. */
  get address(): Deno.NetAddr {
    return this.#member?.address ?? this.#holder.address;
  }

  /** The number of workers that serve now. */
  get activeWorkers(): number {
    return [...this.#threads].filter(({ servingSince }) => servingSince !== Infinity).length;
  }

  /** The sums of all workers, also of those that ended: up to 250 ms old, exact after `shutdown()`. In a worker, its own. */
  get stats(): ServerStats {
    return this.#member?.stats ?? [...this.#threads].map(({ stats }) => stats).reduce(sumOf, this.#past);
  }

  /**
   * Binds the port and lets clients connect. Resolves to the bound address. Rejects with what `TcpServer.listen()` throws,
   * and may be tried again then, and with `TypeError` if the pool is closed.
   */
  // deno-lint-ignore require-await -- Errors are rejections.
  async listen(): Promise<Deno.NetAddr> {
    if (this.#draining !== undefined) throw new TypeError("Cannot listen: the pool is closed, make a new one");
    if (this.#member !== undefined || this.#isListening) return this.address;
    const { hostname, port } = this.#address;
    this.#holder = new TcpServer({ hostname, port: port || freePort(hostname), loadBalanced: true }, Nobody);
    this.#holder.listen();
    this.#isListening = true;
    return this.address;
  }

  /**
   * Starts the workers and serves. Resolves once a shutdown is over. Rejects with what `listen()` and `handleCrash()`
   * throw, and if a worker fails before one with its number has served; the pool is closed then. In a worker it always
   * rejects. A second call rejects with `Deno.errors.Busy`.
   */
  async serveForever(): Promise<void> {
    if (this.#draining !== undefined) return void await this.#draining;
    if (this.#isServing) throw new Deno.errors.Busy("Cannot serveForever(): the pool is serving already");
    this.#isServing = true;
    if (this.#member !== undefined) return await this.#member.serveForever();
    try {
      const { port } = await this.listen();
      const numbers = Array.from({ length: this.#size }, (_, index) => index + 1);
      await Promise.all(numbers.map((number) => this.#keep(number, port)));
    } catch (error) {
      this.close();
      throw error;
    } finally {
      await this.#draining;
    }
  }

  /**
   * Shuts all workers down side by side, as `BaseServer.shutdown()` does: the clients in the queue are served, handlers
   * finish their work, and after `grace` ms the rest are cut off: 10,000 by default, whatever the servers' own option is;
   * 0 cuts at once, `Infinity` never. A worker that still computes 5 s later is given up. A handler's
   * `this.server.shutdown()` has the same effect. Resolves to the sums of the workers' reports, with the address free
   * unless a worker hangs; never rejects. Throws `RangeError` if `grace` is below 0 or no number.
   */
  shutdown({ grace = 10_000 }: { grace?: number } = {}): Promise<PoolShutdownReport> {
    if (!(grace >= 0)) throw new RangeError(`Option "grace" must be 0 or more: it is ${grace}`);
    return this.#draining ??= this.#member?.stop(grace) ?? this.#drain(grace);
  }

  /** Ends all workers now and cuts all clients off, also during a shutdown; `serveForever()` resolves within 5 s. */
  close(): void {
    this.shutdown({ grace: 0 });
    for (const thread of this.#threads) thread.stop(null);
  }

  /** Shuts the pool down, as {@linkcode WorkerPool.shutdown} does. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.shutdown();
  }

  /**
   * Called in the main thread when worker `number`, from 1, ended by an error, its `reason`; a new thread starts in `delay`
   * ms, or none (`undefined`) in a shutdown. The default prints it. An error thrown here closes the pool.
   */
  handleCrash(number: number, reason: string, delay: number | undefined): void {
    const next = delay === undefined ? "" : `, another starts in ${delay} ms`;
    console.error("%s", `Worker ${number} ended${next}: ${reason}`);
  }

  /** Runs worker `number` and its successors until the pool shuts down. Rejects if none of them has ever served. */
  async #keep(number: number, port: number): Promise<void> {
    // By the name that was asked for: it may be the only one that is permitted.
    const name = `worker ${number} of ${this.#module} on ${this.#address.hostname}:${port}`;
    let wait = 0;
    for (let hasServed = false; this.#draining === undefined;) {
      const thread = new WorkerThread(number, this.#module, name, () => this.shutdown());
      this.#threads.add(thread);
      await thread.ended.promise;
      this.#threads.delete(thread);
      this.#past = sumOf(this.#past, thread.stats);
      const { servingSince, reason } = thread;
      hasServed ||= servingSince !== Infinity;
      if (reason === undefined) return;
      if (!hasServed) throw new TypeError(`Cannot start worker ${number}: ${reason.split("\n")[0]}`);
      const isStable = performance.now() - servingSince >= STABLE_MS;
      wait = isStable ? BACKOFF_MIN_MS : Math.min(wait * 2 || BACKOFF_MIN_MS, BACKOFF_MAX_MS);
      this.handleCrash(number, reason, this.#draining === undefined ? wait : undefined);
      await this.#pause(wait);
    }
  }

  async #pause(ms: number): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    const timer = setTimeout(resolve, ms);
    await Promise.race([promise, this.#stopping.promise]);
    clearTimeout(timer);
  }

  async #drain(grace: number): Promise<PoolShutdownReport> {
    const begun = performance.now();
    this.#stopping.resolve();
    const threads = [...this.#threads];
    for (const thread of threads) thread.stop(grace);
    await Promise.all(threads.map(({ serving }) => serving.promise));
    this.#holder.close(); // All workers have the port open, and the queue of clients with it.
    await Promise.all(threads.map(({ ended }) => ended.promise));
    await this.#holder.shutdown(); // Its port is free.
    return {
      finished: threads.reduce((sum, { report }) => sum + (report?.finished ?? 0), 0),
      cut: threads.flatMap(({ report }) => report?.cut ?? []),
      duration: performance.now() - begun,
      hung: threads.filter(({ isHung }) => isHung).map(({ number }) => number),
    };
  }
}

/** Threads that ask for port 0 would share that of any other pool. */
function freePort(hostname: string): number {
  using listener = Deno.listen({ hostname, port: 0 });
  return listener.addr.port;
}
