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
  formatAddress,
  IncompleteReadError,
  type ServerOptions,
  StreamRequestHandler,
  type StreamServer,
  TcpServer,
  TlsServer,
  UnixServer,
} from "./mod.ts";

const USAGE = `Answers what it is sent with a timestamp in front.

Usage: deno run --allow-net server.ts [options]

  --hostname HOST        address to listen on (127.0.0.1)
  --port PORT            port to listen on; 0 takes a free one (8009)
  --unix PATH            listen on a Unix socket instead; this needs
                         --allow-read=PATH --allow-write=PATH too
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
  port: { type: "string", default: "8009" },
  unix: { type: "string" },
  cert: { type: "string" },
  key: { type: "string" },
  lines: { type: "boolean", default: false },
  "max-connections": { type: "string", default: "Infinity" },
  "idle-timeout": { type: "string", default: "Infinity" },
  quiet: { type: "boolean", default: false },
  help: { type: "boolean", default: false },
  version: { type: "boolean", default: false },
} as const;

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

/** C's `ctime` form in local time, such as `Thu Sep  1 22:29:12 2016`. */
function ctime(date: Date): string {
  const [weekday, month, day, year, time] = date.toString().split(" ");
  return `${weekday} ${month} ${String(Number(day)).padStart(2)} ${time} ${year}`;
}

function number(flag: string, text: string, least: number, most = Infinity): number {
  const value = /^(\d+|Infinity)$/.test(text) ? Number(text) : NaN;
  if (value >= least && value <= most) return value;
  throw new TypeError(`${flag} must be a whole number from ${least} to ${most}: it is "${text}"`);
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
function makeServer(args: string[]): StreamServer | null {
  const { values: flags } = parseArgs({ args, options: FLAGS });
  if (flags.help || flags.version) {
    console.log(flags.help ? USAGE : `server.ts ${VERSION}`);
    return null;
  }
  if (flags.quiet) log = () => {};
  const Handler = flags.lines ? StampLines : StampChunks;
  const options: ServerOptions = {
    maxConnections: number("--max-connections", flags["max-connections"], 1),
    idleTimeout: number("--idle-timeout", flags["idle-timeout"], 1),
  };
  const { unix, hostname, cert, key } = flags;
  if ((cert === undefined) !== (key === undefined)) throw new TypeError("--cert and --key must be given together");
  if (cert !== undefined && unix !== undefined) throw new TypeError("--cert is not for --unix");
  if (unix !== undefined) return new UnixServer({ path: unix }, Handler, options);
  const address = { hostname, port: number("--port", flags.port, 0, 65_535) };
  if (cert === undefined || key === undefined) return new TcpServer(address, Handler, options);
  return new TlsServer({ ...address, cert: read("--cert", cert), key: read("--key", key) }, Handler, options);
}

async function serve(server: StreamServer): Promise<void> {
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
  const { accepted, bytesRead, bytesWritten } = server.stats;
  log(`clients: ${accepted}, cut off: ${cut.length}, bytes in: ${bytesRead}, bytes out: ${bytesWritten}`);
}

if (import.meta.main) {
  let exitCode = 2; // The flags are wrong.
  try {
    const server = makeServer(Deno.args);
    exitCode = 1; // The server cannot run.
    if (server !== null) await serve(server);
  } catch (error) {
    const help = exitCode === 2 ? "; --help lists the flags" : "";
    console.error(`server.ts: ${error instanceof Error ? error.message : error}${help}`);
    Deno.exit(exitCode);
  }
}
