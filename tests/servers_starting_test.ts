/** The start of a server: what it refuses, what it opens, and one request at a time. */

import { assert, assertEquals, assertMatch, assertRejects, assertThrows } from "../deps.ts";
import { BaseServer, connect, StreamRequestHandler, StreamServer, TcpServer } from "../mod.ts";
import { FakeTcpConn, turnEnd } from "./fake_conn.ts";
import { freePort } from "./programs.ts";
import {
  countListeners,
  Echo,
  FakeListener,
  FakeServer,
  networkTest,
  rejectionOf,
  untilRefused,
  withServer,
} from "./testing.ts";

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

Deno.test("a TcpServer is a StreamServer and a BaseServer", () => {
  const server = new TcpServer({ port: 0 }, Echo);
  assert(server instanceof StreamServer && server instanceof BaseServer);
});

networkTest("listen() resolves port 0, and a second call gives the same address", async () => {
  await using server = new TcpServer({ port: 0 }, Echo);
  const address = server.listen();
  assert(address.port > 0);
  assertEquals(server.listen(), address);
  assertEquals(server.address, address);
});

networkTest("a server listens on this machine only, without a hostname", () => {
  const server = new TcpServer({ port: 0 }, Echo);
  assertEquals(server.listen().hostname, "127.0.0.1");
  server.close();
});

networkTest("listen() takes an IPv6 address with and without brackets", () => {
  for (const hostname of ["::1", "[::1]"]) {
    const server = new TcpServer({ hostname, port: 0 }, Echo);
    assertEquals(server.listen().hostname, "::1");
    server.close();
  }
});

networkTest(
  "serveForever() on an address in use keeps the system's words, says what to do, and may be called again",
  async () => {
    const port = await freePort();
    const first = new TcpServer({ port }, Echo);
    first.listen();
    const second = new TcpServer({ port }, Echo);
    const error = await rejectionOf(second.serveForever());
    assert(error instanceof Deno.errors.AddrInUse);
    assertMatch(error.message, new RegExp(`^Cannot listen on 127.0.0.1:${port}: address already in use; stop `));
    await first.shutdown();
    await untilRefused(() => connect({ port }));
    const serving = second.serveForever();
    (await connect({ port, retries: 3 })).close();
    await second.shutdown();
    await serving;
  },
);

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

networkTest("serveForever() and handleRequest() reject while the server serves already", async () => {
  await withServer(new TcpServer({ port: 0 }, Echo), async (server) => {
    await assertRejects(() => server.serveForever(), Deno.errors.Busy);
    await assertRejects(() => server.handleRequest(), Deno.errors.Busy);
  });
});

/** What comes back. A program that another test starts may have a closed listener until it runs, and then resets its clients. */
async function echoOf(line: string, port: number): Promise<string | null> {
  for (let tries = 1;; tries++) {
    try {
      await using client = await connect({ port });
      await client.send(`${line}\n`);
      return await client.readLine();
    } catch (error) {
      if (!(error instanceof Deno.errors.ConnectionReset) || tries === 10) throw error;
    }
  }
}

networkTest("reusePort lets a second server listen on the port, and take over", async () => {
  const first = new TcpServer({ port: 0, reusePort: true }, Echo);
  const { port } = first.listen();
  const serving = first.serveForever();
  await using second = new TcpServer({ port, reusePort: true }, Echo);
  second.listen();
  second.serveForever();
  await first.shutdown();
  await serving;
  assertEquals(await echoOf("taken over", port), "taken over");
  assertEquals(second.stats.accepted, 1);
});

networkTest("loadBalanced lets two servers of a process share a port", async () => {
  const port = await freePort();
  const first = new TcpServer({ port, loadBalanced: true }, Echo);
  first.listen();
  await using second = new TcpServer({ port, loadBalanced: true }, Echo);
  assertEquals(second.listen().port, port);
  second.serveForever();
  first.close();
  await first.shutdown();
  assertEquals(await echoOf("shared", port), "shared");
});

Deno.test("serveForever() leaves no listener on its signal", async () => {
  for (const end of ["close", "shutdown"] as const) {
    const { signal } = new AbortController();
    const listeners = countListeners(signal);
    const listener = new FakeListener([]);
    const server = new FakeServer(listener);
    const serving = server.serveForever({ signal });
    await listener.drained;
    assertEquals(listeners(), 1);
    server[end]();
    await serving;
    assertEquals(listeners(), 0);
  }
});

// One request at a time

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

networkTest(
  "handleRequest() calls handleTimeout() when no client connects in time, and the next call serves",
  async () => {
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
  },
);

Deno.test("handleRequest() accepts nothing that it does not serve", async () => {
  const listener = new FakeListener([]);
  const server = new FakeServer(listener);
  await server.handleRequest({ timeout: 1 });
  await server.handleRequest({ timeout: 1 });
  assertEquals(listener.accepts, 1);
  const conns = [new FakeTcpConn().end(), new FakeTcpConn().end()];
  for (const conn of conns) {
    const handled = server.handleRequest();
    await turnEnd();
    listener.give(conn);
    await handled;
    assert(conn.isClosed);
  }
  assertEquals([listener.accepts, server.stats.accepted], [2, 2]);
  server.close();
  await server.serveForever();
});

Deno.test("handleRequest() resolves after its request, also if that comes while a shutdown closes the listener", async () => {
  for (const delay of [0, 1, 5]) {
    const order: string[] = [];
    class Slow extends StreamRequestHandler {
      override async handle() {
        order.push("handle()");
        await new Promise((resolve) => setTimeout(resolve, 20));
        order.push("handled");
      }
    }
    const arriving = Promise.withResolvers<Deno.Conn>();
    class Late extends FakeListener {
      override accept() {
        return arriving.promise;
      }
      override close() {
        setTimeout(() => arriving.resolve(new FakeTcpConn()), delay);
      }
    }
    const server = new FakeServer(new Late([]), Slow);
    const handling = server.handleRequest().then(() => order.push("handleRequest()"));
    await turnEnd();
    await server.shutdown();
    await handling;
    assertEquals(order, ["handle()", "handled", "handleRequest()"]);
  }
});

for (const call of ["serveForever", "handleRequest"] as const) {
  Deno.test(`${call}() is refused while a handleRequest() waits`, async () => {
    const server = new FakeServer(new FakeListener([]));
    const handling = server.handleRequest();
    const error = await rejectionOf(server[call]());
    assert(error instanceof Deno.errors.Busy);
    assertEquals(error.message, `Cannot ${call}(): the server is serving already`);
    server.close();
    await handling;
  });
}

networkTest("serveForever() after a handleRequest() that timed out may be shut down in the same turn", async () => {
  const server = new TcpServer({ port: 0 }, Echo);
  await server.handleRequest({ timeout: 1 });
  const serving = server.serveForever();
  await server.shutdown();
  await serving;
});

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

Deno.test("handleRequest() that accepting fails for rejects with its error, and the server is closed", async () => {
  const listener = new FakeListener([new TypeError("a disaster")]);
  const server = new FakeServer(listener);
  assertEquals((await rejectionOf(server.handleRequest())).message, "a disaster");
  await server.handleRequest();
  await server.serveForever();
  assert(listener.closed);
});

Deno.test("handleRequest() refuses a timeout of 0", async () => {
  await assertRejects(() => new FakeServer(new FakeListener([])).handleRequest({ timeout: 0 }), RangeError);
});
