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
  delay,
  moveCursor,
  parseFlagsAndMessages,
  readFileOf,
  runScript,
  stdin,
  stdout,
  UsageError,
  wholeNumber,
} from "./deps.ts";
import { connect, DatagramClient, formatAddress, IncompleteReadError, printable, SocketStream } from "./mod.ts";

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
  --cert FILE       show the server the certificate in FILE; --key FILE is its
                    private key. This needs --allow-read of both
  --timeout MS      how long to wait for the connection and for an answer;
                    Infinity waits for ever (10000)
  --retries N       try so often again when the connection fails (0)
  --reconnect       when the server leaves, wait until it is back: 250 ms, then
                    twice as long each time, up to 5 s
  --hex             what is sent is written as bytes in hexadecimal, such as
                    68 65 6c 6c 6f 0a, and what comes is printed as such: its
                    place in all that has come, bytes, text
  --timing          say on standard error (on a terminal, below the answer) how
                    long each answer took
  --keep-open       an empty line asks again, instead of ending
  --no-newline      send lines without their line end
  --help            print this and end
  --version         print the version and end

On a terminal an empty line, Ctrl-C or Ctrl-D ends it. The arrows bring back the
lines of this session, Tab completes from them, and Ctrl-L clears the screen.
Piped input is sent line by line, each answered before the next; then what is
still coming is printed. With MESSAGEs, these are the lines.

What the server sends is printed byte by byte as it is, but not to a terminal,
which would obey it: there control characters are written as \\x1b.

No line is sent twice. With --reconnect, what is typed while the server is away
is not sent, and is said not to be; of piped lines those that had no answer are
named, the others wait, and the exit code is 1.`;

const VERSION = "0.1.0";

const FLAGS = {
  hostname: { type: "string", default: "127.0.0.1" },
  port: { type: "string" }, // 8009, if there is no --unix.
  unix: { type: "string" },
  udp: { type: "boolean", default: false },
  tls: { type: "boolean", default: false },
  ca: { type: "string" },
  "server-name": { type: "string" },
  cert: { type: "string" },
  key: { type: "string" },
  timeout: { type: "string", default: "10000" },
  retries: { type: "string", default: "0" },
  reconnect: { type: "boolean", default: false },
  hex: { type: "boolean", default: false },
  timing: { type: "boolean", default: false },
  "keep-open": { type: "boolean", default: false },
  "no-newline": { type: "boolean", default: false },
  help: { type: "boolean", default: false },
  version: { type: "boolean", default: false },
} as const;

/** The flags that mean nothing without a connection. */
const FOR_CONNECTIONS = ["tls", "reconnect"] as const;

/** The flags that mean nothing without TLS. */
const FOR_TLS = ["ca", "server-name", "cert", "key"] as const;

/** What the flags ask for; `null` if they only asked to be told something. */
function readFlags(args: string[]) {
  const { values: flags, positionals } = parseFlagsAndMessages(args, FLAGS);
  if (flags.help || flags.version) {
    console.log(flags.help ? USAGE : `client.ts ${VERSION}`);
    return null;
  }
  const { udp, hex } = flags;
  const target = readTarget(flags);
  const timeout = wholeNumber("--timeout", flags.timeout, 1);
  const retries = wholeNumber("--retries", flags.retries, 0);
  const senseless = retries > 0 ? "retries" : FOR_CONNECTIONS.find((name) => flags[name]);
  if (udp && senseless !== undefined) throw new UsageError(`--${senseless} is for connections, and --udp has none`);
  const lineEnd = udp || hex || flags["no-newline"] ? "" : "\n";
  return {
    udp,
    hex,
    lineEnd,
    messages: positionals.map((text) => readMessage(text, { hex, lineEnd })),
    target,
    timeout,
    retries,
    reconnect: flags.reconnect,
    timing: flags.timing,
    keepOpen: flags["keep-open"],
    tls: readTrust(flags),
  };
}

type Flags = ReturnType<typeof parseFlagsAndMessages<typeof FLAGS>>["values"];

type Settings = NonNullable<ReturnType<typeof readFlags>>;

function readTarget({ hostname, unix, port }: Flags) {
  if (hostname === "") throw new UsageError("--hostname must not be empty: name the server, or leave the flag out");
  if (/\/|^[^:]*:[^:]*$|\]:/.test(hostname)) {
    throw new UsageError(`--hostname takes a name or an address only; the port goes to --port: it is "${hostname}"`);
  }
  if (unix === "") throw new UsageError("--unix must not be empty: name the server's socket, or leave the flag out");
  if (unix !== undefined && port !== undefined) throw new UsageError("choose one of --port and --unix");
  return unix === undefined ? { hostname, port: wholeNumber("--port", port ?? "8009", 1, 65_535) } : { path: unix };
}

/** Whom to trust, and whom to be; `false` without TLS. */
function readTrust(flags: Flags) {
  const { tls, ca, "server-name": serverName, cert, key } = flags;
  const senseless = FOR_TLS.find((name) => flags[name] !== undefined);
  if (!tls && senseless !== undefined) throw new UsageError(`--${senseless} is for --tls; give that too`);
  if ((cert === undefined) !== (key === undefined)) throw new UsageError("--cert and --key must be given together");
  if (serverName === "") throw new UsageError("--server-name must not be empty: name whom the certificate must be for");
  return tls && {
    ...(ca === undefined ? {} : { caCerts: [readFileOf("--ca", ca)] }),
    ...(serverName === undefined ? {} : { serverName }),
    ...(cert === undefined ? {} : { cert: readFileOf("--cert", cert) }),
    ...(key === undefined ? {} : { key: readFileOf("--key", key) }),
  };
}

function readMessage(text: string, how: Encoding): Uint8Array {
  try {
    return encode(text, how);
  } catch (error) {
    throw error instanceof SyntaxError ? new UsageError(error.message) : error;
  }
}

// --- What is sent -------------------------------------------------------------

/** A line to be sent. */
interface Line {
  readonly data: Uint8Array;
  /** It was the last one, and its line end is missing: a server of lines waits for ours. */
  readonly isUnfinished: boolean;
}

/** How text becomes bytes. */
interface Encoding {
  readonly hex: boolean;
  readonly lineEnd: string;
}

const encoder = new TextEncoder();

/** The bytes that `text` stands for; throws `SyntaxError`. */
function encode(text: string, { hex, lineEnd }: Encoding): Uint8Array {
  return hex ? bytesInHex(text) : encoder.encode(text + lineEnd);
}

function bytesInHex(text: string): Uint8Array {
  const words = text.split(/\s+/).filter((word) => word !== "");
  const wrong = words.find((word) => !/^([0-9a-f]{2})+$/i.test(word));
  if (wrong !== undefined) {
    const shown = printable(wrong.length > 20 ? `${wrong.slice(0, 20)}…` : wrong);
    throw new SyntaxError(`"${shown}" is not in hexadecimal; write two digits for each byte, such as 68 65 6c 6c 6f`);
  }
  return Uint8Array.from(words.join("").match(/../g) ?? [], (digits) => parseInt(digits, 16));
}

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

/** The lines that are piped in, byte by byte as they are; throws a sentence at one that cannot be read. */
async function* pipedLines(settings: Settings): AsyncGenerator<Line> {
  const input = standardInput();
  for (let number = 1;; number++) {
    const line = await readPiped(input);
    if (line === null) return;
    yield settings.hex ? { data: readPipedHex(line.data, number), isUnfinished: false } : {
      data: settings.lineEnd === "" && !line.isUnfinished ? line.data.subarray(0, -1) : line.data,
      isUnfinished: line.isUnfinished,
    };
  }
}

async function readPiped(input: SocketStream): Promise<Line | null> {
  try {
    const data = await input.readUntil("\n");
    return data && { data, isUnfinished: false };
  } catch (error) {
    if (!(error instanceof IncompleteReadError)) throw error;
    return { data: error.partial, isUnfinished: true };
  }
}

/** To go on behind a line that is left out would be to say something else, so this ends it. */
function readPipedHex(line: Uint8Array, number: number): Uint8Array {
  try {
    return bytesInHex(new TextDecoder().decode(line));
  } catch (error) {
    if (!(error instanceof SyntaxError)) throw error;
    throw new Error(`line ${number} and what follows is not sent: ${error.message}`);
  }
}

// --- What comes ---------------------------------------------------------------

/** How what comes is printed. */
type View = (data: Uint8Array) => Uint8Array;

function makeView({ hex, udp }: Settings): View {
  if (hex) return hexView(udp);
  return Deno.stdout.isTerminal() ? safeView(udp) : (data) => data;
}

/** Text that a terminal can be given: it would obey what a server sends. */
function safeView(udp: boolean): View {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  return (data) => {
    // A character may come in two pieces, but not in two datagrams.
    const text = decoder.decode(data, { stream: !udp }).replaceAll("\r\n", "\n");
    // An empty datagram is an answer, too.
    return encoder.encode(udp && text === "" ? "\n" : text.replace(/[^\n\t]+/g, printable));
  };
}

const BYTES_PER_ROW = 16;

/** Rows as `hexdump -C` prints them. Places count from the connection's beginning, or from the datagram's. */
function hexView(udp: boolean): View {
  let offset = 0;
  return (data) => {
    if (udp) offset = 0;
    const rows: string[] = [];
    for (let start = 0; start < data.length || rows.length === 0; start += BYTES_PER_ROW) {
      rows.push(hexRow(offset + start, data.subarray(start, start + BYTES_PER_ROW)));
    }
    offset += data.length;
    return encoder.encode(rows.join(""));
  };
}

function hexRow(offset: number, bytes: Uint8Array): string {
  const digits = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0"));
  const halves = [digits.slice(0, BYTES_PER_ROW / 2), digits.slice(BYTES_PER_ROW / 2)].map((half) => half.join(" "));
  const text = Array.from(bytes, (byte) => byte >= 0x20 && byte < 0x7f ? String.fromCharCode(byte) : ".").join("");
  return `${offset.toString(16).padStart(8, "0")}  ${halves.join("  ").padEnd(48)}  |${text}|\n`;
}

/** How long an answer took that was asked for at `since`, to be printed on `output`. */
function duration(since: number, output: typeof Deno.stdout | typeof Deno.stderr): string {
  const text = `${(performance.now() - since).toFixed(1)} ms`;
  return output.isTerminal() && !Deno.noColor ? `\x1b[2m${text}\x1b[22m` : text;
}

// --- The server ---------------------------------------------------------------

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

/** The waits between two tries to reach a server that has left. */
const RECONNECT_MIN_MS = 250;
const RECONNECT_MAX_MS = 5_000;

/** The server, by one connection or, if it leaves and comes back, by several. */
class Server implements AsyncDisposable {
  readonly #settings: Settings;
  #peer: SocketStream | DatagramPeer;
  #view: View;
  #hasSpoken = false;

  private constructor(settings: Settings, peer: SocketStream | DatagramPeer) {
    this.#settings = settings;
    this.#peer = peer;
    this.#view = makeView(settings);
  }

  static async reach(settings: Settings): Promise<Server> {
    const { udp, target, tls, timeout, retries } = settings;
    const peer = udp ? new DatagramPeer(settings) : await connect({ ...target, tls, timeout, retries });
    return new Server(settings, peer);
  }

  /** Waits until the server, which has left, can be reached again. */
  async reachAgain(signal?: AbortSignal): Promise<void> {
    this.#peer.close();
    const { target, tls, timeout } = this.#settings;
    for (let wait = RECONNECT_MIN_MS;; wait = Math.min(wait * 2, RECONNECT_MAX_MS)) {
      await delay(wait, undefined, signal && { signal });
      try {
        this.#peer = await connect({ ...target, tls, timeout, ...(signal && { signal }) });
        this.#view = makeView(this.#settings);
        this.#hasSpoken = false;
        return;
      } catch (error) {
        if (signal?.aborted || !isAbsence(error)) throw error;
      }
    }
  }

  async send(data: Uint8Array): Promise<void> {
    await this.#peer.send(data);
  }

  /** What comes next, to be printed; `null` at the end. */
  async recv(): Promise<Uint8Array | null> {
    const data = await this.#peer.recv();
    if (data === null) return null;
    const { udp, tls, hex } = this.#settings;
    const mayBeAlert = !this.#hasSpoken && !udp && tls === false && !hex;
    this.#hasSpoken = true;
    if (mayBeAlert && isTlsAlert(data)) throw new Error("the server speaks TLS there; run again with --tls");
    return this.#view(data);
  }

  async closeWrite(): Promise<void> {
    await this.#peer.closeWrite();
  }

  /** A person may think for as long as they like. For datagrams that is so anyway. */
  waitForEver(): void {
    if (this.#peer instanceof SocketStream) this.#peer.timeout = Infinity;
  }

  close(): void {
    this.#peer.close();
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#peer instanceof SocketStream) await this.#peer[Symbol.asyncDispose]();
    else this.#peer.close();
  }
}

/** Whether a failed try only means that the server is not there yet. */
function isAbsence(error: unknown): boolean {
  return !(error instanceof Deno.errors.NotCapable || error instanceof Deno.errors.InvalidData);
}

function hasLeft(error: unknown): boolean {
  return error instanceof Deno.errors.ConnectionReset || error instanceof Deno.errors.BrokenPipe;
}

/** RFC 8446, 5.1 and 6: a record of 2 bytes that is an alert, which is how a server of TLS answers anything else. */
function isTlsAlert(data: Uint8Array): boolean {
  const [type, major, , lengthHigh, lengthLow, level] = data;
  return data.length === 7 && type === 21 && major === 3 && lengthHigh === 0 && lengthLow === 2 &&
    (level === 1 || level === 2);
}

// --- Without a person ---------------------------------------------------------

/** Sends each line and prints its answer before the next one, then what is still coming. */
async function exchange(server: Server, lines: AsyncIterable<Line> | Line[], settings: Settings): Promise<void> {
  const { udp, reconnect, timing } = settings;
  const output = Deno.stdout.writable.getWriter();
  let number = 0;
  let unanswered = 0;
  let isAway = false;

  async function print(data: Uint8Array) {
    await output.write(data).catch(() => {
      throw new Error("standard output is closed");
    });
  }

  async function ask({ data, isUnfinished }: Line) {
    const since = performance.now();
    await server.send(data);
    if (isUnfinished) await server.closeWrite();
    const answer = await server.recv();
    if (answer === null) throw new Deno.errors.ConnectionReset();
    await print(answer);
    // A datagram is whole, so its end can be told from the middle of an answer.
    if (udp && answer.at(-1) !== LINE_FEED) await print(new Uint8Array([LINE_FEED]));
    if (timing) console.error(duration(since, Deno.stderr));
  }

  for await (const line of lines) {
    number++;
    if (line.data.length === 0 && !udp) continue; // Nothing would answer it.
    if (isAway) {
      console.error("client.ts: trying to reach the server again…");
      await server.reachAgain();
      console.error("client.ts: the server is back");
    }
    try {
      isAway = false;
      await ask(line);
    } catch (error) {
      if (!reconnect || !hasLeft(error)) throw error;
      isAway = true;
      unanswered++;
      console.error(`client.ts: the server has left before it answered line ${number}, which is not sent again`);
    }
  }
  if (!isAway) await printRest(server, print);
  if (unanswered > 0) throw new Error(`${unanswered} of ${number} lines were not answered; send them again if need be`);
}

async function printRest(server: Server, print: (data: Uint8Array) => Promise<void>): Promise<void> {
  await server.closeWrite();
  try {
    for (let rest; (rest = await server.recv()) !== null;) await print(rest);
  } catch (error) {
    if (!(error instanceof Deno.errors.TimedOut)) throw error;
    console.error("client.ts: the server has answered everything, but keeps the connection open");
  }
}

// --- On a terminal ------------------------------------------------------------

/** What the prompt shows while lines are sent, and while they are not. */
const [READY, AWAY] = [">>> ", "--- "];

/** Lines that the arrows bring back. They are kept in this session only: on disk they might betray a password. */
const HISTORY_LINES = 1_000;

/** A prompt, above which all else is printed. */
class Prompt implements AsyncDisposable {
  readonly #lines = new Set<string>();
  readonly #terminal = createInterface({
    input: stdin,
    output: stdout,
    prompt: READY,
    historySize: HISTORY_LINES,
    removeHistoryDuplicates: true,
    completer: (begun: string) => this.#complete(begun),
  });
  #isOpen = true;
  #isShown = false;

  constructor() {
    this.#terminal.on("line", () => this.#isShown = false);
    this.#terminal.on("close", () => {
      if (this.#isShown) stdout.write("\n");
      this.#isOpen = this.#isShown = false;
    });
  }

  get isOpen(): boolean {
    return this.#isOpen;
  }

  /** What is typed, line by line, until somebody closes the prompt. */
  async *[Symbol.asyncIterator](): AsyncGenerator<string> {
    this.#ask();
    for await (const line of this.#terminal) {
      if (line.trim() !== "") this.#lines.add(line);
      yield line;
      this.#ask();
    }
  }

  /** Prints `texts`, a line each, above the prompt. */
  print(...texts: (Uint8Array | string)[]): void {
    const rows = this.#isShown ? this.#erase() : 0;
    for (const text of texts) {
      if (text.length === 0) continue; // Half a character has come.
      stdout.write(text);
      if (text.at(-1) !== "\n" && text.at(-1) !== LINE_FEED) stdout.write("\n");
    }
    stdout.write("\n".repeat(rows)); // The prompt goes up again by as many.
    if (this.#isShown) this.#ask();
  }

  /** Prints `text`, and then asks with `prompt`, which is as wide as the one before. */
  change(text: string, prompt: string): void {
    this.#terminal.setPrompt(prompt);
    this.print(text);
  }

  close(): void {
    this.#terminal.close();
  }

  /** Closes it; what was printed is on the screen then, and would else be lost if the process ended at once. */
  async [Symbol.asyncDispose](): Promise<void> {
    this.close();
    await new Promise<void>((resolve) => void stdout.write("", () => resolve()));
  }

  #ask(): void {
    this.#isShown = this.#isOpen;
    if (this.#isOpen) this.#terminal.prompt(true);
  }

  /** Clears the prompt with what is typed; returns how many rows that had above the cursor. */
  #erase(): number {
    const { rows } = this.#terminal.getCursorPos();
    moveCursor(stdout, 0, -rows);
    cursorTo(stdout, 0);
    clearScreenDown(stdout);
    return rows;
  }

  /** The lines of this session that begin so, in the form that `node:readline` asks for. */
  #complete(begun: string): [string[], string] {
    const isBegun = begun !== "";
    return [isBegun ? [...this.#lines].filter((line) => line.startsWith(begun)) : [], begun];
  }
}

/** Talks to a person: what the server says is printed above the prompt, whenever it comes. */
async function converse(server: Server, settings: Settings): Promise<void> {
  const { keepOpen, reconnect, timing } = settings;
  await using prompt = new Prompt();
  const leaving = new AbortController();
  let isAway = false;
  let askedAt: number | undefined; // When the last line was sent that may still be answered.

  async function send(line: string) {
    if (isAway) return prompt.print("Not sent, as the server is away; the up arrow brings the line back.");
    try {
      const data = encode(line, settings);
      askedAt = performance.now();
      await server.send(data);
    } catch (error) {
      if (error instanceof SyntaxError) return prompt.print(`Not sent: ${error.message}.`);
      if (!(reconnect && hasLeft(error))) throw error; // Else reading tells.
    }
  }

  async function sendWhatIsTyped() {
    for await (const line of prompt) {
      if (line === "" && !keepOpen) break;
      if (line !== "") await send(line);
    }
    prompt.close();
    leaving.abort();
    setTimeout(() => server.close(), PARTING_MS);
    await server.closeWrite().catch(() => {}); // If the server has left, reading tells.
  }

  async function printWhatComes() {
    server.waitForEver();
    for (let data; (data = await server.recv()) !== null;) {
      prompt.print(data, ...(timing && askedAt !== undefined ? [duration(askedAt, Deno.stdout)] : []));
      askedAt = undefined;
    }
  }

  async function waitForReturn() {
    isAway = true;
    const loss = askedAt === undefined ? "" : " before it answered, and nothing is sent again";
    askedAt = undefined;
    prompt.change(`The server has left${loss}; trying again…`, AWAY);
    await server.reachAgain(leaving.signal);
    isAway = false;
    prompt.change("The server is back.", READY);
  }

  async function printWhileItIsThere() {
    while (prompt.isOpen) {
      try {
        await printWhatComes();
      } catch (error) {
        if (!(reconnect && prompt.isOpen && hasLeft(error))) throw error;
      }
      if (!prompt.isOpen) return;
      if (reconnect) {
        await waitForReturn();
      } else {
        prompt.close();
        stdout.write("The server has left.\n");
      }
    }
  }

  try {
    await Promise.all([sendWhatIsTyped(), printWhileItIsThere()]);
  } catch (error) {
    // The person has left, while the server was away or did not part in time.
    const isParting = error instanceof Deno.errors.BadResource || leaving.signal.aborted && isAway;
    if (prompt.isOpen || !isParting) throw error;
  }
}

/** How long a person who has ended waits for the last answer. */
const PARTING_MS = 1_000;

const LINE_FEED = 0x0a;

async function talk(settings: Settings): Promise<void> {
  try {
    await using server = await Server.reach(settings);
    if (settings.messages.length > 0) {
      await exchange(server, settings.messages.map((data) => ({ data, isUnfinished: false })), settings);
    } else if (stdin.isTTY && stdout.isTTY) {
      await converse(server, settings);
    } else {
      await exchange(server, pipedLines(settings), settings);
    }
  } catch (error) {
    throw explained(error, settings);
  }
}

/** What the server did, for a person. */
function explained(error: unknown, { udp, target, timeout, tls }: Settings): unknown {
  if (!(error instanceof Error)) return error;
  if (hasLeft(error) && !error.message.startsWith("Cannot connect")) {
    const isKnown = tls !== false && "cert" in tls;
    const hint = isKnown ? ", or check that it accepts the certificate of --cert" : "";
    return new Error(`the server has left in the middle; start it again${hint}`);
  }
  if (error instanceof Deno.errors.TimedOut && !error.message.startsWith("Cannot connect")) {
    const where = "path" in target ? target.path : formatAddress({ transport: "udp", ...target });
    const what = udp ? `no answer from ${where}` : "the server did not answer";
    return new Error(`${what} within ${timeout} ms; try a longer --timeout`);
  }
  return Object.assign(error, { message: inFlags(error.message) });
}

/** The library's names for options are flags here. */
function inFlags(message: string): string {
  return message
    .replace("in caCerts", "with --ca")
    .replace("set serverName", "set --server-name")
    .replace("speak TLS there; check the port", "speak TLS there; check the port, or leave --tls out")
    .replace(/during the TLS handshake$/, "$&; check that it speaks TLS there, or leave --tls out")
    .replace(/^the TLS handshake failed \((received fatal alert: (\w+))\)$/, (whole, _, alert) => {
      if (alert === "CertificateRequired") {
        return "the server asks for a certificate; give it one with --cert and --key";
      }
      const isOurs = /Certificate|UnknownCA|AccessDenied/.test(alert);
      return isOurs
        ? `the server does not accept this client's certificate (${alert}); give it another with --cert`
        : whole;
    });
}

async function main(args: string[]): Promise<void> {
  const settings = readFlags(args);
  if (settings === null) return;
  await talk(settings);
  Deno.exit(0); // A read of standard input that waits would keep the process alive.
}

if (import.meta.main) await runScript("client.ts", main);
