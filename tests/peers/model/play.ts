/**
 * Plays a scenario: the model programs, their clients, and the transcript of what happened.
 *
 * @module
 */

import { assert } from "../../../deps.ts";
import type { Program } from "../../programs.ts";
import { startPython } from "../python.ts";
import type { Kind, Scenario, Side, Step } from "./scenario.ts";

/** Long enough for a busy machine; no step that succeeds waits for it. */
const PATIENCE_MS = 10_000;

/** How long a call that is expected to go on is watched. */
const LOOK_MS = 100;

/** Resolves like `promise`, or to `undefined` after `ms`. */
async function within<T>(ms: number, promise: Promise<T>): Promise<T | undefined> {
  const { promise: late, resolve } = Promise.withResolvers<undefined>();
  const timer = setTimeout(() => resolve(undefined), ms);
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** A line that a model program prints. */
interface ModelEvent {
  readonly server: number;
  /** From 1 on in the order of acceptance; 0 for what concerns the server. */
  readonly connection: number;
  readonly event: string;
  readonly detail?: string;
  /** A port: the server's for "listening", the client's for "get_request"; 0 without ports. */
  readonly peer?: number;
}

function isModelEvent(value: unknown): value is ModelEvent {
  return typeof value === "object" && value !== null && "server" in value && "connection" in value && "event" in value;
}

/** A model program: many servers, each with a number. */
export class Model {
  readonly #program: Program;
  readonly #parsed: ModelEvent[] = [];
  #parsedLength = 0;

  constructor(program: Program) {
    this.#program = program;
  }

  async tell(server: number, call: string, more: Record<string, string | number>): Promise<void> {
    await this.#program.write(JSON.stringify({ server, call, ...more }) + "\n");
  }

  events(server: number): ModelEvent[] {
    this.#parse(this.#program.stdout);
    return this.#parsed.filter((event) => event.server === server);
  }

  /** Waits until an event of the server fits. */
  async has(server: number, what: string, fits: (event: ModelEvent) => boolean): Promise<void> {
    await this.#program.shows(`${what} of server ${server}`, (text) => {
      this.#parse(text);
      return this.#parsed.some((event) => event.server === server && fits(event));
    });
  }

  #parse(text: string): void {
    const end = text.lastIndexOf("\n") + 1;
    for (const line of text.slice(this.#parsedLength, end).split("\n")) {
      if (line === "") continue;
      const event: unknown = JSON.parse(line);
      assert(isModelEvent(event), `Not an event: ${line}`);
      this.#parsed.push(event);
    }
    this.#parsedLength = end;
  }
}

/** A client, and what it saw. Another kind of socket takes another class, and a line in `Play`. */
interface Client {
  /** 0 without ports. */
  readonly port: number;
  /** What it saw, in words. */
  readonly story: string;
  send(data: string | Uint8Array): Promise<void>;
  /** Reads `count` bytes, or to the end. */
  read(count: number): Promise<void>;
  closeWrite(): Promise<void>;
  close(): void;
}

class StreamClient implements Client {
  readonly #conn: Deno.Conn | undefined;
  /** One letter for each byte. */
  readonly #decoder = new TextDecoder("latin1");
  readonly port: number;
  #received = "";
  #count = 0;
  #end = "";
  #isClosed = false;

  constructor(conn: Deno.Conn | undefined, port = 0) {
    this.#conn = conn;
    this.port = conn?.localAddr.transport === "tcp" ? conn.localAddr.port : port;
  }

  get story(): string {
    const received = this.#received.replaceAll(/x{100,}/g, (run) => `(${run.length} x)`);
    return `received ${JSON.stringify(received)}${this.#end && `, then ${this.#end}`}`;
  }

  async send(data: string | Uint8Array): Promise<void> {
    const address = this.#conn?.localAddr;
    const text = address?.transport === "tcp" ? `${address.hostname}:${address.port}` : "";
    const bytes = typeof data === "string" ? new TextEncoder().encode(data.replace("ADDRESS", text)) : data;
    if (!await within(PATIENCE_MS, this.#sendAll(bytes))) {
      throw new Error("The server does not take what a client sends");
    }
  }

  async #sendAll(bytes: Uint8Array): Promise<true> {
    try {
      for (let rest = bytes; rest.length > 0;) rest = rest.subarray(await this.#conn?.write(rest) ?? Infinity);
    } catch (error) {
      if (!isLeaving(error)) throw error;
    }
    return true;
  }

  async read(count: number): Promise<void> {
    if (!await within(PATIENCE_MS, this.#readAll(count))) throw new Error(`A client has waited; it ${this.story}`);
  }

  async #readAll(count: number): Promise<true> {
    for (const goal = this.#count + count; this.#count < goal && this.#end === "";) {
      const into = new Uint8Array(Math.min(goal - this.#count, 65_536));
      try {
        const got = await this.#conn?.read(into) ?? null;
        this.#count += got ?? 0;
        if (got === null) this.#end = "the end";
        this.#received += this.#decoder.decode(into.subarray(0, got ?? 0));
      } catch (error) {
        if (!isLeaving(error)) throw error;
        this.#end = "a reset";
      }
    }
    return true;
  }

  async closeWrite(): Promise<void> {
    try {
      await this.#conn?.closeWrite();
    } catch (error) {
      if (!isLeaving(error)) throw error;
    }
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#conn?.close();
  }
}

/** A client of datagrams: each read is one. */
class DatagramClient implements Client {
  readonly #socket: Deno.DatagramConn;
  readonly #server: Deno.Addr;
  readonly #received: string[] = [];
  #isClosed = false;

  constructor(server: Deno.Addr, localPath = "") {
    this.#server = server;
    this.#socket = localPath === ""
      ? Deno.listenDatagram({ transport: "udp", hostname: "127.0.0.1", port: 0 })
      : Deno.listenDatagram({ transport: "unixpacket", path: localPath });
  }

  get port(): number {
    return this.#socket.addr.transport === "udp" ? this.#socket.addr.port : 0;
  }

  get story(): string {
    return `received ${JSON.stringify(this.#received)}`;
  }

  async send(data: string | Uint8Array): Promise<void> {
    const bytes = typeof data === "string" ? new TextEncoder().encode(data) : data;
    await this.#socket.send(bytes, this.#server);
  }

  async read(): Promise<void> {
    const received = await within(PATIENCE_MS, this.#socket.receive(new Uint8Array(65_536)));
    if (received === undefined) throw new Error(`A client has waited; it ${this.story}`);
    this.#received.push(new TextDecoder("latin1").decode(received[0]));
  }

  closeWrite(): Promise<void> {
    return Promise.reject(new TypeError("A socket of datagrams has no end"));
  }

  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    this.#socket.close();
  }
}

function isLeaving(error: unknown): boolean {
  return error instanceof Deno.errors.ConnectionReset || error instanceof Deno.errors.BrokenPipe ||
    error instanceof Deno.errors.NotConnected || error instanceof Deno.errors.BadResource;
}

/** One run of a scenario against one model. */
export class Play {
  readonly #model: Model;
  readonly #kind: Kind;
  readonly #side: Side;
  readonly #number: number;
  readonly #path: string;
  readonly #scenario: Scenario;
  readonly #clients = new Map<string, Client>();
  readonly #lines: string[] = [];
  #port = 0;

  constructor(model: Model, kind: Kind, side: Side, number: number, path: string, scenario: Scenario) {
    this.#model = model;
    this.#kind = kind;
    this.#side = side;
    this.#number = number;
    this.#path = kind.transport.startsWith("unix") ? path : "";
    this.#scenario = scenario;
  }

  /** Runs the steps, and returns what happened: one line for each client, its hooks, and each event of the server. */
  async run(): Promise<string[]> {
    try {
      await this.#do("construct");
      if (!this.#scenario.manual) {
        await this.#listen();
        await this.#tell("serve_forever");
      }
      for (const step of this.#scenario.steps) await this.#step(step);
    } finally {
      for (const client of this.#clients.values()) client.close();
      await this.#tell("drop");
      await this.#model.has(this.#number, "the end", ({ event }) => event === "dropped");
    }
    return [...this.#lines, ...this.#transcript()].sort();
  }

  async #step(step: Step): Promise<void> {
    switch (step[1]) {
      case "listens":
        return await this.#listen();
      case "begins":
        return await this.#tell(step[2], step[3]);
      case "does":
        return await this.#do(step[2], step[3]);
      case "is past":
        return await this.#isPast(step[0], step[2], step[3]);
      case "is asked about":
        return await this.#lookAt(step[2], step[3](this.#kind, this.#side));
      case "restarts":
        await this.#do("construct", { port: this.#port });
        if (!this.#events.at(-1)?.event.startsWith("construct throws")) await this.#listen();
        return;
      case "is dialed":
        return await this.#dial();
      case "connects":
        return void this.#clients.set(step[0], await this.#open(step[0]));
      case "comes and resets": {
        await using program = startPython("model/server.py", ["reset", "127.0.0.1", String(this.#port)]);
        const { stdout } = await program.ended();
        return void this.#clients.set(step[0], new StreamClient(undefined, Number(stdout)));
      }
      case "sends":
        return await this.#client(step[0]).send(step[2]);
      case "reads":
        return await this.#client(step[0]).read(step[2]);
      case "reads to the end":
        return await this.#client(step[0]).read(Infinity);
      case "half-closes":
        return await this.#client(step[0]).closeWrite();
      case "closes":
      case "resets":
        return this.#client(step[0]).close();
    }
  }

  #client(name: string): Client {
    const client = this.#clients.get(name);
    assert(client !== undefined, `The client ${name} has not connected`);
    return client;
  }

  async #open(name: string): Promise<Client> {
    switch (this.#kind.transport) {
      case "udp":
        return new DatagramClient({ transport: "udp", hostname: "127.0.0.1", port: this.#port });
      case "unixpacket":
        return new DatagramClient({ transport: "unixpacket", path: this.#path }, `${this.#path}.${name}`);
      default:
        return new StreamClient(await this.#connect());
    }
  }

  async #connect(): Promise<Deno.Conn> {
    if (this.#path !== "") return await Deno.connect({ transport: "unix", path: this.#path });
    return await Deno.connect({ hostname: "127.0.0.1", port: this.#port });
  }

  async #dial(): Promise<void> {
    try {
      (await this.#connect()).close();
      this.#lines.push("server: lets clients in");
    } catch {
      this.#lines.push("server: lets nobody in");
    }
  }

  async #tell(call: string, more: { timeout?: number; port?: number } = {}): Promise<void> {
    const { handler, quirk = "" } = this.#scenario;
    const port = call === "construct" ? 0 : this.#port;
    const options = { kind: this.#kind.python, path: this.#path, port, handler, quirk, timeout: 0, ...more };
    await this.#model.tell(this.#number, call, options);
  }

  async #do(call: string, more: { timeout?: number; port?: number } = {}): Promise<void> {
    const count = this.#ended(call);
    await this.#tell(call, more);
    await this.#model.has(this.#number, `the end of ${call}`, () => this.#ended(call) > count);
  }

  /** How often a call came to its end. */
  #ended(call: string): number {
    return this.#events.filter(({ event }) => isEndOf(call, event)).length;
  }

  async #listen(): Promise<void> {
    await this.#do("listen");
    this.#port = this.#events.find(({ event }) => event === "listening")?.peer ?? 0;
  }

  async #lookAt(call: string, goesOn: boolean): Promise<void> {
    const ended = this.#model.has(this.#number, `the end of ${call}`, ({ event }) => isEndOf(call, event));
    // It is watched on, but not waited for, when it goes on; the steps let it end.
    const hasEnded = await within(goesOn ? LOOK_MS : PATIENCE_MS, ended.then(() => true));
    this.#lines.push(`server: ${call} ${hasEnded ? "is over" : "goes on"}`);
  }

  async #isPast(who: string, hook: string, times = 1): Promise<void> {
    await this.#model.has(this.#number, `${hook} of ${who}`, () => {
      const calls = this.#events.filter((event) => {
        return event.event === hook && (who === "server" || this.#nameOf(event) === who);
      });
      return calls.length >= times;
    });
  }

  get #events(): ModelEvent[] {
    return this.#model.events(this.#number);
  }

  /** Which client an event is about. */
  #nameOf({ connection }: ModelEvent): string {
    if (connection === 0) return "server";
    const names = [...this.#clients.keys()];
    if (this.#path !== "") return names[connection - 1] ?? "nobody";
    const accepted = this.#events.find((event) => event.connection === connection && event.event === "get_request");
    return names.find((name) => this.#clients.get(name)?.port === accepted?.peer) ?? "nobody";
  }

  #transcript(): string[] {
    const calls = this.#events.map((event) => ({ who: this.#nameOf(event), what: describe(event) }));
    const ofClients = calls.filter(({ who }) => who !== "server");
    const order = ofClients.map(({ who, what }) => `${who}.${what}`).join(" ");
    return [
      ...[...this.#clients].map(([name, client]) => `${name}: ${client.story}`),
      ...[...this.#clients.keys()].map((name) => {
        return [`${name}:`, ...ofClients.filter(({ who }) => who === name).map(({ what }) => what)].join(" ");
      }),
      ...calls.filter(({ who, what }) => who === "server" && !PLUMBING.has(what)).map(({ what }) => `server: ${what}`),
      ...(this.#scenario.ordered && this.#kind.oneByOne ? [`order: ${order}`] : []),
    ];
  }
}

/** Events that are there for the harness. */
const PLUMBING = new Set(["construct returned", "listening", "listen returned", "dropped"]);

function isEndOf(call: string, event: string): boolean {
  return event === `${call} returned` || event.startsWith(`${call} throws`);
}

function describe({ event, detail }: ModelEvent): string {
  return detail === undefined ? event : `${event}(${detail})`;
}
