/** The hooks of a server: their order, and what their own faults do. */

import { assert, assertEquals, assertMatch } from "../deps.ts";
import {
  connect,
  type ConnectionFilter,
  type ErrorOutcome,
  SocketStream,
  type StreamConn,
  StreamRequestHandler,
  TcpServer,
} from "../mod.ts";
import { FakeTcpConn, turnEnd } from "./fake_conn.ts";
import { withFakeTime } from "./fake_time.ts";
import {
  Echo,
  FakeListener,
  FakeServer,
  FAULTS,
  Greeter,
  networkTest,
  printedBy,
  rejectionOf,
  until,
  withServer,
} from "./testing.ts";

/** Sends one line back. */
class Once extends StreamRequestHandler {
  override async handle() {
    await this.request.send(`${await this.request.readLine()}\n`);
  }
}

Deno.test("the hooks run in the documented order", async () => {
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
  class Server extends FakeServer {
    override getRequest(conn: StreamConn) {
      calls.push("getRequest");
      return super.getRequest(conn);
    }
    override handleOpen() {
      calls.push("handleOpen");
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
    override handleClose() {
      calls.push("handleClose");
      this.close();
    }
  }
  const filters: ConnectionFilter[] = ["first filter", "second filter"].map((name) => (conn) => {
    calls.push(name);
    return conn;
  });
  await new Server(new FakeListener([new FakeTcpConn()]), Handler, { filters }).serveForever();
  assertEquals(calls, [
    "first filter",
    "second filter",
    "getRequest",
    "handleOpen",
    "verifyRequest",
    "processRequest",
    "finishRequest",
    "setup",
    "handle",
    "finish",
    "handleError",
    "handleClose",
  ]);
});

networkTest("verifyRequest() comes before any handler is made, and its false closes the connection", async () => {
  let made = 0;
  class Counted extends Echo {
    constructor(...args: ConstructorParameters<typeof Echo>) {
      super(...args);
      made++;
    }
  }
  class Picky extends TcpServer {
    #asked = 0;
    override verifyRequest(): boolean | Promise<boolean> {
      const isWelcome = this.#asked++ % 2 === 0;
      return this.#asked > 2 ? Promise.resolve(isWelcome) : isWelcome;
    }
  }
  await withServer(new Picky({ port: 0 }, Counted), async (server, dial) => {
    for (let rejected = 1; rejected <= 2; rejected++) {
      const welcome = await dial();
      await welcome.send("hello\n");
      assertEquals(await welcome.readLine(), "hello");
      assertEquals(await (await dial()).recv(), null);
      assertEquals([made, server.stats.rejected, server.stats.errors], [rejected, rejected, 0]);
      assertEquals(server.openConnections.length, rejected);
    }
  });
});

Deno.test("noDelay reaches each connection before its filters, and noDelay: false leaves it as the system makes it", async () => {
  for (const noDelay of [true, false]) {
    const conn = new FakeTcpConn();
    const listener = new FakeListener([conn]);
    const filters = [(accepted: StreamConn) => {
      conn.calls.push("filter");
      return accepted;
    }];
    const server = new FakeServer(listener, Echo, { noDelay, filters });
    const serving = server.serveForever();
    await listener.drained;
    assertEquals(conn.calls, noDelay ? ["setNoDelay(true)", "filter"] : ["filter"]);
    server.close();
    await serving;
  }
});

Deno.test("a connection on which setNoDelay() throws is served all the same", async () => {
  class Gone extends FakeTcpConn {
    override setNoDelay(): never {
      throw Object.assign(new TypeError("Invalid argument (os error 22)"), { code: "EINVAL" });
    }
  }
  const conn = new Gone().give("hello").end();
  const server = new FakeServer(new FakeListener([conn]));
  const serving = server.serveForever();
  await conn.whenClosed;
  assertEquals(conn.calls, ["write(5)", "close()"]);
  assertEquals(server.stats.errors, 0);
  server.close();
  await serving;
});

// Hooks with faults

networkTest("getRequest(), verifyRequest() and handleError() that throw hurt their own connection only", async () => {
  class Faulty extends TcpServer {
    faults = ["getRequest", "verifyRequest", "handleError"];
    override getRequest(conn: StreamConn) {
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
  await printedBy(() =>
    withServer(new Faulty({ port: 0 }, Echo), async (_server, dial) => {
      assertEquals(await (await dial()).recv(), null);
      assertEquals(await (await dial()).recv(), null);
      const client = await dial();
      await client.send("fine\n");
      assertEquals(await client.readLine(), "fine");
    })
  );
});

/** Streams that a getRequest() gives back, and what is wrong with them. */
const NO_STREAMS: [string, () => unknown][] = [
  ["a promise of a stream", () => Promise.resolve(new SocketStream(new FakeTcpConn()))],
  ["nothing", () => undefined],
  ["another object", () => ({})],
];

for (const [what, give] of NO_STREAMS) {
  Deno.test(`getRequest() that returns ${what} is the program's own error`, async () => {
    const errors: [string, ErrorOutcome][] = [];
    class Faulty extends FakeServer {
      override handleError(error: unknown, _: Deno.Addr, outcome: ErrorOutcome) {
        errors.push([error instanceof TypeError ? error.message : "", outcome]);
      }
    }
    const conn = new FakeTcpConn();
    const server = new Faulty(new FakeListener([conn]));
    Object.assign(server, { getRequest: give });
    const serving = server.serveForever();
    await conn.whenClosed;
    server.close();
    await serving;
    const [[message, outcome] = []] = errors;
    assertMatch(message ?? "", /^getRequest\(\) must return a SocketStream: it has returned /);
    assertEquals([outcome, errors.length, server.stats.errors], ["error", 1, 1]);
  });
}

const thrown: [string, () => unknown] = ["an error, by throwing it,", () => {
  throw new TypeError("a bug in the hook");
}];

for (const [what, end] of [thrown, ...NO_STREAMS]) {
  networkTest(`the stream of a getRequest() that gives ${what} after it made it is closed`, async () => {
    const made: SocketStream[] = [];
    const server = new TcpServer({ port: 0 }, Greeter);
    const make = server.getRequest.bind(server);
    const getRequest = (conn: StreamConn) => {
      made.push(make(conn));
      return end();
    };
    Object.assign(server, { getRequest, handleError: () => {} });
    await withServer(server, async (_server, dial) => {
      assertEquals(await (await dial()).recv(), null);
      const [stream] = made;
      assert(stream !== undefined);
      assertEquals((await rejectionOf(stream.recv())).message, "The stream is closed");
    });
  });
}

for (const [how, fail] of FAULTS) {
  networkTest(`a closeRequest() that ${how} is counted and printed, and its connection is closed`, async () => {
    class Faulty extends TcpServer {
      protected override closeRequest = fail;
    }
    const printed = await printedBy(() =>
      withServer(new Faulty({ port: 0 }, Once), async (server, dial) => {
        for (const [index, word] of ["one", "two"].entries()) {
          const client = await dial();
          client.timeout = 5_000; // For one that is not closed.
          await client.send(`${word}\n`);
          assertEquals(await Array.fromAsync(client.lines()), [word]);
          await until(() => server.stats.active === 0);
          assertEquals(server.stats.errors, index + 1);
        }
      })
    );
    const texts = printed.map(([head, error]) => [head, error instanceof TypeError && error.message]);
    assertEquals(texts, Array(2).fill(["Error in closeRequest():", "a bug in the hook"]));
  });

  networkTest(`a processRequest() that ${how} closes its connection, and handleError() gets its error`, async () => {
    const errors: unknown[] = [];
    class Faulty extends TcpServer {
      override processRequest = fail;
      override handleError(error: unknown) {
        errors.push(error);
      }
    }
    await withServer(new Faulty({ port: 0 }, Echo), async (server, dial) => {
      assertEquals(await (await dial()).recv(), null);
      assertEquals([errors.length, server.stats.errors], [1, 1]);
    });
  });
}

networkTest("a handleError() that never settles keeps no other client from being accepted", async () => {
  let connections = 0;
  class Picky extends TcpServer {
    override getRequest(conn: StreamConn) {
      if (connections++ === 0) throw new TypeError("a bug in the hook");
      return super.getRequest(conn);
    }
    override handleError() {
      return new Promise<void>(() => {});
    }
  }
  await withServer(new Picky({ port: 0 }, Greeter, { maxConnections: 1 }), async (_server, dial) => {
    assertEquals(await (await dial()).readLine(), null);
    assertEquals(await (await dial()).readLine(), "hello");
  });
});

networkTest("a handleError() that waits before it calls its default gets each client's own outcome", async () => {
  class Slow extends TcpServer {
    override async handleError(error: unknown, clientAddress: Deno.Addr, outcome: ErrorOutcome) {
      await turnEnd();
      await super.handleError(error, clientAddress, outcome);
    }
  }
  const printed = await printedBy(() =>
    withServer(new Slow({ port: 0 }, Greeter, { timeout: 50 }), async (server, dial) => {
      const clients = await Promise.all([dial(), dial(), dial()]);
      await Promise.all(clients.map((client) => Array.fromAsync(client.lines())));
      assertEquals(server.stats.timedOut, 3);
    })
  );
  assertEquals(printed, []);
});

networkTest("a handleError() that rejects, and errors that cannot be printed, end nothing", async () => {
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
    override async handleError(error: unknown, clientAddress: Deno.Addr, outcome: ErrorOutcome) {
      await super.handleError(error, clientAddress, outcome);
      throw error;
    }
  }
  await printedBy(() =>
    withServer(new Rejecting({ port: 0 }, Throwing), async (server, dial) => {
      for (let times = 1; times <= 2; times++) {
        const client = await dial();
        assertEquals(await client.readLine(), "hello");
        assertEquals(await client.recv(), null);
      }
      await until(() => server.stats.active === 0);
      assertEquals(server.stats.errors, 4);
    })
  );
});

// What handleError() prints

networkTest("handleError() prints a handler's error with its stack, and a client's fault in one sentence", async () => {
  class Lines extends StreamRequestHandler {
    override async handle() {
      await this.request.readLine();
      throw new TypeError("a bug");
    }
  }
  const printed = await printedBy(() =>
    withServer(new TcpServer({ port: 0 }, Lines, { limit: 4 }), async (_server, dial) => {
      const [longWinded, short] = [await dial(), await dial()];
      await longWinded.send("far too long\n");
      assertEquals(await longWinded.recv(), null);
      await short.send("ok\n");
      assertEquals(await short.recv(), null);
    })
  );
  assertEquals(printed.length, 2);
  assertEquals(printed[0]?.[1], 'Cannot find the end of the line within the limit of 4 bytes (option "limit")');
  assert(printed[1]?.[1] instanceof TypeError);
});

/** What is thrown, from what a client has sent, and whether it has a stack. */
const THROWN: [string, (line: string) => unknown, boolean][] = [
  ["an error", (line) => new TypeError(`no such command: ${line}`), true],
  ["a cause", (line) => new TypeError("outer", { cause: new TypeError(line) }), true],
  ["a name", (line) => Object.assign(new TypeError("outer"), { name: line }), true],
  ["an object with an error in it", (line) => ({ error: new TypeError(line) }), true],
  ["an object with a text in it", (line) => ({ line }), false],
  ["a function", (line) => Object.defineProperty(() => {}, "name", { value: line }), false],
  ["a text", (line) => line, false],
];

for (const [what, make, hasStack] of THROWN) {
  networkTest(`handleError() prints what a client has sent without its control characters: ${what}`, async () => {
    class Quoting extends StreamRequestHandler {
      override async handle() {
        throw make(new TextDecoder().decode(await this.request.recv() ?? undefined));
      }
    }
    const printed = await printedBy(() =>
      withServer(new TcpServer({ port: 0 }, Quoting), async (_server, dial) => {
        const client = await dial();
        await client.send("\x1b[2J\nError while serving nobody: \u202e");
        assertEquals(await client.recv(), null);
      })
    );
    const [, text] = printed[0] ?? [];
    assert(typeof text === "string", Deno.inspect(text));
    assertMatch(text, /\\x1b\[2J(\\n|\n {2,4})Error while serving nobody: \\u202e/);
    assert(!/^Error while/m.test(text));
    assertEquals(/\n +at /.test(text), hasStack);
  });
}

Deno.test("handleError() prints a client's path that looks like a format as it is", async () => {
  const server = new TcpServer({ port: 0 }, Echo);
  const clientAddress = { transport: "unix", path: "/tmp/100%s.sock" } as const;
  const printed = await printedBy(async () => await server.handleError("a bug", clientAddress, "error"));
  assertEquals(printed, [["Error while serving /tmp/100%%s.sock:", "a bug"]]);
});

// Chores

/** Serves nothing; counts its chores, of which each takes `ms`. */
class Serviced extends FakeServer {
  readonly calls: number[] = [];
  most = 0;
  ms = 0;
  #running = 0;
  override async serviceActions() {
    this.calls.push(performance.now());
    this.most = Math.max(this.most, ++this.#running);
    if (this.ms > 0) await new Promise((resolve) => setTimeout(resolve, this.ms));
    this.#running--;
    throw new TypeError("a bug in a chore");
  }
}

for (const ms of [0, 1_700]) {
  Deno.test(`serviceActions() that takes ${ms} ms and then throws runs every 500 ms, once at a time`, async () => {
    await withFakeTime(async (time) => {
      const server = new Serviced(new FakeListener([]));
      server.ms = ms;
      const begun = time.now();
      const printed = await printedBy(async () => {
        const serving = server.serveForever();
        await time.advance(5_000);
        server.close();
        await time.advanceUntil(serving);
        await time.advance(ms);
      });
      const calls = server.calls.map((at) => at - begun);
      const expected = Array.from({ length: ms === 0 ? 10 : 3 }, (_, index) => 500 + index * (ms === 0 ? 500 : 2_000));
      assertEquals([calls, server.most, printed.length], [expected, 1, expected.length]);
    });
  });
}

networkTest("a subclass may keep its clients' streams, and write to all of them", async () => {
  const members = new Set<SocketStream>();
  class Room extends TcpServer {
    override getRequest(conn: StreamConn) {
      const stream = super.getRequest(conn);
      members.add(stream);
      return stream;
    }
  }
  const server = new Room({ port: 0 }, Greeter);
  await withServer(server, async (_server, dial) => {
    const clients = [await dial(), await connect({ port: server.address.port })];
    for (const client of clients) assertEquals(await client.readLine(), "hello");
    for (const member of members) await member.send("news\n");
    for (const client of clients) assertEquals(await client.readLine(), "news");
    clients[1]?.close();
  });
});
