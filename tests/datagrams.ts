/**
 * What the tests of datagrams share: servers that keep what their handlers throw,
 * sockets without the library, and a socket that follows a script.
 *
 * @module
 */

import {
  type Datagram,
  DatagramClient,
  type DatagramClientOptions,
  DatagramRequestHandler,
  type DatagramRequestHandlerClass,
  DatagramServer,
  type DatagramServerOptions,
  type DatagramSocket,
  type ErrorOutcome,
  UdpServer,
  UnixDatagramServer,
} from "../mod.ts";
import { assertEquals } from "../deps.ts";

/** The client of a `FakeSocket`. */
export const CLIENT: Deno.NetAddr = { transport: "udp", hostname: "127.0.0.1", port: 1 };

/** Long enough for a busy machine; no test that passes waits for it. */
export const PATIENCE_MS = 10_000;

export function decoded(data: Uint8Array): string {
  return new TextDecoder().decode(data);
}

/** A system's error with its code. */
export function systemError(code: string, message = code): Error {
  return Object.assign(new Error(`${message} (os error 0)`), { code });
}

/** Sends back what it is sent. */
export class EchoDatagram extends DatagramRequestHandler {
  override async handle() {
    await this.request.reply(this.request.data);
  }
}

/** A handler that calls `handle` for each datagram. */
export function handlerOf(
  handle: (request: Datagram, handler: DatagramRequestHandler) => void | Promise<void>,
): DatagramRequestHandlerClass {
  return class extends DatagramRequestHandler {
    override handle() {
      return handle(this.request, this);
    }
  };
}

/** Echoes; a datagram that says `word` waits until `exit` resolves. */
export function echoExcept(word: string, exit: Promise<void>): DatagramRequestHandlerClass {
  return handlerOf(async (request) => {
    if (decoded(request.data) === word) await exit;
    await request.reply(request.data);
  });
}

/** Keeps what its handlers throw. */
export class RecordingServer extends UdpServer {
  readonly errors: unknown[] = [];
  readonly outcomes: ErrorOutcome[] = [];

  override handleError(error: unknown, _clientAddress: Deno.Addr, outcome: ErrorOutcome) {
    this.errors.push(error);
    this.outcomes.push(outcome);
  }
}

/** The same over Unix sockets. */
export class RecordingUnixServer extends UnixDatagramServer {
  readonly errors: unknown[] = [];
  readonly outcomes: ErrorOutcome[] = [];

  override handleError(error: unknown, _clientAddress: Deno.Addr, outcome: ErrorOutcome) {
    this.errors.push(error);
    this.outcomes.push(outcome);
  }
}

/** A socket of the test's own, without the library. */
export class PlainSocket implements Disposable {
  readonly #socket: Deno.DatagramConn;

  constructor(path?: string) {
    this.#socket = path === undefined
      ? Deno.listenDatagram({ transport: "udp", hostname: "127.0.0.1", port: 0 })
      : Deno.listenDatagram({ transport: "unixpacket", path });
  }

  get addr(): Deno.Addr {
    return this.#socket.addr;
  }

  async send(text: string, to: Deno.Addr): Promise<void> {
    await this.#socket.send(new TextEncoder().encode(text), to);
  }

  async receive(): Promise<string> {
    const [data] = await this.#socket.receive();
    return decoded(data);
  }

  [Symbol.dispose](): void {
    this.#socket.close();
  }
}

/** Starts a server, and ends it after `test`, with the clients that `test` has made. */
export async function withServer<Address extends Deno.Addr, Server extends DatagramServer<Address>>(
  server: Server & DatagramServer<Address>,
  test: (
    server: Server,
    address: Address,
    dial: (options: DatagramClientOptions) => DatagramClient,
  ) => Promise<void>,
): Promise<void> {
  const address = await server.listen();
  const serving = server.serveForever();
  const clients: DatagramClient[] = [];
  try {
    await test(server, address, (options) => {
      const client = new DatagramClient({ timeout: PATIENCE_MS, ...options });
      clients.push(client);
      return client;
    });
  } finally {
    for (const client of clients) client.close();
    await server.shutdown();
    await serving;
  }
}

export async function ask(client: DatagramClient, question: string): Promise<string> {
  await client.send(question);
  return decoded(await client.recv());
}

/** Receives, however often that takes too long. */
export async function receiveLate(client: DatagramClient): Promise<string> {
  for (const deadline = performance.now() + PATIENCE_MS;;) {
    try {
      return decoded(await client.recv());
    } catch (error) {
      if (!(error instanceof Deno.errors.TimedOut) || performance.now() > deadline) throw error;
    }
  }
}

/** Fails the test unless the Unix server at `path` answers. */
export async function assertServes(path: string): Promise<void> {
  using client = new DatagramClient({ path, localPath: `${path}.${crypto.randomUUID()}`, timeout: PATIENCE_MS });
  assertEquals(await ask(client, "hello"), "hello");
}

/** A socket that gives what a script says, and then waits until it is closed. */
export class FakeSocket implements DatagramSocket {
  readonly addr: Deno.Addr = CLIENT;
  readonly sent: string[] = [];
  /** What the next sends reject with. */
  readonly sendFailures: Error[] = [];
  readonly #script: (Error | Uint8Array | string)[];
  readonly #drained = Promise.withResolvers<void>();
  #pending: PromiseWithResolvers<[Uint8Array<ArrayBuffer>, Deno.Addr]> | undefined;
  isClosed = false;

  constructor(script: (Error | Uint8Array | string)[]) {
    this.#script = [...script];
  }

  /** Resolves when the script is over and the server waits for more. */
  get drained(): Promise<void> {
    return this.#drained.promise;
  }

  receive(into: Uint8Array<ArrayBuffer>): Promise<[Uint8Array<ArrayBuffer>, Deno.Addr]> {
    const next = this.#script.shift();
    if (next instanceof Error) return Promise.reject(next);
    if (next !== undefined) {
      const data = typeof next === "string" ? new TextEncoder().encode(next) : next;
      into.set(data);
      return Promise.resolve([into.subarray(0, data.length), CLIENT]);
    }
    this.#drained.resolve();
    this.#pending = Promise.withResolvers();
    return this.#pending.promise;
  }

  send(data: Uint8Array): Promise<number> {
    const failure = this.sendFailures.shift();
    if (failure !== undefined) return Promise.reject(failure);
    this.sent.push(decoded(data));
    return Promise.resolve(data.length);
  }

  close(): void {
    this.isClosed = true;
    this.#pending?.reject(new Deno.errors.Interrupted("operation canceled"));
  }
}

/** Listens on a socket that the test has made. */
export class FakeServer extends DatagramServer {
  readonly overloads: unknown[] = [];
  readonly #fake: FakeSocket;

  constructor(fake: FakeSocket, Handler: DatagramRequestHandlerClass, options: DatagramServerOptions = {}) {
    super(Handler, options);
    this.#fake = fake;
  }

  override listen(): Deno.Addr {
    return this.boundAddress ?? this.adoptSocket(this.#fake, this.#fake.addr);
  }

  override handleOverload(error: unknown) {
    this.overloads.push(error);
  }
}
