#!/usr/bin/env -S deno run --allow-net=127.0.0.1:8009
/**
 * The tutorial's client: it sends what is typed and prints what comes back.
 *
 * ```sh
 * deno run --allow-net client.ts --help
 * ```
 *
 * @module
 */

import {
  clearScreenDown,
  createInterface,
  cursorTo,
  type Interface,
  moveCursor,
  parseFlagsAndMessages,
  readFileOf,
  runScript,
  stdin,
  stdout,
  UsageError,
  wholeNumber,
} from "./deps.ts";
import { connect, DatagramClient, formatAddress, IncompleteReadError, SocketStream } from "./mod.ts";

const USAGE = `Sends what is typed, a line at a time, and prints what comes back.

Usage: deno run --allow-net client.ts [options] [MESSAGE...]

  --hostname HOST   the server's name or address (127.0.0.1)
  --port PORT       the server's port (8009)
  --unix PATH       connect to a Unix socket instead; this needs
                    --allow-read=PATH --allow-write=PATH too
  --udp             send each line as one datagram, without its line end; this
                    needs --unstable-net too. With --unix it makes a socket
                    beside PATH for the answers
  --tls             encrypt with TLS; the server's certificate is checked
  --ca FILE         trust the authority whose certificate is in FILE, instead
                    of those that are well known; this needs --allow-read=FILE
  --server-name NAME  the name that the certificate must have (the hostname)
  --timeout MS      how long to wait for the connection and for an answer;
                    Infinity waits for ever (10000)
  --retries N       try so often again when the connection fails (0)
  --keep-open       an empty line asks again, instead of ending
  --no-newline      send lines without their line end
  --help            print this and end
  --version         print the version and end

On a terminal an empty line or Ctrl-D ends it. Piped input is sent line by line,
each answered before the next; then what is still coming is printed. With
MESSAGEs, these are the lines.`;

const VERSION = "0.1.0";

const FLAGS = {
  hostname: { type: "string", default: "127.0.0.1" },
  port: { type: "string" }, // 8009, if there is no --unix.
  unix: { type: "string" },
  udp: { type: "boolean", default: false },
  tls: { type: "boolean", default: false },
  ca: { type: "string" },
  "server-name": { type: "string" },
  timeout: { type: "string", default: "10000" },
  retries: { type: "string", default: "0" },
  "keep-open": { type: "boolean", default: false },
  "no-newline": { type: "boolean", default: false },
  help: { type: "boolean", default: false },
  version: { type: "boolean", default: false },
} as const;

/** What the flags ask for; `null` if they only asked to be told something. */
function readFlags(args: string[]) {
  const { values: flags, positionals } = parseFlagsAndMessages(args, FLAGS);
  if (flags.help || flags.version) {
    console.log(flags.help ? USAGE : `client.ts ${VERSION}`);
    return null;
  }
  const { hostname, unix, udp } = flags;
  if (hostname === "") throw new UsageError("--hostname must not be empty");
  if (/\/|^[^:]*:[^:]*$|\]:/.test(hostname)) {
    throw new UsageError(`--hostname takes a name or an address only; the port goes to --port: it is "${hostname}"`);
  }
  if (unix === "") throw new UsageError("--unix must not be empty");
  if (unix !== undefined && flags.port !== undefined) throw new UsageError("choose one of --port and --unix");
  const port = wholeNumber("--port", flags.port ?? "8009", 1, 65_535);
  const timeout = wholeNumber("--timeout", flags.timeout, 1);
  const retries = wholeNumber("--retries", flags.retries, 0);
  if (udp && retries > 0) throw new UsageError("--retries is for connections, and --udp has none");
  const { tls, ca, "server-name": serverName } = flags;
  if (!tls && (ca !== undefined || serverName !== undefined)) {
    throw new UsageError(`${ca === undefined ? "--server-name" : "--ca"} is for --tls`);
  }
  if (udp && tls) throw new UsageError("--tls is for connections, and --udp has none");
  const trust = {
    ...(ca === undefined ? {} : { caCerts: [readFileOf("--ca", ca)] }),
    ...(serverName === undefined ? {} : { serverName }),
  };
  return {
    udp,
    keepOpen: flags["keep-open"],
    lineEnd: udp || flags["no-newline"] ? "" : "\n",
    messages: positionals,
    target: unix === undefined ? { hostname, port } : { path: unix },
    timeout,
    retries,
    tls: tls && trust,
  };
}

type Settings = NonNullable<ReturnType<typeof readFlags>>;

/** Standard input as a stream, for its way of reading lines as bytes. */
function standardInput(): SocketStream {
  const nowhere: Deno.Addr = { transport: "unix", path: "" };
  return new SocketStream({
    localAddr: nowhere,
    remoteAddr: nowhere,
    read: (into) => Deno.stdin.read(into),
    write: () => Promise.reject(new TypeError("Standard input is not for writing")),
    closeWrite: () => Promise.resolve(),
    close: () => {},
  }, { limit: Infinity });
}

/** The lines that were piped in, byte by byte as they were; throws what follows the last line end. */
async function* pipedLines(lineEnd: string): AsyncGenerator<Uint8Array> {
  const input = standardInput();
  for (let line; (line = await input.readUntil("\n")) !== null;) yield lineEnd === "" ? line.subarray(0, -1) : line;
}

/** A server of datagrams, to be talked to like a connection: each datagram is to be answered by one. */
class DatagramPeer implements Disposable {
  readonly #client: DatagramClient;
  #unanswered = 0;
  #isEnding = false;

  constructor({ target, timeout }: Settings) {
    const isUnix = "path" in target;
    this.#client = new DatagramClient({
      ...(isUnix ? { ...target, localPath: `${target.path}.client-${Deno.pid}` } : target),
      timeout,
    });
  }

  async send(data: Uint8Array | string): Promise<void> {
    this.#unanswered++;
    await this.#client.send(data);
  }

  /** The next answer; `null` at the end. It is waited for without end while nothing was asked. */
  async recv(): Promise<Uint8Array | null> {
    while (!this.#isOver) {
      const isAsked = this.#unanswered > 0;
      try {
        const answer = await this.#client.recv();
        this.#unanswered = Math.max(0, this.#unanswered - 1);
        return answer;
      } catch (error) {
        if (this.#isOver) break;
        if (isAsked || !(error instanceof Deno.errors.TimedOut)) throw error;
      }
    }
    return null;
  }

  /** No more will be asked; what was asked may still be answered. */
  closeWrite(): Promise<void> {
    this.#isEnding = true;
    if (this.#isOver) this.close();
    return Promise.resolve();
  }

  close(): void {
    this.#unanswered = 0;
    this.#client.close();
  }

  [Symbol.dispose](): void {
    this.close();
  }

  get #isOver(): boolean {
    return this.#isEnding && this.#unanswered === 0;
  }
}

type Server = SocketStream | DatagramPeer;

/** Sends each line and prints its answer before the next one, then what is still coming. */
async function exchange(server: Server, lines: AsyncIterable<Uint8Array> | Uint8Array[]): Promise<void> {
  const output = Deno.stdout.writable.getWriter();

  async function print(data: Uint8Array) {
    await output.write(data).catch(() => {
      throw new Error("standard output is closed");
    });
  }

  async function printAnswer() {
    const answer = await server.recv();
    if (answer === null) throw new Deno.errors.ConnectionReset();
    await print(answer);
    // A datagram is whole, so its end can be told from the middle of an answer.
    const isWhole = server instanceof DatagramPeer && answer.at(-1) !== LINE_FEED;
    if (isWhole) await print(new Uint8Array([LINE_FEED]));
  }

  try {
    for await (const line of lines) {
      if (line.length === 0 && server instanceof SocketStream) continue; // Nothing would answer it.
      await server.send(line);
      await printAnswer();
    }
    await server.closeWrite();
  } catch (error) {
    if (!(error instanceof IncompleteReadError)) throw error;
    await server.send(error.partial); // The last line has no end: a server of lines waits for ours.
    await server.closeWrite();
    await printAnswer();
  }
  try {
    for (let rest; (rest = await server.recv()) !== null;) await print(rest);
  } catch (error) {
    if (!(error instanceof Deno.errors.TimedOut)) throw error;
    console.error("client.ts: the server has answered everything, but keeps the connection open");
  }
}

/** Talks to a person: what the server says is printed above the prompt, whenever it comes. */
async function converse(server: Server, { keepOpen, lineEnd }: Settings): Promise<void> {
  const terminal = createInterface({ input: stdin, output: stdout, prompt: ">>> " });
  let open = true;
  let asking = false; // The prompt is on the screen.
  terminal.on("line", () => asking = false);
  terminal.on("close", () => {
    if (asking) stdout.write("\n");
    open = asking = false;
  });

  function ask() {
    asking = open;
    if (open) terminal.prompt(true);
  }

  async function sendWhatIsTyped() {
    ask();
    for await (const line of terminal) {
      if (line === "" && !keepOpen) break;
      if (line !== "") await server.send(line + lineEnd);
      ask();
    }
    terminal.close();
    setTimeout(() => server.close(), PARTING_MS);
    await server.closeWrite().catch(() => {}); // If the server has left, reading tells.
  }

  async function printWhatComes() {
    for (let data; (data = await server.recv()) !== null;) {
      const rows = asking ? erasePrompt(terminal) : 0;
      stdout.write(data);
      if (data.at(-1) !== LINE_FEED) stdout.write("\n");
      stdout.write("\n".repeat(rows)); // The prompt goes up again by as many.
      if (asking) ask();
    }
    if (!open) return;
    terminal.close();
    stdout.write("The server has left.\n");
  }

  try {
    await Promise.all([sendWhatIsTyped(), printWhatComes()]);
  } catch (error) {
    if (open || !(error instanceof Deno.errors.BadResource)) throw error; // Else it did not part in time.
  } finally {
    terminal.close();
  }
}

/** Clears the prompt with what is typed; returns how many rows that had above the cursor. */
function erasePrompt(terminal: Interface): number {
  const { rows } = terminal.getCursorPos();
  moveCursor(stdout, 0, -rows);
  cursorTo(stdout, 0);
  clearScreenDown(stdout);
  return rows;
}

/** How long a person who has ended waits for the last answer. */
const PARTING_MS = 1_000;

const LINE_FEED = 0x0a;

async function talk(settings: Settings): Promise<void> {
  const { messages, lineEnd, udp, target, tls, timeout, retries } = settings;
  try {
    await using server = udp ? new DatagramPeer(settings) : await connect({ ...target, tls, timeout, retries });
    if (messages.length > 0) {
      const encoder = new TextEncoder();
      await exchange(server, messages.map((message) => encoder.encode(message + lineEnd)));
    } else if (stdin.isTTY) {
      // A person may think for as long as they like.
      if (server instanceof SocketStream) server.timeout = Infinity;
      await converse(server, settings);
    } else {
      await exchange(server, pipedLines(lineEnd));
    }
  } catch (error) {
    throw explained(error, settings);
  }
}

/** What the server did, for a person. */
function explained(error: unknown, { udp, target, timeout }: Settings): unknown {
  if (error instanceof Deno.errors.TimedOut) {
    const where = "path" in target ? target.path : formatAddress({ transport: "udp", ...target });
    return new Error(
      udp ? `no answer from ${where} within ${timeout} ms` : `the server did not answer within ${timeout} ms`,
    );
  }
  const hasLeft = error instanceof Deno.errors.ConnectionReset || error instanceof Deno.errors.BrokenPipe;
  if (hasLeft) return new Error("the server has left in the middle");
  return error instanceof Error ? Object.assign(error, { message: inFlags(error.message) }) : error;
}

/** The library's names for options are flags here. */
function inFlags(message: string): string {
  return message.replace("in caCerts", "with --ca").replace("set serverName", "set --server-name");
}

async function main(args: string[]): Promise<void> {
  const settings = readFlags(args);
  if (settings !== null) await talk(settings);
}

if (import.meta.main) await runScript("client.ts", main);
