/**
 * Our side of python_model_test.ts: the programs of python/model_server.py on
 * mod.ts. Commands come as lines of JSON; each call of a hook, and each command
 * that returns, prints one, under Python's names.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import {
  type Datagram,
  DatagramRequestHandler,
  type DatagramRequestHandlerClass,
  IncompleteReadError,
  LimitOverrunError,
  type ShutdownReport,
  type SocketStream,
  StreamRequestHandler,
  type StreamRequestHandlerClass,
  TcpServer,
  UdpServer,
  UnixDatagramServer,
  UnixServer,
} from "../mod.ts";

/** One line of the test's. */
interface Command {
  readonly server: number;
  readonly call: string;
  readonly kind: string;
  readonly path: string;
  readonly port: number;
  readonly handler: string;
  readonly quirk: string;
  readonly timeout: number;
}

/** What both sides call an error. */
function nameOf(error: unknown): string {
  if (error instanceof LimitOverrunError || error instanceof IncompleteReadError) return error.name;
  if (error instanceof Deno.errors.ConnectionReset || error instanceof Deno.errors.BrokenPipe) {
    return "the peer is gone";
  }
  if (error instanceof Deno.errors.TimedOut) return "timed out";
  if (error instanceof Deno.errors.AddrInUse) return "EADDRINUSE";
  return error instanceof Error ? error.message : String(error);
}

/** Resolves to whether `condition` came to hold. */
async function settles(condition: () => boolean): Promise<boolean> {
  const deadline = performance.now() + 5_000;
  while (!condition() && performance.now() < deadline) await new Promise((resolve) => setTimeout(resolve, 1));
  return condition();
}

const openDescriptors = () => [...Deno.readDirSync("/proc/self/fd")].length;

/** Those that are open while the program waits for its next command, which takes one too. */
async function openWhenIdle(): Promise<number> {
  await new Promise((resolve) => setTimeout(resolve));
  return openDescriptors();
}

/** What the servers of all kinds do alike: tell each call, and follow the scenario's quirk. */
class Recorder {
  readonly number: number;
  readonly quirk: string;
  readonly aside: SocketStream[] = [];
  /** To see which of them are still in memory. */
  handlers: WeakRef<object>[] = [];
  isDropping = false;
  descriptors = 0;
  #count = 0;
  #services = 0;
  #hasBound = false;
  /** By request and, as `handleError()` has nothing else, by the client's address, which is one object for one request. */
  readonly #numbers = new WeakMap<object, number>();

  constructor(number: number, quirk: string) {
    this.number = number;
    this.quirk = quirk;
  }

  say(event: string, connection = 0, more: Record<string, string | number> = {}): void {
    console.log(JSON.stringify({ server: this.number, connection, event, ...more }));
  }

  tell(event: string, request: object, more: Record<string, string | number> = {}): void {
    this.say(event, this.#numbers.get(request) ?? 0, more);
  }

  /** The first `listen()` binds. */
  bind(): void {
    if (!this.#hasBound) this.say("server_bind");
    this.#hasBound = true;
  }

  tellServer(event: string): void {
    if (!this.isDropping) this.say(event);
  }

  getRequest(request: object, address: Deno.Addr): void {
    this.#numbers.set(request, ++this.#count).set(address, this.#count);
    this.tell("get_request", address, { peer: "port" in address ? address.port : 0 });
    if (this.quirk === "get_request throws") throw new TypeError("get_request fails");
  }

  verifyRequest(request: object): boolean {
    this.tell("verify_request", request);
    if (this.quirk === "verify_request throws") throw new TypeError("verify_request fails");
    return this.quirk !== "verify_request says no";
  }

  /** Whether to go on. */
  processRequest(request: object): boolean {
    this.tell("process_request", request);
    if (this.quirk === "process_request throws") throw new TypeError("process_request fails");
    return this.quirk !== "process_request puts aside";
  }

  handleError(error: unknown, address: Deno.Addr): void {
    this.tell("handle_error", address, { detail: nameOf(error) });
    if (this.quirk === "handle_error throws") throw new TypeError("handle_error fails");
  }

  serviceActions(): void {
    if (!this.quirk.startsWith("service_actions")) return;
    this.#services++;
    if (this.#services === 1) this.say("service_actions");
    if (this.quirk === "service_actions throws") throw new TypeError("service_actions fails");
  }

  async closeRequest(request: object, close: () => Promise<void> | undefined): Promise<void> {
    this.tell("shutdown_request", request);
    await close();
    this.tell("close_request", request);
  }
}

// --- Handlers

abstract class Handler extends StreamRequestHandler {
  declare readonly server: ModelTcpServer | ModelUnixServer;

  override async setup() {
    this.server.recorder.tell("setup", this.request);
    this.server.recorder.handlers.push(new WeakRef(this));
    await this.prepare();
  }

  override async handle() {
    this.server.recorder.tell("handle", this.request);
    await this.serve();
  }

  override async finish() {
    this.server.recorder.tell("finish", this.request);
    await this.putAway();
  }

  prepare(): void {}
  serve(): void | Promise<void> {}
  putAway(): void | Promise<void> {}
}

class Echo extends Handler {
  override async serve() {
    for await (const data of this.request) await this.request.send(data);
  }
}

class UpperLines extends Handler {
  override async serve() {
    for await (const line of this.request.lines()) await this.request.write(line.toUpperCase() + "\n");
  }
}

class RawLines extends Handler {
  override async serve() {
    for (let line; (line = await this.request.readUntil("\n")) !== null;) await this.request.write(line);
  }
}

class Greet extends Handler {
  override async serve() {
    await this.request.write("hello\n");
    for await (const _ of this.request);
  }
}

class GreetAndGo extends Handler {
  override async serve() {
    await this.request.write("hello\n");
  }
}

class GreetBuffered extends Handler {
  override serve() {
    this.request.write("hel");
    this.request.write("lo\n");
  }
}

class FourBytes extends Handler {
  override async serve() {
    for (;;) {
      await this.request.write(await this.request.readExactly(4));
      await this.request.write("\n");
    }
  }
}

class CountToTheEnd extends Handler {
  override async serve() {
    let count = 0;
    for await (const data of this.request) count += data.length;
    await this.request.write(`${count} bytes\n`);
  }
}

class AskTwice extends Handler {
  override async serve() {
    await this.request.write("your ");
    await this.request.write("name? ");
    const name = await this.request.readLine();
    await this.request.write(`hello ${name}\n`);
  }
}

class SetupAndFinish extends Handler {
  #name = "";

  override prepare() {
    this.#name = "prepared";
  }

  override async serve() {
    await this.request.write(`${this.#name}\n`);
  }

  override async putAway() {
    await this.request.write("put away\n");
  }
}

class ThrowsInSetup extends Handler {
  override prepare() {
    throw new TypeError("setup fails");
  }
}

class ThrowsInHandle extends Handler {
  override async serve() {
    await this.request.write("so far\n");
    throw new TypeError("handle fails");
  }
}

class ThrowsInFinish extends Handler {
  override putAway() {
    throw new TypeError("finish fails");
  }
}

class ThrowsInBoth extends Handler {
  override serve() {
    throw new TypeError("handle fails");
  }

  override putAway() {
    throw new TypeError("finish fails");
  }
}

class Exits extends Handler {
  override serve() {
    throw new Error("exit");
  }
}

class ClosesItself extends Handler {
  override async serve() {
    await this.request.write("bye\n");
    this.request.close();
  }
}

class ReadsPastTheEnd extends Handler {
  override async serve() {
    for await (const _ of this.request);
    await this.request.write(`again: ${(await this.request.recv())?.length ?? 0}\n`);
  }
}

class Impatient extends Handler {
  override prepare() {
    this.request.timeout = 20;
  }

  override async serve() {
    await this.request.readLine();
  }
}

class Big extends Handler {
  override async serve() {
    await this.request.write("x".repeat(4_194_304));
  }
}

class Flood extends Handler {
  override async serve() {
    await this.request.write("hello\n");
    await this.request.readLine();
    for (;;) await this.request.write("x".repeat(65_536));
  }
}

class TellsAddress extends Handler {
  override async serve() {
    const line = await this.request.readLine();
    const address = this.clientAddress;
    const isSame = address.transport !== "tcp" || line === `${address.hostname}:${address.port}`;
    await this.request.write(isSame ? "yes\n" : "no\n");
  }
}

class EveryType extends Handler {
  override async serve() {
    const bytes = new TextEncoder().encode("ab\n");
    const types: [string, Uint8Array | string][] = [
      ["bytes", bytes],
      ["bytearray", Buffer.from(bytes)],
      ["slice", new TextEncoder().encode("..ab\n").subarray(2)],
      ["empty", new Uint8Array()],
      ["read-only", new Uint8Array(new Uint8Array(bytes).buffer)],
      ["text", "ab\n"],
    ];
    for (const [name, data] of types) {
      await this.request.write(`${name}: `);
      await this.request.write(data);
    }
    // TypeScript refuses these, JavaScript does not.
    for (const [name, data] of [["16-bit numbers", Uint16Array.of(0x6261, 0x0a63)], ["number", 7]]) {
      await this.request.write(`${name}: `);
      try {
        await Reflect.apply(this.request.write, this.request, [data]);
      } catch (error) {
        await this.request.write(`${error instanceof Error ? error.name : error}\n`);
      }
    }
  }
}

class ShutsDown extends Handler {
  override async serve() {
    await this.request.readLine();
    await this.server.shutdown();
    await this.request.write("returned\n");
  }
}

const HANDLERS: Record<string, StreamRequestHandlerClass> = {
  "echo": Echo,
  "upper lines": UpperLines,
  "raw lines": RawLines,
  "greet": Greet,
  "greet and go": GreetAndGo,
  "greet buffered": GreetBuffered,
  "four bytes": FourBytes,
  "count to the end": CountToTheEnd,
  "ask twice": AskTwice,
  "setup and finish": SetupAndFinish,
  "throws in setup": ThrowsInSetup,
  "throws in handle": ThrowsInHandle,
  "throws in finish": ThrowsInFinish,
  "throws in both": ThrowsInBoth,
  "exits": Exits,
  "closes itself": ClosesItself,
  "reads past the end": ReadsPastTheEnd,
  "impatient": Impatient,
  "big": Big,
  "flood": Flood,
  "tells address": TellsAddress,
  "every type": EveryType,
  "shuts down": ShutsDown,
};

// --- Datagram handlers

abstract class DatagramHandler extends DatagramRequestHandler {
  declare readonly server: ModelUdpServer | ModelUnixDatagramServer;

  override setup() {
    this.server.recorder.tell("setup", this.request);
  }

  override async handle() {
    this.server.recorder.tell("handle", this.request);
    await this.serve();
  }

  override finish() {
    this.server.recorder.tell("finish", this.request);
  }

  abstract serve(): void | Promise<void>;
}

class DatagramEcho extends DatagramHandler {
  override async serve() {
    await this.request.reply(this.request.data);
  }
}

class DatagramUpper extends DatagramHandler {
  override async serve() {
    await this.request.reply(new TextDecoder().decode(this.request.data).toUpperCase());
  }
}

class DatagramThrows extends DatagramHandler {
  override serve() {
    throw new TypeError("handle fails");
  }
}

class DatagramLength extends DatagramHandler {
  override async serve() {
    await this.request.reply(`${this.request.data.length} bytes`);
  }
}

class DatagramSecret extends DatagramHandler {
  override async serve() {
    const text = new TextDecoder().decode(this.request.data);
    if (text !== "be quiet") await this.request.reply(text);
  }
}

const DATAGRAM_HANDLERS: Record<string, DatagramRequestHandlerClass> = {
  "echo": DatagramEcho,
  "upper": DatagramUpper,
  "throws in handle": DatagramThrows,
  "length": DatagramLength,
  "secret": DatagramSecret,
};

// --- Servers

class ModelTcpServer extends TcpServer {
  readonly recorder: Recorder;

  constructor({ port, handler }: Command, maxConnections: number, recorder: Recorder) {
    super({ port }, HANDLERS[handler] ?? Echo, { maxConnections });
    this.recorder = recorder;
  }

  override listen() {
    this.recorder.bind();
    return super.listen();
  }

  override close() {
    this.recorder.tellServer("server_close");
    super.close();
  }

  override shutdown(options?: { grace?: number }): Promise<ShutdownReport> {
    this.recorder.tellServer("shutdown");
    return super.shutdown(options);
  }

  override getRequest(conn: Deno.Conn) {
    const request = super.getRequest(conn);
    this.recorder.getRequest(request, request.remoteAddress);
    return request;
  }

  override verifyRequest(request: SocketStream) {
    return this.recorder.verifyRequest(request);
  }

  override async processRequest(request: SocketStream, clientAddress: Deno.Addr) {
    if (this.recorder.processRequest(request)) await super.processRequest(request, clientAddress);
    else this.recorder.aside.push(request);
  }

  override async finishRequest(request: SocketStream, clientAddress: Deno.Addr) {
    this.recorder.tell("finish_request", request);
    await super.finishRequest(request, clientAddress);
  }

  override handleError(error: unknown, clientAddress: Deno.Addr) {
    this.recorder.handleError(error, clientAddress);
  }

  override handleTimeout() {
    this.recorder.say("handle_timeout");
  }

  override serviceActions() {
    this.recorder.serviceActions();
  }

  protected override async closeRequest(request: SocketStream) {
    await this.recorder.closeRequest(request, () => super.closeRequest(request));
  }
}

class ModelUnixServer extends UnixServer {
  readonly recorder: Recorder;

  constructor({ path, handler }: Command, maxConnections: number, recorder: Recorder) {
    super({ path }, HANDLERS[handler] ?? Echo, { maxConnections });
    this.recorder = recorder;
  }

  override listen() {
    this.recorder.bind();
    return super.listen();
  }

  override close() {
    this.recorder.tellServer("server_close");
    super.close();
  }

  override shutdown(options?: { grace?: number }): Promise<ShutdownReport> {
    this.recorder.tellServer("shutdown");
    return super.shutdown(options);
  }

  override getRequest(conn: Deno.Conn) {
    const request = super.getRequest(conn);
    this.recorder.getRequest(request, request.remoteAddress);
    return request;
  }

  override verifyRequest(request: SocketStream) {
    return this.recorder.verifyRequest(request);
  }

  override async processRequest(request: SocketStream, clientAddress: Deno.Addr) {
    if (this.recorder.processRequest(request)) await super.processRequest(request, clientAddress);
    else this.recorder.aside.push(request);
  }

  override async finishRequest(request: SocketStream, clientAddress: Deno.Addr) {
    this.recorder.tell("finish_request", request);
    await super.finishRequest(request, clientAddress);
  }

  override handleError(error: unknown, clientAddress: Deno.Addr) {
    this.recorder.handleError(error, clientAddress);
  }

  override handleTimeout() {
    this.recorder.say("handle_timeout");
  }

  override serviceActions() {
    this.recorder.serviceActions();
  }

  protected override async closeRequest(request: SocketStream) {
    await this.recorder.closeRequest(request, () => super.closeRequest(request));
  }
}

class ModelUdpServer extends UdpServer {
  readonly recorder: Recorder;

  constructor({ port, handler }: Command, maxConcurrent: number, recorder: Recorder) {
    super({ port }, DATAGRAM_HANDLERS[handler] ?? DatagramEcho, { maxConcurrent });
    this.recorder = recorder;
  }

  override listen() {
    this.recorder.bind();
    return super.listen();
  }

  override close() {
    this.recorder.tellServer("server_close");
    super.close();
  }

  override shutdown(options?: { grace?: number }): Promise<ShutdownReport> {
    this.recorder.tellServer("shutdown");
    return super.shutdown(options);
  }

  /** A server of datagrams has no getRequest(); this is its first hook. */
  override verifyRequest(request: Datagram, clientAddress: Deno.Addr) {
    this.recorder.getRequest(request, clientAddress);
    return this.recorder.verifyRequest(request);
  }

  override async processRequest(request: Datagram, clientAddress: Deno.Addr) {
    if (this.recorder.processRequest(request)) await super.processRequest(request, clientAddress);
  }

  override async finishRequest(request: Datagram, clientAddress: Deno.Addr) {
    this.recorder.tell("finish_request", request);
    await super.finishRequest(request, clientAddress);
  }

  override handleError(error: unknown, clientAddress: Deno.Addr) {
    this.recorder.handleError(error, clientAddress);
  }

  override handleTimeout() {
    this.recorder.say("handle_timeout");
  }
}

class ModelUnixDatagramServer extends UnixDatagramServer {
  readonly recorder: Recorder;

  constructor({ path, handler }: Command, maxConcurrent: number, recorder: Recorder) {
    super({ path }, DATAGRAM_HANDLERS[handler] ?? DatagramEcho, { maxConcurrent });
    this.recorder = recorder;
  }

  override listen() {
    this.recorder.bind();
    return super.listen();
  }

  override close() {
    this.recorder.tellServer("server_close");
    super.close();
  }

  override shutdown(options?: { grace?: number }): Promise<ShutdownReport> {
    this.recorder.tellServer("shutdown");
    return super.shutdown(options);
  }

  /** A server of datagrams has no getRequest(); this is its first hook. */
  override verifyRequest(request: Datagram, clientAddress: Deno.Addr) {
    this.recorder.getRequest(request, clientAddress);
    return this.recorder.verifyRequest(request);
  }

  override async processRequest(request: Datagram, clientAddress: Deno.Addr) {
    if (this.recorder.processRequest(request)) await super.processRequest(request, clientAddress);
  }

  override async finishRequest(request: Datagram, clientAddress: Deno.Addr) {
    this.recorder.tell("finish_request", request);
    await super.finishRequest(request, clientAddress);
  }

  override handleError(error: unknown, clientAddress: Deno.Addr) {
    this.recorder.handleError(error, clientAddress);
  }

  override handleTimeout() {
    this.recorder.say("handle_timeout");
  }
}

type ModelServer = ModelTcpServer | ModelUnixServer | ModelUdpServer | ModelUnixDatagramServer;

/** Python's kinds, by how many clients they serve at once. */
const AT_ONCE: Record<string, number> = { TCPServer: 1, UnixStreamServer: 1, UDPServer: 1, UnixDatagramServer: 1 };

function make(command: Command): ModelServer {
  const recorder = new Recorder(command.server, command.quirk);
  if (command.kind.endsWith("UDPServer")) return new ModelUdpServer(command, AT_ONCE[command.kind] ?? 1_000, recorder);
  if (command.kind.endsWith("DatagramServer")) {
    return new ModelUnixDatagramServer(command, AT_ONCE[command.kind] ?? 1_000, recorder);
  }
  const maxConnections = AT_ONCE[command.kind] ?? Infinity;
  return command.path === ""
    ? new ModelTcpServer(command, maxConnections, recorder)
    : new ModelUnixServer(command, maxConnections, recorder);
}

function makePlain({ path, port }: Command): TcpServer | UnixServer {
  return path === "" ? new TcpServer({ port }, Echo) : new UnixServer({ path }, Echo);
}

const servers = new Map<number, ModelServer>();

/** The server of a command; each but the first needs one. */
function serverOf(command: Command): ModelServer {
  const server = servers.get(command.server);
  if (server === undefined) throw new TypeError(`There is no server ${command.server}`);
  return server;
}

function say(command: Command, event: string): void {
  console.log(JSON.stringify({ server: command.server, connection: 0, event }));
}

/** Runs a command. */
const CALLS: Record<string, (command: Command) => void | Promise<unknown>> = {
  "construct": (command) => void servers.set(command.server, make(command)),
  "listen": async (command) => {
    const address = await serverOf(command).listen();
    serverOf(command).recorder.say("listening", 0, { peer: "port" in address ? address.port : 0 });
  },
  "serve_forever": (command) => serverOf(command).serveForever(),
  "shutdown": (command) => serverOf(command).shutdown(),
  "server_close": (command) => serverOf(command).close(),
  "handle_request": (command) => serverOf(command).handleRequest({ timeout: command.timeout || Infinity }),
  "with": async (command) => {
    await using _server = serverOf(command);
  },
  "aside": async (command) => {
    for (const request of serverOf(command).recorder.aside.splice(0)) await request.send("later\n");
  },
  "remember descriptors": async (command) => {
    serverOf(command).recorder.descriptors = await openWhenIdle();
  },
  "compare descriptors": async (command) => {
    const { descriptors } = serverOf(command).recorder;
    const isSame = await settles(() => openDescriptors() <= descriptors);
    say(command, isSame ? "descriptors are given back" : "descriptors are kept");
  },
  "count handlers": async (command) => {
    const { recorder } = serverOf(command);
    const collect: unknown = Reflect.get(globalThis, "gc"); // The test starts this program with --expose-gc.
    const isNone = await settles(() => {
      if (typeof collect === "function") collect();
      return recorder.handlers.every((handler) => handler.deref() === undefined);
    });
    say(command, isNone ? "handlers are given back" : "handlers are kept");
  },
  "fail to bind": async (command) => {
    const names = new Set<string>();
    const descriptors = await openWhenIdle();
    for (let i = 0; i < 100; i++) {
      try {
        await makePlain(command).listen();
      } catch (error) {
        names.add(nameOf(error));
      }
    }
    await settles(() => openDescriptors() <= descriptors);
    const kept = openDescriptors() - descriptors;
    say(command, `binding fails with ${[...names].sort().join(" ")}, ${kept} descriptors are kept`);
  },
  "start and stop 20": async () => {
    const many = Array.from({ length: 20 }, () => new TcpServer({ port: 0 }, Echo));
    await Promise.all(many.flatMap((server) => [server.serveForever(), server.shutdown()]));
  },
  "drop": async (command) => {
    const server = servers.get(command.server);
    servers.delete(command.server);
    if (server !== undefined) {
      server.recorder.isDropping = true;
      await settles(() => server.stats.active === 0);
      server.close();
      await server.serveForever(); // Until it is over.
    }
    say(command, "dropped");
  },
};

async function obey(command: Command): Promise<void> {
  try {
    await CALLS[command.call]?.(command);
    const isDropping = command.call === "drop" || servers.get(command.server)?.recorder.isDropping !== false;
    if (command.call === "serve_forever" && isDropping || command.call === "drop") return;
    say(command, `${command.call} returned`);
  } catch (error) {
    say(command, `${command.call} throws ${nameOf(error)}`);
  }
}

function isCommand(value: unknown): value is Command {
  return typeof value === "object" && value !== null && "server" in value && "call" in value;
}

let rest = "";
for await (const text of Deno.stdin.readable.pipeThrough(new TextDecoderStream())) {
  const lines = (rest + text).split("\n");
  rest = lines.pop() ?? "";
  for (const line of lines) {
    const command: unknown = JSON.parse(line);
    if (isCommand(command)) obey(command);
  }
}
