/** Datagram servers and their client: over UDP, over Unix sockets, with Python and with socat. */

import { assert, assertEquals, assertMatch, assertRejects, assertThrows } from "../deps.ts";
import {
  Datagram,
  DatagramClient,
  type DatagramClientOptions,
  DatagramRequestHandler,
  type DatagramRequestHandlerClass,
  DatagramServer,
  type DatagramServerOptions,
  type DatagramSocket,
  UdpServer,
  UnixDatagramServer,
} from "../mod.ts";
import { permissionsIn, Program, programTestIn, startPython } from "./programs.ts";
import { networkTest, programTest, rejectionOf, unixTest, until } from "./testing.ts";

const CLIENT: Deno.NetAddr = { transport: "udp", hostname: "127.0.0.1", port: 1 };

/** Long enough for a busy machine; no test that passes waits for it. */
const PATIENCE_MS = 10_000;

/** Sends back what it is sent. */
class Echo extends DatagramRequestHandler {
  override async handle() {
    await this.request.reply(this.request.data);
  }
}

/** Fails as it is told to; else sends back what it is sent. */
class Fragile extends DatagramRequestHandler {
  override async handle() {
    const text = decoded(this.request.data);
    if (text === "throw") throw new TypeError("handler boom");
    if (text === "reject") await Promise.reject(new TypeError("handler boom"));
    if (text === "too long") await this.request.reply(new Uint8Array(65_508));
    if (text === "too long, and forgotten") this.request.reply(new Uint8Array(65_508));
    await this.request.reply(this.request.data);
  }
}

/** Keeps what its handlers throw. */
class RecordingServer extends UdpServer {
  readonly errors: unknown[] = [];

  override handleError(error: unknown) {
    this.errors.push(error);
  }
}

/** The same over Unix sockets. */
class RecordingUnixServer extends UnixDatagramServer {
  readonly errors: unknown[] = [];

  override handleError(error: unknown) {
    this.errors.push(error);
  }
}

/** A socket of the test's own, without the library. */
class PlainSocket implements Disposable {
  readonly #socket: Deno.DatagramConn;

  constructor(
    address: Deno.UdpListenOptions & { transport: "udp" } | Deno.UnixListenOptions & { transport: "unixpacket" },
  ) {
    this.#socket = address.transport === "udp" ? Deno.listenDatagram(address) : Deno.listenDatagram(address);
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

function decoded(data: Uint8Array): string {
  return new TextDecoder().decode(data);
}

/** A gate that handlers wait at until the test opens it. */
function gate(): { opened: Promise<void>; open: () => void } {
  const { promise, resolve } = Promise.withResolvers<void>();
  return { opened: promise, open: resolve };
}

/** Starts a server, and ends it after `test`, with the clients that `test` has made. */
async function withServer<Address extends Deno.Addr, Server extends DatagramServer<Address>>(
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

async function ask(client: DatagramClient, question: string): Promise<string> {
  await client.send(question);
  return decoded(await client.recv());
}

/** Receives, however often that takes too long. */
async function receiveLate(client: DatagramClient): Promise<string> {
  for (const deadline = performance.now() + PATIENCE_MS;;) {
    try {
      return decoded(await client.recv());
    } catch (error) {
      if (!(error instanceof Deno.errors.TimedOut) || performance.now() > deadline) throw error;
    }
  }
}

// --- UDP ------------------------------------------------------------------------

networkTest("a datagram of any length arrives whole, both ways", async (t) => {
  await withServer(new UdpServer({ port: 0 }, Echo), async (_server, { port }, dial) => {
    const client = dial({ port });
    for (const length of [0, 1, 1_472, 65_507]) {
      await t.step(`${length} bytes`, async () => {
        const bytes = Uint8Array.from({ length }, (_, i) => i * 31);
        await client.send(bytes);
        assertEquals(await client.recv(), bytes);
      });
    }
  });
});

/** Whether this machine has the address ::1. */
function hasIpv6(): boolean {
  try {
    Deno.listenDatagram({ transport: "udp", hostname: "::1", port: 0 }).close();
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) return true; // The test is left out.
    return false;
  }
}

if (hasIpv6()) {
  networkTest("datagrams go over IPv6", async () => {
    await withServer(new UdpServer({ hostname: "::1", port: 0 }, Echo), async (_server, { hostname, port }, dial) => {
      assertEquals(hostname, "::1");
      assertEquals(await ask(dial({ hostname: "::1", port }), "hello"), "hello");
    });
  });
}

networkTest("a client finds its server by name", async () => {
  await withServer(new UdpServer({ hostname: "localhost", port: 0 }, Echo), async (_server, { port }, dial) => {
    assertEquals(await ask(dial({ hostname: "localhost", port }), "hello"), "hello");
  });
});

for (
  const [name, hostname] of [
    ["of all interfaces", "0.0.0.0"],
    ["written short", "127.1"],
    ["in capitals", "LOCALHOST"],
    ["that is IPv4 written as IPv6", "::ffff:127.0.0.1"],
  ] as const
) {
  networkTest(`a client takes the answer of a server whose address is one ${name}`, async () => {
    await withServer(new UdpServer({ hostname: "127.0.0.1", port: 0 }, Echo), async (_server, { port }, dial) => {
      assertEquals(await ask(dial({ hostname, port, timeout: 1_000 }), "hello"), "hello");
    });
  });
}

if (hasIpv6()) {
  for (const hostname of ["0:0:0:0:0:0:0:1", "[::1]", "::"]) {
    networkTest(`a client takes the answer of a server whose address is written ${hostname}`, async () => {
      await withServer(new UdpServer({ hostname: "::1", port: 0 }, Echo), async (_server, { port }, dial) => {
        assertEquals(await ask(dial({ hostname, port, timeout: 1_000 }), "hello"), "hello");
      });
    });
  }
}

networkTest("listen() resolves port 0, and a second call gives the same address", async () => {
  await using server = new UdpServer({ port: 0 }, Echo);
  const address = server.listen();
  assert(address.port > 0);
  assertEquals([address.transport, address.hostname], ["udp", "127.0.0.1"]);
  assertEquals(server.listen(), address);
  assertEquals(server.address, address);
});

networkTest("a port in use is one sentence", async () => {
  await using first = new UdpServer({ port: 0 }, Echo);
  const { port } = first.listen();
  const error = await rejectionOf(new UdpServer({ port }, Echo).serveForever());
  assert(error instanceof Deno.errors.AddrInUse);
  assertMatch(error.message, new RegExp(`^Cannot listen on 127.0.0.1:${port}: the address is in use; stop`));
});

networkTest("text is replied as UTF-8", async () => {
  class Greeter extends DatagramRequestHandler {
    override async handle() {
      await this.request.reply("你好");
    }
  }
  await withServer(new UdpServer({ port: 0 }, Greeter), async (_server, { port }, dial) => {
    assertEquals(await ask(dial({ port }), ""), "你好");
  });
});

networkTest("the bytes of a datagram never change when others come", async () => {
  const kept: Uint8Array[] = [];
  class Keeping extends DatagramRequestHandler {
    override async handle() {
      kept.push(this.request.data);
      await this.request.reply("ok");
    }
  }
  await withServer(new UdpServer({ port: 0 }, Keeping), async (_server, { port }, dial) => {
    const client = dial({ port });
    const sent = Array.from({ length: 100 }, (_, i) => `${i}`.repeat(i * i));
    for (const text of sent) await ask(client, text);
    assertEquals(kept.map(decoded).join() === sent.join(), true);
  });
});

networkTest("the bytes that a client has received never change when others come", async () => {
  await withServer(new UdpServer({ port: 0 }, Echo), async (_server, { port }, dial) => {
    const client = dial({ port });
    const kept: Uint8Array[] = [];
    const sent = Array.from({ length: 100 }, (_, i) => `datagram ${i}`);
    for (const text of sent) {
      await client.send(text);
      kept.push(await client.recv());
    }
    assertEquals(kept.map(decoded), sent);
  });
});

for (const fault of ["throw", "reject"]) {
  networkTest(`a handler that ${fault}s hurts nobody else, and handleError() is told`, async () => {
    await withServer(new RecordingServer({ port: 0 }, Fragile), async (server, { port }, dial) => {
      const [bad, good] = [dial({ port }), dial({ port })];
      await bad.send(fault);
      assertEquals(await ask(good, "fine"), "fine");
      assertEquals(await ask(bad, "fine again"), "fine again");
      assertEquals(server.errors.map(String), ["TypeError: handler boom"]);
      assertEquals(server.stats.errors, 1);
    });
  });
}

networkTest("a reply that is too long rejects in one sentence, and the server goes on", async () => {
  await withServer(new RecordingServer({ port: 0 }, Fragile), async (server, { port }, dial) => {
    const client = dial({ port });
    await client.send("too long");
    assertEquals(await ask(client, "fine"), "fine");
    assertEquals(server.errors.length, 1);
    assertMatch(String(server.errors[0]), /: Cannot reply with 65508 bytes to 127\.0\.0\.1:\d+: [^\n]*too long/i);
    assertEquals(server.stats.bytesWritten, 4);
  });
});

networkTest("a failed reply that nobody awaits is nobody's harm", async () => {
  await withServer(new RecordingServer({ port: 0 }, Fragile), async (server, { port }, dial) => {
    assertEquals(await ask(dial({ port }), "too long, and forgotten"), "too long, and forgotten");
    assertEquals(server.errors, []);
  });
});

networkTest("a client that has left is no error of the server's", async () => {
  const entrance = gate();
  class Late extends DatagramRequestHandler {
    override async handle() {
      if (decoded(this.request.data) === "late") await entrance.opened;
      for (let i = 0; i < 3; i++) await this.request.reply(this.request.data);
    }
  }
  await withServer(new RecordingServer({ port: 0 }, Late), async (server, { port }, dial) => {
    const leaving = dial({ port });
    await leaving.send("late");
    await until(() => server.stats.active === 1);
    leaving.close();
    entrance.open();
    await until(() => server.stats.active === 0);
    assertEquals(await ask(dial({ port }), "fine"), "fine");
    assertEquals(server.errors, []);
  });
});

// --- At the same time --------------------------------------------------------------

networkTest("handlers run side by side up to maxConcurrent, and what comes beyond is dropped and counted", async () => {
  const exit = gate();
  class Slow extends DatagramRequestHandler {
    override async handle() {
      await exit.opened;
      await this.request.reply(this.request.data);
    }
  }
  await withServer(new UdpServer({ port: 0 }, Slow, { maxConcurrent: 2 }), async (server, { port }, dial) => {
    const client = dial({ port });
    for (const text of ["1", "2", "3", "4", "5"]) await client.send(text);
    await until(() => server.stats.dropped === 3);
    assertEquals([server.stats.active, server.stats.accepted], [2, 2]);
    exit.open();
    assertEquals([await client.recv(), await client.recv()].map(decoded).sort(), ["1", "2"]);
    assertEquals(await ask(client, "6"), "6");
    assertEquals([server.stats.dropped, server.stats.accepted], [3, 3]);
  });
});

networkTest("replies overtake each other as their handlers do", async () => {
  const exit = gate();
  class Some extends DatagramRequestHandler {
    override async handle() {
      if (decoded(this.request.data) === "slow") await exit.opened;
      await this.request.reply(this.request.data);
    }
  }
  await withServer(new UdpServer({ port: 0 }, Some), async (_server, { port }, dial) => {
    const client = dial({ port });
    await client.send("slow");
    assertEquals(await ask(client, "fast"), "fast");
    exit.open();
    assertEquals(decoded(await client.recv()), "slow");
  });
});

for (
  const [name, options, kind] of [
    ["no datagrams at all", { maxConcurrent: 0 }, RangeError],
    ["half a datagram", { maxConcurrent: 1.5 }, RangeError],
    ["a negative grace", { grace: -1 }, RangeError],
    ["an option that does not exist", { ...{ grace: 1 }, ...{ maxConnections: 1 } }, TypeError],
  ] as const
) {
  Deno.test(`UdpServer refuses ${name}`, () => {
    assertThrows(() => new UdpServer({ port: 0 }, Echo, options), kind);
  });
}

Deno.test("UdpServer refuses an address that is none", () => {
  assertThrows(() => new UdpServer({ port: 65_536 }, Echo), RangeError);
  assertThrows(() => new UdpServer({ hostname: "", port: 0 }, Echo), TypeError);
});

Deno.test("UnixDatagramServer refuses an empty path", () => {
  assertThrows(() => new UnixDatagramServer({ path: "" }, Echo), TypeError);
});

// --- Receiving ---------------------------------------------------------------------

function systemError(code: string): Error {
  return Object.assign(new Error(`${code} (os error 0)`), { code });
}

/** A socket that gives what a script says, and then waits until it is closed. */
class FakeSocket implements DatagramSocket {
  readonly addr: Deno.Addr = CLIENT;
  readonly sent: string[] = [];
  readonly #script: (Error | Uint8Array | string)[];
  readonly #drained = Promise.withResolvers<void>();
  #pending: PromiseWithResolvers<[Uint8Array<ArrayBuffer>, Deno.Addr]> | undefined;

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
    this.sent.push(decoded(data));
    return Promise.resolve(data.length);
  }

  close(): void {
    this.#pending?.reject(new Deno.errors.Interrupted("operation canceled"));
  }
}

/** Listens on a socket that the test has made. */
class FakeServer extends DatagramServer {
  readonly overloads: unknown[] = [];
  readonly #fake: FakeSocket;

  constructor(fake: FakeSocket, Handler: DatagramRequestHandlerClass = Echo, options: DatagramServerOptions = {}) {
    super(Handler, options);
    this.#fake = fake;
  }

  override listen(): Deno.Addr {
    return this.boundAddress ?? this.adopt(this.#fake, this.#fake.addr);
  }

  override handleOverload(error: unknown) {
    this.overloads.push(error);
  }
}

const SURVIVED = [
  { name: "a datagram sent before that met nobody", error: systemError("ECONNREFUSED"), lost: 1, overloads: 0 },
  { name: "an unreachable host", error: systemError("EHOSTUNREACH"), lost: 1, overloads: 0 },
  {
    name: "a sender whose address is no text",
    error: new Deno.errors.InvalidData("not valid UTF-8"),
    lost: 1,
    overloads: 0,
  },
  { name: "too many open files", error: systemError("EMFILE"), lost: 0, overloads: 1 },
  { name: "no memory", error: systemError("ENOBUFS"), lost: 0, overloads: 1 },
];

for (const { name, error, lost, overloads } of SURVIVED) {
  Deno.test(`serveForever() outlives ${name}`, async () => {
    const socket = new FakeSocket(["before", error, error, "after"]);
    const server = new FakeServer(socket);
    const serving = server.serveForever();
    await socket.drained;
    await until(() => socket.sent.length === 2);
    assertEquals(socket.sent, ["before", "after"]);
    assertEquals([server.stats.lost, server.stats.overloads], [2 * lost, overloads]);
    assertEquals(server.overloads.length, overloads);
    await server.shutdown();
    await serving;
  });
}

Deno.test("serveForever() rejects with an error of receiving that nobody knows", async () => {
  const unknown = systemError("EINVAL");
  const server = new FakeServer(new FakeSocket(["before", unknown, "after"]));
  assertEquals(await rejectionOf(server.serveForever()), unknown);
  assertEquals(server.stats.accepted, 1);
});

Deno.test("a datagram that fills the buffer may have been cut: it is counted, and not handed on", async () => {
  const lengths: number[] = [];
  class Measuring extends DatagramRequestHandler {
    override handle() {
      lengths.push(this.request.data.length);
    }
  }
  const socket = new FakeSocket([new Uint8Array(65_535), new Uint8Array(65_536), new Uint8Array(1)]);
  const server = new FakeServer(socket, Measuring);
  const serving = server.serveForever();
  await socket.drained;
  assertEquals([server.stats.lost, server.stats.accepted], [1, 2]);
  await server.shutdown();
  await serving;
  assertEquals(lengths, [65_535, 1]);
});

// --- Hooks --------------------------------------------------------------------------

networkTest("verifyRequest() that says no costs no handler", async () => {
  class Guarded extends UdpServer {
    override verifyRequest({ data }: Datagram) {
      const isPolite = decoded(data).startsWith("please");
      return data.length % 2 === 0 ? isPolite : Promise.resolve(isPolite);
    }
  }
  class Strict extends Echo {
    override setup() {
      assert(decoded(this.request.data).startsWith("please"), "a handler was made");
    }
  }
  await withServer(new Guarded({ port: 0 }, Strict), async (server, { port }, dial) => {
    const client = dial({ port });
    await client.send("now");
    await client.send("at once");
    await client.send("this minute!");
    assertEquals(await ask(client, "please"), "please");
    assertEquals([server.stats.rejected, server.stats.errors, server.stats.accepted], [3, 0, 4]);
  });
});

networkTest("the hooks run in the documented order", async () => {
  const calls: string[] = [];
  class Handler extends DatagramRequestHandler {
    override setup() {
      calls.push("setup");
    }
    override handle() {
      calls.push("handle");
      throw new TypeError("after handle");
    }
    override async finish() {
      calls.push("finish");
      await this.request.reply("finished");
    }
  }
  class Server extends UdpServer {
    override verifyRequest() {
      calls.push("verifyRequest");
      return true;
    }
    override async processRequest(request: Datagram, clientAddress: Deno.Addr) {
      calls.push("processRequest");
      await super.processRequest(request, clientAddress);
    }
    override async finishRequest(request: Datagram, clientAddress: Deno.Addr) {
      calls.push("finishRequest");
      await super.finishRequest(request, clientAddress);
    }
    override handleError(error: unknown) {
      calls.push(`handleError ${error}`);
    }
  }
  await withServer(new Server({ port: 0 }, Handler), async (server, { port }, dial) => {
    assertEquals(await ask(dial({ port }), "hello"), "finished");
    await until(() => server.stats.active === 0);
    assertEquals(calls, [
      "verifyRequest",
      "processRequest",
      "finishRequest",
      "setup",
      "handle",
      "finish",
      "handleError TypeError: after handle",
    ]);
  });
});

networkTest("the handler knows its client and its server", async () => {
  const known: unknown[] = [];
  class Curious extends DatagramRequestHandler {
    override async handle() {
      known.push(this.clientAddress, this.request.clientAddress, this.server);
      await this.request.reply("");
    }
  }
  await withServer(new UdpServer({ port: 0 }, Curious), async (server, { port }) => {
    using client = new PlainSocket({ transport: "udp", hostname: "127.0.0.1", port: 0 });
    await client.send("hello", { transport: "udp", hostname: "127.0.0.1", port });
    await client.receive();
    assert(known[2] === server);
    assertEquals(known.slice(0, 2), [client.addr, client.addr]);
  });
});

networkTest("stats count datagrams and their bytes, both ways", async () => {
  class Twice extends DatagramRequestHandler {
    override async handle() {
      await this.request.reply(this.request.data);
      await this.request.reply(this.request.data);
    }
  }
  await withServer(new UdpServer({ port: 0 }, Twice), async (server, { port }, dial) => {
    const client = dial({ port });
    for (const text of ["12345", "123"]) {
      await client.send(text);
      await client.recv();
      await client.recv();
    }
    await until(() => server.stats.active === 0);
    const { accepted, bytesRead, bytesWritten } = server.stats;
    assertEquals({ accepted, bytesRead, bytesWritten }, { accepted: 2, bytesRead: 8, bytesWritten: 16 });
  });
});

// --- One at a time --------------------------------------------------------------------

networkTest("handleRequest() serves one datagram", async () => {
  await using server = new UdpServer({ port: 0 }, Echo);
  const { port } = server.listen();
  using client = new DatagramClient({ port, timeout: PATIENCE_MS });
  await client.send("one");
  await client.send("two");
  await server.handleRequest();
  assertEquals([server.stats.accepted, server.stats.active], [1, 0]);
  assertEquals(decoded(await client.recv()), "one");
  await server.handleRequest();
  assertEquals(decoded(await client.recv()), "two");
});

networkTest("handleRequest() calls handleTimeout() when none comes, and the next call serves what comes", async () => {
  let timeouts = 0;
  class Waiting extends UdpServer {
    override handleTimeout() {
      timeouts++;
    }
  }
  await using server = new Waiting({ port: 0 }, Echo);
  const { port } = server.listen();
  await server.handleRequest({ timeout: 5 });
  await server.handleRequest({ timeout: 5 });
  assertEquals(timeouts, 2);
  using client = new DatagramClient({ port, timeout: PATIENCE_MS });
  await client.send("late");
  await server.handleRequest();
  assertEquals(decoded(await client.recv()), "late");
  assertEquals(timeouts, 2);
});

networkTest("shutdown() waits for the datagram of a handleRequest(), and its reply goes out", async () => {
  const exit = gate();
  class Slow extends DatagramRequestHandler {
    override async handle() {
      await exit.opened;
      await this.request.reply("at last");
    }
  }
  const server = new RecordingServer({ port: 0 }, Slow);
  const { port } = server.listen();
  using client = new DatagramClient({ port, timeout: PATIENCE_MS });
  await client.send("question");
  const handled = server.handleRequest();
  await until(() => server.stats.active === 1);
  const down = server.shutdown();
  exit.open();
  await handled;
  assertEquals(server.errors, []);
  assertEquals(decoded(await client.recv()), "at last");
  assertEquals((await down).cut, []);
});

// --- Ending ---------------------------------------------------------------------------

networkTest("shutdown() waits for handlers, their replies go out, and then the port is free", async () => {
  const started = gate();
  class Slow extends DatagramRequestHandler {
    override async handle() {
      started.open();
      await new Promise((resolve) => this.signal.addEventListener("abort", resolve));
      await this.request.reply("goodbye");
    }
  }
  const server = new UdpServer({ port: 0 }, Slow);
  const { port } = server.listen();
  const serving = server.serveForever();
  using client = new DatagramClient({ port, timeout: PATIENCE_MS });
  await client.send("hello");
  await started.opened;
  const { finished, cut } = await server.shutdown();
  await using next = new UdpServer({ port }, Echo);
  next.listen();
  await serving;
  assertEquals({ finished, cut }, { finished: 1, cut: [] });
  assertEquals(decoded(await client.recv()), "goodbye");
});

networkTest("shutdown() serves what waits in the kernel", async () => {
  const server = new UdpServer({ port: 0 }, Echo);
  const { port } = server.listen();
  using client = new DatagramClient({ port, timeout: PATIENCE_MS });
  const sent = Array.from({ length: 20 }, (_, i) => `datagram ${i}`);
  for (const text of sent) await client.send(text);
  const serving = server.serveForever();
  await until(() => server.stats.accepted > 0);
  await server.shutdown();
  await serving;
  const received: string[] = [];
  for (const _ of sent) received.push(decoded(await client.recv()));
  assertEquals(received.sort(), sent.sort());
});

networkTest("shutdown() gives up a handler that never ends, and names its client", async () => {
  class Endless extends DatagramRequestHandler {
    override async handle() {
      await this.request.reply("ready");
      await new Promise(() => {});
    }
  }
  const server = new UdpServer({ port: 0 }, Endless);
  const { port } = server.listen();
  const serving = server.serveForever();
  using client = new PlainSocket({ transport: "udp", hostname: "127.0.0.1", port: 0 });
  await client.send("hello", { transport: "udp", hostname: "127.0.0.1", port });
  await client.receive();
  const { finished, cut } = await server.shutdown({ grace: 20 });
  assertEquals({ finished, cut }, { finished: 0, cut: [client.addr] });
  await serving;
});

networkTest("a server that never served shuts down, and its port is free", async () => {
  const server = new UdpServer({ port: 0 }, Echo);
  const { port } = server.listen();
  await server.shutdown();
  await using next = new UdpServer({ port }, Echo);
  next.listen();
  await server.serveForever();
  assertThrows(() => server.close() ?? server.shutdown({ grace: -1 }), RangeError);
});

networkTest("close() ends the server now, and a reply behind it rejects", async () => {
  const requests: Datagram[] = [];
  class Endless extends DatagramRequestHandler {
    override async handle() {
      requests.push(this.request);
      await new Promise(() => {});
    }
  }
  await withServer(new UdpServer({ port: 0 }, Endless), async (server, { port }, dial) => {
    await dial({ port }).send("hello");
    await until(() => requests.length === 1);
    server.close();
    const error = await rejectionOf(requests[0]?.reply("too late") ?? Promise.resolve());
    assert(error instanceof Deno.errors.BadResource);
    assertMatch(error.message, /^Cannot reply with 8 bytes to 127\.0\.0\.1:\d+: [^\n]*closed/);
    assertEquals(server.stats.bytesWritten, 0);
  });
});

networkTest("a handler may shut its server down after it has replied", async () => {
  class Last extends DatagramRequestHandler {
    override async handle() {
      await this.request.reply("ending");
      this.server.shutdown();
    }
  }
  const server = new RecordingServer({ port: 0 }, Last);
  const { port } = server.listen();
  const serving = server.serveForever();
  using client = new DatagramClient({ port, timeout: PATIENCE_MS });
  assertEquals(await ask(client, "end"), "ending");
  await serving;
  assertEquals(server.errors, []);
});

networkTest("a handler that has called shutdown() can still reply, and wait for it", async () => {
  class Last extends DatagramRequestHandler {
    override async handle() {
      const down = this.server.shutdown();
      await this.request.reply("ending");
      const { cut } = await down;
      assertEquals(cut, []);
    }
  }
  const server = new RecordingServer({ port: 0 }, Last);
  const { port } = server.listen();
  const serving = server.serveForever();
  using client = new DatagramClient({ port, timeout: PATIENCE_MS });
  assertEquals(await ask(client, "end"), "ending");
  await serving;
  assertEquals(server.errors, []);
});

networkTest("serveForever() ends with its signal", async () => {
  const ending = new AbortController();
  const server = new UdpServer({ port: 0 }, Echo);
  const { port } = server.listen();
  const serving = server.serveForever({ signal: ending.signal });
  using client = new DatagramClient({ port, timeout: PATIENCE_MS });
  assertEquals(await ask(client, "hello"), "hello");
  ending.abort();
  await serving;
});

Deno.test("a datagram of the test's own counts what it is answered", async () => {
  const sent: [string, Deno.Addr][] = [];
  const request = new Datagram(
    new Uint8Array(3),
    CLIENT,
    (data, to) => Promise.resolve(sent.push([decoded(data), to])),
  );
  await new UdpServer({ port: 0 }, Echo).finishRequest(request, CLIENT);
  await request.reply("more");
  assertEquals(sent, [["\0\0\0", CLIENT], ["more", CLIENT]]);
  assertEquals([request.bytesRead, request.bytesWritten], [3, 7]);
});

// --- The client -----------------------------------------------------------------------

networkTest("recv() rejects after the timeout, and a late answer answers the next call", async () => {
  const exit = gate();
  class Slow extends DatagramRequestHandler {
    override async handle() {
      await exit.opened;
      await this.request.reply(this.request.data);
    }
  }
  await withServer(new UdpServer({ port: 0 }, Slow), async (_server, { port }, dial) => {
    const client = dial({ port, timeout: 20 });
    await client.send("first");
    const error = await rejectionOf(client.recv());
    assert(error instanceof Deno.errors.TimedOut);
    assertEquals(error.message, `No answer came from 127.0.0.1:${port} within 20 ms`);
    exit.open();
    assertEquals(await receiveLate(client), "first");
  });
});

networkTest("a stranger's datagram is not taken for the server's", async () => {
  const exit = gate();
  const clients: Deno.Addr[] = [];
  class Slow extends DatagramRequestHandler {
    override async handle() {
      clients.push(this.clientAddress);
      await exit.opened;
      await this.request.reply("from the server");
    }
  }
  await withServer(new UdpServer({ port: 0 }, Slow), async (_server, { port }, dial) => {
    using stranger = new PlainSocket({ transport: "udp", hostname: "127.0.0.1", port: 0 });
    const client = dial({ port });
    await client.send("hello");
    await until(() => clients.length === 1);
    for (const to of clients) await stranger.send("from a stranger", to);
    exit.open();
    assertEquals(decoded(await client.recv()), "from the server");
  });
});

networkTest("a stranger that goes on sending does not prolong the timeout", async () => {
  const clients: Deno.Addr[] = [];
  class Silent extends DatagramRequestHandler {
    override handle() {
      clients.push(this.clientAddress);
    }
  }
  await withServer(new UdpServer({ port: 0 }, Silent), async (_server, { port }, dial) => {
    using stranger = new PlainSocket({ transport: "udp", hostname: "127.0.0.1", port: 0 });
    const client = dial({ port, timeout: 50 });
    await client.send("hello");
    await until(() => clients.length === 1);
    const chatter = setInterval(() => {
      for (const to of clients) stranger.send("chatter", to);
    }, 5);
    try {
      await assertRejects(() => client.recv(), Deno.errors.TimedOut);
    } finally {
      clearInterval(chatter);
    }
  });
});

networkTest("close() ends a recv() that waits, and may be called again", async () => {
  const client = new DatagramClient({ port: 9 });
  const received = rejectionOf(client.recv());
  client.close();
  client.close();
  assert(await received instanceof Error);
  await assertRejects(() => client.recv(), Error);
});

networkTest("a datagram that is too long for send() rejects in one sentence, and the client goes on", async () => {
  await withServer(new UdpServer({ port: 0 }, Echo), async (_server, { port }, dial) => {
    const client = dial({ port });
    const error = await rejectionOf(client.send(new Uint8Array(65_508)));
    assertMatch(error.message, new RegExp(`^Cannot send 65508 bytes to 127\\.0\\.0\\.1:${port}: [^\n]*too long`, "i"));
    assertEquals(await ask(client, "fine"), "fine");
  });
});

networkTest("a client outlives a server that is not there yet", async () => {
  const server = new UdpServer({ port: 0 }, Echo);
  const { port } = server.listen();
  await server.shutdown();
  using client = new DatagramClient({ port, timeout: 20 });
  await client.send("too early");
  await assertRejects(() => client.recv(), Deno.errors.TimedOut);
  await withServer(new UdpServer({ port }, Echo), async () => {
    await client.send("in time");
    assertEquals(await receiveLate(client), "in time");
  });
});

for (
  const [name, options, kind] of [
    ["a timeout of 0", { port: 9, timeout: 0 }, RangeError],
    ["a port out of range", { port: 65_536 }, RangeError],
    ["an empty hostname", { hostname: "", port: 9 }, TypeError],
    ["an option that does not exist", { ...{ port: 9 }, ...{ retries: 1 } }, TypeError],
  ] as const
) {
  networkTest(`DatagramClient refuses ${name}`, () => {
    assertThrows(() => new DatagramClient(options).close(), kind);
  });
}

Deno.test("a client without the permission says which flag is missing", { permissions: { net: false } }, () => {
  let message = "";
  try {
    new DatagramClient({ port: 8009 }).close();
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) message = error.message;
  }
  assertMatch(message, /^Cannot [^\n]*permission is missing; run again with --allow-net=\S+$/);
});

Deno.test("a server without the permission says which flag is missing", { permissions: { net: false } }, async () => {
  const error = await rejectionOf(new UdpServer({ port: 8009 }, Echo).serveForever());
  assert(error instanceof Deno.errors.NotCapable);
  assertEquals(
    error.message,
    "Cannot listen on 127.0.0.1:8009: permission is missing; run again with --allow-net=127.0.0.1",
  );
});

Deno.test("a Unix server without the permissions names the least flags", {
  permissions: { net: false, read: false, write: false },
}, async () => {
  const error = await rejectionOf(new UnixDatagramServer({ path: "/tmp/a.sock" }, Echo).serveForever());
  assertMatch(error.message, /^Cannot listen on \/tmp\/a\.sock: permission is missing; run again with /);
  assertEquals(permissionsIn(error.message).slice(0, 2), ["--allow-read=/tmp/", "--allow-write=/tmp/"]);
});

// --- Unix sockets -----------------------------------------------------------------------

function exists(path: string): boolean {
  try {
    Deno.lstatSync(path);
    return true;
  } catch {
    return false; // Whatever it is, it is not there.
  }
}

/** Leaves a socket file that nobody answers on, as a killed server does. */
function leaveStaleSocket(path: string): void {
  const socket = Deno.listenDatagram({ transport: "unixpacket", path: `${path}.moved` });
  Deno.renameSync(`${path}.moved`, path); // So that closing does not remove it.
  socket.close();
}

async function assertServes(path: string): Promise<void> {
  using client = new DatagramClient({ path, localPath: `${path}.${crypto.randomUUID()}`, timeout: PATIENCE_MS });
  assertEquals(await ask(client, "hello"), "hello");
}

unixTest("a Unix datagram of any length arrives whole, both ways", async (folder) => {
  const path = `${folder}/server.sock`;
  await withServer(new UnixDatagramServer({ path }, Echo), async (_server, _address, dial) => {
    const client = dial({ path, localPath: `${folder}/client.sock` });
    for (const length of [0, 1, 1_472, 65_507]) {
      const bytes = Uint8Array.from({ length }, (_, i) => i * 31);
      await client.send(bytes);
      assertEquals(await client.recv(), bytes);
    }
  });
});

unixTest("a Unix datagram that was cut is counted, and not handed on", async (folder) => {
  const path = `${folder}/server.sock`;
  await withServer(new UnixDatagramServer({ path }, Echo), async (server, _address, dial) => {
    const client = dial({ path, localPath: `${folder}/client.sock` });
    await client.send(new Uint8Array(70_000));
    assertEquals(await ask(client, "fine"), "fine");
    assertEquals([server.stats.lost, server.stats.accepted], [1, 1]);
  });
});

unixTest("UnixDatagramServer removes its file when it ends, and its client its own", async (folder) => {
  const path = `${folder}/server.sock`;
  const localPath = `${folder}/client.sock`;
  await withServer(new UnixDatagramServer({ path }, Echo), async (server, address, dial) => {
    assertEquals([address.path, server.address], [path, address]);
    assertEquals(await server.listen(), address);
    const client = dial({ path, localPath });
    assertEquals(await ask(client, "hello"), "hello");
    client.close();
    assert(!exists(localPath));
  });
  assert(!exists(path));
});

unixTest("UnixDatagramServer removes its file when it is closed, and when it never served", async (folder) => {
  const path = `${folder}/server.sock`;
  const server = new UnixDatagramServer({ path }, Echo);
  await server.listen();
  server.close();
  await server.serveForever();
  assert(!exists(path));
});

unixTest("UnixDatagramServer replaces a socket file that nobody answers on", async (folder) => {
  const path = `${folder}/server.sock`;
  leaveStaleSocket(path);
  assert(exists(path));
  await withServer(new UnixDatagramServer({ path }, Echo), () => assertServes(path));
});

unixTest("UnixDatagramServer leaves a server that is alive alone", async (folder) => {
  const path = `${folder}/server.sock`;
  await withServer(new UnixDatagramServer({ path }, Echo), async () => {
    const error = await rejectionOf(new UnixDatagramServer({ path }, Echo).serveForever());
    assert(error instanceof Deno.errors.AddrInUse);
    assertMatch(error.message, /server\.sock: the address is in use; stop the program/);
    await assertServes(path);
  });
});

unixTest("UnixDatagramServer leaves a file alone that is no socket, and can be tried again", async (folder) => {
  const path = `${folder}/server.sock`;
  Deno.writeTextFileSync(path, "precious");
  const server = new UnixDatagramServer({ path }, Echo);
  await assertRejects(() => server.serveForever(), Deno.errors.AddrInUse);
  assertEquals(Deno.readTextFileSync(path), "precious");
  Deno.removeSync(path);
  await withServer(server, () => assertServes(path));
});

unixTest("UnixDatagramServer gives its file the mode", async (folder) => {
  const path = `${folder}/server.sock`;
  await using server = new UnixDatagramServer({ path, mode: 0o600 }, Echo);
  await server.listen();
  assertEquals((Deno.lstatSync(path).mode ?? 0) & 0o777, 0o600);
});

unixTest("Unix replies go out while a receive is pending", async (folder) => {
  const path = `${folder}/server.sock`;
  const exit = gate();
  class Slow extends DatagramRequestHandler {
    override async handle() {
      if (decoded(this.request.data) === "slow") await exit.opened;
      await this.request.reply(this.request.data);
    }
  }
  await withServer(new UnixDatagramServer({ path }, Slow), async (_server, _address, dial) => {
    const client = dial({ path, localPath: `${folder}/client.sock` });
    await client.send("slow");
    assertEquals(await ask(client, "fast"), "fast"); // Now nothing more comes, and the server waits.
    exit.open();
    assertEquals(decoded(await client.recv()), "slow");
  });
});

unixTest("a Unix stranger's datagram is not taken for the server's", async (folder) => {
  const path = `${folder}/server.sock`;
  const localPath = `${folder}/client.sock`;
  await withServer(new UnixDatagramServer({ path }, Echo), async (_server, _address, dial) => {
    const client = dial({ path, localPath });
    using stranger = new PlainSocket({ transport: "unixpacket", path: `${folder}/stranger.sock` });
    await stranger.send("from a stranger", { transport: "unixpacket", path: localPath });
    assertEquals(await ask(client, "from the server"), "from the server");
  });
});

unixTest("a Unix server that is not there is one sentence", async (folder) => {
  const path = `${folder}/server.sock`;
  using client = new DatagramClient({ path, localPath: `${folder}/client.sock` });
  const error = await rejectionOf(client.send("hello"));
  assertMatch(error.message, /^Cannot send 5 bytes to [^\n]*server\.sock: no such file; start the server/);
});

unixTest("a Unix client does not remove a file that is not its own", async (folder) => {
  const path = `${folder}/server.sock`;
  await withServer(new UnixDatagramServer({ path }, Echo), async () => {
    assertThrows(() => new DatagramClient({ path: `${folder}/other.sock`, localPath: path }).close(), Error);
    await assertServes(path);
  });
});

unixTest("a Unix client that is closed again leaves the file of the next one alone", async (folder) => {
  const path = `${folder}/server.sock`;
  const localPath = `${folder}/client.sock`;
  await withServer(new UnixDatagramServer({ path }, Echo), async (_server, _address, dial) => {
    const first = dial({ path, localPath });
    first.close();
    const second = dial({ path, localPath });
    first.close();
    assert(exists(localPath));
    assertEquals(await ask(second, "hello"), "hello");
  });
});

unixTest("a Unix client that has left is one error, and the server goes on", async (folder) => {
  const path = `${folder}/server.sock`;
  const exit = gate();
  class Late extends DatagramRequestHandler {
    override async handle() {
      if (decoded(this.request.data) === "late") await exit.opened;
      await this.request.reply(this.request.data);
    }
  }
  await withServer(new RecordingUnixServer({ path }, Late), async (server, _address, dial) => {
    const leaving = dial({ path, localPath: `${folder}/leaving.sock` });
    await leaving.send("late");
    await until(() => server.stats.active === 1);
    leaving.close();
    exit.open();
    await until(() => server.errors.length === 1);
    assertMatch(String(server.errors[0]), /: Cannot reply with 4 bytes to [^\n]*leaving\.sock: /);
    await assertServes(path);
  });
});

// --- Other programs ---------------------------------------------------------------------

/** A Python client, which sends the lines that it is given. */
function startUnixClient(way: string, folder: string, name = "client"): Program {
  return startPython("unix_datagram_client.py", [way, `${folder}/server.sock`, `${folder}/${name}.sock`]);
}

for (const way of ["sendto", "connect"]) {
  programTestIn(`a Python client that is bound is answered, by ${way}()`, async (folder) => {
    const path = `${folder}/server.sock`;
    await withServer(new UnixDatagramServer({ path }, Echo), async () => {
      await using client = startUnixClient(way, folder);
      for (const text of ["hello", "你好", "goodbye"]) {
        await client.write(`${text}\n`);
        await client.printed(`${text}\n`);
      }
      await client.closeInput();
      assertEquals((await client.ended()).code, 0);
    });
  });

  programTestIn(`a Python client by ${way}() is answered while the server receives`, async (folder) => {
    const path = `${folder}/server.sock`;
    const exit = gate();
    class Slow extends DatagramRequestHandler {
      override async handle() {
        if (decoded(this.request.data) === "slow") await exit.opened;
        await this.request.reply(this.request.data);
      }
    }
    await withServer(new UnixDatagramServer({ path }, Slow), async (server) => {
      await using client = startUnixClient(way, folder);
      await client.write("slow\n");
      await until(() => server.stats.active === 1);
      await assertServes(path); // Now nothing more comes, and the server waits.
      exit.open();
      await client.printed("slow\n");
    });
  });

  programTestIn(`a client by ${way}() that never reads holds up nobody else`, async (folder) => {
    const path = `${folder}/server.sock`;
    class Generous extends DatagramRequestHandler {
      override async handle() {
        const isDeaf = decoded(this.request.data) === "deaf";
        await this.request.reply(isDeaf ? new Uint8Array(30_000) : this.request.data);
      }
    }
    await withServer(new RecordingUnixServer({ path }, Generous), async (server) => {
      await using deaf = startUnixClient(`deaf-${way}`, folder, "deaf");
      await deaf.write("deaf\n".repeat(30));
      await until(() => server.errors.length > 0); // Its queue is full.
      await assertServes(path);
      await until(() => server.stats.active === 0);
      for (const error of server.errors) {
        assert(error instanceof Deno.errors.TimedOut);
        assertMatch(
          error.message,
          /^Cannot reply with 30000 bytes to [^\n]*deaf\.sock: the client (took nothing for 1000 ms|takes nothing)$/,
        );
      }
      await assertServes(path);
    });
  });
}

programTestIn(
  "a Python client that is bound to nothing cannot be answered: reported once, and the server goes on",
  async (folder) => {
    const path = `${folder}/server.sock`;
    await withServer(new RecordingUnixServer({ path }, Echo), async (server) => {
      await using client = startUnixClient("anonymous", folder);
      await client.write("hello\n");
      await client.printed("sent\n");
      await until(() => server.errors.length > 0 && server.stats.active === 0);
      await assertServes(path);
      assertEquals(server.errors.length, 1);
      assertMatch(String(server.errors[0]), /: Cannot reply with 5 bytes to \(unnamed Unix socket\): [^\n]*no path/);
    });
  },
);

programTestIn("a Python client whose path is no UTF-8 is counted as lost, and the server goes on", async (folder) => {
  const path = `${folder}/server.sock`;
  await withServer(new RecordingUnixServer({ path }, Echo), async (server) => {
    await using client = startUnixClient("deaf-sendto", folder, "?");
    await client.write("hello\n");
    await client.printed("sent\n");
    await until(() => server.stats.lost === 1);
    await assertServes(path);
    assertEquals(server.errors, []);
  });
});

programTestIn("a client outlives a stranger whose path is no UTF-8", async (folder) => {
  const path = `${folder}/server.sock`;
  const echoPath = `${folder}/echo.sock`;
  await withServer(new UnixDatagramServer({ path: echoPath }, Echo), async (_server, _address, dial) => {
    const client = dial({ path: echoPath, localPath: path });
    await using stranger = startUnixClient("deaf-sendto", folder, "?");
    await stranger.write("hello\n");
    await stranger.printed("sent\n");
    await client.send("question");
    await client.recv().catch(() => client.recv()); // The stranger's datagram may be told of, once.
    assertEquals(await ask(client, "again"), "again");
  });
});

programTestIn("a crowd of connected Python clients is answered, each with its own", async (folder) => {
  const path = `${folder}/server.sock`;
  await withServer(new RecordingUnixServer({ path }, Echo), async (server) => {
    await using crowd = startPython("unix_datagram_crowd.py", [path, folder, "20", "25"]);
    const { code, stdout } = await crowd.ended();
    assertEquals([code, stdout, server.errors], [0, "right answers: 500\n", []]);
    assertEquals(server.stats.accepted, 500);
  });
});

programTestIn("a reply to a connected client that the end of the server overtakes still settles", async (folder) => {
  const path = `${folder}/server.sock`;
  for (let turns = 0; turns < 12; turns++) {
    const requests: Datagram[] = [];
    class Keeping extends DatagramRequestHandler {
      override async handle() {
        requests.push(this.request);
        await new Promise(() => {});
      }
    }
    await withServer(new UnixDatagramServer({ path }, Keeping), async (server) => {
      await using client = startUnixClient("deaf-connect", folder, `client${turns}`);
      await client.write("hello\n");
      await until(() => requests.length === 1);
      let hasSettled = false;
      const settle = () => hasSettled = true;
      requests[0]?.reply("").then(settle, settle);
      const turn = () => new Promise<void>((resolve) => setImmediate(resolve));
      for (let i = 0; i < turns; i++) await turn();
      server.close();
      await until(() => hasSettled);
    });
  }
});

programTest("socat talks to a UDP server", async () => {
  await withServer(new UdpServer({ port: 0 }, Echo), async (_server, { port }) => {
    await using socat = Program.start("socat", ["-", `UDP4:127.0.0.1:${port}`]);
    for (const text of ["hello\n", "goodbye\n"]) {
      await socat.write(text);
      await socat.printed(text);
    }
    await socat.closeInput();
    assertEquals((await socat.ended()).code, 0);
  });
});

programTestIn("socat talks to a server of Unix datagrams", async (folder) => {
  const path = `${folder}/server.sock`;
  await withServer(new UnixDatagramServer({ path }, Echo), async () => {
    await using socat = Program.start("socat", ["-", `UNIX-SENDTO:${path},bind=${folder}/client.sock`]);
    for (const text of ["hello\n", "goodbye\n"]) {
      await socat.write(text);
      await socat.printed(text);
    }
    await socat.closeInput();
    assertEquals((await socat.ended()).code, 0);
  });
});

const WITHOUT_FLAG = `
import { DatagramClient, DatagramRequestHandler, UdpServer, UnixDatagramServer } from "MOD";

class Silent extends DatagramRequestHandler {
  override handle() {}
}

const attempts = [
  () => new UdpServer({ port: 0 }, Silent).serveForever(),
  () => new UnixDatagramServer({ path: "server.sock" }, Silent).serveForever(),
  () => new DatagramClient({ port: 9 }),
  () => new DatagramClient({ path: "server.sock", localPath: "client.sock" }),
];
for (const attempt of attempts) await Promise.try(attempt).catch((error) => console.log(String(error)));
`;

programTestIn("without --unstable-net one sentence says so", async (folder) => {
  const source = WITHOUT_FLAG.replace("MOD", new URL("../mod.ts", import.meta.url).href);
  await Deno.writeTextFile(`${folder}/main.ts`, source);
  const args = ["run", "--no-config", "--no-prompt", "--allow-net", "--allow-read", "--allow-write", "main.ts"];
  await using program = Program.start(Deno.execPath(), args, { cwd: folder });
  const { code, stdout, stderr } = await program.ended();
  const sentence =
    "TypeError: Cannot open a datagram socket: Deno has them behind a flag; run again with --unstable-net";
  assertEquals([code, stderr, stdout.trimEnd().split("\n")], [0, "", Array.from({ length: 4 }, () => sentence)]);
});

networkTest("shutdown() ends although datagrams keep coming", async () => {
  const server = new UdpServer({ port: 0 }, Echo);
  const { port } = server.listen();
  const serving = server.serveForever();
  using client = new DatagramClient({ port });
  let isOver = false;
  const flooding = (async () => {
    while (!isOver) await client.send("more");
  })();
  await until(() => server.stats.accepted > 100);
  const { cut } = await server.shutdown({ grace: 60_000 });
  isOver = true;
  await flooding;
  await serving;
  assertEquals(cut, []);
});

networkTest("a second recv() of a DatagramClient rejects while one waits", async () => {
  await using server = new UdpServer({ port: 0 }, Echo);
  const { port } = server.listen();
  server.serveForever();
  using client = new DatagramClient({ port });
  const first = client.recv();
  await assertRejects(() => client.recv(), Deno.errors.Busy);
  await client.send("one");
  assertEquals(new TextDecoder().decode(await first), "one");
});
