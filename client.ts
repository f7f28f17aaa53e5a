#!/usr/bin/env -S deno run --allow-net=127.0.0.1:8009
// The tutorial's client: it sends what is typed, a line at a time, and prints what comes back.

import { type FlagTable, readFile, runScript, UsageError, wholeNumber } from "./deps.ts";
import { connect, DatagramClient, IncompleteReadError, printable, SocketStream } from "./mod.ts";

// --- The conversation ------------------------------------------------------------

type Lines = AsyncIterable<string | Uint8Array> | string[];
type Print = (data: Uint8Array) => unknown;

/** Sends lines, and prints what the server says at any time. Without a `prompt` each line waits for an answer to the last. */
async function converse(server: Server, lines: Lines, print: Print, prompt?: Prompt): Promise<void> {
  const hearing = server.hear(print);
  hearing.then(() => prompt?.close("The server has left.\n"), () => prompt?.close());
  try {
    for await (const line of lines) {
      await server.send(line);
      if (prompt === undefined || server.isUdp) await server.answered();
    }
  } finally {
    await server.end();
    if (prompt !== undefined) setTimeout(() => Deno.exit(0), 1_000); // A person who has ended waits no longer.
    await hearing; // All that came is printed first. Why nothing comes says more than that a line could not be sent.
  }
}

/** The server, which is heard while lines are sent to it. */
class Server {
  readonly isUdp: boolean;
  readonly #peer: SocketStream | DatagramClient;
  readonly #lineEnd: string;
  readonly #isHalfDuplex: boolean; // A Unix datagram socket of Deno cannot send while it waits to receive.
  readonly #into = new Uint8Array(65_536); // For recv() an answer of 300 bytes may be two chunks, and so two lines.
  #isAsked = false;
  #isSending = false;
  #isEnding = false;
  #isOver = false;
  #wake = () => {};

  constructor(peer: SocketStream | DatagramClient, lineEnd: string, isUnix: boolean) {
    [this.#peer, this.#lineEnd, this.#isHalfDuplex] = [peer, lineEnd, isUnix];
    this.isUdp = peer instanceof DatagramClient;
  }

  async send(line: string | Uint8Array): Promise<void> {
    if (line.length === 0 && !this.isUdp) return; // Nothing would answer it.
    this.#isAsked = this.#isSending = true;
    await this.#peer.send(line).finally(() => this.#isSending = false);
    this.#wake();
    // A server of lines waits for the end of the last one.
    if (this.#lineEnd !== "" && line.at(-1) !== "\n" && line.at(-1) !== LINE_FEED) await this.end();
  }

  /** Resolves when something has come since a line was sent; rejects if nothing will. */
  async answered(): Promise<void> {
    while (this.#isAsked && !this.#isOver) await new Promise<void>((resolve) => this.#wake = resolve);
    if (this.#isAsked) throw new Error("the server closed the connection before it answered");
  }

  /** Prints what comes until the server ends; with datagrams, until `end()`. */
  async hear(print: Print): Promise<void> {
    try {
      for (let data; (data = await this.#recv()) !== null; this.#wake()) {
        const isFirst = this.#peer instanceof SocketStream && !this.#peer.under.under && this.#peer.bytesRead === 7;
        const isTlsAlert = isFirst && /^21,3,[0-4],0,2,2,/.test(data.join()); // RFC 8446, 5.1 and 6: a fatal one.
        if (isTlsAlert) throw new Error("the server speaks TLS; run again with --tls");
        this.#isAsked = false;
        await print(data);
      }
    } finally {
      this.#isOver = true;
      this.#wake();
    }
  }

  async #recv(): Promise<Uint8Array | null> {
    while (!this.#isOver) {
      const isLate = this.#isAsked && !this.#isSending;
      try {
        if (this.#peer instanceof SocketStream) {
          const count = await this.#peer.read(this.#into);
          return count === null ? null : this.#into.slice(0, count);
        }
        if (isLate || this.#isEnding || !this.#isHalfDuplex) return await this.#peer.recv();
        await new Promise<void>((resolve) => this.#wake = resolve);
      } catch (error) {
        if (error instanceof Deno.errors.BadResource || this.isUdp && this.#isEnding) break;
        if (!(error instanceof Deno.errors.TimedOut)) throw error;
        if (isLate) throw new Error("no answer came within --timeout");
        if (this.#isEnding && !this.#isAsked) {
          console.error("client.ts: the server has answered everything, but keeps the connection open");
          break;
        }
      }
    }
    return null;
  }

  /** No more is sent; what was asked may still be answered. */
  async end(): Promise<void> {
    this.#isEnding = true;
    if (this.#peer instanceof SocketStream) return await this.#peer.closeWrite().catch(() => {}); // hear() tells.
    this.#peer.close();
    this.#wake();
  }
}

/** The lines of standard input, byte by byte as they are. With a `prompt` each is asked for, and an empty one ends. */
async function* inputLines(lineEnd: string, prompt: string): AsyncGenerator<Uint8Array> {
  const localAddr: Deno.Addr = { transport: "unix", path: "" };
  const conn = {
    ...{ localAddr, remoteAddr: localAddr, close: () => {}, closeWrite: () => Promise.resolve() },
    ...{ read: (into: Uint8Array) => Deno.stdin.read(into), write: (data: Uint8Array) => Deno.stdout.write(data) },
  };
  const input = new SocketStream(conn, { limit: Infinity });
  try {
    for (;;) {
      Deno.stdout.writeSync(new TextEncoder().encode(prompt));
      const line = await input.readUntil("\n");
      if (line === null || prompt !== "" && line.length === 1) return;
      yield lineEnd === "" ? line.subarray(0, -1) : line;
    }
  } catch (error) {
    if (!(error instanceof IncompleteReadError)) throw error;
    yield error.partial;
  }
}

/** Makes what comes fit to print: a terminal would obey control characters, and a datagram may lack a line end. */
function fit(print: Print, isUdp: boolean): Print {
  const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
  const safe = (text: string) =>
    new TextEncoder().encode(text.replaceAll("\r\n", "\n").replace(/[^\n\t]+/g, printable));
  return (data) => {
    const shown = Deno.stdout.isTerminal() ? safe(decoder.decode(data, { stream: !isUdp })) : data;
    return print(isUdp && shown.at(-1) !== LINE_FEED ? new Uint8Array([...shown, LINE_FEED]) : shown);
  };
}

// --- The prompt ------------------------------------------------------------------

const [PROMPT, LINE_FEED] = [">>> ", 0x0a];

/** `undefined` if the terminal cannot move its cursor (TERM=dumb). History stays in memory: it may hold passwords. */
async function openPrompt(): Promise<Prompt | undefined> {
  const modules = [import("node:readline"), import("node:stream"), import("node:process")] as const;
  const [{ createInterface }, { PassThrough }, { stdout }] = await Promise.all(modules);
  const input = Object.assign(new PassThrough(), { setRawMode: (isRaw: boolean) => Deno.stdin.setRaw(isRaw) });
  const settings = { prompt: PROMPT, historySize: 1_000, removeHistoryDuplicates: true, terminal: true };
  const probed = new PassThrough(); // Deno's readline sees TERM without a permission.
  createInterface({ input: new PassThrough(), output: probed, ...settings }).prompt();
  if (!String(probed.read()).includes("\x1b")) return undefined;
  return new Prompt(createInterface({ input, output: stdout, ...settings }), input, stdout);
}

/** A prompt with editing and history, above which all else is printed. */
class Prompt {
  readonly #editor: import("node:readline").Interface;
  readonly #input: NodeJS.EventEmitter;
  readonly #output: NodeJS.WritableStream;
  #isOpen = true;
  #isShown = false;

  constructor(editor: import("node:readline").Interface, input: NodeJS.EventEmitter, output: NodeJS.WritableStream) {
    [this.#editor, this.#input, this.#output] = [editor, input, output];
    editor.on("line", () => this.#isShown = false).on("close", () => this.close());
    if (Deno.build.os !== "windows") Deno.addSignalListener("SIGCONT", () => this.#ask()); // After Ctrl-Z and fg.
    this.#readKeys();
  }

  /** What is typed, until an empty line (unless `keepOpen`) or `close()`. */
  async *lines(lineEnd: string, keepOpen: boolean): AsyncGenerator<string> {
    this.#ask();
    for await (const line of this.#editor) {
      if (line !== "") yield line + lineEnd;
      else if (!keepOpen) break;
      this.#ask();
    }
    this.close();
  }

  /** Prints a text, on lines of its own, above the prompt. */
  print(text: Uint8Array): void {
    const rows = this.#isShown ? this.#editor.getCursorPos().rows : 0; // The prompt goes up by as many again.
    if (this.#isShown) this.#output.write(`${rows > 0 ? `\x1b[${rows}A` : ""}\r\x1b[J`);
    this.#output.write(text);
    this.#output.write((text.length === 0 || text.at(-1) === LINE_FEED ? "" : "\n") + "\n".repeat(rows));
    if (this.#isShown) this.#ask();
  }

  /** Ends the questions, with a last text. */
  close(text = ""): void {
    if (!this.#isOpen) return;
    this.#isOpen = false;
    this.#editor.close();
    this.#output.write(`${this.#isShown ? "\n" : ""}${text}`);
  }

  #ask(): void {
    this.#isShown = this.#isOpen;
    if (!this.#isOpen) return;
    Deno.stdin.setRaw(true);
    this.#editor.prompt(true);
  }

  async #readKeys(): Promise<void> {
    for await (const text of Deno.stdin.readable.pipeThrough(new TextDecoderStream())) {
      for (const [keys] of text.matchAll(/[^\p{Cc}]{16,}|[\u2028\u2029]|[^]/gu)) this.#type(keys);
    }
    this.close();
  }

  /** Puts in at once what is pasted: for each key readline looks at the whole line, and it takes U+2028 for Enter. */
  #type(keys: string): void {
    if (keys.length < 16 && !/[\u2028\u2029]/.test(keys)) return void this.#input.emit("data", keys);
    const { line, cursor } = this.#editor;
    const text = line.slice(0, cursor) + keys + line.slice(cursor);
    Object.assign(this.#editor, { line: text, cursor: cursor + keys.length });
    this.#ask();
  }
}

// --- The flags -------------------------------------------------------------------

const FLAGS = [
  ["hostname", "HOST", "the server's name or address (127.0.0.1)"],
  ["port", "PORT", "the server's port (8009)"],
  ["unix", "PATH", "connect to a Unix socket instead, of at most 107 bytes"],
  ["udp", "", "send each line as one datagram, without its line end; needs --unstable-net"],
  ["tls", "", "encrypt with TLS; the server's certificate is checked"],
  ["ca", "FILE", "trust the authority of this certificate besides the well-known ones"],
  ["timeout", "MS", "how long to wait for the connection and for an answer (10000)"],
  ["retries", "N", "try so often again when the connection fails (0)"],
  ["keep-open", "", "an empty line asks again, instead of ending"],
  ["no-newline", "", "send lines without their line end"],
  ["help", "", "print this"],
  ["version", "", "print the version"],
] as const satisfies FlagTable<string>;

const USAGE = `Sends what is typed, a line at a time, and prints what comes back.
Usage: deno run --allow-net client.ts [FLAG...] [--] [MESSAGE...]
%s

On a terminal an empty line, Ctrl-C or Ctrl-D ends it. Piped lines, and MESSAGEs, each wait for an answer to the last.
--unix needs --allow-read=PATH --allow-write=PATH too, and with --udp it makes a socket beside PATH.`;

type Flags = ReadonlyMap<(typeof FLAGS)[number][0], string>;

async function reach(flags: Flags): Promise<SocketStream | DatagramClient> {
  for (const [flag, other] of [["unix", "port"], ["unix", "hostname"], ["udp", "tls"], ["udp", "retries"]] as const) {
    if (flags.has(flag) && flags.has(other)) throw new UsageError(`--${other} is not for --${flag}`);
  }
  const timeout = wholeNumber("--timeout", flags.get("timeout") ?? "10000", 1);
  const retries = wholeNumber("--retries", flags.get("retries") ?? "0", 0);
  const port = wholeNumber("--port", flags.get("port") ?? "8009", 1, 65_535);
  const [path, ca, hostname = "127.0.0.1"] = [flags.get("unix"), flags.get("ca"), flags.get("hostname")];
  if (ca !== undefined && !flags.has("tls")) throw new UsageError("--ca is for --tls; give that too");
  const tls = flags.has("tls") && (ca === undefined || { caCerts: [readFile(ca)] });
  const local = { path: path ?? "", localPath: `${path}.client-${Deno.pid}` };
  if (flags.has("udp")) return new DatagramClient({ ...(path === undefined ? { hostname, port } : local), timeout });
  return await connect({ ...(path === undefined ? { hostname, port } : { path }), timeout, retries, tls });
}

async function main(flags: Flags, others: string[]): Promise<void> {
  const isPerson = others.length === 0 && Deno.stdin.isTerminal() && Deno.stdout.isTerminal();
  const lineEnd = flags.has("udp") || flags.has("no-newline") ? "" : "\n";
  using peer = await reach(flags);
  if (isPerson && peer instanceof SocketStream) peer.timeout = Infinity; // A person may think for as long as they like.
  const server = new Server(peer, lineEnd, flags.has("unix"));
  const prompt = isPerson ? await openPrompt() : undefined;
  const output = Deno.stdout.writable.getWriter();
  const closed = () => Promise.reject(new Error("standard output is closed"));
  const print = (data: Uint8Array) => prompt ? prompt.print(data) : output.write(data).catch(closed);
  const piped = others.length > 0 ? others.map((text) => text + lineEnd) : inputLines(lineEnd, isPerson ? PROMPT : "");
  await converse(server, prompt?.lines(lineEnd, flags.has("keep-open")) ?? piped, fit(print, server.isUdp), prompt);
  Deno.exit(0); // A read of standard input may still wait.
}

if (import.meta.main) await runScript("client.ts", USAGE, FLAGS, main);
