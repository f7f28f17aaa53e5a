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
  --max-connections N    serve so many clients at once, others wait (no limit)
  --idle-timeout MS      close clients that are silent for so long (never)
  --quiet                print errors only
  --help                 print this and end
  --version              print the version and end

SIGINT or SIGTERM lets clients finish what they have begun; a second one cuts
them off.`;

const VERSION = "0.1.0";

const FLAGS = {
  hostname: { type: "string", default: "127.0.0.1" },
  port: { type: "string" }, // 8009, if there is no --unix.
  unix: { type: "string" },
  udp: { type: "boolean", default: false },
  cert: { type: "string" },
  key: { type: "string" },
  lines: { type: "boolean", default: false },
  "max-connections": { type: "string", default: "Infinity" },
  "idle-timeout": { type: "string", default: "Infinity" },
  quiet: { type: "boolean", default: false },
  help: { type: "boolean", default: false },
  version: { type: "boolean", default: false },
} as const;

/** The flags that mean nothing to datagrams. */
const FOR_CONNECTIONS = ["lines", "max-connections", "idle-timeout"] as const;

/** The flags that take a number. */
const NUMBERS = /^--(port|max-connections|idle-timeout)$/;

/** Prints what happens; `--quiet` replaces it. */
let log: (line: string) => void = console.log;

abstract class Stamp extends StreamRequestHandler {
  override setup() {
    log(`...connected from: ${formatAddress(this.clientAddress)}`);
  }

  /** Answers with the time and `data`, whose bytes pass through unchanged. */
  protected async answer(data: Uint8Array) {
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

/** Parses the flags; what it throws is one sentence. */
function parse(args: string[]) {
  try {
    return parseArgs({ args: withNegatives(args), options: FLAGS });
  } catch (error) {
    throw error instanceof Error ? new TypeError(error.message.replace(/\.?\s+(To|This|Did) .*/s, "")) : error;
  }
}

/** Writes `--port -1` as `--port=-1`, as the parser would take the number for a flag. */
function withNegatives(args: string[]): string[] {
  const joined: string[] = [];
  for (const [index, arg] of args.entries()) {
    const isNumber = /^-\d/.test(arg) && NUMBERS.test(args[index - 1] ?? "") && !args.slice(0, index).includes("--");
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
function makeServer(args: string[]): StreamServer | DatagramServer | null {
  const { values: flags } = parse(args);
  if (flags.help || flags.version) {
    console.log(flags.help ? USAGE : `server.ts ${VERSION}`);
    return null;
  }
  if (flags.quiet) log = () => {};
  const { hostname, unix: path } = flags;
  if (flags.port !== undefined && path !== undefined) throw new TypeError("choose one of --port and --unix");
  const port = number("--port", flags.port ?? "8009", 0, 65_535);
  const options: ServerOptions = {
    maxConnections: number("--max-connections", flags["max-connections"], 1),
    idleTimeout: number("--idle-timeout", flags["idle-timeout"], 1),
  };
  if (flags.udp) {
    const isEncrypted = flags.cert !== undefined || flags.key !== undefined;
    const senseless = isEncrypted ? "cert" : FOR_CONNECTIONS.find((name) => flags[name] !== FLAGS[name].default);
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

async function serve(server: StreamServer | DatagramServer): Promise<void> {
  const signals = ["SIGINT", "SIGTERM"] as const;
  let received = 0;
  const stop = () => received++ === 0 ? void server.shutdown() : server.close();
  for (const signal of signals) Deno.addSignalListener(signal, stop);
  try {
    log(`waiting for connection... on ${formatAddress(await server.listen())}`);
    await server.serveForever();
  } finally {
    for (const signal of signals) Deno.removeSignalListener(signal, stop);
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
  return message.replace(/\b(cert|key) (holds|is not)/, "--$1 $2").replace(/; give it the text of.*/, "");
}

if (import.meta.main) {
  let exitCode = 2; // The flags are wrong.
  try {
    const server = makeServer(Deno.args);
    exitCode = 1; // The server cannot run.
    if (server !== null) await serve(server);
  } catch (error) {
    const help = exitCode === 2 ? "; --help lists the flags" : "";
    console.error(`server.ts: ${error instanceof Error ? inFlags(error.message) : error}${help}`);
    Deno.exit(exitCode);
  }
}
