import { assert, assertEquals, assertMatch, assertRejects, assertThrows } from "../deps.ts";
import {
  BaseServer,
  type CloseReason,
  connect,
  type ConnectionReport,
  type ServerOptions,
  socketPair,
  SocketStream,
  StreamRequestHandler,
  TcpServer,
  TlsServer,
} from "../mod.ts";
import { FakeTcpConn, turnEnd } from "./fake_conn.ts";
import { countListeners, Echo, FakeListener, networkTest, programTest, rejectionOf, until } from "./testing.ts";

/** Says which connection it is, and stays until its client leaves. */
class Greeter extends StreamRequestHandler {
  override async handle() {
    await this.request.send("hello\n");
    await this.request.recv();
  }
}

/** Starts a server and a client, and ends both after `test`. */
async function withServer<Server extends TcpServer>(
  server: Server,
  test: (server: Server, dial: () => Promise<SocketStream>) => Promise<void>,
): Promise<void> {
  const { port } = server.listen();
  const serving = server.serveForever();
  const clients: SocketStream[] = [];
  try {
    await test(server, async () => {
      const client = await connect({ port });
      clients.push(client);
      return client;
    });
  } finally {
    for (const client of clients) client.close();
    await server.shutdown();
    await serving;
  }
}

/** Serves what a listener of the test gives out. */
class FakeServer extends TcpServer {
  readonly #listener: FakeListener;

  constructor(listener: FakeListener, ...rest: [typeof Echo, ServerOptions?]) {
    super({ port: 0 }, ...rest);
    this.#listener = listener;
  }

  override listen(): Deno.NetAddr {
    return this.adopt(this.#listener, { transport: "tcp", hostname: "127.0.0.1", port: 1 });
  }
}

/** Tells when a shutdown ends what waits for a new message. */
class Draining extends TcpServer {
  readonly #ending = Promise.withResolvers<void>();

  get ending(): Promise<void> {
    return this.#ending.promise;
  }

  protected override endRequest(request: SocketStream, isLate: boolean) {
    super.endRequest(request, isLate);
    this.#ending.resolve();
  }
}

// Starting

Deno.test("a server that is constructed opens nothing and calls no hook", () => {
  class Strict extends TcpServer {
    override listen(): never {
      throw new TypeError("a hook was called");
    }
  }
  const server = new Strict({ port: 0 }, Echo);
  assertThrows(() => server.address, TypeError);
  assertEquals(server.stats.accepted, 0);
});

for (
  const [name, make] of [
    [
      "an option that does not exist",
      () => new TcpServer({ port: 0 }, Echo, { ...{ grace: 1 }, ...{ maxConnection: 1 } }),
    ],
    ["an empty hostname", () => new TcpServer({ hostname: "", port: 0 }, Echo)],
  ] as const
) {
  Deno.test(`TcpServer refuses ${name}`, () => void assertThrows(make, TypeError));
}

for (
  const [name, make] of [
    ["a port out of range", () => new TcpServer({ port: 65_536 }, Echo)],
    ["a port that is no whole number", () => new TcpServer({ port: 1.5 }, Echo)],
    ["no connections at all", () => new TcpServer({ port: 0 }, Echo, { maxConnections: 0 })],
    ["a negative grace", () => new TcpServer({ port: 0 }, Echo, { grace: -1 })],
    ["an idle timeout of 0", () => new TcpServer({ port: 0 }, Echo, { idleTimeout: 0 })],
  ] as const
) {
  Deno.test(`TcpServer refuses ${name}`, () => void assertThrows(make, RangeError));
}

networkTest("listen() resolves port 0, and a second call gives the same address", async () => {
  await using server = new TcpServer({ port: 0 }, Echo);
  const address = server.listen();
  assert(address.port > 0);
  assertEquals(server.listen(), address);
  assertEquals(server.address, address);
});

const mistakes: [string, string, RegExp][] = [
  ["an address", "[null]", /^Address must be an object/],
  ["a hostname", '[{ "port": 0, "hostname": 5 }]', /^Option "hostname" must be a string: it is 5$/],
  ["options", '[{ "port": 0 }, null]', /^Options must be an object such as \{ timeout: 5_000 \}: they are null$/],
  ["a text for options", '[{ "port": 0 }, "fast"]', /^Options must be an object/],
];

for (const [what, json, sentence] of mistakes) {
  Deno.test(`TcpServer and TlsServer say in one sentence what is wrong with ${what} from plain JavaScript`, async () => {
    const [address, options] = JSON.parse(json);
    for (const Server of [TcpServer, TlsServer]) {
      const error = await rejectionOf(Promise.try(() => new Server(address, Echo, options)));
      assert(error instanceof TypeError);
      assertMatch(error.message, sentence);
    }
  });
}

Deno.test("TcpServer refuses a tcpBacklog that the kernel would take for another", async () => {
  for (const tcpBacklog of [2 ** 31, 2 ** 40, Infinity]) {
    const error = await rejectionOf(Promise.try(() => new TcpServer({ port: 0, tcpBacklog }, Echo)));
    assert(error instanceof RangeError);
    assertMatch(error.message, /"tcpBacklog" must be 2147483647 or less/);
  }
});

networkTest("a server listens on this machine only, if it is told no hostname", () => {
  const server = new TcpServer({ port: 0 }, Echo);
  assertEquals(server.listen().hostname, "127.0.0.1");
  server.close();
});

networkTest("listen() says which address is in use, and what to do", async () => {
  await using first = new TcpServer({ port: 0 }, Echo);
  const { port } = first.listen();
  const second = new TcpServer({ port }, Echo);
  const error = await rejectionOf(second.serveForever());
  assert(error instanceof Deno.errors.AddrInUse);
  assertMatch(error.message, new RegExp(`^Cannot listen on 127.0.0.1:${port}: the address is in use; stop`));
});

networkTest("serveForever() rejects while it runs already", async () => {
  await withServer(new TcpServer({ port: 0 }, Echo), async (server) => {
    await assertRejects(() => server.serveForever(), Deno.errors.Busy);
    await assertRejects(() => server.handleRequest(), Deno.errors.Busy);
  });
});

Deno.test("serveForever() without the permission says which flag is missing", {
  permissions: { net: false },
}, async () => {
  const error = await rejectionOf(new TcpServer({ port: 8009 }, Echo).serveForever());
  assert(error instanceof Deno.errors.NotCapable);
  assertEquals(
    error.message,
    "Cannot listen on 127.0.0.1:8009: permission is missing; run again with --allow-net=127.0.0.1:8009",
  );
});

// Serving

networkTest("clients are served side by side", async () => {
  await withServer(new TcpServer({ port: 0 }, Greeter), async (_server, dial) => {
    const clients = await Promise.all(Array.from({ length: 20 }, dial));
    for (const client of clients) assertEquals(await client.readLine(), "hello");
  });
});

networkTest("maxConnections: 1 serves one client after the other", async () => {
  await withServer(new TcpServer({ port: 0 }, Greeter, { maxConnections: 1 }), async (server, dial) => {
    const first = await dial();
    const second = await dial();
    assertEquals(await first.readLine(), "hello");
    second.timeout = 20;
    await assertRejects(() => second.readLine(), Deno.errors.TimedOut);
    assertEquals(server.stats.active, 1);
    second.timeout = Infinity;
    first.close();
    assertEquals(await second.readLine(), "hello");
  });
});

networkTest("a handler that throws ends its own connection only, and handleError() is told", async () => {
  class Fragile extends StreamRequestHandler {
    override async handle() {
      const line = await this.request.readLine();
      if (line === "throw") throw new TypeError("handler boom");
      await this.request.send(`${line}\n`);
    }
  }
  class Reporting extends TcpServer {
    readonly reported: string[] = [];
    override handleError(error: unknown, clientAddress: Deno.Addr) {
      this.reported.push(`${error} from ${clientAddress.transport}`);
    }
  }
  await withServer(new Reporting({ port: 0 }, Fragile), async (server, dial) => {
    const [bad, good] = [await dial(), await dial()];
    await bad.send("throw\n");
    assertEquals(await bad.recv(), null);
    await good.send("fine\n");
    assertEquals(await good.readLine(), "fine");
    assertEquals(server.reported, ["TypeError: handler boom from tcp"]);
    assertEquals(server.stats.errors, 1);
  });
});

networkTest("what is still buffered when the handler returns is sent", async () => {
  class Hasty extends StreamRequestHandler {
    override handle() {
      this.request.write("a".repeat(100_000));
    }
  }
  await withServer(new TcpServer({ port: 0 }, Hasty), async (_server, dial) => {
    const client = await dial();
    assertEquals((await client.readExactly(100_000)).length, 100_000);
    assertEquals(await client.recv(), null);
  });
});

networkTest("a client that vanished is counted, and prints nothing", async () => {
  class Impatient extends StreamRequestHandler {
    override async handle() {
      await this.request.readExactly(10);
    }
  }
  await withServer(new TcpServer({ port: 0 }, Impatient), async (server, dial) => {
    const client = await dial();
    await client.send("abc");
    client.close();
    await until(() => server.stats.aborted === 1);
    assertEquals(server.stats.errors, 0);
  });
});

networkTest("another connection's trouble inside a handler is the handler's own error", async () => {
  class Proxy extends StreamRequestHandler {
    override async handle() {
      const [ours, theirs] = socketPair();
      theirs.close();
      ours.close();
      await ours.recv();
    }
  }
  class Silent extends TcpServer {
    override handleError() {}
  }
  await withServer(new Silent({ port: 0 }, Proxy), async (server, dial) => {
    await (await dial()).recv();
    assertEquals([server.stats.errors, server.stats.aborted], [1, 0]);
  });
});

networkTest("idleTimeout closes a silent client, and counts it", async () => {
  await withServer(new TcpServer({ port: 0 }, Echo, { idleTimeout: 20 }), async (server, dial) => {
    const client = await dial();
    assertEquals(await client.recv(), null);
    await until(() => server.stats.active === 0);
    assertEquals([server.stats.timedOut, server.stats.errors], [1, 0]);
  });
});

networkTest("maxLifetime ends a client that is never silent, and counts it", async () => {
  await withServer(new TcpServer({ port: 0 }, Echo, { maxLifetime: 20 }), async (server, dial) => {
    const client = await dial();
    await assertRejects(async () => {
      for (;;) {
        await client.send(".");
        if (await client.recv() === null) throw new Deno.errors.ConnectionReset("it has ended");
      }
    });
    await until(() => server.stats.active === 0);
    assertEquals([server.stats.timedOut, server.stats.errors], [1, 0]);
  });
});

networkTest(
  "over maxConnectionsPerHost a client is closed at once, and no hook but handleRefuse() knows of it",
  async () => {
    let verified = 0;
    const refusals: Deno.Addr[] = [];
    class Verifying extends TcpServer {
      override verifyRequest() {
        verified++;
        return true;
      }
      override handleRefuse(clientAddress: Deno.Addr) {
        refusals.push(clientAddress);
        throw new TypeError("a bug in the hook");
      }
    }
    const print = console.error;
    console.error = () => {};
    await withServer(new Verifying({ port: 0 }, Greeter, { maxConnectionsPerHost: 2 }), async (server, dial) => {
      const [first, second] = [await dial(), await dial()];
      for (const client of [first, second]) assertEquals(await client.readLine(), "hello");
      for (let refused = 1; refused <= 3; refused++) {
        const client = await dial();
        assertEquals(await client.recv(), null);
        assertEquals(server.stats.refused, refused);
        assertEquals(refusals.at(-1), client.localAddress);
      }
      assertEquals([server.stats.accepted, server.stats.active, verified], [2, 2, 2]);
      first.close();
      await until(() => server.stats.active === 1);
      assertEquals(await (await dial()).readLine(), "hello");
      assertEquals(server.stats.refused, 3);
    });
    console.error = print;
    assertEquals(refusals.length, 3);
  },
);

networkTest("a connection that getRequest() has failed for does not count for its host", async () => {
  class Faulty extends TcpServer {
    #connections = 0;
    override getRequest(conn: Deno.Conn) {
      if (++this.#connections <= 2) throw new TypeError("a bug in the hook");
      return super.getRequest(conn);
    }
    override handleError() {}
  }
  await withServer(new Faulty({ port: 0 }, Greeter, { maxConnectionsPerHost: 1 }), async (server, dial) => {
    for (let failed = 0; failed < 2; failed++) assertEquals(await (await dial()).recv(), null);
    assertEquals(await (await dial()).readLine(), "hello");
    assertEquals(server.stats.refused, 0);
  });
});

/** Connects from 127.0.0.2, and prints what it is told. */
const OTHER_HOST = `
import socket, sys
client = socket.create_connection(("127.0.0.1", int(sys.argv[1])), source_address=("127.0.0.2", 0))
print(client.recv(100).decode(), end="")
`;

programTest("a host that has as many connections as it may costs no other host anything", async () => {
  await withServer(new TcpServer({ port: 0 }, Greeter, { maxConnectionsPerHost: 1 }), async (server, dial) => {
    assertEquals(await (await dial()).readLine(), "hello");
    assertEquals(await (await dial()).recv(), null);
    const other = new Deno.Command("python3", { args: ["-c", OTHER_HOST, String(server.address.port)] });
    assertEquals(new TextDecoder().decode((await other.output()).stdout), "hello\n");
  });
});

networkTest("stats count requests and bytes of those that left and of those that stay", async () => {
  await withServer(new TcpServer({ port: 0 }, Echo), async (server, dial) => {
    const [first, second] = [await dial(), await dial()];
    for (const client of [first, second]) {
      await client.send("12345");
      await client.readExactly(5);
    }
    first.close();
    await until(() => server.stats.active === 1);
    const { accepted, active, bytesRead, bytesWritten } = server.stats;
    assertEquals({ accepted, active, bytesRead, bytesWritten }, {
      accepted: 2,
      active: 1,
      bytesRead: 10,
      bytesWritten: 10,
    });
  });
});

// Hooks

networkTest("the hooks run in the documented order", async () => {
  const calls: string[] = [];
  class Handler extends StreamRequestHandler {
    override setup() {
      calls.push("setup");
    }
    override handle() {
      calls.push("handle");
      throw new TypeError("after handle");
    }
    override finish() {
      calls.push("finish");
    }
  }
  class Server extends TcpServer {
    override getRequest(conn: Deno.Conn) {
      calls.push("getRequest");
      return super.getRequest(conn);
    }
    override verifyRequest() {
      calls.push("verifyRequest");
      return true;
    }
    override async processRequest(request: SocketStream, clientAddress: Deno.Addr) {
      calls.push("processRequest");
      await super.processRequest(request, clientAddress);
    }
    override async finishRequest(request: SocketStream, clientAddress: Deno.Addr) {
      calls.push("finishRequest");
      await super.finishRequest(request, clientAddress);
    }
    override handleError() {
      calls.push("handleError");
    }
  }
  await withServer(new Server({ port: 0 }, Handler), async (_server, dial) => {
    assertEquals(await (await dial()).recv(), null);
    assertEquals(calls, [
      "getRequest",
      "verifyRequest",
      "processRequest",
      "finishRequest",
      "setup",
      "handle",
      "finish",
      "handleError",
    ]);
  });
});

networkTest("verifyRequest() that says no costs no handler", async () => {
  class Guarded extends TcpServer {
    override verifyRequest() {
      return Promise.resolve(false);
    }
  }
  class Unreachable extends StreamRequestHandler {
    override handle() {
      throw new TypeError("a handler was made");
    }
  }
  await withServer(new Guarded({ port: 0 }, Unreachable), async (server, dial) => {
    assertEquals(await (await dial()).recv(), null);
    assertEquals([server.stats.rejected, server.stats.errors], [1, 0]);
  });
});

/** Keeps what its hooks are told. */
class Witness extends TcpServer {
  readonly opened: Deno.Addr[] = [];
  readonly closed: (ConnectionReport & { clientAddress: Deno.Addr })[] = [];
  override handleOpen(request: SocketStream, clientAddress: Deno.Addr): void | Promise<void> {
    assertEquals(request.bytesRead, 0);
    this.opened.push(clientAddress);
  }
  override handleClose(report: ConnectionReport, clientAddress: Deno.Addr): void | Promise<void> {
    this.closed.push({ ...report, clientAddress });
  }
  override handleError() {}
}

class Forgiving extends StreamRequestHandler {
  override async handle() {
    await this.request.recv().catch(() => {});
  }
}

class Faulty extends StreamRequestHandler {
  override handle() {
    throw new TypeError("a bug");
  }
}

class Picky extends Witness {
  override verifyRequest() {
    return false;
  }
}

class Exact extends StreamRequestHandler {
  override async handle() {
    await this.request.readExactly(10);
  }
}

const endings: [CloseReason, string, () => Witness][] = [
  ["finished", "a client that has left in order", () => new Witness({ port: 0 }, Echo)],
  ["aborted", "a client that has left inside of a message", () => new Witness({ port: 0 }, Exact)],
  ["timedOut", "a client that was silent", () => new Witness({ port: 0 }, Echo, { idleTimeout: 10 })],
  ["timedOut", "a deadline that the handler keeps", () => new Witness({ port: 0 }, Forgiving, { maxLifetime: 10 })],
  ["error", "a handler that throws", () => new Witness({ port: 0 }, Faulty)],
  ["rejected", "a client that was turned away", () => new Picky({ port: 0 }, Echo)],
];

for (const [reason, what, make] of endings) {
  networkTest(`handleOpen() and handleClose() are told of ${what}: "${reason}"`, async () => {
    await withServer(make(), async (server, dial) => {
      const client = await dial();
      const { localAddress } = client;
      if (reason === "finished" || reason === "aborted") {
        await client.send("12345");
        client.close();
      }
      await until(() => server.closed.length === 1);
      const [closed] = server.closed;
      assert(closed !== undefined && closed.duration >= 0 && closed.duration < 10_000);
      assertEquals(server.opened, [localAddress]);
      assertEquals([closed.reason, closed.clientAddress], [reason, localAddress]);
      assertEquals(closed.bytesRead, reason === "finished" || reason === "aborted" ? 5 : 0);
      assertEquals(server.stats.timedOut, reason === "timedOut" ? 1 : 0);
      assertEquals(server.openConnections, []);
    });
  });
}

for (
  const [what, leave, expected] of [
    ["reads nothing", () => {}, "timedOut"],
    ["has left", (client: SocketStream) => client.close(), "aborted"],
  ] as const
) {
  networkTest(`handleClose() is told of a client that ${what} while its answer is sent: "${expected}"`, async () => {
    const closed = Promise.withResolvers<ConnectionReport>();
    class Reporting extends TcpServer {
      override handleClose(report: ConnectionReport) {
        closed.resolve(report);
      }
    }
    class Generous extends StreamRequestHandler {
      override async handle() {
        await this.request.readLine();
        this.request.write(new Uint8Array(1 << 25)); // More than any kernel buffers.
      }
    }
    await withServer(new Reporting({ port: 0 }, Generous, { timeout: 500 }), async (server, dial) => {
      const client = await dial();
      await client.send("go\n");
      await until(() => server.stats.bytesWritten > 0);
      leave(client);
      assertEquals((await closed.promise).reason, expected);
      assertEquals(server.stats[expected], 1);
    });
  });
}

networkTest(
  'handleClose() is told of a connection that is cut off, once, although its handler ends later: "cut"',
  async () => {
    const release = Promise.withResolvers<void>();
    class Stuck extends StreamRequestHandler {
      override async handle() {
        await this.request.send("ready\n");
        await release.promise;
      }
    }
    await withServer(new Witness({ port: 0 }, Stuck), async (server, dial) => {
      assertEquals(await (await dial()).readLine(), "ready");
      const down = server.shutdown({ grace: 0 });
      await until(() => server.closed.length === 1);
      assertEquals(server.openConnections, []);
      release.resolve();
      await down;
      await until(() => server.stats.active === 0);
      assertEquals(server.closed.map(({ reason, bytesWritten }) => [reason, bytesWritten]), [["cut", 6]]);
    });
  },
);

for (
  const [how, fail] of [
    ["throw", () => {
      throw new TypeError("a bug in the hook");
    }],
    ["reject", () => Promise.reject(new TypeError("a bug in the hook"))],
  ] as const
) {
  networkTest(`handleOpen() and handleClose() that ${how} hurt nobody`, async () => {
    class Failing extends TcpServer {
      override handleOpen = fail;
      override handleClose = fail;
    }
    const print = console.error;
    console.error = () => {};
    try {
      await withServer(new Failing({ port: 0 }, Greeter), async (server, dial) => {
        for (let served = 1; served <= 2; served++) {
          const client = await dial();
          assertEquals(await client.readLine(), "hello");
          client.close();
          await until(() => server.stats.errors === 2 * served);
        }
      });
    } finally {
      console.error = print;
    }
  });
}

const waits: [string, (request: SocketStream) => Promise<unknown>][] = [
  ["recv()", (request) => request.recv()],
  ["readLine()", (request) => request.readLine()],
  ["for await", (request) => Array.fromAsync(request)],
  ["frames()", (request) => Array.fromAsync(request.frames())],
  ["send()", (request) => request.send(new Uint8Array(1 << 24))],
  ["send()", (request) => request.write(new Uint8Array(1 << 24))],
  ["handler", () => new Promise(() => {})],
];

for (const [waitsFor, wait] of waits) {
  networkTest(`openConnections tells that ${wait} waits for ${waitsFor}`, async () => {
    class Waiting extends StreamRequestHandler {
      override async handle() {
        await wait(this.request);
      }
    }
    class Hasty extends TcpServer {
      override handleError() {}
    }
    await withServer(new Hasty({ port: 0 }, Waiting, { grace: 0 }), async (server, dial) => {
      const clients = [await dial(), await dial()];
      await until(() => server.openConnections.length === 2);
      await until(() => server.openConnections.every((connection) => connection.waitsFor === waitsFor));
      const [older, newer] = server.openConnections;
      assertEquals([older?.clientAddress, newer?.clientAddress], clients.map(({ localAddress }) => localAddress));
      assert(older !== undefined && newer !== undefined && older.age > newer.age && newer.age >= 0);
      if (waitsFor === "send()") {
        await until(() => server.openConnections.every(({ bytesWritten }) => bytesWritten > 0));
      }
    });
  });
}

networkTest("verifyRequest() comes before any handler is made", async () => {
  let made = 0;
  class Counted extends Echo {
    constructor(...args: ConstructorParameters<typeof Echo>) {
      super(...args);
      made++;
    }
  }
  class Even extends TcpServer {
    #asked = 0;
    override verifyRequest() {
      return this.#asked++ % 2 === 0;
    }
  }
  await withServer(new Even({ port: 0 }, Counted), async (server, dial) => {
    const welcome = await dial();
    await welcome.send("hello\n");
    assertEquals(await welcome.readLine(), "hello");
    assertEquals(await (await dial()).recv(), null);
    assertEquals([made, server.stats.rejected, server.openConnections.length], [1, 1, 1]);
  });
});

networkTest("hooks that throw hurt their own connection only", async () => {
  class Faulty extends TcpServer {
    faults = ["getRequest", "verifyRequest", "handleError"];
    override getRequest(conn: Deno.Conn) {
      this.#fail("getRequest");
      return super.getRequest(conn);
    }
    override verifyRequest() {
      this.#fail("verifyRequest");
      return true;
    }
    override handleError() {
      this.#fail("handleError");
    }
    #fail(hook: string) {
      if (this.faults[0] !== hook) return;
      this.faults.shift();
      throw new TypeError(`a bug in ${hook}`);
    }
  }
  const print = console.error;
  console.error = () => {};
  try {
    await withServer(new Faulty({ port: 0 }, Echo), async (_server, dial) => {
      assertEquals(await (await dial()).recv(), null);
      assertEquals(await (await dial()).recv(), null);
      const client = await dial();
      await client.send("fine\n");
      assertEquals(await client.readLine(), "fine");
    });
  } finally {
    console.error = print;
  }
});

networkTest("handleError() prints a handler's error with its stack, and a client's fault in one sentence", async () => {
  const printed: unknown[][] = [];
  const print = console.error;
  console.error = (...args) => void printed.push(args);
  class Lines extends StreamRequestHandler {
    override async handle() {
      await this.request.readLine();
      throw new TypeError("a bug");
    }
  }
  try {
    await withServer(new TcpServer({ port: 0 }, Lines, { limit: 4 }), async (_server, dial) => {
      const [longWinded, short] = [await dial(), await dial()];
      await longWinded.send("far too long\n");
      assertEquals(await longWinded.recv(), null);
      await short.send("ok\n");
      assertEquals(await short.recv(), null);
    });
  } finally {
    console.error = print;
  }
  assertEquals(printed.length, 2);
  assertEquals(printed[0]?.[1], 'Cannot find the end of the line within the limit of 4 bytes (option "limit")');
  assert(printed[1]?.[1] instanceof TypeError);
});

/** What is thrown, from what a client has sent, and whether it has a stack. */
const thrown: [string, (line: string) => unknown, boolean][] = [
  ["an error", (line) => new TypeError(`no such command: ${line}`), true],
  ["a cause", (line) => new TypeError("outer", { cause: new TypeError(line) }), true],
  ["a name", (line) => Object.assign(new TypeError("outer"), { name: line }), true],
  ["an object with an error in it", (line) => ({ error: new TypeError(line) }), true],
  ["an object with a text in it", (line) => ({ line }), false],
  ["a function", (line) => Object.defineProperty(() => {}, "name", { value: line }), false],
  ["a text", (line) => line, false],
];

for (const [what, make, hasStack] of thrown) {
  networkTest(`handleError() prints what a client has sent without its control characters: ${what}`, async () => {
    class Quoting extends StreamRequestHandler {
      override async handle() {
        throw make(new TextDecoder().decode(await this.request.recv() ?? undefined));
      }
    }
    const printed: unknown[][] = [];
    const print = console.error;
    console.error = (...args) => void printed.push(args);
    try {
      await withServer(new TcpServer({ port: 0 }, Quoting), async (_server, dial) => {
        const client = await dial();
        await client.send("\x1b[2J\nError while serving nobody: \u202e");
        assertEquals(await client.recv(), null);
      });
    } finally {
      console.error = print;
    }
    const [, text] = printed[0] ?? [];
    assert(typeof text === "string", Deno.inspect(text));
    assertMatch(text, /\\x1b\[2J(\\n|\n {2,4})Error while serving nobody: \\u202e/);
    assert(!/^Error while/m.test(text));
    assertEquals(/\n +at /.test(text), hasStack);
  });
}

networkTest("serviceActions() runs while the server serves, and survives its own errors", async () => {
  const called = Promise.withResolvers<void>();
  class Serviced extends TcpServer {
    override serviceActions() {
      called.resolve();
      throw new TypeError("a bug in a chore");
    }
  }
  const print = console.error;
  console.error = () => {};
  try {
    await withServer(new Serviced({ port: 0 }, Echo), () => called.promise);
  } finally {
    console.error = print;
  }
});

Deno.test("serviceActions() is not called while its last call runs", async () => {
  let [ticks, calls, running, most, isOver] = [0, 0, 0, 0, false];
  class Serviced extends FakeServer {
    override async serviceActions() {
      calls++;
      most = Math.max(most, ++running);
      const begun = ticks;
      await until(() => isOver || ticks >= begun + 3);
      running--;
    }
  }
  const { setInterval } = globalThis;
  const hurried = (callback: () => void) =>
    setInterval(() => {
      ticks++;
      callback();
    }, 1);
  globalThis.setInterval = Object.assign(hurried, setInterval);
  const server = new Serviced(new FakeListener([]), Echo);
  const serving = server.serveForever();
  globalThis.setInterval = setInterval;
  await until(() => calls >= 3);
  isOver = true;
  server.close();
  await serving;
  await until(() => running === 0);
  assertEquals(most, 1);
});

Deno.test("noDelay reaches each connection, and noDelay: false leaves it as the system makes it", async () => {
  for (const noDelay of [true, false]) {
    const conn = new FakeTcpConn();
    const request = new TcpServer({ port: 0 }, Echo, { noDelay }).getRequest(conn);
    assertEquals(conn.calls, noDelay ? ["setNoDelay(true)"] : []);
    request.close();
    await turnEnd();
  }
});

// One request at a time

Deno.test("handleRequest() is refused while another one waits", async () => {
  const server = new FakeServer(new FakeListener([]), Echo);
  const handling = server.handleRequest();
  const error = await rejectionOf(server.handleRequest());
  assert(error instanceof Deno.errors.Busy);
  assertEquals(error.message, "Cannot handleRequest(): the server is serving already");
  server.close();
  await handling;
});

networkTest("handleRequest() serves one request", async () => {
  await using server = new TcpServer({ port: 0 }, Echo);
  const { port } = server.listen();
  const handled = server.handleRequest();
  const client = await connect({ port });
  await client.send("once\n");
  assertEquals(await client.readLine(), "once");
  client.close();
  await handled;
  assertEquals([server.stats.accepted, server.stats.active], [1, 0]);
});

networkTest("handleRequest() calls handleTimeout() when nobody comes, and the next call serves who comes", async () => {
  let timeouts = 0;
  class Waiting extends TcpServer {
    override handleTimeout() {
      timeouts++;
    }
  }
  await using server = new Waiting({ port: 0 }, Echo);
  const { port } = server.listen();
  await server.handleRequest({ timeout: 5 });
  await server.handleRequest({ timeout: 5 });
  assertEquals(timeouts, 2);
  const client = await connect({ port });
  await client.send("late\n");
  await client.closeWrite();
  await server.handleRequest();
  assertEquals(await client.readLine(), "late");
  client.close();
});

networkTest("serveForever() is refused while a handleRequest() waits", async () => {
  await using server = new TcpServer({ port: 0 }, Echo);
  const handling = server.handleRequest({ timeout: 20 });
  assert(await rejectionOf(server.serveForever()) instanceof Deno.errors.Busy);
  await handling;
});

networkTest("serveForever() behind a handleRequest() that timed out may be shut down in the same turn", async () => {
  const server = new TcpServer({ port: 0 }, Echo);
  await server.handleRequest({ timeout: 1 });
  const serving = server.serveForever();
  await server.shutdown();
  await serving;
});

networkTest("the stream of a getRequest() that throws behind it is closed", async () => {
  const made: SocketStream[] = [];
  class Failing extends TcpServer {
    override getRequest(conn: Deno.Conn): SocketStream {
      made.push(super.getRequest(conn));
      throw new TypeError("a bug in the hook");
    }
    override handleError() {}
  }
  await withServer(new Failing({ port: 0 }, Greeter), async (_server, dial) => {
    assertEquals(await (await dial()).recv(), null);
    const [stream] = made;
    assert(stream !== undefined);
    assertEquals((await rejectionOf(stream.recv())).message, "The stream is closed");
  });
});

networkTest("a handleError() that never settles stops nobody from being accepted", async () => {
  let connections = 0;
  class Picky extends TcpServer {
    override getRequest(conn: Deno.Conn) {
      if (connections++ === 0) throw new TypeError("a bug in the hook");
      return super.getRequest(conn);
    }
    override handleError() {
      return new Promise<void>(() => {});
    }
  }
  await withServer(new Picky({ port: 0 }, Greeter), async (_server, dial) => {
    assertEquals(await (await dial()).readLine(), null);
    assertEquals(await (await dial()).readLine(), "hello");
  });
});

networkTest(
  "a handleError() that waits before it calls its default is told about each client in its own way",
  async () => {
    class Slow extends TcpServer {
      override async handleError(error: unknown, clientAddress: Deno.Addr) {
        await new Promise((resolve) => setTimeout(resolve, 1));
        super.handleError(error, clientAddress);
      }
    }
    const printed: unknown[][] = [];
    const print = console.error;
    console.error = (...args) => void printed.push(args);
    try {
      await withServer(new Slow({ port: 0 }, Greeter, { timeout: 50 }), async (server, dial) => {
        const clients = await Promise.all([dial(), dial(), dial()]);
        await Promise.all(clients.map((client) => Array.fromAsync(client.lines())));
        assertEquals(server.stats.timedOut, 3);
      });
    } finally {
      console.error = print;
    }
    assertEquals(printed, []);
  },
);

networkTest("serveForever() serves the request that a handleRequest() has waited for in vain", async () => {
  await using server = new TcpServer({ port: 0 }, Echo);
  const { port } = server.listen();
  await server.handleRequest({ timeout: 5 });
  server.serveForever();
  for (const word of ["one", "two"]) {
    await using client = await connect({ port });
    await client.send(`${word}\n`);
    assertEquals(await client.readLine(), word);
  }
});

// Ending

networkTest("shutdown() of an idle server resolves, and frees the port", async () => {
  const server = new TcpServer({ port: 0 }, Echo);
  const { port } = server.listen();
  const serving = server.serveForever();
  const { finished, cut } = await server.shutdown();
  assertEquals({ finished, cut }, { finished: 0, cut: [] });
  await using again = new TcpServer({ port }, Echo);
  again.listen();
  await serving;
});

Deno.test("shutdown() before the start lets serveForever() resolve at once", async () => {
  const server = new TcpServer({ port: 0 }, Echo);
  await server.shutdown();
  await server.serveForever();
  await server.handleRequest();
  assertThrows(() => server.listen(), TypeError);
});

networkTest("shutdown() while serveForever() is still starting ends it", async () => {
  const server = new TcpServer({ port: 0 }, Echo);
  const serving = server.serveForever();
  await server.shutdown();
  await serving;
});

networkTest("shutdown() called twice is one shutdown", async () => {
  await withServer(new TcpServer({ port: 0 }, Echo), async (server) => {
    assert(server.shutdown() === server.shutdown());
    await server.shutdown();
  });
});

networkTest("serveForever({ signal }) shuts down when the signal aborts, also if it had aborted before", async () => {
  const controller = new AbortController();
  const server = new TcpServer({ port: 0 }, Echo);
  const serving = server.serveForever({ signal: controller.signal });
  controller.abort();
  await serving;
  await new TcpServer({ port: 0 }, Echo).serveForever({ signal: AbortSignal.abort() });
});

Deno.test("serveForever() leaves no listener on its signal", async () => {
  for (const end of ["close", "shutdown"] as const) {
    const { signal } = new AbortController();
    const listeners = countListeners(signal);
    const listener = new FakeListener([]);
    const server = new FakeServer(listener, Echo);
    const serving = server.serveForever({ signal });
    await listener.drained;
    assertEquals(listeners(), 1);
    server[end]();
    await serving;
    assertEquals(listeners(), 0);
  }
});

Deno.test("shutdown() aborts signal behind the backlog: a client of the backlog meets a handler that may go on", async () => {
  const aborted: boolean[] = [];
  class Looking extends Echo {
    override handle() {
      aborted.push(this.signal.aborted, this.server.signal.aborted);
      return Promise.resolve();
    }
  }
  const listener = new FakeListener([]);
  const server = new FakeServer(listener, Looking);
  const serving = server.serveForever();
  await listener.drained;
  const down = server.shutdown();
  listener.give(new FakeTcpConn().end());
  await down;
  await serving;
  assertEquals(aborted, [false, false]);
  assert(server.signal.aborted);
});

networkTest("shutdown() waits for a handler that is in the middle of something", async () => {
  const release = Promise.withResolvers<void>();
  const started = Promise.withResolvers<void>();
  class Slow extends StreamRequestHandler {
    override async handle() {
      const line = await this.request.readLine();
      started.resolve();
      await release.promise;
      await this.request.send(`${line} is done\n`);
    }
  }
  await withServer(new TcpServer({ port: 0 }, Slow), async (server, dial) => {
    const client = await dial();
    await client.send("work\n");
    await started.promise;
    const down = server.shutdown();
    release.resolve();
    assertEquals(await client.readLine(), "work is done");
    const { finished, cut } = await down;
    assertEquals({ finished, cut }, { finished: 1, cut: [] });
  });
});

networkTest("shutdown() lets a message that has begun come to its end", async () => {
  class Lines extends StreamRequestHandler {
    override async handle() {
      for await (const line of this.request.lines()) await this.request.send(`${line}!\n`);
    }
  }
  await withServer(new Draining({ port: 0 }, Lines), async (server, dial) => {
    const client = await dial();
    await client.send("first\nsec");
    assertEquals(await client.readLine(), "first!");
    const down = server.shutdown();
    await server.ending;
    await client.send("ond\n");
    assertEquals(await client.readLine(), "second!");
    assertEquals(await client.readLine(), null);
    assertEquals((await down).cut, []);
  });
});

networkTest("shutdown() does not end a body that is read behind its header", async () => {
  class Records extends StreamRequestHandler {
    override async handle() {
      const [length = 0] = await this.request.readExactly(1);
      await this.request.send(await this.request.readExactly(length));
    }
  }
  await withServer(new Draining({ port: 0 }, Records), async (server, dial) => {
    const client = await dial();
    await client.send(new Uint8Array([3]));
    await until(() => server.stats.bytesRead === 1);
    const down = server.shutdown();
    await server.ending;
    await client.send("abc");
    assertEquals((await client.readExactly(3)).length, 3);
    assertEquals((await down).cut, []);
  });
});

networkTest("shutdown() serves clients that wait in the backlog", async () => {
  await using server = new TcpServer({ port: 0 }, Echo, { maxConnections: 1 });
  const { port } = server.listen();
  const clients = await Promise.all(Array.from({ length: 10 }, () => connect({ port })));
  for (const client of clients) await client.send("waiting\n");
  const serving = server.serveForever();
  assertEquals(await clients[0]?.readLine(), "waiting");
  const down = server.shutdown();
  for (const client of clients.slice(1)) {
    assertEquals(await client.readLine(), "waiting");
    client.close();
  }
  clients[0]?.close();
  assertEquals((await down).cut, []);
  await serving;
});

networkTest("shutdown() gives clients that have just come a moment to speak", async () => {
  await withServer(new Draining({ port: 0 }, Echo), async (server, dial) => {
    const client = await dial();
    await until(() => server.stats.active === 1);
    const down = server.shutdown();
    await server.ending;
    await client.send("not too late\n");
    assertEquals(await client.readLine(), "not too late");
    await down;
  });
});

networkTest("shutdown() aborts the signal of handlers that wait for something else", async () => {
  class Waiting extends StreamRequestHandler {
    override async handle() {
      await this.request.send("waiting\n");
      await new Promise((resolve) => this.signal.addEventListener("abort", resolve));
      await this.request.send("goodbye\n");
    }
  }
  await withServer(new TcpServer({ port: 0 }, Waiting), async (server, dial) => {
    const client = await dial();
    assertEquals(await client.readLine(), "waiting");
    const down = server.shutdown();
    assertEquals(await client.readLine(), "goodbye");
    assertEquals((await down).finished, 1);
  });
});

/** Never ends by itself, whatever happens to its stream. */
class Endless extends StreamRequestHandler {
  override async handle() {
    await this.request.send("ready\n");
    await new Promise(() => {});
  }
}

networkTest("shutdown() cuts a handler off that never ends, and names its client", async () => {
  await withServer(new TcpServer({ port: 0 }, Endless), async (server, dial) => {
    const client = await dial();
    assertEquals(await client.readLine(), "ready");
    const { finished, cut } = await server.shutdown({ grace: 20 });
    assertEquals({ finished, cut }, { finished: 0, cut: [client.localAddress] });
    assertEquals(await client.recv(), null);
  });
});

networkTest("shutdown({ grace: 0 }) cuts at once, and finish() still runs", async () => {
  const finished = Promise.withResolvers<void>();
  class Ending extends StreamRequestHandler {
    override async handle() {
      await this.request.send("ready\n");
      await this.request.readExactly(1_000);
    }
    override finish() {
      finished.resolve();
    }
  }
  await withServer(new TcpServer({ port: 0 }, Ending), async (server, dial) => {
    const client = await dial();
    assertEquals(await client.readLine(), "ready");
    assertEquals((await server.shutdown({ grace: 0 })).cut.length, 1);
    await finished.promise;
    assertEquals([server.stats.errors, server.stats.aborted], [0, 0]);
  });
});

networkTest("shutdown() from inside handlers does not deadlock", async () => {
  class Stop extends StreamRequestHandler {
    override async handle() {
      await this.request.readLine();
      const { cut } = await this.server.shutdown();
      await this.request.send(`${cut.length} were cut\n`);
    }
  }
  const server = new TcpServer({ port: 0 }, Stop);
  const { port } = server.listen();
  const serving = server.serveForever();
  const clients = [await connect({ port }), await connect({ port })];
  for (const client of clients) await client.send("stop\n");
  for (const client of clients) assertEquals(await client.readLine(), "0 were cut");
  await serving;
  for (const client of clients) client.close();
});

networkTest("close() cuts everything off, and serveForever() resolves", async () => {
  await withServer(new TcpServer({ port: 0 }, Endless), async (server, dial) => {
    const client = await dial();
    assertEquals(await client.readLine(), "ready");
    server.close();
    server.close();
    assertEquals(await client.recv(), null);
    assert(server.signal.aborted);
  });
});

networkTest("close() ends a shutdown that waits", async () => {
  await withServer(new TcpServer({ port: 0 }, Endless), async (server, dial) => {
    const client = await dial();
    assertEquals(await client.readLine(), "ready");
    const down = server.shutdown({ grace: Infinity });
    server.close();
    assertEquals((await down).cut.length, 1);
  });
});

networkTest("close() ends a shutdown that a handler waits for", async () => {
  const called = Promise.withResolvers<void>();
  class Ending extends StreamRequestHandler {
    override async handle() {
      await this.server.shutdown({ grace: Infinity });
      called.resolve();
      await new Promise(() => {});
    }
  }
  const server = new TcpServer({ port: 0 }, Ending);
  const { port } = server.listen();
  const serving = server.serveForever();
  await using _client = await connect({ port });
  await called.promise;
  server.close();
  await serving;
});

networkTest("a timer that a handler has left behind may call shutdown()", async () => {
  const [left, called] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
  class Leaving extends StreamRequestHandler {
    override handle() {
      left.promise.then(() => this.server.shutdown({ grace: Infinity })).then(() => called.resolve());
    }
  }
  await withServer(new TcpServer({ port: 0 }, Leaving), async (_server, dial) => {
    const client = await dial();
    assertEquals(await client.recv(), null);
    client.close();
    left.resolve();
    await called.promise;
  });
});

networkTest("a client that close() met before it was served has no handler", async () => {
  const calls: string[] = [];
  class Watching extends TcpServer {
    override handleOpen() {
      calls.push("handleOpen");
      this.close();
    }
    override verifyRequest() {
      calls.push("verifyRequest");
      return true;
    }
    override handleClose({ reason }: ConnectionReport) {
      calls.push(reason);
    }
  }
  const server = new Watching({ port: 0 }, Greeter);
  const { port } = server.listen();
  const serving = server.serveForever();
  await using client = await connect({ port });
  assertEquals(await client.recv(), null);
  await serving;
  assertEquals(calls, ["handleOpen", "cut"]);
});

networkTest("a client that close() met while verifyRequest() thought has no handler", async () => {
  let handlers = 0;
  class Counting extends StreamRequestHandler {
    override handle() {
      handlers++;
    }
  }
  class Thinking extends TcpServer {
    override async verifyRequest() {
      await Promise.resolve();
      this.close();
      return true;
    }
  }
  const server = new Thinking({ port: 0 }, Counting);
  const { port } = server.listen();
  const serving = server.serveForever();
  await using client = await connect({ port });
  assertEquals(await client.recv(), null);
  await serving;
  assertEquals(handlers, 0);
});

networkTest("await using shuts a server down", async () => {
  let port: number;
  {
    await using server = new TcpServer({ port: 0 }, Echo);
    ({ port } = server.listen());
    server.serveForever();
  }
  await assertRejects(() => connect({ port }), Deno.errors.ConnectionRefused);
});

Deno.test("close() right after constructing does nothing else", async () => {
  const server = new TcpServer({ port: 0 }, Echo);
  server.close();
  await server.serveForever();
});

Deno.test("a server that was closed while it was about to listen closes the listener", async () => {
  const fake = new FakeListener([]);
  class Late extends TcpServer {
    override listen(): Deno.NetAddr {
      this.close();
      return this.adopt(fake, { transport: "tcp", hostname: "127.0.0.1", port: 1 });
    }
  }
  await new Late({ port: 0 }, Echo).serveForever();
  assert(fake.closed);
});

networkTest("shutdown() from the only handler that may run lets those who wait in the backlog be served", async () => {
  class Stop extends StreamRequestHandler {
    override async handle() {
      const line = await this.request.readLine();
      if (line === "stop") await this.server.shutdown();
      await this.request.send(`${line} is done\n`);
    }
  }
  await withServer(new TcpServer({ port: 0 }, Stop, { maxConnections: 1, grace: 60_000 }), async (_server, dial) => {
    const [first, second] = [await dial(), await dial()];
    await second.send("work\n");
    await first.send("stop\n");
    assertEquals(await first.readLine(), "stop is done");
    assertEquals(await second.readLine(), "work is done");
  });
});

Deno.test("a handler that has called shutdown() gives its place up once", async () => {
  let [running, most, served] = [0, 0, 0];
  const [begun, stopped] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()];
  class Stop extends Echo {
    override async handle() {
      if (served++ === 0) {
        void this.server.shutdown();
        return await begun.promise; // Another one has its place already.
      }
      most = Math.max(most, ++running);
      begun.resolve();
      await stopped.promise;
      for (let turn = 0; turn < 10; turn++) await turnEnd(); // Whoever may be accepted now is.
      running--;
    }
  }
  class Watching extends FakeServer {
    override handleClose() {
      stopped.resolve();
    }
  }
  const listener = new FakeListener([new FakeTcpConn(), new FakeTcpConn(), new FakeTcpConn()]);
  await new Watching(listener, Stop, { maxConnections: 1, grace: 60_000 }).serveForever();
  assertEquals([served, most], [3, 1]);
});

Deno.test("a handler that has called shutdown() and never ends is cut off after the grace", async () => {
  class Stuck extends Echo {
    override async handle() {
      await this.server.shutdown();
      await new Promise(() => {});
    }
  }
  const reasons: CloseReason[] = [];
  class Watching extends FakeServer {
    override handleClose({ reason }: ConnectionReport) {
      reasons.push(reason);
    }
  }
  const conn = new FakeTcpConn();
  const server = new Watching(new FakeListener([conn]), Stuck, { grace: 20 });
  await server.serveForever();
  assertEquals([reasons, conn.isClosed], [["cut"], true]);
  assertEquals(server.openConnections, []);
});

Deno.test("what a handler has left to be sent is given up when its client takes no byte for 30 s", async () => {
  class Leaving extends Echo {
    override handle() {
      this.request.write("left over");
      return Promise.resolve();
    }
  }
  const reasons: CloseReason[] = [];
  class Watching extends FakeServer {
    override handleClose({ reason }: ConnectionReport) {
      reasons.push(reason);
    }
  }
  const conn = new FakeTcpConn().holdWrites();
  const server = new Watching(new FakeListener([conn]), Leaving, { grace: 0 });
  const { setTimeout } = globalThis;
  const { now } = performance;
  let skipped = 0;
  const hurried = (callback: () => void, ms = 0) => {
    return setTimeout(() => {
      skipped += ms;
      callback();
    }, 0);
  };
  performance.now = () => now.call(performance) + skipped;
  globalThis.setTimeout = Object.assign(hurried, setTimeout);
  try {
    const serving = server.serveForever();
    await conn.whenClosed;
    assertEquals(reasons, []);
    assert(skipped >= 29_000, `after ${skipped} ms`);
    for (; reasons.length === 0;) await turnEnd();
    globalThis.setTimeout = setTimeout;
    server.close();
    await serving;
  } finally {
    globalThis.setTimeout = setTimeout;
    performance.now = now;
  }
  assertEquals(reasons, ["timedOut"]);
});

networkTest("a line that was cut in two by a shutdown is never handed out as a whole", async () => {
  const lines: string[] = [];
  class Lines extends StreamRequestHandler {
    override async handle() {
      for await (const line of this.request.lines()) {
        lines.push(line);
        if (line === "one") await this.server.shutdown({ grace: 300 });
      }
    }
  }
  class Quiet extends TcpServer {
    override handleError() {}
  }
  const server = new Quiet({ port: 0 }, Lines);
  const { port } = server.listen();
  const serving = server.serveForever();
  const client = await connect({ port });
  await client.send("one\nDELETE /important");
  await serving; // The client is cut off in the middle of its line.
  client.close();
  assertEquals(lines, ["one"]);
});

networkTest("handleError() that rejects, and errors that cannot be printed, end nothing", async () => {
  class Unprintable extends TypeError {
    override get message(): string {
      throw new TypeError("no message either");
    }
  }
  class Throwing extends StreamRequestHandler {
    override async handle() {
      await this.request.send("hello\n");
      throw new Unprintable();
    }
  }
  class Rejecting extends TcpServer {
    override async handleError(error: unknown, clientAddress: Deno.Addr) {
      await super.handleError(error, clientAddress);
      throw error;
    }
  }
  const print = console.error;
  console.error = () => {};
  try {
    await withServer(new Rejecting({ port: 0 }, Throwing), async (server, dial) => {
      for (let times = 1; times <= 2; times++) {
        const client = await dial();
        assertEquals(await client.readLine(), "hello");
        assertEquals(await client.recv(), null);
      }
      await until(() => server.stats.active === 0);
      assertEquals(server.stats.errors, 4);
    });
  } finally {
    console.error = print;
  }
});

networkTest("a handler that uses its stream after it closed it is told so", async () => {
  const told: unknown[] = [];
  class Closing extends StreamRequestHandler {
    override async handle() {
      this.request.close();
      await this.request.send("too late\n");
    }
  }
  class Telling extends TcpServer {
    override handleError(error: unknown) {
      told.push(error);
    }
  }
  await withServer(new Telling({ port: 0 }, Closing), async (server, dial) => {
    assertEquals(await (await dial()).recv(), null);
    await until(() => server.stats.errors === 1);
    assert(told[0] instanceof Deno.errors.BadResource);
  });
});

networkTest("the report counts the handlers that finished and those that were cut off", async () => {
  class Mixed extends StreamRequestHandler {
    override async handle() {
      const line = await this.request.readLine();
      await this.request.send("ready\n");
      if (line === "stay") await new Promise(() => {});
      await this.request.recv();
    }
  }
  await withServer(new TcpServer({ port: 0 }, Mixed), async (server, dial) => {
    const clients = [await dial(), await dial(), await dial()];
    for (const [index, client] of clients.entries()) {
      await client.send(index === 0 ? "stay\n" : "go\n");
      assertEquals(await client.readLine(), "ready");
    }
    const { finished, cut } = await server.shutdown({ grace: 200 });
    assertEquals([finished, cut.length], [2, 1]);
  });
});

networkTest("shutdown() lets a message of several lines come to its end", async () => {
  class Headers extends StreamRequestHandler {
    override async handle() {
      const headers: (string | null)[] = [];
      for (let line; (line = await this.request.readLine()) !== "";) headers.push(line);
      await this.request.send(`${headers.join("+")}\n`);
    }
  }
  await withServer(new Draining({ port: 0 }, Headers), async (server, dial) => {
    const client = await dial();
    await client.send("one\n");
    await until(() => server.stats.bytesRead === 4);
    const down = server.shutdown();
    await server.ending;
    await client.send("two\n\n");
    assertEquals(await client.readLine(), "one+two");
    assertEquals((await down).cut, []);
  });
});

Deno.test("shutdown() ends although accepting fails for good meanwhile", async () => {
  const listener = new FakeListener([]);
  class Faked extends TcpServer {
    override listen(): Deno.NetAddr {
      return this.adopt(listener, { transport: "tcp", hostname: "127.0.0.1", port: 1 });
    }
  }
  const server = new Faked({ port: 0 }, Echo, { grace: Infinity });
  const serving = rejectionOf(server.serveForever());
  await listener.drained;
  const down = server.shutdown();
  listener.fail(new TypeError("a disaster"));
  await down;
  assertEquals((await serving).message, "a disaster");
});

networkTest("a client that comes after a handleRequest() that timed out is served by the shutdown", async () => {
  const server = new TcpServer({ port: 0 }, Echo);
  const { port } = server.listen();
  await server.handleRequest({ timeout: 5 });
  const client = await connect({ port });
  await client.send("in time\n");
  await server.shutdown();
  assertEquals(await client.readLine(), "in time");
  client.close();
});

networkTest("what a handler sent before it closed its stream counts to its request", async () => {
  class Hasty extends StreamRequestHandler {
    override async handle() {
      await this.request.recv();
      this.request.send("a".repeat(3_000_000));
      this.request.close();
    }
  }
  await withServer(new TcpServer({ port: 0 }, Hasty), async (server, dial) => {
    const client = await dial();
    await client.send("go\n");
    assertEquals((await client.readExactly(3_000_000)).length, 3_000_000);
    await until(() => server.stats.active === 0);
    assertEquals(server.stats.bytesWritten, 3_000_000);
  });
});

networkTest("serveForever() can be tried again after the address was in use", async () => {
  const first = new TcpServer({ port: 0 }, Echo);
  const { port } = first.listen();
  const second = new TcpServer({ port }, Echo);
  await assertRejects(() => second.serveForever(), Deno.errors.AddrInUse);
  await first.shutdown();
  const serving = second.serveForever();
  (await connect({ port, retries: 3 })).close();
  await second.shutdown();
  await serving;
});

networkTest("a handler's signal is its own, so that its listeners end with it", async () => {
  const signals = new Set<AbortSignal>();
  class Signalled extends StreamRequestHandler {
    override async handle() {
      signals.add(this.signal);
      assert(this.signal === this.signal);
      await this.request.send("ready\n");
      if (!this.signal.aborted) await new Promise((resolve) => this.signal.addEventListener("abort", resolve));
    }
  }
  await withServer(new TcpServer({ port: 0 }, Signalled), async (server, dial) => {
    for (const client of [await dial(), await dial()]) assertEquals(await client.readLine(), "ready");
    assertEquals(signals.size, 2);
    await server.shutdown();
    for (const signal of signals) assert(signal.aborted);
  });
});

Deno.test("a handler's signal follows its server also where nothing is accepted, and behind another request", async () => {
  const signals: AbortSignal[] = [];
  class Signalled extends StreamRequestHandler {
    override async handle() {
      signals.push(this.signal);
      await this.request.recv();
    }
  }
  const server = new TcpServer({ port: 0 }, Signalled);
  const [client, request] = socketPair();
  const [otherClient, otherRequest] = socketPair();
  const over = server.finishRequest(request, request.remoteAddress);
  const otherOver = server.finishRequest(otherRequest, otherRequest.remoteAddress);
  await otherClient.closeWrite();
  await otherOver;
  await server.shutdown();
  // The signal of a handler that is done is followed by nothing.
  assertEquals(signals.map(({ aborted }) => aborted), [true, false]);
  for (const stream of [client, request, otherClient, otherRequest]) stream.close();
  await rejectionOf(over);
});

networkTest(
  "another client's stream that fails in a handler is no fault of the handler's own client, and is reported",
  async () => {
    const room = new Set<SocketStream>();
    class Chat extends StreamRequestHandler {
      override async handle() {
        room.add(this.request);
        for await (const line of this.request.lines()) {
          for (const member of room) await member.send(`${line}\n`);
        }
      }
    }
    const told: unknown[] = [];
    class Telling extends TcpServer {
      override handleError(error: unknown) {
        told.push(error);
      }
    }
    await withServer(new Telling({ port: 0 }, Chat), async (server, dial) => {
      const [here, gone] = [await dial(), await dial()];
      await until(() => room.size === 2);
      const [, other] = room;
      other?.close();
      await until(() => server.stats.errors === 1); // Its handler was reading.
      await here.send("hello\n");
      await until(() => server.stats.errors === 2);
      assert(told.every((error) => error instanceof Deno.errors.BadResource));
      assertEquals(server.stats.aborted, 0);
      gone.close();
    });
  },
);

networkTest("reusePort lets a second server listen on the port, and take over", async () => {
  const first = new TcpServer({ port: 0, reusePort: true }, Echo);
  const { port } = first.listen();
  const serving = first.serveForever();
  await using second = new TcpServer({ port, reusePort: true }, Echo);
  second.listen();
  second.serveForever();
  await first.shutdown();
  await serving;
  const client = await connect({ port });
  await client.send("taken over\n");
  assertEquals(await client.readLine(), "taken over");
  client.close();
  assertEquals(second.stats.accepted, 1);
});

networkTest(
  "getRequest() that rejects, and streams that cannot be closed, hurt their own connection only",
  async () => {
    class Unclosable extends SocketStream {
      override [Symbol.asyncDispose](): Promise<void> {
        this.close();
        return Promise.reject(new TypeError("a bug in the stream"));
      }
    }
    class Faulty extends TcpServer {
      #connections = 0;
      override getRequest(conn: Deno.Conn): SocketStream {
        if (++this.#connections === 1) throw new TypeError("a bug in the hook");
        return new Unclosable(conn);
      }
      override handleError() {}
    }
    await withServer(new Faulty({ port: 0 }, Echo), async (server, dial) => {
      assertEquals(await (await dial()).recv(), null);
      const client = await dial();
      await client.send("fine\n");
      assertEquals(await client.readLine(), "fine");
      client.close();
      await until(() => server.stats.active === 0);
    });
  },
);

networkTest("handleTimeout() that throws leaves the server open", async () => {
  class Faulty extends TcpServer {
    override handleTimeout() {
      throw new TypeError("a bug in the hook");
    }
  }
  await using server = new Faulty({ port: 0 }, Echo);
  const { port } = server.listen();
  await assertRejects(() => server.handleRequest({ timeout: 5 }), TypeError);
  const handled = server.handleRequest();
  const client = await connect({ port });
  client.close();
  await handled;
});

networkTest("handlers that are done are not kept", async () => {
  await withServer(new TcpServer({ port: 0 }, Greeter), async (server, dial) => {
    for (let i = 0; i < 20; i++) {
      const client = await dial();
      await client.readLine();
      client.close();
    }
    await until(() => server.stats.active === 0);
    assertEquals(server.stats.accepted, 20);
  });
});

Deno.test("BaseServer is what all servers are", () => {
  assert(new TcpServer({ port: 0 }, Echo) instanceof BaseServer);
});
