#!/usr/bin/env -S deno run --allow-net=127.0.0.1:8009
/**
 * The tutorial's server: it answers what it is sent with a timestamp in front.
 *
 * ```sh
 * deno run --allow-net server.ts --help
 * ```
 *
 * @module
 */

import { parseFlags, readFileOf, runScript, UsageError, wholeNumber } from "./deps.ts";
import {
  type ConnectionReport,
  type Datagram,
  DatagramRequestHandler,
  DatagramServer,
  formatAddress,
  IncompleteReadError,
  LimitOverrunError,
  printable,
  type ServerOptions,
  type ShutdownReport,
  StreamRequestHandler,
  type StreamServer,
  TcpServer,
  TlsServer,
  UdpServer,
  UnixDatagramServer,
  UnixServer,
  WorkerPool,
} from "./mod.ts";

const USAGE = `Answers what it is sent with a timestamp in front.

Usage: deno run --allow-net server.ts [options]

  --hostname HOST        address to listen on (127.0.0.1)
  --port PORT            port to listen on; 0 takes a free one (8009)
  --unix PATH            listen on a Unix socket instead; this needs
                         --allow-read=PATH --allow-write=PATH too
  --udp                  serve datagrams, each of which is stamped; this needs
                         --unstable-net too
  --cert FILE            encrypt with TLS; FILE is the server's certificate, and
  --key FILE             its private key; this needs --allow-read of both
  --client-ca FILE       serve only clients whose certificate the authority in
                         FILE has vouched for; this needs --allow-read=FILE
  --workers N            serve with N threads, or with "auto" one for each
                         processor; limits are for each; this needs
                         --allow-read=server.ts,mod.ts,deps.ts
  --lines                stamp each line, instead of each chunk as it arrives
  --max-connections N    serve so many clients at once, others wait (what the
                         system allows if run with -A, else no limit)
  --max-connections-per-host N
                         close what one host has beyond so many (no limit)
  --proxy-from LIST      take the client's address from the PROXY header that
                         these proxies send, and refuse others; LIST is of
                         addresses and ranges with commas between, or "unix"
  --idle-timeout MS      close clients that are silent for so long (never)
  --max-lifetime MS      close clients after so long, busy or not (never)
  --health [HOST:]PORT   answer a balancer's HTTP request there: 200 while
                         clients are welcome, 503 once the server is to end
                         (no answer; HOST: 127.0.0.1)
  --drain-delay MS       accept clients for so long after SIGINT or SIGTERM, as a
                         balancer sends some until it has asked again (0)
  --quiet                print errors only
  --json                 print one line of JSON for each event, and nothing else
  --help                 print this and end
  --version              print the version and end

On a terminal the last line says how the server is doing. SIGUSR2 prints the
same anywhere, with rates since the last such line. SIGINT or SIGTERM lets
clients finish what they have begun; a second one cuts them off. Colours are for
terminals, and not if NO_COLOR is set.

With --json each line is an object with "time" (ISO 8601) and "event", which is
  listening   address
  health      address
  opened      client
  closed      client, reason, duration, bytesRead, bytesWritten
  refused     client: its host has as many as it may, or it is no proxy
  datagram    client, bytesRead (with --udp, in place of the three above)
  error       client, name, message; also if the client has merely vanished
  overload    message: descriptors or memory have run out
  status      upon SIGUSR2: messagesPerSecond, bytesReadPerSecond,
              bytesWrittenPerSecond, and all counts of the server (mod.ts tells
              of them at ServerStats)
  stopped     finished, cut (clients), duration, and the same counts
Durations are in milliseconds. With --quiet it is error, overload and status.
Why the server cannot start is said on standard error all the same.`;

const VERSION = "0.1.0";

const FLAGS = {
  hostname: { type: "string" }, // 127.0.0.1, if there is no --unix.
  port: { type: "string" }, // 8009, if there is no --unix.
  unix: { type: "string" },
  udp: { type: "boolean", default: false },
  cert: { type: "string" },
  key: { type: "string" },
  "client-ca": { type: "string" },
  workers: { type: "string" },
  lines: { type: "boolean", default: false },
  "max-connections": { type: "string" },
  "max-connections-per-host": { type: "string" },
  "proxy-from": { type: "string" },
  "idle-timeout": { type: "string" },
  "max-lifetime": { type: "string" },
  health: { type: "string" },
  "drain-delay": { type: "string", default: "0" },
  quiet: { type: "boolean", default: false },
  json: { type: "boolean", default: false },
  help: { type: "boolean", default: false },
  version: { type: "boolean", default: false },
} as const;

/** The library's limits that are flags. */
const LIMITS = [
  ["max-connections", "maxConnections"],
  ["max-connections-per-host", "maxConnectionsPerHost"],
  ["idle-timeout", "idleTimeout"],
  ["max-lifetime", "maxLifetime"],
] as const;

/** The flags that mean nothing to datagrams. */
const FOR_CONNECTIONS = [
  "workers",
  "lines",
  "cert",
  "key",
  "client-ca",
  "proxy-from",
  ...LIMITS.map(([flag]) => flag),
] as const;

/** Threads are no use beyond the processors, of which no machine has more. */
const MAX_WORKERS = 1_024;

// --- What is told --------------------------------------------------------------

type Server = StreamServer | DatagramServer | WorkerPool;

/** Messages and bytes in a second. */
interface Rates {
  readonly messagesPerSecond: number;
  readonly bytesReadPerSecond: number;
  readonly bytesWrittenPerSecond: number;
}

/** Tells whoever runs the server what happens. */
interface Reporter {
  listening(address: Deno.Addr): void;
  tellingHealth(address: Deno.Addr): void;
  opened(client: Deno.Addr): void;
  closed(client: Deno.Addr, report: ConnectionReport): void;
  refused(client: Deno.Addr): void;
  received(datagram: Datagram): void;
  failed(error: unknown, client: Deno.Addr): void;
  overloaded(error: unknown): void;
  asked(server: Server, rates: Rates): void;
  stopped(server: Server, report: ShutdownReport): void;
}

/** The tutorial's words. Without a terminal, or with NO_COLOR, the console leaves out the colours. */
class TextReporter implements Reporter {
  readonly #isQuiet: boolean;

  constructor(isQuiet: boolean) {
    this.#isQuiet = isQuiet;
  }

  listening(address: Deno.Addr): void {
    this.#log("waiting for connection... on %c%s", ADDRESS_STYLE, formatAddress(address));
  }

  tellingHealth(address: Deno.Addr): void {
    this.#log("health is told on %c%s", ADDRESS_STYLE, formatAddress(address));
  }

  opened(client: Deno.Addr): void {
    this.#log("...connected from: %c%s", ADDRESS_STYLE, formatAddress(client));
  }

  closed(): void {}

  refused(): void {}

  received({ clientAddress }: Datagram): void {
    this.#log("...datagram from: %c%s", ADDRESS_STYLE, formatAddress(clientAddress));
  }

  failed(error: unknown): void {
    console.error("server.ts: %s", printable(messageOf(error)));
  }

  overloaded(error: unknown): void {
    console.error("server.ts: cannot accept connections for now: %s", printable(messageOf(error)));
  }

  asked(server: Server, rates: Rates): void {
    console.log(statusText(server, rates));
  }

  stopped(server: Server, { cut }: ShutdownReport): void {
    const { accepted, dropped, handshakeFailures, bytesRead, bytesWritten } = server.stats;
    const requests = server instanceof DatagramServer
      ? `datagrams: ${accepted}, dropped: ${dropped}`
      : `clients: ${accepted}, cut off: ${cut.length}`;
    const failures = handshakeFailures === 0 ? "" : `, handshakes failed: ${handshakeFailures}`;
    this.#log(`${requests}${failures}, bytes in: ${bytesRead}, bytes out: ${bytesWritten}`);
  }

  #log(...data: string[]): void {
    if (!this.#isQuiet) console.log(...data);
  }
}

const ADDRESS_STYLE = "color: cyan";
const ERROR_STYLE = "color: red";

/** One line of JSON for each event; `--help` tells their fields. */
class JsonReporter implements Reporter {
  readonly #isQuiet: boolean;

  constructor(isQuiet: boolean) {
    this.#isQuiet = isQuiet;
  }

  listening(address: Deno.Addr): void {
    this.#print("listening", { address: formatAddress(address) });
  }

  tellingHealth(address: Deno.Addr): void {
    this.#print("health", { address: formatAddress(address) });
  }

  opened(client: Deno.Addr): void {
    this.#print("opened", { client: formatAddress(client) });
  }

  closed(client: Deno.Addr, { reason, duration, bytesRead, bytesWritten }: ConnectionReport): void {
    this.#print("closed", {
      client: formatAddress(client),
      reason,
      duration: rounded(duration),
      bytesRead,
      bytesWritten,
    });
  }

  refused(client: Deno.Addr): void {
    this.#print("refused", { client: formatAddress(client) });
  }

  received({ clientAddress, bytesRead }: Datagram): void {
    this.#print("datagram", { client: formatAddress(clientAddress), bytesRead });
  }

  failed(error: unknown, client: Deno.Addr): void {
    const name = error instanceof Error ? error.name : typeof error;
    this.#print("error", { client: formatAddress(client), name, message: messageOf(error) });
  }

  overloaded(error: unknown): void {
    this.#print("overload", { message: messageOf(error) });
  }

  asked({ stats }: Server, rates: Rates): void {
    this.#print("status", { ...rates, ...stats });
  }

  stopped({ stats }: Server, { finished, cut, duration }: ShutdownReport): void {
    this.#print("stopped", { finished, cut: cut.map(formatAddress), duration: rounded(duration), ...stats });
  }

  #print(event: string, fields: Record<string, unknown>): void {
    if (this.#isQuiet && !["error", "overload", "status"].includes(event)) return;
    const line = JSON.stringify({ time: new Date().toISOString(), event, ...fields });
    // JSON leaves some of what a terminal acts on as it is.
    console.log("%s", line.replace(/[\p{Cc}\p{Cf}\p{Zl}\p{Zp}]/gu, escapeInJson));
  }
}

/** To the microsecond. */
function rounded(ms: number): number {
  return Math.round(ms * 1_000) / 1_000;
}

function escapeInJson(character: string): string {
  const units = Array.from({ length: character.length }, (_, index) => character.charCodeAt(index));
  return units.map((unit) => `\\u${unit.toString(16).padStart(4, "0")}`).join("");
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Has `reporter` told of all that happens at `server`. It sets hooks on the object: one class for each kind of server would say the same four times. */
function observed<Observed extends StreamServer | DatagramServer>(server: Observed): Observed {
  if (!(server instanceof DatagramServer)) {
    server.handleOpen = (_request, client) => reporter.opened(client);
    server.handleClose = (report, client) => reporter.closed(client, report);
    server.handleRefuse = (client) => reporter.refused(client);
  }
  if (reporter instanceof TextReporter) return server; // The library prints errors by itself, with their stack.
  server.handleError = (error, client) => reporter.failed(error, client);
  server.handleOverload = (error) => reporter.overloaded(error);
  return server;
}

let reporter: Reporter = new TextReporter(false);

// --- What is answered ----------------------------------------------------------

/** Chunks, lines or datagrams that were answered. */
let messages = 0;

abstract class Stamp extends StreamRequestHandler {
  /** Answers with the time and `data`, whose bytes pass through unchanged. */
  protected async answer(data: Uint8Array) {
    messages++;
    this.request.write(`[${ctime(new Date())}] `);
    await this.request.write(data);
  }
}

class StampChunks extends Stamp {
  override async handle() {
    for await (const data of this.request) await this.answer(data);
  }
}

class StampLines extends Stamp {
  override async handle() {
    try {
      for (let line; (line = await this.request.readUntil("\n")) !== null;) await this.answer(line);
    } catch (error) {
      if (!(error instanceof IncompleteReadError)) throw error;
      await this.answer(error.partial); // The last line has no end.
    }
  }
}

class StampDatagrams extends DatagramRequestHandler {
  override async handle() {
    messages++;
    reporter.received(this.request);
    const stamp = new TextEncoder().encode(`[${ctime(new Date())}] `);
    try {
      await this.request.reply(new Uint8Array([...stamp, ...this.request.data]));
    } catch (error) { // The answer is too long, or the client cannot be answered.
      reporter.failed(error, this.clientAddress);
    }
  }
}

/** C's `ctime` form in local time, such as `Thu Sep  1 22:29:12 2016`. */
function ctime(date: Date): string {
  const [weekday, month, day, year, time] = date.toString().split(" ");
  return `${weekday} ${month} ${String(Number(day)).padStart(2)} ${time} ${year}`;
}

// --- What the flags ask for ----------------------------------------------------

type Flags = ReturnType<typeof parseFlags<typeof FLAGS>>["values"];

function makeServer(flags: Flags): Server {
  const { hostname = "127.0.0.1", unix: path } = flags;
  if (hostname === "") {
    throw new UsageError('--hostname must not be empty: "127.0.0.1" is this machine, "0.0.0.0" all its IPv4 addresses');
  }
  if (path === "") throw new UsageError("--unix must not be empty: name the file that clients will connect to");
  for (const flag of ["hostname", "port"] as const) {
    if (flags[flag] !== undefined && path !== undefined) throw new UsageError(`choose one of --${flag} and --unix`);
  }
  const port = wholeNumber("--port", flags.port ?? "8009", 0, 65_535);
  const options: ServerOptions = {};
  for (const [flag, option] of LIMITS) {
    const text = flags[flag];
    if (text !== undefined) options[option] = wholeNumber(`--${flag}`, text, 1);
  }
  const proxies = flags["proxy-from"];
  if (proxies !== undefined) options.proxyProtocol = { from: proxies.split(",") };
  if (flags.udp) {
    const senseless = FOR_CONNECTIONS.find((name) => flags[name]);
    if (senseless !== undefined) throw new UsageError(`--${senseless} is for connections, and --udp has none`);
    return path === undefined
      ? observed(new UdpServer({ hostname, port }, StampDatagrams))
      : observed(new UnixDatagramServer({ path }, StampDatagrams));
  }
  const Handler = flags.lines ? StampLines : StampChunks;
  const { cert, key, "client-ca": clientCa, workers } = flags;
  if ((cert === undefined) !== (key === undefined)) throw new UsageError("--cert and --key must be given together");
  if (cert !== undefined && path !== undefined) throw new UsageError("--cert is not for --unix");
  if (clientCa !== undefined && cert === undefined) {
    throw new UsageError("--client-ca is for TLS; it needs --cert and --key too");
  }
  if (workers !== undefined && path !== undefined) throw new UsageError("--workers is not for --unix");
  if (path !== undefined) return observed(new UnixServer({ path }, Handler, options));
  const makeOne = () => {
    if (cert === undefined || key === undefined) return observed(new TcpServer({ hostname, port }, Handler, options));
    const identity = { cert: readFileOf("--cert", cert), key: readFileOf("--key", key) };
    const trust = clientCa === undefined ? {} : { clientCa: readFileOf("--client-ca", clientCa) };
    return observed(new TlsServer({ hostname, port, ...identity, ...trust }, Handler, options));
  };
  return workers === undefined ? makeOne() : makePool(workers, makeOne);
}

function makePool(workers: string, makeOne: () => TcpServer): WorkerPool {
  if (workers === "auto") return new WorkerPool(import.meta.url, makeOne);
  return new WorkerPool(import.meta.url, makeOne, { workers: wholeNumber("--workers", workers, 1, MAX_WORKERS) });
}

// --- Health --------------------------------------------------------------------

/** What balancers may take of the server that answers them: they ask briefly, and who does not is gone in a second. */
const HEALTH_LIMITS: ServerOptions = {
  maxConnections: 256,
  maxConnectionsPerHost: 64,
  maxLifetime: 1_000,
  limit: 8_192,
};

/** How the health can be asked for; HAProxy's `option httpchk` takes OPTIONS if it is told nothing else. */
const HEALTH_METHODS = ["GET", "HEAD", "OPTIONS"];

/** Tells balancers whether to send clients here. */
class HealthServer extends TcpServer {
  isDraining = false;

  constructor(address: { hostname: string; port: number }) {
    super(address, Health, HEALTH_LIMITS);
  }
}

/** Answers one HTTP request. */
class Health extends StreamRequestHandler {
  declare readonly server: HealthServer;

  override async handle() {
    const head = await this.readHead();
    if (head === null) return; // Connected, and no more: that is a check, too.
    const [method = ""] = head.split(" ");
    if (!HEALTH_METHODS.includes(method)) {
      return await this.answer("405 Method Not Allowed", `${HEALTH_METHODS.join(" or ")}\n`);
    }
    const [status, body] = this.server.isDraining ? ["503 Service Unavailable", "draining\n"] : ["200 OK", "ok\n"];
    await this.answer(status, method === "HEAD" ? "" : body, body.length);
  }

  /** The head of the request; `null` if there is none, or none of a size that is meant. */
  async readHead(): Promise<string | null> {
    try {
      const head = await this.request.readUntil("\r\n\r\n");
      return head && new TextDecoder().decode(head);
    } catch (error) {
      if (error instanceof LimitOverrunError) return null;
      throw error;
    }
  }

  async answer(status: string, body: string, length = body.length) {
    const fields = `Allow: ${
      HEALTH_METHODS.join(", ")
    }\r\nCache-Control: no-store\r\nConnection: close\r\nContent-Length: ${length}`;
    await this.request.send(`HTTP/1.1 ${status}\r\n${fields}\r\n\r\n${body}`);
  }
}

/** Makes what answers balancers, if the flags ask for it. */
function makeHealthServer(flags: Flags): HealthServer | undefined {
  if (flags.health === undefined) return undefined;
  const [, hostname = "127.0.0.1", port = ""] = /^(?:(.+):)?(.*)$/.exec(flags.health) ?? [];
  return new HealthServer({ hostname, port: wholeNumber("--health", port, 0, 65_535) });
}

// --- Workers -------------------------------------------------------------------

/** How often a worker tells the main thread how many messages it has answered. */
const TELL_INTERVAL_MS = 250;

/** What workers tell the main thread: messages that they have answered, or what is to be printed. */
type FromWorker = number | { readonly way: "log" | "error"; readonly data: string[] };

const WORKERS_CHANNEL = "server.ts";

/** In a worker: lets the main thread count, and print above its status line. */
function tellMainThread(): void {
  const channel = new BroadcastChannel(WORKERS_CHANNEL);
  const tell = (what: FromWorker) => channel.postMessage(what);
  setInterval(() => {
    if (messages > 0) tell(messages);
    messages = 0;
  }, TELL_INTERVAL_MS);
  const printable = (data: unknown) => typeof data === "string" ? data : Deno.inspect(data);
  for (const way of ["log", "error"] as const) console[way] = (...data) => tell({ way, data: data.map(printable) });
}

/** Serves until the main thread ends this one. */
async function serveAsWorker(pool: WorkerPool): Promise<void> {
  tellMainThread();
  await pool.serveForever().catch(() => {}); // The main thread has been told how it went.
}

/** In the main thread: does what the workers tell. */
function listenToWorkers(): BroadcastChannel {
  const channel = new BroadcastChannel(WORKERS_CHANNEL);
  channel.onmessage = ({ data }: MessageEvent<FromWorker>) => {
    if (typeof data === "number") messages += data;
    else console[data.way](...data.data);
  };
  return channel;
}

// --- How it is doing -----------------------------------------------------------

/** The rates of a server since it was last asked. */
class Meter {
  readonly #server: Server;
  #last = { at: performance.now(), messages, bytesRead: 0, bytesWritten: 0 };

  constructor(server: Server) {
    this.#server = server;
  }

  read(): Rates {
    const { bytesRead, bytesWritten } = this.#server.stats;
    const last = this.#last;
    const next = this.#last = { at: performance.now(), messages, bytesRead, bytesWritten };
    const rate = (what: "messages" | "bytesRead" | "bytesWritten") =>
      Math.round((next[what] - last[what]) * 1_000 / Math.max(next.at - last.at, 1));
    return {
      messagesPerSecond: rate("messages"),
      bytesReadPerSecond: rate("bytesRead"),
      bytesWrittenPerSecond: rate("bytesWritten"),
    };
  }
}

function statusText(server: Server, { messagesPerSecond, bytesReadPerSecond, bytesWrittenPerSecond }: Rates): string {
  const there = `${server instanceof DatagramServer ? "datagrams" : "connections"}: ${server.stats.active}`;
  const traffic = `bytes/s in: ${bytesReadPerSecond}, bytes/s out: ${bytesWrittenPerSecond}`;
  return `${there}, messages/s: ${messagesPerSecond}, ${traffic}`;
}

/** How often the status line is drawn anew: a person can read it meanwhile. */
const STATUS_INTERVAL_MS = 1_000;

/** The last line of a terminal, that says how the server is doing. What else is printed goes above it. */
class StatusLine implements Disposable {
  readonly #server: Server;
  readonly #meter: Meter;
  readonly #timer: ReturnType<typeof setInterval>;
  readonly #print = { log: console.log, error: console.error };
  #text = "";

  constructor(server: Server) {
    this.#server = server;
    this.#meter = new Meter(server);
    // The library prints its errors by the console, too.
    for (const way of ["log", "error"] as const) console[way] = (...data) => this.#printAbove(way, data);
    this.#timer = setInterval(() => this.#update(), STATUS_INTERVAL_MS);
    this.#update();
  }

  [Symbol.dispose](): void {
    clearInterval(this.#timer);
    Object.assign(console, this.#print);
    this.#show("");
  }

  #update(): void {
    this.#text = statusText(this.#server, this.#meter.read());
    this.#show(this.#text);
  }

  #printAbove(way: "log" | "error", data: unknown[]): void {
    this.#show("");
    this.#print[way](...(way === "error" ? inErrorStyle(data) : data));
    this.#show(this.#text);
  }

  /** Writes over the line; a text that is too long for it would leave parts behind. */
  #show(text: string): void {
    try {
      const { columns } = Deno.consoleSize();
      Deno.stdout.writeSync(new TextEncoder().encode(`\r\x1b[K${text.slice(0, columns - 1)}`));
    } catch {
      // The terminal is gone, and nobody looks.
    }
  }
}

/** What goes to the console as an error, in its colour. */
function inErrorStyle([format, ...data]: unknown[]): unknown[] {
  return typeof format === "string" ? [`%c${format}`, ERROR_STYLE, ...data] : [format, ...data];
}

/** SIGUSR1 is the runtime's own; other systems have neither. */
const STATUS_SIGNAL = Deno.build.os === "windows" ? undefined : "SIGUSR2";

/** An hour: no balancer takes longer to ask again. */
const MAX_DELAY_MS = 3_600_000;

/** How to serve, besides what. */
interface Manner {
  readonly health: HealthServer | undefined;
  /** Milliseconds for which clients are accepted after a signal. */
  readonly drainDelay: number;
  readonly hasStatusLine: boolean;
}

/** Serves until a signal ends it, and `drainDelay` milliseconds more. */
async function serve(server: Server, { health, drainDelay, hasStatusLine }: Manner): Promise<void> {
  const workers = server instanceof WorkerPool ? listenToWorkers() : undefined;
  let received = 0;
  let draining: ReturnType<typeof setTimeout> | undefined;
  const stop = () => {
    if (received++ > 0) return server.close();
    if (health !== undefined) health.isDraining = true;
    draining = setTimeout(() => server.shutdown(), drainDelay);
  };
  const meter = new Meter(server);
  const listeners = new Map<Deno.Signal, () => void>([["SIGINT", stop], ["SIGTERM", stop]]);
  if (STATUS_SIGNAL !== undefined) listeners.set(STATUS_SIGNAL, () => reporter.asked(server, meter.read()));
  for (const [signal, listener] of listeners) Deno.addSignalListener(signal, listener);
  try {
    const healthAddress = health?.listen(); // First: if it cannot, nothing has been made.
    reporter.listening(await server.listen());
    if (healthAddress !== undefined) reporter.tellingHealth(healthAddress);
    using _status = hasStatusLine ? new StatusLine(server) : undefined;
    // Balancers are answered until the last client has left.
    await Promise.all([server.serveForever().finally(() => health?.close()), health?.serveForever()]);
  } finally {
    clearTimeout(draining);
    for (const [signal, listener] of listeners) Deno.removeSignalListener(signal, listener);
    workers?.close();
  }
  reporter.stopped(server, await server.shutdown()); // It is over: this is its report.
}

async function main(args: string[]): Promise<void> {
  const { values: flags } = parseFlags(args, FLAGS);
  if (flags.help) return console.log(USAGE);
  if (flags.version) return console.log(`server.ts ${VERSION}`);
  const { quiet, json } = flags;
  reporter = json ? new JsonReporter(quiet) : new TextReporter(quiet);
  const server = makeServer(flags);
  const health = makeHealthServer(flags);
  const drainDelay = wholeNumber("--drain-delay", flags["drain-delay"], 0, MAX_DELAY_MS);
  if (server instanceof WorkerPool && server.isWorker) return await serveAsWorker(server);
  await serve(server, { health, drainDelay, hasStatusLine: Deno.stdout.isTerminal() && !quiet && !json });
}

if (import.meta.main) await runScript("server.ts", main);
