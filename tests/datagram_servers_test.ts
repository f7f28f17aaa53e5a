/** Servers of datagrams: serving side by side, receiving, replies, hooks, one at a time, the end. */

import { assert, assertEquals, assertMatch, assertThrows } from "../deps.ts";
import {
  Datagram,
  DatagramClient,
  DatagramRequestHandler,
  DatagramServer,
  type ErrorOutcome,
  UdpServer,
  UnixDatagramServer,
} from "../mod.ts";
import {
  ask,
  CLIENT,
  decoded,
  EchoDatagram,
  echoExcept,
  FakeServer,
  FakeSocket,
  handlerOf,
  PATIENCE_MS,
  PlainSocket,
  RecordingServer,
  systemError,
  withServer,
} from "./datagrams.ts";
import { networkTest, rejectionOf, until } from "./testing.ts";

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

// --- Options and addresses ---------------------------------------------------------

for (
  const [name, options, kind] of [
    ["no datagrams at all", { maxConcurrent: 0 }, RangeError],
    ["half a datagram", { maxConcurrent: 1.5 }, RangeError],
    ["a negative grace", { grace: -1 }, RangeError],
    ["an option that does not exist", { ...{ grace: 1 }, ...{ maxConnections: 1 } }, TypeError],
  ] as const
) {
  Deno.test(`UdpServer refuses ${name}`, () => {
    assertThrows(() => new UdpServer({ port: 0 }, EchoDatagram, options), kind);
  });
}

Deno.test("a datagram server refuses an address that is none", () => {
  assertThrows(() => new UdpServer({ port: 65_536 }, EchoDatagram), RangeError);
  assertThrows(() => new UdpServer({ hostname: "", port: 0 }, EchoDatagram), TypeError);
  assertThrows(() => new UdpServer({ ...{ port: 0 }, ...{ reusePort: true } }, EchoDatagram), TypeError);
  assertThrows(() => new UnixDatagramServer({ path: "" }, EchoDatagram), TypeError);
});

networkTest("UdpServer.listen() resolves port 0, and a second call gives the same address", async () => {
  await using server = new UdpServer({ port: 0 }, EchoDatagram);
  const address = server.listen();
  assert(address.port > 0);
  assertEquals([address.transport, address.hostname], ["udp", "127.0.0.1"]);
  assertEquals(server.listen(), address);
  assertEquals(server.address, address);
});

networkTest("a UDP port in use is one sentence with the system's words", async () => {
  await using first = new UdpServer({ port: 0 }, EchoDatagram);
  const { port } = first.listen();
  const error = await rejectionOf(new UdpServer({ port }, EchoDatagram).serveForever());
  assert(error instanceof Deno.errors.AddrInUse);
  assertMatch(error.message, new RegExp(`^Cannot listen on 127.0.0.1:${port}: address already in use; stop [^\n]*$`));
});

Deno.test("UdpServer without the permission says which flag is missing", { permissions: { net: false } }, async () => {
  const error = await rejectionOf(new UdpServer({ port: 8009 }, EchoDatagram).serveForever());
  assert(error instanceof Deno.errors.NotCapable);
  assertEquals(
    error.message,
    "Cannot listen on 127.0.0.1:8009: permission is missing; run again with --allow-net=127.0.0.1",
  );
});

// --- Requests and replies ----------------------------------------------------------

networkTest("a datagram of any length arrives whole, both ways", async (t) => {
  await withServer(new UdpServer({ port: 0 }, EchoDatagram), async (_server, { port }, dial) => {
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

networkTest("text is replied as UTF-8", async () => {
  const Greeter = handlerOf((request) => request.reply("你好"));
  await withServer(new UdpServer({ port: 0 }, Greeter), async (_server, { port }, dial) => {
    assertEquals(await ask(dial({ port }), ""), "你好");
  });
});

networkTest("the bytes of a datagram never change when others come", async () => {
  const kept: Uint8Array[] = [];
  const Keeping = handlerOf(async (request) => {
    kept.push(request.data);
    await request.reply("ok");
  });
  await withServer(new UdpServer({ port: 0 }, Keeping), async (_server, { port }, dial) => {
    const client = dial({ port });
    const sent = Array.from({ length: 100 }, (_, i) => `${i}`.repeat(i * i));
    for (const text of sent) await ask(client, text);
    assertEquals(kept.map(decoded).join() === sent.join(), true);
  });
});

for (const fault of ["throw", "reject"]) {
  networkTest(`a datagram's handler that ${fault}s hurts no other, and is an error`, async () => {
    await withServer(new RecordingServer({ port: 0 }, Fragile), async (server, { port }, dial) => {
      const [bad, good] = [dial({ port }), dial({ port })];
      await bad.send(fault);
      assertEquals(await ask(good, "fine"), "fine");
      assertEquals(await ask(bad, "fine again"), "fine again");
      assertEquals([server.errors.map(String), server.outcomes], [["TypeError: handler boom"], ["error"]]);
      assertEquals(server.stats.errors, 1);
    });
  });
}

networkTest("a reply that is too long rejects in one sentence, and is the program's own error", async () => {
  await withServer(new RecordingServer({ port: 0 }, Fragile), async (server, { port }, dial) => {
    const client = dial({ port });
    await client.send("too long");
    assertEquals(await ask(client, "fine"), "fine");
    assertEquals(server.outcomes, ["error"]);
    assertMatch(String(server.errors[0]), /: Cannot reply with 65508 bytes to 127\.0\.0\.1:\d+: message too long$/);
    assertEquals([server.stats.errors, server.stats.aborted, server.stats.bytesWritten], [1, 0, 4]);
  });
});

networkTest("a failed reply that nobody awaits is nobody's harm", async () => {
  await withServer(new RecordingServer({ port: 0 }, Fragile), async (server, { port }, dial) => {
    assertEquals(await ask(dial({ port }), "too long, and forgotten"), "too long, and forgotten");
    assertEquals(server.errors, []);
  });
});

networkTest("a client that has left is no error of the server's", async () => {
  const exit = Promise.withResolvers<void>();
  const Late = handlerOf(async (request) => {
    if (decoded(request.data) === "late") await exit.promise;
    for (let i = 0; i < 3; i++) await request.reply(request.data);
  });
  await withServer(new RecordingServer({ port: 0 }, Late), async (server, { port }, dial) => {
    const leaving = dial({ port });
    await leaving.send("late");
    await until(() => server.stats.active === 1);
    leaving.close();
    exit.resolve();
    await until(() => server.stats.active === 0);
    assertEquals(await ask(dial({ port }), "fine"), "fine");
    assertEquals(server.errors, []);
  });
});

/** Errors that a reply meets, and whose they are. */
const REPLY_FAILURES: { name: string; error: Error; outcome: ErrorOutcome; words: string }[] = [
  {
    name: "a client that cannot be reached",
    error: systemError("EHOSTUNREACH", "No route to host"),
    outcome: "aborted",
    words: "no route to host",
  },
  {
    name: "a missing permission",
    error: new Deno.errors.NotCapable("Requires net access"),
    outcome: "error",
    words: "permission is missing; run again with --allow-net=127.0.0.1",
  },
  {
    name: "a reply that is too long",
    error: systemError("EMSGSIZE", "Message too long"),
    outcome: "error",
    words: "message too long",
  },
];

for (const { name, error, outcome, words } of REPLY_FAILURES) {
  Deno.test(`a reply that fails by ${name} makes the outcome "${outcome}"`, async () => {
    const told: unknown[] = [];
    class Telling extends FakeServer {
      override handleError(error: unknown, _clientAddress: Deno.Addr, outcome: ErrorOutcome) {
        told.push(error instanceof Error && error.message, outcome);
      }
    }
    const socket = new FakeSocket(["hello"]);
    socket.sendFailures.push(error);
    const server = new Telling(socket, EchoDatagram);
    const serving = server.serveForever();
    await socket.drained;
    await until(() => server.stats.active === 0);
    const { errors, aborted, bytesWritten } = server.stats;
    assertEquals(told, [`Cannot reply with 5 bytes to 127.0.0.1:1: ${words}`, outcome]);
    assertEquals([errors, aborted, bytesWritten], outcome === "error" ? [1, 0, 0] : [0, 1, 0]);
    await server.shutdown();
    await serving;
  });
}

Deno.test("an error of the handler's own behind a failed reply is an error", async () => {
  const Careless = handlerOf(async (request) => {
    await request.reply("lost").catch(() => {});
    throw new TypeError("handler boom");
  });
  const socket = new FakeSocket(["hello"]);
  socket.sendFailures.push(systemError("EHOSTUNREACH"));
  class Quiet extends FakeServer {
    override handleError() {}
  }
  const server = new Quiet(socket, Careless);
  const serving = server.serveForever();
  await socket.drained;
  await until(() => server.stats.active === 0);
  assertEquals([server.stats.errors, server.stats.aborted], [1, 0]);
  await server.shutdown();
  await serving;
});

/** Runs `test` with a clock that it can put forward, and what was printed meanwhile. */
async function withClock(test: (printed: string[], forward: (ms: number) => void) => Promise<void>): Promise<void> {
  const [now, print] = [performance.now, console.error];
  const printed: string[] = [];
  let ahead = 0;
  performance.now = () => now.call(performance) + ahead;
  console.error = (...args) => void printed.push(args.slice(1).join(" "));
  try {
    await test(printed, (ms) => ahead += ms);
  } finally {
    performance.now = now;
    console.error = print;
  }
}

Deno.test("of clients that cannot be answered one line a second is printed, with how many were left out", async () => {
  await withClock(async (printed, forward) => {
    const server = new FakeServer(new FakeSocket([]), EchoDatagram);
    const failure = systemError("EHOSTUNREACH", "No route to host");
    forward(1_001); // Whatever was printed before.
    const refuse = () => server.handleError(new Error(`Cannot reply: ${failure.message}`), CLIENT, "aborted");
    for (let count = 0; count < 4; count++) await refuse();
    assertEquals(printed, ["Cannot reply: No route to host (os error 0)"]);
    forward(999);
    await refuse();
    assertEquals(printed.length, 1);
    forward(1_000);
    await refuse();
    assertMatch(printed[1] ?? "", /^Cannot reply: .* \(4 similar lines were left out before\)$/);
    forward(1_001);
    await refuse();
    assertEquals(printed[2], printed[0]);
    await server.handleError(new TypeError("a bug"), CLIENT, "error");
    assertMatch(printed[3] ?? "", /a bug/);
  });
});

networkTest("the handler knows its client and its server", async () => {
  const known: unknown[] = [];
  const Curious = handlerOf(async (request, { clientAddress, server }) => {
    known.push(clientAddress, request.clientAddress, server);
    await request.reply("");
  });
  await withServer(new UdpServer({ port: 0 }, Curious), async (server, { port }) => {
    using client = new PlainSocket();
    await client.send("hello", { transport: "udp", hostname: "127.0.0.1", port });
    await client.receive();
    assert(known[2] === server);
    assertEquals(known.slice(0, 2), [client.addr, client.addr]);
  });
});

networkTest("stats count datagrams and their bytes, both ways", async () => {
  const Twice = handlerOf(async (request) => {
    await request.reply(request.data);
    await request.reply(request.data);
  });
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

Deno.test("a datagram of the test's own counts what it is answered", async () => {
  const sent: [string, Deno.Addr][] = [];
  const send = (data: Uint8Array, to: Deno.Addr) => Promise.resolve(sent.push([decoded(data), to]));
  const request = new Datagram(new Uint8Array(3), CLIENT, send);
  await new UdpServer({ port: 0 }, EchoDatagram).finishRequest(request, CLIENT);
  await request.reply("more");
  assertEquals(sent, [["\0\0\0", CLIENT], ["more", CLIENT]]);
  assertEquals([request.bytesRead, request.bytesWritten], [3, 7]);
});

Deno.test("reply() rejects when a send of the test's own throws", async () => {
  const request = new Datagram(new Uint8Array(3), CLIENT, () => {
    throw new TypeError("a bug in send()");
  });
  const replied = request.reply("more");
  assertMatch((await rejectionOf(replied)).message, /a bug in send\(\)/);
  assertEquals(request.bytesWritten, 0);
});

// --- At the same time --------------------------------------------------------------

networkTest("handlers run side by side up to maxConcurrent, and what comes beyond is dropped and counted", async () => {
  const exit = Promise.withResolvers<void>();
  const Slow = handlerOf(async (request) => {
    await exit.promise;
    await request.reply(request.data);
  });
  await withServer(new UdpServer({ port: 0 }, Slow, { maxConcurrent: 2 }), async (server, { port }, dial) => {
    const client = dial({ port });
    for (const text of ["1", "2", "3", "4", "5"]) await client.send(text);
    await until(() => server.stats.dropped === 3);
    assertEquals([server.stats.active, server.stats.accepted], [2, 2]);
    exit.resolve();
    assertEquals([await client.recv(), await client.recv()].map(decoded).sort(), ["1", "2"]);
    assertEquals(await ask(client, "6"), "6");
    assertEquals([server.stats.dropped, server.stats.accepted], [3, 3]);
  });
});

networkTest("replies overtake each other as their handlers do", async () => {
  const exit = Promise.withResolvers<void>();
  await withServer(new UdpServer({ port: 0 }, echoExcept("slow", exit.promise)), async (_server, { port }, dial) => {
    const client = dial({ port });
    await client.send("slow");
    assertEquals(await ask(client, "fast"), "fast");
    exit.resolve();
    assertEquals(decoded(await client.recv()), "slow");
  });
});

// --- Receiving ---------------------------------------------------------------------

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
  Deno.test(`a datagram server outlives ${name}`, async () => {
    const socket = new FakeSocket(["before", error, error, "after"]);
    const server = new FakeServer(socket, EchoDatagram);
    const serving = server.serveForever();
    await socket.drained;
    await until(() => socket.sent.length === 2);
    assertEquals(socket.sent, ["before", "after"]);
    assertEquals([server.stats.lost, server.stats.overloads], [2 * lost, overloads]);
    assertEquals(server.overloads.length, overloads);
    await server.shutdown();
    await serving;
    assert(socket.isClosed);
  });
}

Deno.test("a datagram server ends with an error of receiving that nobody knows", async () => {
  const unknown = systemError("EINVAL");
  const server = new FakeServer(new FakeSocket(["before", unknown, "after"]), EchoDatagram);
  assertEquals(await rejectionOf(server.serveForever()), unknown);
  assertEquals(server.stats.accepted, 1);
});

Deno.test("a datagram that fills the buffer may have been cut: it is counted, and not handed on", async () => {
  const lengths: number[] = [];
  const Measuring = handlerOf((request) => void lengths.push(request.data.length));
  const socket = new FakeSocket([new Uint8Array(65_535), new Uint8Array(65_536), new Uint8Array(1)]);
  const server = new FakeServer(socket, Measuring);
  const serving = server.serveForever();
  await socket.drained;
  assertEquals([server.stats.lost, server.stats.accepted], [1, 2]);
  await server.shutdown();
  await serving;
  assertEquals(lengths, [65_535, 1]);
});

Deno.test("small datagrams share a buffer, and each is a part of its own", async () => {
  const kept: Uint8Array[] = [];
  const Keeping = handlerOf((request) => void kept.push(request.data));
  const texts = Array.from({ length: 1_000 }, (_, i) => `datagram ${i}`);
  const socket = new FakeSocket(texts);
  const server = new FakeServer(socket, Keeping);
  const serving = server.serveForever();
  await socket.drained;
  await server.shutdown();
  await serving;
  assertEquals(kept.map(decoded), texts);
  assertEquals(new Set(kept.map(({ buffer }) => buffer)).size, 1);
});

// --- Hooks --------------------------------------------------------------------------

networkTest("verifyRequest() that refuses a datagram costs no handler", async () => {
  class Guarded extends UdpServer {
    override verifyRequest({ data }: Datagram) {
      const isPolite = decoded(data).startsWith("please");
      return data.length % 2 === 0 ? isPolite : Promise.resolve(isPolite);
    }
  }
  class Strict extends EchoDatagram {
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

networkTest("the hooks of a datagram run in the documented order", async () => {
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
    override handleError(error: unknown, _clientAddress: Deno.Addr, outcome: ErrorOutcome) {
      calls.push(`handleError ${error}, ${outcome}`);
    }
    protected override closeRequest(request: Datagram) {
      calls.push("closeRequest");
      super.closeRequest(request);
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
      "handleError TypeError: after handle, error",
      "closeRequest",
    ]);
  });
});

// --- One at a time --------------------------------------------------------------------

networkTest("handleRequest() serves one datagram", async () => {
  await using server = new UdpServer({ port: 0 }, EchoDatagram);
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

networkTest("handleRequest() calls handleTimeout() when no datagram comes, and the next call serves one", async () => {
  let timeouts = 0;
  class Waiting extends UdpServer {
    override handleTimeout() {
      timeouts++;
    }
  }
  await using server = new Waiting({ port: 0 }, EchoDatagram);
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

Deno.test("a datagram server's own kind needs listen() only", () => {
  class Own extends DatagramServer {
    constructor() {
      super(EchoDatagram, {});
    }
    override listen(): Deno.Addr {
      return this.boundAddress ?? this.adoptSocket(new FakeSocket([]), CLIENT);
    }
  }
  const server = new Own();
  assertEquals([server.listen(), server.listen(), server.address], [CLIENT, CLIENT, CLIENT]);
  server.close();
  assertThrows(() => server.listen(), TypeError);
});
