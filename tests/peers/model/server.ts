/**
 * Our side of python_model_test.ts: the programs of server.py on mod.ts. Commands come
 * as lines of JSON; each call of a hook, and each command that returns, prints one,
 * under Python's names.
 *
 * @module
 */

import {
  type Datagram,
  type DatagramRequestHandlerClass,
  type DatagramServer,
  type DatagramServerOptions,
  type ServerOptions,
  type ShutdownReport,
  type SocketStream,
  type StreamConn,
  type StreamRequestHandlerClass,
  type StreamServer,
  TcpServer,
  UdpServer,
  UnixDatagramServer,
  UnixServer,
} from "../../../mod.ts";
import { DATAGRAM_HANDLERS, DatagramEcho, Echo, HANDLERS } from "./handlers.ts";
import { nameOf, Recorder } from "./recorder.ts";

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

// --- Servers

/** What a class of servers of streams makes; unlike `StreamServer`, it knows how to listen. */
interface ListeningStreamServer extends StreamServer {
  listen(): Deno.Addr | Promise<Deno.Addr>;
}

/** The servers of `Base` that tell what their hooks do. */
function modelOfStreams<Address>(
  Base: new (address: Address, Handler: StreamRequestHandlerClass, options: ServerOptions) => ListeningStreamServer,
) {
  return class extends Base {
    readonly recorder: Recorder;

    constructor(address: Address, handler: string, maxConnections: number, recorder: Recorder) {
      super(address, HANDLERS[handler] ?? Echo, { maxConnections });
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

    override getRequest(conn: StreamConn) {
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
  };
}

const ModelTcpServer = modelOfStreams(TcpServer);
const ModelUnixServer = modelOfStreams(UnixServer);

/** The same for servers of datagrams. */
interface ListeningDatagramServer extends DatagramServer {
  listen(): Deno.Addr | Promise<Deno.Addr>;
}

function modelOfDatagrams<Address>(
  Base: new (
    address: Address,
    Handler: DatagramRequestHandlerClass,
    options: DatagramServerOptions,
  ) => ListeningDatagramServer,
) {
  return class extends Base {
    readonly recorder: Recorder;

    constructor(address: Address, handler: string, maxConcurrent: number, recorder: Recorder) {
      super(address, DATAGRAM_HANDLERS[handler] ?? DatagramEcho, { maxConcurrent });
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
  };
}

const ModelUdpServer = modelOfDatagrams(UdpServer);
const ModelUnixDatagramServer = modelOfDatagrams(UnixDatagramServer);

type ModelServer = InstanceType<typeof ModelTcpServer> | InstanceType<typeof ModelUdpServer>;

/** Python's kinds, by how many clients they serve at once. */
const AT_ONCE: Record<string, number> = { TCPServer: 1, UnixStreamServer: 1, UDPServer: 1, UnixDatagramServer: 1 };

function make({ server, kind, path, port, handler, quirk }: Command): ModelServer {
  const recorder = new Recorder(server, quirk);
  const maxConcurrent = AT_ONCE[kind] ?? 1_000;
  if (kind.endsWith("UDPServer")) return new ModelUdpServer({ port }, handler, maxConcurrent, recorder);
  if (kind.endsWith("DatagramServer")) return new ModelUnixDatagramServer({ path }, handler, maxConcurrent, recorder);
  const maxConnections = AT_ONCE[kind] ?? Infinity;
  return path === ""
    ? new ModelTcpServer({ port }, handler, maxConnections, recorder)
    : new ModelUnixServer({ path }, handler, maxConnections, recorder);
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
