/** The end of a server, in the order in which `shutdown()` tells it. Clients are fakes, in a time that the test advances, unless sockets matter. */

import { assert, assertEquals, assertThrows } from "../deps.ts";
import {
  connect,
  type ShutdownReport,
  SocketStream,
  StreamRequestHandler,
  type StreamRequestHandlerClass,
  TcpServer,
} from "../mod.ts";
import { FakeConn, FakeTcpConn, isPending, textOf, turnEnd } from "./fake_conn.ts";
import { withFakeTime } from "./fake_time.ts";
import { onStage, Witness } from "./stage.ts";
import {
  Echo,
  FakeListener,
  FakeServer,
  listenAgain,
  networkTest,
  until,
  untilRefused,
  withServer,
} from "./testing.ts";
import { freePort } from "./programs.ts";

/** The report without its times. */
function counts({ finished, cut }: ShutdownReport): [finished: number, cut: number] {
  return [finished, cut.length];
}

/** Answers each line. */
class Lines extends StreamRequestHandler {
  override async handle() {
    for await (const line of this.request.lines()) await this.request.send(`${line}!\n`);
  }
}

/** Never ends by itself, whatever happens to its stream. */
class Endless extends StreamRequestHandler {
  override async handle() {
    await this.request.send("ready\n");
    await new Promise(() => {});
  }
}

// Before the start, while it starts, and twice

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

Deno.test("shutdown() called twice is one shutdown, with the first call's grace", async () => {
  await onStage(Endless, {}, async ({ server, time, accept }) => {
    await accept();
    const down = server.shutdown({ grace: 2_000 });
    assert(down === server.shutdown({ grace: 0 }));
    await time.advance(1_900);
    assert(await isPending(down));
    assertEquals(counts(await time.advanceUntil(down, 400)), [0, 1]);
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

// 1. It stops accepting; clients in the backlog are served

networkTest("shutdown() of an idle server resolves, and frees the port", async () => {
  const port = await freePort();
  const server = new TcpServer({ port }, Echo);
  const serving = server.serveForever();
  assertEquals(counts(await server.shutdown()), [0, 0]);
  await using again = new TcpServer({ port }, Echo);
  await listenAgain(() => again.listen());
  await serving;
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

networkTest("a client that connects after a handleRequest() that timed out is served by the shutdown", async () => {
  const server = new TcpServer({ port: 0 }, Echo);
  const { port } = server.listen();
  await server.handleRequest({ timeout: 5 });
  const client = await connect({ port });
  await client.send("in time\n");
  await server.shutdown();
  assertEquals(await client.readLine(), "in time");
  client.close();
});

Deno.test("shutdown() looks at the backlog for 50 ms, and for half a second under a steady load", async () => {
  class Brief extends StreamRequestHandler {
    override handle() {}
  }
  await onStage(Brief, {}, async ({ server, listener, time, accept }) => {
    const down = server.shutdown();
    for (let passed = 40; passed <= 520; passed += 40) {
      await time.advance(40);
      assertEquals(listener.closed, passed > 500, `after ${passed} ms`);
      await accept();
    }
    await time.advanceUntil(down, 1_000);
    assertEquals(server.stats.accepted, 12);
  });
  await onStage(Brief, {}, async ({ server, listener, time }) => {
    server.shutdown();
    await time.advance(49);
    assert(!listener.closed);
    await time.advance(2);
    assert(listener.closed);
  });
});

/** As many reads as a server has that cannot know whether it was quiet. */
async function readMuch(): Promise<void> {
  await using stream = new SocketStream(new FakeConn().give(new Uint8Array(70)));
  for (let count = 0; count < 70; count++) await stream.read(new Uint8Array(1));
}

Deno.test("shutdown() of a busy process takes neither the backlog nor a client for quiet", async () => {
  await onStage(Lines, {}, async ({ server, listener, time, accept }) => {
    const conn = await accept();
    conn.give("one\n");
    await turnEnd();
    const down = server.shutdown();
    for (let passed = 0; passed < 400; passed += 10) {
      await time.advance(10);
      assertEquals([listener.closed, server.stats.active], [false, 1], `after ${passed} ms`);
      await readMuch();
    }
    await time.advance(60);
    assert(listener.closed);
    assertEquals(counts(await time.advanceUntil(down, 100)), [1, 0]);
  });
});

Deno.test("shutdown() ends although accepting fails for good meanwhile", async () => {
  const listener = new FakeListener([]);
  const server = new FakeServer(listener, Echo, { grace: Infinity });
  const serving = server.serveForever().catch((error) => error);
  await listener.drained;
  const down = server.shutdown();
  listener.fail(new TypeError("a disaster"));
  await down;
  assertEquals((await serving).message, "a disaster");
});

// 2. The signal aborts

Deno.test("shutdown() aborts the signal after the backlog was served: its clients' handlers may go on", async () => {
  const aborted: boolean[] = [];
  class Looking extends StreamRequestHandler {
    override handle() {
      aborted.push(this.signal.aborted, this.server.signal.aborted);
    }
  }
  await onStage(Looking, {}, async ({ server, time, accept }) => {
    const down = server.shutdown();
    (await accept()).end();
    await time.advanceUntil(down);
    assertEquals(aborted, [false, false]);
    assert(server.signal.aborted);
  });
});

Deno.test("shutdown() aborts the signal of handlers that wait for something else", async () => {
  class Waiting extends StreamRequestHandler {
    override async handle() {
      await new Promise((resolve) => this.signal.addEventListener("abort", resolve));
      await this.request.send("goodbye\n");
    }
  }
  await onStage(Waiting, {}, async ({ server, time, accept }) => {
    const conn = await accept();
    const down = server.shutdown();
    assertEquals(counts(await time.advanceUntil(down, 1_000)), [1, 0]);
    assertEquals(textOf(conn.written), "goodbye\n");
  });
});

Deno.test("shutdown() aborts the signal after half a second, although the backlog has no place yet", async () => {
  const aborted: number[] = [];
  class Waiting extends StreamRequestHandler {
    override async handle() {
      await new Promise((resolve) => this.signal.addEventListener("abort", resolve));
      aborted.push(performance.now());
    }
  }
  await onStage(Waiting, { maxConnections: 1 }, async ({ server, time, accept }) => {
    await accept();
    await accept(); // Waits for a place, so that the backlog is never known to be empty.
    const begun = time.now();
    await time.advanceUntil(server.shutdown(), 3_000);
    assertEquals(aborted.map((at) => at - begun)[0], 500);
  });
});

// 3. Handlers finish what they have begun

Deno.test("shutdown() waits for a handler that is in the middle of something", async () => {
  const release = Promise.withResolvers<void>();
  class Slow extends StreamRequestHandler {
    override async handle() {
      const line = await this.request.readLine();
      await release.promise;
      await this.request.send(`${line} is done\n`);
    }
  }
  await onStage(Slow, {}, async ({ server, time, accept }) => {
    const conn = await accept();
    conn.give("work\n");
    const down = server.shutdown();
    await time.advance(9_900);
    assert(await isPending(down));
    release.resolve();
    assertEquals(counts(await time.advanceUntil(down, 1)), [1, 0]);
    assertEquals(textOf(conn.written), "work is done\n");
  });
});

Deno.test("shutdown() ends a read that waits for a new message, within 100 ms", async () => {
  await onStage(Lines, {}, async ({ server, time, accept }) => {
    const conn = await accept();
    conn.give("one\n");
    const report = await time.advanceUntil(server.shutdown(), 101);
    assertEquals([counts(report), textOf(conn.written), server.outcomes], [[1, 0], "one!\n", ["finished"]]);
  });
});

/** Records of one byte of length. */
class Records extends StreamRequestHandler {
  override async handle() {
    const [length = 0] = await this.request.readExactly(1);
    await this.request.send(await this.request.readExactly(length));
  }
}

class Headers extends StreamRequestHandler {
  override async handle() {
    const headers: (string | null)[] = [];
    for (let line; (line = await this.request.readLine()) !== "";) headers.push(line);
    await this.request.send(`${headers.join("+")}\n`);
  }
}

/** Answers each two lines. */
class Pairs extends StreamRequestHandler {
  override async handle() {
    for (let first; (first = await this.request.readLine()) !== null;) {
      const second = await this.request.readLine();
      await this.request.send(`${first}+${second}\n`);
    }
  }
}

/** What has begun, what comes while the server drains, and the answer to both. */
const MESSAGES: [string, StreamRequestHandlerClass, begun: string, rest: string, answer: string][] = [
  ["a message that has begun", Lines, "first\nsec", "ond\n", "first!\nsecond!\n"],
  ["a body that is read after its header", Records, "\x03", "abc", "abc"],
  ["a message of several lines", Headers, "one\n", "two\n\n", "one+two\n"],
  ["a message that began in the same packet as the last", Pairs, "1\n2\n3\n", "4\n", "1+2\n3+4\n"],
];

for (const [what, Handler, begun, rest, answer] of MESSAGES) {
  Deno.test(`shutdown() lets ${what} come to its end`, async () => {
    await onStage(Handler, {}, async ({ server, time, accept }) => {
      const conn = await accept();
      conn.give(begun);
      const down = server.shutdown();
      await time.advance(400); // Clients were looked at several times.
      conn.give(rest);
      assertEquals(counts(await time.advanceUntil(down, 200)), [1, 0]);
      assertEquals(textOf(conn.written), answer);
    });
  });
}

Deno.test("shutdown() gives clients that have just connected half a second for their first word", async () => {
  for (const [word, at] of [["in time\n", 480], ["too late\n", 560]] as const) {
    await onStage(Lines, {}, async ({ server, time, accept }) => {
      const conn = await accept();
      const down = server.shutdown();
      await time.advance(at);
      conn.give(word);
      await time.advanceUntil(down, 200);
      assertEquals(textOf(conn.written), at < 500 ? "in time!\n" : "");
    });
  }
});

Deno.test("shutdown() counts the half second of a client of the backlog from its own accept", async () => {
  await onStage(Lines, {}, async ({ server, time, accept }) => {
    await time.advance(10_000);
    const down = server.shutdown();
    await time.advance(40);
    const conn = await accept();
    await time.advance(490);
    conn.give("in time\n");
    await time.advanceUntil(down, 200);
    assertEquals(textOf(conn.written), "in time!\n");
  });
});

Deno.test("bytes that come after a shutdown has ended a read are not lost to the handler", async () => {
  const read: unknown[] = [];
  class Persistent extends StreamRequestHandler {
    override async handle() {
      read.push(await this.request.read(new Uint8Array(8)));
      await new Promise((resolve) => setTimeout(resolve, 2_000));
      read.push(textOf(await this.request.recv()), await this.request.recv());
    }
  }
  await onStage(Persistent, {}, async ({ server, time, accept }) => {
    const conn = await accept();
    const down = server.shutdown();
    await time.advance(1_000);
    conn.give("late");
    assertEquals(counts(await time.advanceUntil(down, 3_000)), [1, 0]);
    assertEquals(read, [null, "late", null]);
  });
});

Deno.test("shutdown() never hands out half a line as a line", async () => {
  const lines: string[] = [];
  class Keeping extends StreamRequestHandler {
    override async handle() {
      for await (const line of this.request.lines()) lines.push(line);
    }
  }
  await onStage(Keeping, {}, async ({ server, time, accept }) => {
    (await accept()).give("one\nDELETE /important");
    assertEquals(counts(await time.advanceUntil(server.shutdown())), [0, 1]);
    assertEquals(lines, ["one"]);
  });
});

Deno.test("a client in its filters is ended by the shutdown after half a second", async () => {
  await withFakeTime(async (time) => {
    const listener = new FakeListener([]);
    const server = new Witness(listener, Echo, { filters: [() => new Promise(() => {})] });
    const serving = server.serveForever();
    await listener.drained;
    const conn = new FakeTcpConn();
    listener.give(conn);
    await turnEnd();
    const report = await time.advanceUntil(server.shutdown(), 1_000);
    assertEquals([conn.isClosed, report.cut, server.outcomes], [true, [conn.remoteAddr], []]);
    await time.advanceUntil(serving);
  });
});

// 4. After the grace the rest are cut off

Deno.test("shutdown() cuts a handler off that never ends, and names its client", async () => {
  await onStage(Endless, {}, async ({ server, time, accept }) => {
    const conn = await accept();
    const down = server.shutdown();
    await time.advance(9_999);
    assert(!conn.isClosed);
    await time.advance(1);
    assert(conn.isClosed);
    const { finished, cut, duration } = await time.advanceUntil(down, 200);
    assertEquals([finished, cut, duration], [0, [conn.remoteAddr], 10_200]);
    assertEquals(server.outcomes, ["cut"]);
  });
});

Deno.test("the server's grace is that of a shutdown() which names none, and close() shortens it", async () => {
  for (const closesAt of [undefined, 1_000]) {
    await onStage(Endless, { grace: 3_000 }, async ({ server, time, accept }) => {
      const conn = await accept();
      const down = server.shutdown();
      await time.advance(closesAt ?? 2_999);
      assert(!conn.isClosed);
      if (closesAt === undefined) await time.advance(1);
      else server.close();
      assert(conn.isClosed);
      assertEquals(counts(await time.advanceUntil(down, 200)), [0, 1]);
    });
  }
});

Deno.test("shutdown({ grace: 0 }) cuts at once, and finish() still has 200 ms", async () => {
  const calls: string[] = [];
  class Ending extends StreamRequestHandler {
    override async handle() {
      await this.request.readExactly(1_000);
    }
    override async finish() {
      calls.push("finish");
      await new Promise((resolve) => setTimeout(resolve, 150));
      calls.push("finished");
    }
  }
  await onStage(Ending, {}, async ({ server, time, accept }) => {
    const conn = await accept();
    assertEquals(counts(await time.advanceUntil(server.shutdown({ grace: 0 }), 200)), [0, 1]);
    assertEquals([conn.isClosed, calls], [true, ["finish", "finished"]]);
    assertEquals([server.stats.errors, server.stats.aborted, server.stats.active], [0, 0, 0]);
  });
});

Deno.test("grace: Infinity waits for ever", async () => {
  await onStage(Endless, { grace: Infinity }, async ({ server, time, accept }) => {
    const conn = await accept();
    const down = server.shutdown();
    await time.advance(3_600_000);
    assert(await isPending(down) && !conn.isClosed);
    server.close();
    assertEquals(counts(await time.advanceUntil(down, 300)), [0, 1]);
  });
});

networkTest("clients that are cut off read the end, and the address is free", async () => {
  const port = await freePort();
  const server = new TcpServer({ port }, Endless);
  const serving = server.serveForever();
  const client = await connect({ port });
  assertEquals(await client.readLine(), "ready");
  const { cut } = await server.shutdown({ grace: 0 });
  assertEquals(cut, [client.localAddress]);
  assertEquals(await client.recv(), null);
  client.close();
  await using again = new TcpServer({ port }, Echo);
  await listenAgain(() => again.listen());
  await serving;
});

Deno.test("the report counts the handlers that finished since the call, and those that were cut off", async () => {
  class Mixed extends StreamRequestHandler {
    override async handle() {
      const line = await this.request.readLine();
      if (line === "stay") await new Promise(() => {});
      if (line === "go") await this.request.recv();
    }
  }
  await onStage(Mixed, {}, async ({ server, time, accept }) => {
    for (const word of ["before", "stay", "go", "go"]) (await accept()).give(`${word}\n`);
    await turnEnd();
    const { finished, cut, duration } = await time.advanceUntil(server.shutdown({ grace: 5_000 }));
    assertEquals([finished, cut.length, duration], [2, 1, 5_200]);
    assertEquals(server.outcomes, ["finished", "finished", "finished", "cut"]);
  });
});

// What handlers have left to be sent

class Leaving extends StreamRequestHandler {
  override handle() {
    this.request.write("left over");
  }
}

Deno.test("bytes that a handler has left are sent as long as the client takes some within 30 s", async () => {
  await onStage(Leaving, {}, async ({ server, time, accept }) => {
    const conn = new FakeTcpConn().holdWrites();
    conn.takes = () => 3;
    await accept(conn);
    for (let taken = 0; taken < 3; taken++) {
      await time.advance(29_000);
      assertEquals([conn.isClosed, server.stats.active], [false, 1]);
      conn.releaseOneWrite();
    }
    await turnEnd();
    assertEquals([textOf(conn.written), conn.isClosed, server.outcomes], ["left over", true, ["finished"]]);
  });
});

/** The timeout of the server, and the milliseconds after which the bytes are dropped. */
for (const [timeout, patience] of [[Infinity, 30_000], [1_000, 1_000], [120_000, 30_000]] as const) {
  Deno.test(`bytes that a handler has left are dropped after ${patience} ms, with a timeout of ${timeout} ms`, async () => {
    await onStage(Leaving, { timeout }, async ({ server, time, accept }) => {
      const conn = await accept(new FakeTcpConn().holdWrites());
      await time.advance(patience - 1);
      assertEquals([conn.isClosed, server.outcomes], [false, []]);
      await time.advance(patience / 16 + 11);
      assertEquals([conn.isClosed, server.outcomes], [true, ["timedOut"]]);
      assertEquals([server.stats.timedOut, server.stats.active], [1, 0]);
    });
  });
}

Deno.test("bytes that a handler has left are dropped when the grace is over", async () => {
  await onStage(Leaving, { grace: 1_000 }, async ({ server, time, accept }) => {
    const conn = await accept(new FakeTcpConn().holdWrites());
    assertEquals(counts(await time.advanceUntil(server.shutdown(), 1_300)), [0, 1]);
    assertEquals([conn.isClosed, server.outcomes, server.stats.active], [true, ["cut"], 0]);
  });
});

networkTest('"await using" shuts a server down', async () => {
  let port: number;
  {
    await using server = new TcpServer({ port: 0 }, Echo);
    ({ port } = server.listen());
    server.serveForever();
  }
  await untilRefused(() => connect({ port }));
});

Deno.test("a handler that lets the reason of its signal through has finished, and it is no error", async () => {
  class Obedient extends StreamRequestHandler {
    override async handle() {
      await new Promise((_, reject) => this.signal.addEventListener("abort", () => reject(this.signal.reason)));
    }
  }
  for (const end of ["shutdown", "close"] as const) {
    await onStage(Obedient, {}, async ({ server, time, serving, accept }) => {
      await accept();
      server[end]();
      await time.advanceUntil(serving, 1_000);
      assertEquals([server.stats.errors, server.outcomes], [0, [end === "close" ? "cut" : "finished"]]);
    });
  }
});

// From inside a handler

/** Shuts its server down when it is told to. */
class Stop extends StreamRequestHandler {
  override async handle() {
    for await (const line of this.request.lines()) {
      if (line === "stop") void this.server.shutdown();
      await this.request.send(`${line} is done\n`);
    }
  }
}

Deno.test("a handler that calls shutdown() without await goes on to its end", async () => {
  await onStage(Stop, {}, async ({ server, time, serving, accept }) => {
    const conns = [await accept(), await accept()];
    for (const conn of conns) conn.give("stop\n");
    await time.advanceUntil(serving, 200);
    for (const conn of conns) assertEquals(textOf(conn.written), "stop is done\n");
    assertEquals(counts(await server.shutdown()), [2, 0]);
  });
});

networkTest("after a handler has called shutdown(), clients in the backlog are served", async () => {
  await withServer(new TcpServer({ port: 0 }, Stop, { maxConnections: 1, grace: 60_000 }), async (_server, dial) => {
    const [first, second] = [await dial(), await dial()];
    await second.send("work\n");
    await first.send("stop\n");
    assertEquals(await first.readLine(), "stop is done");
    assertEquals(await second.readLine(), "work is done");
  });
});

Deno.test("a handler that awaits shutdown() waits for the grace, and is cut off", async () => {
  class Waiting extends StreamRequestHandler {
    override async handle() {
      const { cut } = await this.server.shutdown();
      assertEquals(cut.length, 1);
      await this.request.send("never sent");
    }
  }
  await onStage(Waiting, {}, async ({ server, time, serving, accept }) => {
    const conn = await accept();
    await time.advance(9_999);
    assert(!conn.isClosed);
    await time.advanceUntil(serving, 300);
    assertEquals([conn.calls, server.outcomes], [["setNoDelay(true)", "close()"], ["cut"]]);
    await until(() => server.stats.active === 0);
    assertEquals(server.stats.errors, 0);
  });
});

Deno.test("close() ends a shutdown that a handler waits for", async () => {
  class Waiting extends StreamRequestHandler {
    override async handle() {
      await this.server.shutdown({ grace: Infinity });
      await new Promise(() => {});
    }
  }
  await onStage(Waiting, {}, async ({ server, time, serving, accept }) => {
    await accept();
    await time.advance(60_000);
    server.close();
    await time.advanceUntil(serving, 300);
  });
});

Deno.test("a timer that a handler has left behind may await shutdown()", async () => {
  let report: ShutdownReport | undefined;
  class Timing extends StreamRequestHandler {
    override handle() {
      setTimeout(async () => report = await this.server.shutdown({ grace: Infinity }), 1_000);
    }
  }
  await onStage(Timing, {}, async ({ time, serving, accept }) => {
    await accept();
    await time.advanceUntil(serving, 2_000);
    assert(report !== undefined);
    assertEquals(counts(report), [0, 0]);
  });
});
