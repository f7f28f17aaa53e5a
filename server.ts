#!/usr/bin/env -S deno run --allow-net=127.0.0.1:8009
// The tutorial's server: it answers what it is sent with a timestamp in front.

import { type FlagTable, readFile, runScript, UsageError, wholeNumber } from "./deps.ts";
import {
  DatagramRequestHandler,
  formatAddress,
  IncompleteReadError,
  LimitOverrunError,
  type ServerOptions,
  StreamRequestHandler,
  TcpServer,
  UdpServer,
  UnixDatagramServer,
  UnixServer,
} from "./mod.ts";

const BUF_SIZE = 1024;

// --- The handlers: one object for each client ------------------------------------

class Stamp extends StreamRequestHandler {
  override setup() {
    say("...connected from: ", formatAddress(this.clientAddress));
  }

  override async handle() {
    for (let data; (data = await this.request.recv(BUF_SIZE)) !== null;) await this.answer(data);
  }

  async answer(data: Uint8Array) {
    this.request.write(stamp());
    await this.request.write(data); // Its bytes pass unchanged.
  }
}

class StampLines extends Stamp {
  override async handle() {
    try {
      for (let line; (line = await this.request.readUntil("\n")) !== null;) await this.answer(line);
    } catch (error) {
      if (error instanceof IncompleteReadError) return await this.answer(error.partial); // The last line has no end.
      if (error instanceof LimitOverrunError) {
        await this.request.send("The line is too long, and nothing after it is read\n");
      }
      throw error;
    }
  }
}

class StampDatagram extends DatagramRequestHandler {
  override async handle() {
    say("...datagram from: ", formatAddress(this.clientAddress));
    const answer = new Uint8Array([...new TextEncoder().encode(stamp()), ...this.request.data]);
    await this.request.reply(answer).catch(({ message }) => console.error("server.ts: %s", message)); // It may be too long.
  }
}

/** The time as Python's `time.ctime()` writes it, such as `[Thu Sep  1 22:29:12 2016] `. */
function stamp(): string {
  const [weekday, month, day, year, time] = new Date().toString().split(" ");
  return `[${weekday} ${month} ${String(Number(day)).padStart(2)} ${time} ${year}] `;
}

// --- The server ------------------------------------------------------------------

type Server = TcpServer | UnixServer | UdpServer | UnixDatagramServer;

/** Serves until SIGINT or SIGTERM. The first one lets clients finish what they have begun, the second cuts them off. */
async function serve(server: Server) {
  let isStopping = false;
  const stop = () => {
    if (isStopping) return server.close();
    isStopping = true;
    server.shutdown();
  };
  for (const signal of ["SIGINT", "SIGTERM"] as const) Deno.addSignalListener(signal, stop);
  say("waiting for connection... on ", formatAddress(await server.listen()));
  await server.serveForever();
  const { cut } = await server.shutdown(); // It is over: this is its report.
  const { accepted, dropped, bytesRead, bytesWritten } = server.stats;
  const isUdp = server instanceof UdpServer || server instanceof UnixDatagramServer;
  const requests = isUdp
    ? `datagrams: ${accepted}, dropped: ${dropped}`
    : `clients: ${accepted}, cut off: ${cut.length}`;
  say(`${requests}, bytes in: ${bytesRead}, bytes out: ${bytesWritten}`);
}

let isQuiet = false;

/** Prints a line for the person at the terminal, where an address stands out. */
function say(text: string, address = "") {
  if (!isQuiet) console.log("%s%c%s", text, "color: cyan", address);
}

// --- The flags -------------------------------------------------------------------

const FLAGS = [
  ["hostname", "HOST", "address to listen on (127.0.0.1)"],
  ["port", "PORT", "port to listen on; 0 takes a free one (8009)"],
  ["unix", "PATH", "listen on a Unix socket instead"],
  ["udp", "", "serve datagrams, each of which is stamped; needs --unstable-net"],
  ["cert", "FILE", "encrypt with TLS; FILE is the server's certificate,"],
  ["key", "FILE", "and this one its private key"],
  ["lines", "", "stamp each line, instead of each chunk as it arrives"],
  ["max-connections", "N", "serve so many clients at once; others wait (10000)"],
  ["idle-timeout", "MS", "close clients that are silent for so long (never)"],
  ["quiet", "", "print errors only"],
  ["help", "", "print this"],
  ["version", "", "print the version"],
] as const satisfies FlagTable<string>;

const USAGE = `Answers what it is sent with a timestamp in front.
Usage: deno run --allow-net server.ts [FLAG...]
%s

SIGINT (Ctrl-C) or SIGTERM lets clients finish what they have begun; a second one cuts them off.
--unix needs --allow-read=PATH --allow-write=PATH too; --cert and --key need --allow-read of both files.`;

type Flags = ReadonlyMap<(typeof FLAGS)[number][0], string>;

/** Flags that mean nothing to datagrams, and to a Unix socket. */
const NOT_FOR = {
  udp: ["lines", "cert", "key", "max-connections", "idle-timeout"],
  unix: ["hostname", "port", "cert", "key"],
} as const;

async function makeServer(flags: Flags): Promise<Server> {
  for (const [flag, senseless] of [["udp", NOT_FOR.udp], ["unix", NOT_FOR.unix]] as const) {
    const other = flags.has(flag) ? senseless.find((name) => flags.has(name)) : undefined;
    if (other !== undefined) throw new UsageError(`--${other} is not for --${flag}`);
  }
  const [cert, key, path, hostname = "127.0.0.1"] = (["cert", "key", "unix", "hostname"] as const).map((name) =>
    flags.get(name)
  );
  if ((cert === undefined) !== (key === undefined)) throw new UsageError("--cert and --key must be given together");
  const port = wholeNumber("--port", flags.get("port") ?? "8009", 0, 65_535);
  const options: ServerOptions = {
    maxConnections: wholeNumber("--max-connections", flags.get("max-connections") ?? "10000", 1),
    idleTimeout: wholeNumber("--idle-timeout", flags.get("idle-timeout") ?? "Infinity", 1),
  };
  const Handler = flags.has("lines") ? StampLines : Stamp;
  if (flags.has("udp")) {
    return path === undefined
      ? new UdpServer({ hostname, port }, StampDatagram)
      : new UnixDatagramServer({ path }, StampDatagram);
  }
  if (path !== undefined) return new UnixServer({ path }, Handler, options);
  if (cert === undefined || key === undefined) return new TcpServer({ hostname, port }, Handler, options);
  const { TlsServer } = await import("./extras/tls.ts");
  return new TlsServer({ hostname, port, cert: readFile(cert), key: readFile(key) }, Handler, options);
}

async function main(flags: Flags, others: string[]): Promise<void> {
  if (others.length > 0) throw new UsageError(`unexpected argument ${others[0]}`);
  isQuiet = flags.has("quiet");
  await serve(await makeServer(flags));
}

if (import.meta.main) await runScript("server.ts", USAGE, FLAGS, main);
