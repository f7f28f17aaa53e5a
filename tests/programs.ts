/**
 * Helpers to start programs and to talk to them: whoever waits, waits for an
 * event, for a bounded time, and fails with what was printed until then.
 *
 * @module
 */

import { assert } from "../deps.ts";
import { PACKAGES } from "./packages.ts";

/** Long enough for a busy machine; no test that passes waits for it. */
const PATIENCE_MS = 10_000;

export interface ProgramOptions {
  cwd?: string;
  env?: Record<string, string>;
}

/** How a program ended. */
export interface Outcome {
  code: number;
  stdout: string;
  stderr: string;
  /** The standard output as it was. */
  bytes: Uint8Array;
}

/** A child process of the test; `await using` kills it if it still runs. */
export class Program implements AsyncDisposable {
  readonly #name: string;
  readonly #child: Deno.ChildProcess;
  readonly #input: WritableStreamDefaultWriter<Uint8Array>;
  readonly #stdout: Output;
  readonly #stderr: Output;
  #ended = false;

  private constructor(name: string, child: Deno.ChildProcess) {
    this.#name = name;
    this.#child = child;
    this.#input = child.stdin.getWriter();
    this.#stdout = new Output(child.stdout);
    this.#stderr = new Output(child.stderr);
  }

  /** Starts `command`; fails with the name of the package to install if it is missing. */
  static start(command: string, args: string[] = [], { cwd, env }: ProgramOptions = {}): Program {
    try {
      const child = new Deno.Command(command, {
        args,
        env: { DENO_NO_UPDATE_CHECK: "1", NO_COLOR: "1", ...env },
        ...(cwd === undefined ? {} : { cwd }),
        stdin: "piped",
        stdout: "piped",
        stderr: "piped",
      }).spawn();
      return new Program([command, ...args].join(" "), child);
    } catch (error) {
      if (!(error instanceof Deno.errors.NotFound)) throw error;
      throw new Error(`${command} is missing: install the package ${PACKAGES[command] ?? command}`, { cause: error });
    }
  }

  /** The process's number. */
  get pid(): number {
    return this.#child.pid;
  }

  /** What was printed so far. */
  get stdout(): string {
    return this.#stdout.text;
  }

  get stderr(): string {
    return this.#stderr.text;
  }

  /** Waits until standard output holds `pattern`. */
  printed(pattern: RegExp | string): Promise<RegExpMatchArray> {
    return this.#wait(`print ${pattern}`, this.#stdout.holds((text) => match(text, pattern)));
  }

  /** Waits until the standard error holds `pattern`. */
  complained(pattern: RegExp | string): Promise<RegExpMatchArray> {
    return this.#wait(`complain ${pattern}`, this.#stderr.holds((text) => match(text, pattern)));
  }

  /** Waits until `condition` holds for what was printed. */
  shows(what: string, condition: (text: string) => boolean): Promise<true> {
    return this.#wait(`show ${what}`, this.#stdout.holds((text) => condition(text) || undefined));
  }

  async write(data: string | Uint8Array): Promise<void> {
    await this.#input.write(typeof data === "string" ? new TextEncoder().encode(data) : data);
  }

  async closeInput(): Promise<void> {
    await this.#input.close();
  }

  kill(signal: Deno.Signal): void {
    this.#child.kill(signal);
  }

  /** Closes our end of its standard output, as `| head` does. */
  async leaveOutput(): Promise<void> {
    await this.#stdout.cancel();
  }

  /** Waits until it has ended. */
  async ended(): Promise<Outcome> {
    const ended = Promise.all([this.#child.status, this.#stdout.ended, this.#stderr.ended]);
    const [{ code }] = await this.#wait("end", ended);
    this.#ended = true;
    return { code, stdout: this.stdout, stderr: this.stderr, bytes: this.#stdout.bytes };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    if (!this.#ended) this.#killIfAlive();
    await this.#input.close().catch(() => {}); // It may be closed already, or broken.
    await Promise.all([this.#child.status, this.#stdout.ended, this.#stderr.ended]);
  }

  #killIfAlive(): void {
    try {
      this.#child.kill("SIGKILL");
    } catch (error) {
      if (!(error instanceof TypeError)) throw error; // It has ended already.
    }
  }

  async #wait<T>(what: string, promise: Promise<T | undefined>): Promise<T> {
    const { promise: late, resolve } = Promise.withResolvers<undefined>();
    const timer = setTimeout(() => resolve(undefined), PATIENCE_MS);
    const value = await Promise.race([promise, late]);
    clearTimeout(timer);
    if (value !== undefined) return value;
    throw new Error(`"${this.#name}" did not ${what}\n--- stdout\n${this.stdout}\n--- stderr\n${this.stderr}`);
  }
}

function match(text: string, pattern: RegExp | string): RegExpMatchArray | undefined {
  if (typeof pattern !== "string") return text.match(pattern) ?? undefined;
  return text.includes(pattern) ? [pattern] : undefined;
}

/** What comes out of a pipe, kept; whoever waits for something in it is told. */
class Output {
  readonly ended: Promise<true>;
  readonly #reader: ReadableStreamDefaultReader<Uint8Array>;
  #chunks: Uint8Array[] = [];
  #isAtEnd = false;
  #news = Promise.withResolvers<void>();

  constructor(stream: ReadableStream<Uint8Array>) {
    this.#reader = stream.getReader();
    this.ended = this.#collect();
  }

  get bytes(): Uint8Array {
    const bytes = joined(this.#chunks);
    this.#chunks = [bytes];
    return bytes;
  }

  get text(): string {
    return new TextDecoder().decode(this.bytes);
  }

  /** What `find` returns, once it is not `undefined`; `undefined` if the pipe ends before. */
  async holds<T>(find: (text: string) => T | undefined): Promise<T | undefined> {
    for (;;) {
      const news = this.#news.promise;
      const found = find(this.text);
      if (found !== undefined || this.#isAtEnd) return found;
      await news;
    }
  }

  async cancel(): Promise<void> {
    await this.#reader.cancel();
  }

  async #collect(): Promise<true> {
    for (let read; !(read = await this.#reader.read()).done; this.#tell()) this.#chunks.push(read.value);
    this.#isAtEnd = true;
    this.#tell();
    return true;
  }

  #tell(): void {
    this.#news.resolve();
    this.#news = Promise.withResolvers();
  }
}

function joined(chunks: Uint8Array[]): Uint8Array {
  const bytes = new Uint8Array(chunks.reduce((sum, chunk) => sum + chunk.length, 0));
  let at = 0;
  for (const chunk of chunks) {
    bytes.set(chunk, at);
    at += chunk.length;
  }
  return bytes;
}

const here = (path: string) => new URL(path, import.meta.url).pathname;

/** The arguments that run `script`, one of the two, with `permissions` and no others. */
export function denoArgs(script: "server.ts" | "client.ts", args: string[], permissions: string[]): string[] {
  return ["run", "--no-prompt", ...permissions, here(`../${script}`), ...args];
}

/** Starts one of the two scripts. */
export function startScript(
  script: "server.ts" | "client.ts",
  args: string[],
  { permissions = ["--allow-net=127.0.0.1"], ...options }: ProgramOptions & { permissions?: string[] } = {},
): Program {
  return Program.start(Deno.execPath(), denoArgs(script, args, permissions), options);
}

/** A running service.ts, on free ports of 127.0.0.1. */
export class Service implements AsyncDisposable {
  readonly program: Program;
  readonly port: number;
  readonly opsPort: number;

  private constructor(program: Program, port: number, opsPort: number) {
    this.program = program;
    this.port = port;
    this.opsPort = opsPort;
  }

  static async start(
    args: string[] = [],
    { port = 0, opsPort = 0, permissions = ["--allow-net=127.0.0.1"] } = {},
  ): Promise<Service> {
    const flags = ["--port", `${port}`, "--ops-port", `${opsPort}`, ...args];
    const run = ["run", "--no-prompt", ...permissions, here("../docs/running/service.ts"), ...flags];
    const program = Program.start(Deno.execPath(), run);
    try {
      const [, ops, own] = await program.printed(/"operators".*:(\d+)"\}\n.*"listening".*:(\d+)"\}\n/);
      return new Service(program, Number(own), Number(ops));
    } catch (error) {
      await program[Symbol.asyncDispose]();
      throw error;
    }
  }

  /** The events that it has logged, without their time. */
  get events(): Record<string, unknown>[] {
    return this.program.stdout.trimEnd().split("\n").map((line) => {
      const { time: _, ...event } = JSON.parse(line);
      return event;
    });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.program[Symbol.asyncDispose]();
  }
}

/** Runs one of the two scripts to its end, with `input` piped in. */
export async function runScript(
  script: "server.ts" | "client.ts",
  args: string[],
  { input = "", ...options }: ProgramOptions & { permissions?: string[]; input?: string | Uint8Array } = {},
): Promise<Outcome> {
  await using program = startScript(script, args, options);
  await program.write(input).catch(ignoreLeaving);
  await program.closeInput().catch(ignoreLeaving);
  return await program.ended();
}

/** Whether a program reads all of its input, or waits for all answers, is not for the helpers to judge. */
function ignoreLeaving(error: unknown): void {
  if (error instanceof Deno.errors.BrokenPipe || error instanceof Deno.errors.ConnectionReset) return;
  throw error;
}

/** Starts a program of `python/`. */
export function startPython(file: string, args: string[] = []): Program {
  return Program.start("python3", [here(`python/${file}`), ...args]);
}

/** What a terminal is like, and what runs on it. */
export interface TerminalOptions {
  columns?: number;
  rows?: number;
  script?: "server.ts" | "client.ts";
  /** Runs this and not a script. */
  command?: string[];
  env?: Record<string, string>;
}

/** One of the two scripts, or another program, on a terminal of its own. */
export class Terminal implements AsyncDisposable {
  readonly #program: Program;
  readonly #columns: number;

  constructor(
    args: string[],
    { columns = 80, rows = 24, script = "client.ts", command, env = {} }: TerminalOptions = {},
  ) {
    const run = command ?? [Deno.execPath(), ...denoArgs(script, args, ["--allow-net=127.0.0.1"])];
    const driver = [here("python/pty_driver.py"), `${columns}x${rows}`, ...run];
    this.#program = Program.start("python3", driver, { env: { TERM: "xterm", ...env } });
    this.#columns = columns || 80;
  }

  /** All that was shown, with what the terminal does not show. */
  get output(): string {
    return this.#program.stdout;
  }

  async type(keys: string): Promise<void> {
    await this.#program.write(keys);
  }

  /** Waits until the screen shows `rows` and nothing else. */
  async shows(...rows: string[]): Promise<void> {
    const wanted = rows.join("\n");
    const isShown = (output: string) => screen(output, this.#columns).join("\n") === wanted;
    await this.#program.shows(`the screen\n${wanted}`, isShown);
  }

  /** Waits until the screen is like `pattern`. */
  async showsLike(pattern: RegExp): Promise<void> {
    const isShown = (output: string) => pattern.test(screen(output, this.#columns).join("\n"));
    await this.#program.shows(`the screen ${pattern}`, isShown);
  }

  /** How the program ended: its exit code, whether the terminal is sane, and what the screen shows. */
  async ended(): Promise<{ how: string; screen: string[] }> {
    const { stdout, stderr } = await this.#program.ended();
    return { how: stderr.trimEnd(), screen: screen(stdout, this.#columns) };
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#program[Symbol.asyncDispose]();
  }
}

/** Starts server.ts on a free port, which portOf() tells. */
export function startServer(args: string[] = [], options: ProgramOptions = {}): Program {
  return startScript("server.ts", ["--port", "0", ...args], options);
}

/** The least permissions that a Unix socket takes. */
export function unixPermissions(path: string): string[] {
  return [`--allow-read=${path}`, `--allow-write=${path}`, `--allow-net=unix:${path}`];
}

/** Starts server.ts on a Unix socket. */
export async function startUnixServer(path: string): Promise<Program> {
  const server = startScript("server.ts", ["--unix", path], { permissions: unixPermissions(path) });
  try {
    await server.printed(`on ${path}\n`);
    return server;
  } catch (error) {
    await server[Symbol.asyncDispose]();
    throw error;
  }
}

/** The port that a server has printed. */
export async function portOf(server: Program): Promise<number> {
  const [, port] = await server.printed(/127\.0\.0\.1:(\d+)\n/);
  return Number(port);
}

/**
 * A port on which nobody answers. It is below those that port 0 gives, so that no test beside this one gets it. Nothing
 * listens on it to find that out: a program that another test starts at that moment would keep the port for a while.
 */
export async function freePort(): Promise<number> {
  for (;;) {
    const port = 20_000 + Math.floor(Math.random() * 12_000);
    try {
      (await Deno.connect({ hostname: "127.0.0.1", port })).close();
    } catch (error) {
      if (error instanceof Deno.errors.ConnectionRefused) return port;
      throw error;
    }
  }
}

/**
 * How many sockets of `port` a program still holds: the listener, and the connections that were accepted. A closed one
 * has no inode. Another process has to look, as reading /proc takes all permissions.
 */
export function heldSockets(port: number): number {
  const look = new Deno.Command("cat", { args: ["/proc/net/tcp"] }).outputSync();
  const [, ...sockets] = new TextDecoder().decode(look.stdout).trim().split("\n");
  const local = `:${port.toString(16).toUpperCase().padStart(4, "0")}`;
  return sockets.map((line) => line.trim().split(/\s+/)).filter((fields) => {
    return fields[1]?.endsWith(local) && fields[9] !== "0";
  }).length;
}

/** A plain connection of the test's own, without the library. */
export class Peer implements Disposable {
  readonly #conn: Deno.Conn;

  constructor(conn: Deno.Conn) {
    this.#conn = conn;
  }

  static async connect(port: number): Promise<Peer> {
    return new Peer(await Deno.connect({ hostname: "127.0.0.1", port }));
  }

  static async connectUnix(path: string): Promise<Peer> {
    return new Peer(await Deno.connect({ transport: "unix", path }));
  }

  get port(): number {
    return this.#conn.localAddr.transport === "tcp" ? this.#conn.localAddr.port : NaN;
  }

  async send(data: string | Uint8Array): Promise<void> {
    let rest = typeof data === "string" ? new TextEncoder().encode(data) : data;
    while (rest.length > 0) rest = rest.subarray(await this.#conn.write(rest));
  }

  /** What arrives next, "" at the end of the stream. */
  async receiveChunk(): Promise<string> {
    return new TextDecoder().decode(await this.#read() ?? undefined);
  }

  /** The bytes that arrive next, `null` at the end of the stream. */
  async receiveBytes(): Promise<Uint8Array | null> {
    return await this.#read();
  }

  /** What arrives until it ends in `ending`, or the stream does. */
  async receive(ending: string): Promise<string> {
    let text = "";
    for (const decoder = new TextDecoder(); !text.endsWith(ending);) {
      const chunk = await this.#read();
      if (chunk === null) break;
      text += decoder.decode(chunk, { stream: true });
    }
    return text;
  }

  /** All that arrives until the stream ends. */
  async receiveAll(): Promise<Uint8Array> {
    const chunks: Uint8Array[] = [];
    for (let chunk; (chunk = await this.#read()) !== null;) chunks.push(chunk);
    return joined(chunks);
  }

  async closeWrite(): Promise<void> {
    await this.#conn.closeWrite();
  }

  [Symbol.dispose](): void {
    this.#conn.close();
  }

  async #read(): Promise<Uint8Array | null> {
    const into = new Uint8Array(65_536);
    const count = await this.#conn.read(into);
    return count === null ? null : into.subarray(0, count);
  }
}

/** A server of the test's own, without the library; `script` talks to each client in turn. */
export class FakeServer implements AsyncDisposable {
  readonly #listener: Deno.TcpListener;
  readonly #script: (peer: Peer) => Promise<void>;
  readonly #over: Promise<void>;

  constructor(script: (peer: Peer) => Promise<void>, port = 0) {
    this.#script = script;
    this.#listener = Deno.listen({ hostname: "127.0.0.1", port });
    this.#over = this.#serve();
  }

  get port(): number {
    return this.#listener.addr.port;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#listener.close();
    await this.#over;
  }

  async #serve(): Promise<void> {
    for await (const conn of this.#listener) {
      using peer = new Peer(conn);
      await this.#script(peer).catch(ignoreLeaving);
    }
  }
}

/** A server that says what the test tells it to, and the lines that it received. */
export class TalkingServer extends FakeServer {
  readonly #peer: Promise<Peer>;
  readonly #end: () => void;

  constructor() {
    const connected = Promise.withResolvers<Peer>();
    const ended = Promise.withResolvers<void>();
    super(async (peer) => {
      connected.resolve(peer);
      await ended.promise;
    });
    this.#peer = connected.promise;
    this.#end = ended.resolve;
  }

  async say(text: string): Promise<void> {
    await (await this.#peer).send(text);
  }

  async hear(): Promise<string> {
    return await (await this.#peer).receive("\n");
  }

  async hangUp(): Promise<void> {
    await this.#peer;
    this.#end();
  }

  override async [Symbol.asyncDispose](): Promise<void> {
    this.#end();
    await super[Symbol.asyncDispose]();
  }
}

/** Asserts that a script failed as a person can bear it: one sentence on stderr, and no stack. */
export function assertFailed(outcome: Outcome, code: number, sentence: RegExp): void {
  const lines = outcome.stderr.trimEnd().split("\n");
  const isOne = lines.length === 1 && sentence.test(outcome.stderr) && !/^ {4}at /m.test(outcome.stderr);
  const seen = `code ${outcome.code}, stdout ${outcome.stdout}, stderr ${outcome.stderr}`;
  assert(isOne && outcome.code === code, `Expected code ${code} and one sentence like ${sentence}, got ${seen}`);
}

/** The flags that a sentence about a missing permission tells to run with. */
export function permissionsIn(sentence: string): string[] {
  return [...sentence.matchAll(/--allow-\S+/g)].map(([flag]) => flag);
}

/** What a terminal of `columns` shows after `output`: enough of one for a prompt with line editing. */
export function screen(output: string, columns = 80): string[] {
  const rows: string[] = [""];
  let [row, column] = [0, 0];
  const goDown = (count: number) => {
    row += count;
    while (rows.length <= row) rows.push("");
  };
  const put = (text: string) => {
    for (const char of text) {
      if (column === columns) {
        goDown(1);
        column = 0;
      }
      const old = (rows[row] ?? "").padEnd(column);
      rows[row] = old.slice(0, column++) + char + old.slice(column);
    }
  };
  const control: Record<string, (n: number) => void> = {
    A: (n) => row = Math.max(0, row - n),
    C: (n) => column = Math.min(columns - 1, column + n),
    D: (n) => column = Math.max(0, column - n),
    // Rows and columns count from 1; a 0 is taken for it.
    G: (n) => column = Math.max(0, n - 1),
    H: () => [row, column] = [0, 0], // It is used for the corner only.
    J: () => rows.splice(row, rows.length, (rows[row] ?? "").slice(0, column)),
    K: () => rows[row] = (rows[row] ?? "").slice(0, column),
  };
  // deno-lint-ignore no-control-regex
  for (const [token, count, name] of output.matchAll(/\x1b\[\??(\d*)(?:;\d+)?([A-Za-z])|[\r\n]|[^\x1b\r\n]+/g)) {
    if (token === "\r") column = 0;
    else if (token === "\n") goDown(1);
    else if (name === undefined) put(token);
    else control[name]?.(Number(count || 1));
  }
  return rows.map((row) => row.trimEnd());
}
