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
  parseArgs,
  stdin,
  stdout,
} from "./deps.ts";
import { connect, IncompleteReadError, SocketStream } from "./mod.ts";

const USAGE = `Sends what is typed, a line at a time, and prints what comes back.

Usage: deno run --allow-net client.ts [options] [MESSAGE...]

  --hostname HOST   the server's name or address (127.0.0.1)
  --port PORT       the server's port (8009)
  --unix PATH       connect to a Unix socket instead; this needs
                    --allow-read=PATH --allow-write=PATH too
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
  port: { type: "string", default: "8009" },
  unix: { type: "string" },
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

/** What the flags ask for; `null` if they only asked to be told something. */
function readFlags(args: string[]) {
  const { values: flags, positionals } = parseArgs({ args, options: FLAGS, allowPositionals: true });
  if (flags.help || flags.version) {
    console.log(flags.help ? USAGE : `client.ts ${VERSION}`);
    return null;
  }
  const { hostname, unix } = flags;
  if (hostname === "") throw new TypeError("--hostname must not be empty");
  if (unix === "") throw new TypeError("--unix must not be empty");
  const port = number("--port", flags.port, 1, 65_535);
  const { tls, ca, "server-name": serverName } = flags;
  if (!tls && (ca !== undefined || serverName !== undefined)) {
    throw new TypeError(`${ca === undefined ? "--server-name" : "--ca"} is for --tls`);
  }
  const trust = {
    ...(ca === undefined ? {} : { caCerts: [read("--ca", ca)] }),
    ...(serverName === undefined ? {} : { serverName }),
  };
  return {
    keepOpen: flags["keep-open"],
    lineEnd: flags["no-newline"] ? "" : "\n",
    messages: positionals,
    target: {
      ...(unix === undefined ? { hostname, port } : { path: unix }),
      tls: tls && trust,
      timeout: number("--timeout", flags.timeout, 1),
      retries: number("--retries", flags.retries, 0),
    },
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

/** Sends each line and prints its answer before the next one, then what is still coming. */
async function exchange(server: SocketStream, lines: AsyncIterable<Uint8Array> | Uint8Array[]): Promise<void> {
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
  }

  try {
    for await (const line of lines) {
      if (line.length === 0) continue; // Nothing would answer it.
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
    for await (const rest of server) await print(rest);
  } catch (error) {
    if (!(error instanceof Deno.errors.TimedOut)) throw error;
    console.error("client.ts: the server has answered everything, but keeps the connection open");
  }
}

/** Talks to a person: what the server says is printed above the prompt, whenever it comes. */
async function converse(server: SocketStream, { keepOpen, lineEnd }: Settings): Promise<void> {
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
    for await (const data of server) {
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
  await using server = await connect(settings.target);
  const { messages, lineEnd } = settings;
  try {
    if (messages.length > 0) {
      const encoder = new TextEncoder();
      await exchange(server, messages.map((message) => encoder.encode(message + lineEnd)));
    } else if (stdin.isTTY) {
      server.timeout = Infinity; // A person may think for as long as they like.
      await converse(server, settings);
    } else {
      await exchange(server, pipedLines(lineEnd));
    }
  } catch (error) {
    throw explained(error, settings);
  }
}

/** What the server did, for a person. */
function explained(error: unknown, { target }: Settings): unknown {
  if (error instanceof Deno.errors.TimedOut) return new Error(`the server did not answer within ${target.timeout} ms`);
  const hasLeft = error instanceof Deno.errors.ConnectionReset || error instanceof Deno.errors.BrokenPipe;
  return hasLeft ? new Error("the server has left in the middle") : error;
}

if (import.meta.main) {
  let exitCode = 2; // The flags are wrong.
  try {
    const settings = readFlags(Deno.args);
    exitCode = 1; // The server cannot be reached, or has left.
    if (settings !== null) await talk(settings);
    Deno.exit(0); // A read of standard input that waits would keep the process alive.
  } catch (error) {
    const help = exitCode === 2 ? "; --help lists the flags" : "";
    console.error(`client.ts: ${error instanceof Error ? error.message : error}${help}`);
    Deno.exit(exitCode);
  }
}
