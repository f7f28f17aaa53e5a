/** One connection from its accept to its end: what handleOpen(), handleClose() and openConnections tell of it. */

import { assert, assertEquals } from "../deps.ts";
import {
  type ConnectionReport,
  type ErrorOutcome,
  type Outcome,
  type ServerOptions,
  SocketStream,
  StreamRequestHandler,
  type StreamRequestHandlerClass,
  TcpServer,
} from "../mod.ts";
import { connectionReset, FakeTcpConn, turnEnd } from "./fake_conn.ts";
import { onStage } from "./stage.ts";
import { Echo, FakeListener, FakeServer, FAULTS, networkTest, printedBy, until, withServer } from "./testing.ts";

/** Keeps what its hooks get. */
class Witness extends TcpServer {
  readonly opened: Deno.Addr[] = [];
  readonly closed: (ConnectionReport & { clientAddress: Deno.Addr })[] = [];
  readonly errors: ErrorOutcome[] = [];
  override handleOpen(request: SocketStream, clientAddress: Deno.Addr): void | Promise<void> {
    assertEquals(request.bytesRead, 0);
    this.opened.push(clientAddress);
  }
  override handleClose(report: ConnectionReport, clientAddress: Deno.Addr): void | Promise<void> {
    this.closed.push({ ...report, clientAddress });
  }
  override handleError(_error: unknown, _clientAddress: Deno.Addr, outcome: ErrorOutcome) {
    this.errors.push(outcome);
  }
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

class Exact extends StreamRequestHandler {
  override async handle() {
    await this.request.readExactly(10);
  }
}

class Picky extends Witness {
  override verifyRequest() {
    return false;
  }
}

/** How a connection ends, the outcome that handleError() gets, and the server whose client sends five bytes and leaves. */
const ENDINGS: [Outcome, ErrorOutcome[], string, () => Witness][] = [
  ["finished", [], "a client that has left in order", () => new Witness({ port: 0 }, Echo)],
  ["aborted", ["aborted"], "a client that has left inside a message", () => new Witness({ port: 0 }, Exact)],
  ["timedOut", ["timedOut"], "a client that was silent", () => new Witness({ port: 0 }, Echo, { idleTimeout: 10 })],
  ["timedOut", [], "a deadline that the handler keeps", () => new Witness({ port: 0 }, Forgiving, { maxLifetime: 10 })],
  ["error", ["error"], "a handler that throws", () => new Witness({ port: 0 }, Faulty)],
  ["error", ["error"], "a line over the limit", () => new Witness({ port: 0 }, Lines, { limit: 2 })],
  ["rejected", [], "a client that was turned away", () => new Picky({ port: 0 }, Echo)],
];

class Lines extends StreamRequestHandler {
  override async handle() {
    await this.request.readLine();
  }
}

for (const [outcome, errors, what, make] of ENDINGS) {
  networkTest(`handleOpen(), handleError() and handleClose() report ${what}: "${outcome}"`, async () => {
    const speaks = outcome === "finished" || outcome === "aborted" || what.startsWith("a line");
    await withServer(make(), async (server, dial) => {
      const client = await dial();
      const { localAddress } = client;
      if (speaks) {
        await client.send("12345");
        client.close();
      }
      await until(() => server.closed.length === 1);
      const [closed] = server.closed;
      assert(closed !== undefined && closed.duration >= 0 && closed.duration < 10_000);
      assertEquals([server.opened, server.errors], [[localAddress], errors]);
      assertEquals([closed.outcome, closed.clientAddress], [outcome, localAddress]);
      assertEquals(closed.bytesRead, speaks ? 5 : 0);
      const { timedOut, aborted, errors: count, rejected } = server.stats;
      assertEquals([timedOut, aborted, count, rejected], [
        outcome === "timedOut" ? 1 : 0,
        outcome === "aborted" ? 1 : 0,
        outcome === "error" ? 1 : 0,
        outcome === "rejected" ? 1 : 0,
      ]);
      assertEquals([server.openConnections, server.stats.accepted], [[], 1]);
    });
  });
}

/** What the client does while its answer is sent, what the handler did, and how the connection ended. */
const LEFT_WITH_AN_ANSWER: [
  what: string,
  leave: (client: SocketStream) => void,
  end: (request: SocketStream) => void,
  expected: "timedOut" | "aborted",
][] = [
  ["reads nothing", () => {}, () => {}, "timedOut"],
  ["reads nothing, after close() and another write(),", () => {}, (request) => {
    request.close();
    request.write("more");
  }, "timedOut"],
  ["reads nothing, after a close() that ended a read,", () => {}, (request) => {
    request.recv();
    request.close();
  }, "timedOut"],
  ["has left", (client) => client.close(), () => {}, "aborted"],
];

for (const [what, leave, end, expected] of LEFT_WITH_AN_ANSWER) {
  networkTest(`handleClose() reports a client that ${what} while its answer is sent: "${expected}"`, async () => {
    class Generous extends StreamRequestHandler {
      override async handle() {
        await this.request.readLine();
        this.request.write(new Uint8Array(1 << 25)); // More than any kernel buffers.
        end(this.request);
      }
    }
    await withServer(new Witness({ port: 0 }, Generous, { timeout: 500 }), async (server, dial) => {
      const client = await dial();
      await client.send("go\n");
      await until(() => server.stats.bytesWritten > 0);
      leave(client);
      await until(() => server.closed.length === 1);
      assertEquals([server.closed[0]?.outcome, server.stats[expected]], [expected, 1]);
    });
  });
}

/** Errors that a handler may meet, and what they are to the server. */
const ERRORS: [string, ErrorOutcome, (request: SocketStream, conn: FakeTcpConn) => Promise<unknown>][] = [
  ["the reset of its own client", "aborted", (request, conn) => {
    conn.failReads(connectionReset());
    return request.recv();
  }],
  ["a failed write to its own client", "aborted", (request, conn) => {
    conn.failWrites(connectionReset());
    return request.send("abc");
  }],
  ["the reset of another connection", "error", () => {
    return new SocketStream(new FakeTcpConn().failReads(connectionReset())).recv();
  }],
  ["the same error, wrapped", "error", async (request, conn) => {
    conn.failReads(connectionReset());
    await request.recv().catch((cause) => {
      throw new TypeError("no answer", { cause });
    });
  }],
  ["a timeout of its own client", "timedOut", (request) => {
    request.timeout = 1;
    return request.recv();
  }],
  ["a timeout of its own", "error", () => Promise.reject(new Deno.errors.TimedOut("the database"))],
  ["a second read of its own stream", "error", (request) => (request.recv(), request.recv())],
];

for (const [what, outcome, fail] of ERRORS) {
  Deno.test(`an error that is ${what} has the outcome "${outcome}"`, async () => {
    const conn = new FakeTcpConn();
    class Failing extends StreamRequestHandler {
      override async handle() {
        await fail(this.request, conn);
      }
    }
    await onStage(Failing, {}, async ({ server, time, accept }) => {
      await accept(conn);
      await time.advance(30);
      assertEquals([server.errors, server.outcomes], [[outcome], [outcome]]);
    });
  });
}

Deno.test("a connection that is cut off is reported once, although its handler ends later", async () => {
  const release = Promise.withResolvers<void>();
  class Stuck extends StreamRequestHandler {
    override async handle() {
      await this.request.send("ready\n");
      await release.promise;
      await this.request.send("too late");
    }
  }
  await onStage(Stuck, {}, async ({ server, time, accept }) => {
    await accept();
    server.close();
    assertEquals([server.outcomes, server.openConnections, server.stats.active], [["cut"], [], 1]);
    release.resolve();
    await time.advance(1);
    assertEquals([server.outcomes, server.stats.active, server.stats.bytesWritten], [["cut"], 0, 6]);
    assertEquals([server.stats.errors, server.stats.aborted], [0, 0]);
  });
});

Deno.test("a handler that goes on after it was cut off with an error of its own is reported", async () => {
  class Stuck extends StreamRequestHandler {
    override async handle() {
      await this.request.recv().catch(() => {});
      throw new TypeError("a bug");
    }
  }
  await onStage(Stuck, {}, async ({ server, accept }) => {
    await accept();
    server.close();
    await turnEnd();
    assertEquals([server.errors, server.outcomes, server.stats.errors], [["error"], ["cut"], 1]);
  });
});

for (const [how, fail] of FAULTS) {
  networkTest(`a handleOpen() or handleClose() that ${how} hurts nobody`, async () => {
    class Failing extends TcpServer {
      override handleOpen = fail;
      override handleClose = fail;
    }
    await printedBy(() =>
      withServer(new Failing({ port: 0 }, Echo), async (server, dial) => {
        for (let served = 1; served <= 2; served++) {
          const client = await dial();
          await client.send("hello\n");
          assertEquals(await client.readLine(), "hello");
          client.close();
          await until(() => server.stats.errors === 2 * served);
        }
      })
    );
  });
}

// openConnections

const WAITS: [string, (request: SocketStream) => Promise<unknown>][] = [
  ["recv()", (request) => request.recv()],
  ["readLine()", (request) => request.readLine()],
  ["peek()", (request) => request.peek(1)],
  ["for await", (request) => Array.fromAsync(request)],
  ["frames()", (request) => Array.fromAsync(request.frames())],
  ["upgrade()", (request) => request.upgrade(() => new Promise(() => {}))],
  ["send()", (request) => request.send("abc")],
  ["send()", (request) => request.write("abc")],
  ["handler", () => new Promise(() => {})],
];

for (const [waitsFor, wait] of WAITS) {
  Deno.test(`openConnections lists connections with the age and the call that they wait in: ${wait}`, async () => {
    class Waiting extends StreamRequestHandler {
      override async handle() {
        await wait(this.request);
      }
    }
    await onStage(Waiting, {}, async ({ server, time, accept }) => {
      await accept(new FakeTcpConn().holdWrites());
      await time.advance(1_000);
      await accept(new FakeTcpConn().holdWrites());
      await time.advance(500);
      const common = { bytesRead: 0, bytesWritten: 0, waitsFor };
      const { remoteAddr: clientAddress } = new FakeTcpConn();
      assertEquals(server.openConnections, [
        { clientAddress, age: 1_500, ...common },
        { clientAddress, age: 500, ...common },
      ]);
    });
  });
}

networkTest("openConnections tells the bytes of a connection while it is served", async () => {
  await withServer(new TcpServer({ port: 0 }, Echo), async (server, dial) => {
    const client = await dial();
    await client.send("12345");
    await client.readExactly(5);
    const [open] = server.openConnections;
    assertEquals([open?.clientAddress, open?.bytesRead, open?.bytesWritten], [client.localAddress, 5, 5]);
  });
});

/** Serves these connections with these options until `test` is done. */
async function serveFakes(
  conns: FakeTcpConn[],
  Handler: StreamRequestHandlerClass,
  options: ServerOptions,
  test: (server: FakeServer) => Promise<void>,
): Promise<void> {
  const server = new FakeServer(new FakeListener(conns), Handler, options);
  const serving = server.serveForever();
  await turnEnd();
  await test(server);
  server.close();
  await serving;
}

Deno.test("openConnections lists a connection in its filters, with the address of the proxy until a filter knows better", async () => {
  const client = { transport: "tcp", hostname: "192.0.2.1", port: 1 } as const;
  const gate = Promise.withResolvers<void>();
  class Proxied extends FakeTcpConn {
    override readonly remoteAddr: Deno.NetAddr = client;
  }
  const conn = new FakeTcpConn();
  const filters = [() => gate.promise.then(() => new Proxied())];
  await serveFakes([conn], Echo, { filters }, async (server) => {
    const [inFilter] = server.openConnections;
    assertEquals([inFilter?.waitsFor, inFilter?.clientAddress], ["handshake", conn.remoteAddr]);
    gate.resolve();
    await turnEnd();
    const [served] = server.openConnections;
    assertEquals([served?.waitsFor, served?.clientAddress], ["for await", client]);
  });
});

Deno.test("sessions that end in any order leave the others in the list", async () => {
  const conns = Array.from({ length: 9 }, () => new FakeTcpConn());
  await serveFakes(conns, Echo, {}, async (server) => {
    const order = [4, 8, 0, 7, 2, 6, 1, 5, 3];
    for (const [ended, index] of order.entries()) {
      conns[index]?.end();
      await turnEnd();
      assertEquals([server.stats.active, server.openConnections.length], [8 - ended, 8 - ended]);
      assert(conns[index]?.isClosed);
      assertEquals(conns.filter(({ isClosed }) => isClosed).length, ended + 1);
    }
  });
});
