/** What a server gives its clients and handlers, and what it counts. */

import { assert, assertEquals, assertRejects } from "../deps.ts";
import {
  connect,
  socketPair,
  type SocketStream,
  StreamRequestHandler,
  type StreamRequestHandlerClass,
  TcpServer,
} from "../mod.ts";
import { FakeTcpConn, turnEnd } from "./fake_conn.ts";
import { withFakeTime } from "./fake_time.ts";
import { onStage } from "./stage.ts";
import { Echo, FakeListener, FakeServer, Greeter, networkTest, rejectionOf, until, withServer } from "./testing.ts";

/** Keeps the errors of its handlers. */
class Telling extends TcpServer {
  readonly errors: unknown[] = [];
  override handleError(error: unknown) {
    this.errors.push(error);
  }
}

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

Deno.test("a server with maxConnections accepts no more than it serves, connections in their filters included", async () => {
  for (const filters of [[], [() => new Promise<never>(() => {})]]) {
    const conns = Array.from({ length: 5 }, () => new FakeTcpConn());
    const listener = new FakeListener(conns);
    const server = new FakeServer(listener, Echo, { maxConnections: 2, filters });
    const serving = server.serveForever();
    await turnEnd();
    assertEquals([listener.accepts, server.stats.active, server.stats.accepted], [2, 2, 2]);
    server.close();
    await serving;
  }
});

Deno.test("maxConnections is 10,000 by default", async () => {
  const listener = new FakeListener(Array.from({ length: 10_001 }, () => new FakeTcpConn()));
  const server = new FakeServer(listener, Greeter);
  const serving = server.serveForever();
  for (let accepts = -1; accepts < listener.accepts; await turnEnd()) accepts = listener.accepts;
  assertEquals([listener.accepts, server.stats.active], [10_000, 10_000]);
  server.close();
  await serving;
});

networkTest("bytes that are still buffered when the handler returns are sent", async () => {
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

// Counters

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
    assertEquals([accepted, active, bytesRead, bytesWritten], [2, 1, 10, 10]);
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

networkTest("bytes that a handler sent before it closed its stream count to its request", async () => {
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

networkTest("requests that are over are not kept", async () => {
  await withServer(new TcpServer({ port: 0 }, Greeter), async (server, dial) => {
    for (let count = 0; count < 20; count++) {
      const client = await dial();
      await client.readLine();
      client.close();
    }
    await until(() => server.stats.active === 0);
    assertEquals([server.stats.accepted, server.openConnections], [20, []]);
  });
});

// Faults

networkTest("a handler that throws ends its own connection only, and handleError() gets its error", async () => {
  class Fragile extends StreamRequestHandler {
    override async handle() {
      const line = await this.request.readLine();
      if (line === "throw") throw new TypeError("handler boom");
      await this.request.send(`${line}\n`);
    }
  }
  await withServer(new Telling({ port: 0 }, Fragile), async (server, dial) => {
    const [bad, good] = [await dial(), await dial()];
    await bad.send("throw\n");
    assertEquals(await bad.recv(), null);
    await good.send("fine\n");
    assertEquals(await good.readLine(), "fine");
    assertEquals([server.errors.join(), server.stats.errors], ["TypeError: handler boom", 1]);
  });
});

networkTest("the trouble of another stream inside a handler is the handler's own error", async () => {
  class Proxy extends StreamRequestHandler {
    override async handle() {
      const [ours, theirs] = socketPair();
      theirs.close();
      ours.close();
      await ours.recv();
    }
  }
  await withServer(new Telling({ port: 0 }, Proxy), async (server, dial) => {
    await (await dial()).recv();
    assertEquals([server.stats.errors, server.stats.aborted], [1, 0]);
  });
});

networkTest("the failing stream of another client is not the fault of the handler's own, and is reported", async () => {
  const room = new Set<SocketStream>();
  class Chat extends StreamRequestHandler {
    override async handle() {
      room.add(this.request);
      for await (const line of this.request.lines()) {
        for (const member of room) await member.send(`${line}\n`);
      }
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
    assert(server.errors.every((error) => error instanceof Deno.errors.BadResource));
    assertEquals(server.stats.aborted, 0);
    gone.close();
  });
});

networkTest("a handler that uses its stream after it closed it gets BadResource, which is its own error", async () => {
  class Closing extends StreamRequestHandler {
    override async handle() {
      this.request.close();
      await this.request.send("too late\n");
    }
  }
  await withServer(new Telling({ port: 0 }, Closing), async (server, dial) => {
    assertEquals(await (await dial()).recv(), null);
    await until(() => server.stats.errors === 1);
    assert(server.errors[0] instanceof Deno.errors.BadResource);
  });
});

// The handler's signal

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
    assertEquals([signals.size, signals.has(server.signal)], [2, false]);
    await server.shutdown();
    for (const signal of signals) assert(signal.aborted);
  });
});

Deno.test("the signal of a handler whose request was made by a test is the server's", async () => {
  const signals: AbortSignal[] = [];
  class Signalled extends StreamRequestHandler {
    override async handle() {
      signals.push(this.signal);
      await this.request.recv();
    }
  }
  const server = new TcpServer({ port: 0 }, Signalled);
  const [client, request] = socketPair();
  const over = server.finishRequest(request, request.remoteAddress);
  await server.shutdown();
  assertEquals(signals, [server.signal]);
  assert(server.signal.aborted);
  await client.closeWrite();
  await over;
  for (const stream of [client, request]) stream.close();
});

Deno.test("a handler that is cut off finds the reason in its signal and in its calls", async () => {
  const reasons: unknown[] = [];
  class Waiting extends StreamRequestHandler {
    override async handle() {
      this.signal.addEventListener("abort", () => reasons.push(this.signal.reason));
      reasons.push(await rejectionOf(this.request.recv()));
    }
  }
  const server = new FakeServer(new FakeListener([new FakeTcpConn()]), Waiting);
  const serving = server.serveForever();
  await turnEnd();
  server.close();
  await serving;
  const [aborted, failed] = reasons;
  assert(aborted instanceof DOMException && aborted.name === "AbortError");
  assert(failed instanceof Deno.errors.BadResource);
  assertEquals(failed.message, "The server has closed the connection");
});

/** Asks for its signal when it may, and not before. */
function asksLate(seen: AbortSignal[], gate: Promise<void>): StreamRequestHandlerClass {
  return class extends StreamRequestHandler {
    override async handle() {
      await gate;
      seen.push(this.signal);
    }
  };
}

Deno.test("a handler that asks for its signal after the shutdown has aborted it finds it aborted", async () => {
  const seen: AbortSignal[] = [];
  const gate = Promise.withResolvers<void>();
  await onStage(asksLate(seen, gate.promise), {}, async ({ server, time, accept }) => {
    await accept();
    const down = server.shutdown();
    await time.advance(1_000);
    assert(server.signal.aborted);
    gate.resolve();
    await time.advanceUntil(down);
    assertEquals(seen.map(({ aborted, reason }) => [aborted, reason]), [[true, server.signal.reason]]);
  });
});

Deno.test("the signal of a client of the backlog that is served after the abort is aborted", async () => {
  const seen: AbortSignal[] = [];
  const gate = Promise.withResolvers<void>();
  await withFakeTime(async (time) => {
    const listener = new FakeListener([new FakeTcpConn(), new FakeTcpConn()]);
    const server = new FakeServer(listener, asksLate(seen, gate.promise), { maxConnections: 1 });
    const serving = server.serveForever();
    await turnEnd();
    const down = server.shutdown();
    await time.advance(1_000);
    assertEquals([server.signal.aborted, server.stats.accepted], [true, 1]);
    gate.resolve();
    await time.advanceUntil(Promise.all([down, serving]));
    assertEquals([server.stats.accepted, seen.map(({ aborted }) => aborted)], [2, [true, true]]);
  });
});

networkTest("a request that connects to its own server is served", async () => {
  class Asking extends StreamRequestHandler {
    override async handle() {
      const line = await this.request.readLine();
      if (line !== "ask") return await this.request.send(`${line}!\n`);
      await using other = await connect({ port: (this.server as TcpServer).address.port });
      await other.send("asked\n");
      await this.request.send(`${await other.readLine()}\n`);
    }
  }
  await withServer(new TcpServer({ port: 0 }, Asking), async (_server, dial) => {
    const client = await dial();
    await client.send("ask\n");
    assertEquals(await client.readLine(), "asked!");
  });
});
