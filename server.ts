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

import { parseArgs } from "./deps.ts";
import {
  DatagramRequestHandler,
  DatagramServer,
  formatAddress,
  IncompleteReadError,
  type ServerOptions,
  StreamRequestHandler,
  type StreamServer,
  TcpServer,
  TlsServer,
  UdpServer,
  UnixDatagramServer,
  UnixServer,
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
  --health [HOST:]PORT   answer a balancer's HTTP GET or HEAD there: 200 while
                         clients are welcome, 503 once the server is to end
                         (no answer; HOST: 127.0.0.1)
  --drain-delay MS       accept clients for so long after SIGINT or SIGTERM, as a
                         balancer sends some until it has asked again (0)
  --quiet                print errors only
  --help                 print this and end
  --version              print the version and end

On a terminal the last line says how the server is doing. SIGUSR2 prints the
same anywhere, with rates since the last such line. SIGINT or SIGTERM lets
clients finish what they have begun; a second one cuts them off.`;

const VERSION = "0.1.0";

const FLAGS = {
  hostname: { type: "string", default: "127.0.0.1" },
  port: { type: "string" }, // 8009, if there is no --unix.
  unix: { type: "string" },
  udp: { type: "boolean", default: false },
  cert: { type: "string" },
  key: { type: "string" },
  lines: { type: "boolean", default: false },
  "max-connections": { type: "string" },
  "max-connections-per-host": { type: "string" },
  "proxy-from": { type: "string" },
  "idle-timeout": { type: "string" },
  "max-lifetime": { type: "string" },
  health: { type: "string" },
  "drain-delay": { type: "string", default: "0" },
  quiet: { type: "boolean", default: false },
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
const FOR_CONNECTIONS = ["lines", "proxy-from", ...LIMITS.map(([flag]) => flag)] as const;

/** The flags that take a number. */
const NUMBERS = new Set(["port", "drain-delay", ...LIMITS.map(([flag]) => flag)].map((flag) => `--${flag}`));

let isQuiet = false;

/** Prints what happens. */
function log(line: string): void {
  if (!isQuiet) console.log(line);
}

/** Chunks, lines or datagrams that were answered. */
let messages = 0;

abstract class Stamp extends StreamRequestHandler {
  override setup() {
    log(`...connected from: ${formatAddress(this.clientAddress)}`);
  }

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
    log(`...datagram from: ${formatAddress(this.clientAddress)}`);
    const stamp = new TextEncoder().encode(`[${ctime(new Date())}] `);
    try {
      await this.request.reply(new Uint8Array([...stamp, ...this.request.data]));
    } catch (error) { // The answer is too long, or the client cannot be answered.
      console.error(`server.ts: ${error instanceof Error ? error.message : error}`);
    }
  }
}

/** C's `ctime` form in local time, such as `Thu Sep  1 22:29:12 2016`. */
function ctime(date: Date): string {
  const [weekday, month, day, year, time] = date.toString().split(" ");
  return `${weekday} ${month} ${String(Number(day)).padStart(2)} ${time} ${year}`;
}

function number(flag: string, text: string, least: number, most = Infinity): number {
  const value = /^(\d+|Infinity)$/.test(text) ? Number(text) : NaN;
  if (value >= least && value <= most) return value;
  const range = most === Infinity ? `, ${least} or more, or Infinity` : ` from ${least} to ${most}`;
  throw new TypeError(`${flag} must be a whole number${range}: it is "${text}"`);
}

/** What the flags say. */
type Flags = ReturnType<typeof parse>;

/** Parses the flags; what it throws is one sentence. */
function parse(args: string[]) {
  try {
    return parseArgs({ args: withNegatives(args), options: FLAGS }).values;
  } catch (error) {
    throw error instanceof Error ? new TypeError(error.message.replace(/\.?\s+(To|This|Did) .*/s, "")) : error;
  }
}

/** Writes `--port -1` as `--port=-1`, as the parser would take the number for a flag. */
function withNegatives(args: string[]): string[] {
  const joined: string[] = [];
  for (const [index, arg] of args.entries()) {
    const isNumber = /^-\d/.test(arg) && NUMBERS.has(args[index - 1] ?? "") && !args.slice(0, index).includes("--");
    joined.push(isNumber ? `${joined.pop()}=${arg}` : arg);
  }
  return joined;
}

/** The text of the file that `flag` names. */
function read(flag: string, file: string): string {
  try {
    return Deno.readTextFileSync(file);
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) {
      throw new TypeError(`${flag}: permission is missing; run again with --allow-read=${file}`);
    }
    throw new TypeError(`${flag}: cannot read ${file}`);
  }
}

/** Makes what the flags ask for; `null` if they only asked to be told something. */
function makeServer(flags: Flags): StreamServer | DatagramServer | null {
  if (flags.help || flags.version) {
    console.log(flags.help ? USAGE : `server.ts ${VERSION}`);
    return null;
  }
  isQuiet = flags.quiet;
  const { hostname, unix: path } = flags;
  if (flags.port !== undefined && path !== undefined) throw new TypeError("choose one of --port and --unix");
  const port = number("--port", flags.port ?? "8009", 0, 65_535);
  const options: ServerOptions = {};
  for (const [flag, option] of LIMITS) {
    const text = flags[flag];
    if (text !== undefined) options[option] = number(`--${flag}`, text, 1);
  }
  const proxies = flags["proxy-from"];
  if (proxies !== undefined) options.proxyProtocol = { from: proxies.split(",") };
  if (flags.udp) {
    const isEncrypted = flags.cert !== undefined || flags.key !== undefined;
    const senseless = isEncrypted ? "cert" : FOR_CONNECTIONS.find((name) => flags[name]);
    if (senseless !== undefined) throw new TypeError(`--${senseless} is for connections, and --udp has none`);
    return path === undefined
      ? new UdpServer({ hostname, port }, StampDatagrams)
      : new UnixDatagramServer({ path }, StampDatagrams);
  }
  const Handler = flags.lines ? StampLines : StampChunks;
  const { cert, key } = flags;
  if ((cert === undefined) !== (key === undefined)) throw new TypeError("--cert and --key must be given together");
  if (cert !== undefined && path !== undefined) throw new TypeError("--cert is not for --unix");
  if (path !== undefined) return new UnixServer({ path }, Handler, options);
  if (cert === undefined || key === undefined) return new TcpServer({ hostname, port }, Handler, options);
  return new TlsServer({ hostname, port, cert: read("--cert", cert), key: read("--key", key) }, Handler, options);
}

/** What a balancer may take of the server that answers it: it asks briefly, from one or two hosts. */
const HEALTH_LIMITS: ServerOptions = {
  maxConnections: 64,
  maxConnectionsPerHost: 16,
  maxLifetime: 5_000,
  limit: 8_192,
};

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
    const head = await this.request.readUntil("\r\n\r\n");
    if (head === null) return; // Connected, and no more: that is a check, too.
    const [method] = new TextDecoder().decode(head).split(" ");
    if (method !== "GET" && method !== "HEAD") return await this.answer("405 Method Not Allowed", "GET or HEAD\n");
    const [status, body] = this.server.isDraining ? ["503 Service Unavailable", "draining\n"] : ["200 OK", "ok\n"];
    await this.answer(status, method === "GET" ? body : "", body.length);
  }

  async answer(status: string, body: string, length = body.length) {
    const fields = `Allow: GET, HEAD\r\nCache-Control: no-store\r\nConnection: close\r\nContent-Length: ${length}`;
    await this.request.send(`HTTP/1.1 ${status}\r\n${fields}\r\n\r\n${body}`);
  }
}

/** Makes what answers balancers, if the flags ask for it. */
function makeHealthServer(flags: Flags): HealthServer | undefined {
  if (flags.health === undefined) return undefined;
  const [, hostname = "127.0.0.1", port = ""] = /^(?:(.+):)?(.*)$/.exec(flags.health) ?? [];
  return new HealthServer({ hostname, port: number("--health", port, 0, 65_535) });
}

/** How a server is doing: who is there, and rates since it was last asked. */
class Meter {
  readonly #server: StreamServer | DatagramServer;
  #last = { at: performance.now(), messages, bytesRead: 0, bytesWritten: 0 };

  constructor(server: StreamServer | DatagramServer) {
    this.#server = server;
  }

  read(): string {
    const { active, bytesRead, bytesWritten } = this.#server.stats;
    const last = this.#last;
    const next = this.#last = { at: performance.now(), messages, bytesRead, bytesWritten };
    const rate = (what: "messages" | "bytesRead" | "bytesWritten") =>
      Math.round((next[what] - last[what]) * 1_000 / Math.max(next.at - last.at, 1));
    const there = `${this.#server instanceof DatagramServer ? "datagrams" : "connections"}: ${active}`;
    const traffic = `bytes/s in: ${rate("bytesRead")}, bytes/s out: ${rate("bytesWritten")}`;
    return `${there}, messages/s: ${rate("messages")}, ${traffic}`;
  }
}

/** How often the status line is drawn anew: a person can read it meanwhile. */
const STATUS_INTERVAL_MS = 1_000;

/** The last line of a terminal, that says how the server is doing. What else is printed goes above it. */
class StatusLine implements Disposable {
  readonly #meter: Meter;
  readonly #timer: ReturnType<typeof setInterval>;
  readonly #print = { log: console.log, error: console.error };
  #text = "";

  constructor(meter: Meter) {
    this.#meter = meter;
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
    this.#text = this.#meter.read();
    this.#show(this.#text);
  }

  #printAbove(way: "log" | "error", data: unknown[]): void {
    this.#show("");
    this.#print[way](...data);
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

/** An hour: no balancer takes longer to ask again. */
const MAX_DELAY_MS = 3_600_000;

/** SIGUSR1 is the runtime's own; other systems have neither. */
const STATUS_SIGNAL = Deno.build.os === "windows" ? undefined : "SIGUSR2";

/** Serves until a signal ends it, and `drainDelay` milliseconds more. */
async function serve(
  server: StreamServer | DatagramServer,
  health: HealthServer | undefined,
  drainDelay: number,
): Promise<void> {
  let received = 0;
  let draining: ReturnType<typeof setTimeout> | undefined;
  const stop = () => {
    if (received++ > 0) return server.close();
    if (health !== undefined) health.isDraining = true;
    draining = setTimeout(() => server.shutdown(), drainDelay);
  };
  const meter = new Meter(server);
  const listeners = new Map<Deno.Signal, () => void>([["SIGINT", stop], ["SIGTERM", stop]]);
  if (STATUS_SIGNAL !== undefined) listeners.set(STATUS_SIGNAL, () => console.log(meter.read()));
  for (const [signal, listener] of listeners) Deno.addSignalListener(signal, listener);
  try {
    log(`waiting for connection... on ${formatAddress(await server.listen())}`);
    if (health !== undefined) log(`health is told on ${formatAddress(health.listen())}`);
    using _status = Deno.stdout.isTerminal() && !isQuiet ? new StatusLine(new Meter(server)) : undefined;
    // Balancers are answered until the last client has left.
    await Promise.all([server.serveForever().finally(() => health?.close()), health?.serveForever()]);
  } finally {
    clearTimeout(draining);
    for (const [signal, listener] of listeners) Deno.removeSignalListener(signal, listener);
  }
  const { cut } = await server.shutdown(); // It is over: this is its report.
  const { accepted, dropped, handshakeFailures, bytesRead, bytesWritten } = server.stats;
  const requests = server instanceof DatagramServer
    ? `datagrams: ${accepted}, dropped: ${dropped}`
    : `clients: ${accepted}, cut off: ${cut.length}`;
  const failures = handshakeFailures === 0 ? "" : `, handshakes failed: ${handshakeFailures}`;
  log(`${requests}${failures}, bytes in: ${bytesRead}, bytes out: ${bytesWritten}`);
}

/** The library's names for options are flags here, and its texts are files. */
function inFlags(message: string): string {
  return message.replace(/\b(cert|key) (holds|is not)/, "--$1 $2").replace(/; give it the text of.*/, "")
    .replace(/(Option )?"proxyProtocol\.from"/, "--proxy-from");
}

if (import.meta.main) {
  let exitCode = 2; // The flags are wrong.
  try {
    const flags = parse(Deno.args);
    const server = makeServer(flags);
    const health = makeHealthServer(flags);
    const drainDelay = number("--drain-delay", flags["drain-delay"], 0, MAX_DELAY_MS);
    exitCode = 1; // The server cannot run.
    if (server !== null) await serve(server, health, drainDelay);
  } catch (error) {
    const help = exitCode === 2 ? "; --help lists the flags" : "";
    console.error(`server.ts: ${error instanceof Error ? inFlags(error.message) : error}${help}`);
    Deno.exit(exitCode);
  }
}
