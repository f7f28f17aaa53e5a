import { assert, assertEquals, assertMatch, assertRejects } from "../deps.ts";
import { connect, TcpServer, UnixServer } from "../mod.ts";
import { freePort } from "./programs.ts";
import { countListeners, Echo, networkTest, rejectionOf, unixTest } from "./testing.ts";

/** Runs `test` with the port of a listener that takes no more connections: dials wait. */
async function withFullBacklog(test: (port: number) => Promise<void>): Promise<void> {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0, tcpBacklog: 1 });
  const { port } = listener.addr;
  const controller = new AbortController();
  const conns: Deno.Conn[] = [];
  const dials = Array.from({ length: 8 }, async () => {
    conns.push(await Deno.connect({ port, signal: controller.signal }));
  });
  try {
    await Promise.race(dials);
    await test(port);
  } finally {
    controller.abort();
    await Promise.allSettled(dials);
    for (const conn of conns) conn.close();
  }
}

networkTest("connect() opens a stream that reads and writes", async () => {
  await using server = new TcpServer({ port: 0 }, Echo);
  const { port } = server.listen();
  server.serveForever();
  await using stream = await connect({ port });
  await stream.send("hello\n");
  assertEquals(await stream.readLine(), "hello");
  assertEquals(stream.remoteAddress, server.address);
});

networkTest("connect() says what was dialled, why it failed and what to do", async () => {
  const port = freePort();
  const error = await rejectionOf(connect({ port }));
  assert(error instanceof Deno.errors.ConnectionRefused);
  assertEquals(
    error.message,
    `Cannot connect to 127.0.0.1:${port}: nobody listens there; start the server or check the address`,
  );
  assertEquals("code" in error && error.code, "ECONNREFUSED");
  assert(error.cause instanceof Deno.errors.ConnectionRefused);
});

Deno.test("connect() calls a connection that was reset before the runtime could look at it reset", async () => {
  const dial = Deno.connect;
  // What Deno 2.9.6 says then, which is a race.
  const rejected = () => Promise.reject(new Error("Transport endpoint is not connected (os error 107)"));
  try {
    Object.assign(Deno, { connect: rejected });
    const error = await rejectionOf(connect({ port: 8009 }));
    assert(error instanceof Deno.errors.ConnectionReset);
    assertMatch(error.message, /^Cannot connect to 127\.0\.0\.1:8009: the server reset the connection; /);
  } finally {
    Object.assign(Deno, { connect: dial });
  }
});

networkTest("connect() says after how many tries it gave up", async () => {
  const error = await rejectionOf(connect({ port: freePort(), retries: 2 }));
  assertMatch(error.message, /^Cannot connect to 127\.0\.0\.1:\d+ after 3 tries: nobody listens there/);
});

networkTest(
  "connect() leaves no listener on its signal, neither of its dials nor of the waits between them",
  async () => {
    const { signal } = new AbortController();
    const listeners = countListeners(signal);
    const dialing = connect({ port: freePort(), retries: 2, signal });
    assertEquals(listeners(), 1);
    await rejectionOf(dialing);
    assertEquals(listeners(), 0);
  },
);

networkTest("connect() tries again until the server is there", async () => {
  const port = freePort();
  const dialing = connect({ port, retries: Infinity });
  await assertRejects(() => connect({ port }), Deno.errors.ConnectionRefused);
  await using server = new TcpServer({ port }, Echo);
  server.serveForever();
  (await dialing).close();
});

networkTest("connect() gives a name that cannot be resolved a sentence of its own", async () => {
  const error = await rejectionOf(connect({ hostname: "no-such-host.invalid", port: 1 }));
  assertEquals(
    error.message,
    "Cannot connect to no-such-host.invalid:1: the name cannot be resolved; check its spelling",
  );
});

networkTest("connect() gives up after its timeout", async () => {
  await withFullBacklog(async (port) => {
    const error = await rejectionOf(connect({ port, timeout: 20, retries: 1 }));
    assert(error instanceof Deno.errors.TimedOut);
    assertMatch(error.message, /after 2 tries: no answer within 20 ms$/);
  });
});

networkTest("connect() ends with the reason of its signal: before, while it dials, and between tries", async () => {
  const reason = new TypeError("changed my mind");
  await withFullBacklog(async (port) => {
    const controller = new AbortController();
    const dialing = connect({ port, signal: controller.signal });
    controller.abort(reason);
    assertEquals(await rejectionOf(dialing), reason);
  });
  const port = freePort();
  assertEquals(await rejectionOf(connect({ port, signal: AbortSignal.abort(reason) })), reason);
  const controller = new AbortController();
  const dialing = connect({ port, retries: Infinity, signal: controller.signal });
  await assertRejects(() => connect({ port }), Deno.errors.ConnectionRefused);
  controller.abort(reason);
  assertEquals(await rejectionOf(dialing), reason);
});

Deno.test("connect() without the permission names the least flag, and does not try again", {
  permissions: { net: false, read: false, write: false },
}, async () => {
  const tcp = await rejectionOf(connect({ hostname: "::1", port: 8009, retries: Infinity }));
  assert(tcp instanceof Deno.errors.NotCapable);
  assertEquals(
    tcp.message,
    "Cannot connect to [::1]:8009: permission is missing; run again with --allow-net=[::1]:8009",
  );
  const unix = await rejectionOf(connect({ path: "/tmp/a.sock", retries: Infinity }));
  assertMatch(
    unix.message,
    /--allow-read=\/tmp\/a\.sock --allow-write=\/tmp\/a\.sock --allow-net=unix:\/tmp\/a\.sock$/,
  );
});

for (
  const [name, dial, kind] of [
    ["a port out of range", () => connect({ port: -1 }), RangeError],
    ["an empty hostname", () => connect({ hostname: "", port: 1 }), TypeError],
    ["a timeout of 0", () => connect({ port: 1, timeout: 0 }), RangeError],
    ["half a retry", () => connect({ port: 1, retries: 0.5 }), RangeError],
    ["an option that does not exist", () => connect({ port: 1, ...{ retrys: 1 } }), TypeError],
  ] as const
) {
  Deno.test(`connect() refuses ${name}`, async () => {
    await assertRejects(dial, kind);
  });
}

unixTest("connect() dials Unix sockets", async (folder) => {
  const path = `${folder}/echo.sock`;
  await using server = new UnixServer({ path }, Echo);
  await server.listen();
  server.serveForever();
  await using stream = await connect({ path });
  await stream.send("hello\n");
  assertEquals(await stream.readLine(), "hello");
});

unixTest("connect() to a path that is not there says so", async (folder) => {
  const error = await rejectionOf(connect({ path: `${folder}/none.sock` }));
  assert(error instanceof Deno.errors.NotFound);
  assertMatch(error.message, /none\.sock: no such file; start the server or check the path$/);
});
