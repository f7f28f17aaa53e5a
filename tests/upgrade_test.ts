/** upgrade(): a stream goes on over another connection, in the middle of a conversation. */

import { assert, assertEquals, assertMatch, assertRejects, assertStrictEquals, fail } from "../deps.ts";
import { type FilterContext, SocketStream, type StreamConn } from "../mod.ts";
import { connectionReset, FakeConn, isPending, textOf, turnEnd } from "./fake_conn.ts";
import { withFakeTime } from "./fake_time.ts";
import { rejectionOf } from "./testing.ts";

/** Connections of which the second is made of the first. */
function twoConns(): { conn: FakeConn; made: FakeConn; stream: SocketStream } {
  const [conn, made] = [new FakeConn(), new FakeConn()];
  return { conn, made, stream: new SocketStream(conn) };
}

Deno.test("upgrade() sends written data first, gives the filter the old connection, and goes on over the new one", async () => {
  const { conn, made, stream } = twoConns();
  const given: StreamConn[] = [];
  stream.write("go ahead\n");
  await stream.upgrade((old) => {
    given.push(old);
    assertEquals(textOf(conn.written), "go ahead\n");
    return made;
  });
  assertStrictEquals(given[0], conn);
  assertStrictEquals(stream.under, made);
  made.give("hello\n");
  assertEquals(await stream.readLine(), "hello");
  await stream.send("again\n");
  assertEquals([textOf(conn.written), textOf(made.written)], ["go ahead\n", "again\n"]);
  assertEquals([stream.bytesWritten, stream.bytesRead], [15, 6]);
  stream.close();
  assertEquals([made.isClosed, conn.isClosed], [true, false]); // The new one closes those under it.
});

Deno.test("upgrade() takes a filter that gives its connection at once, or later, and may be called again", async () => {
  const conns = [new FakeConn(), new FakeConn(), new FakeConn()];
  const [first, second, third] = conns;
  assert(first && second && third);
  const stream = new SocketStream(first);
  await stream.upgrade(() => second);
  await stream.upgrade(() => Promise.resolve(third));
  await stream.send("abc");
  assertEquals(conns.map((conn) => textOf(conn.written)), ["", "", "abc"]);
  stream.close();
});

Deno.test("addresses after upgrade() are those of the new connection", async () => {
  class Elsewhere extends FakeConn {
    override readonly remoteAddr: Deno.Addr = { transport: "tcp", hostname: "192.0.2.1", port: 1 };
  }
  const stream = new SocketStream(new FakeConn());
  await stream.upgrade(() => new Elsewhere());
  assertEquals(stream.remoteAddress, { transport: "tcp", hostname: "192.0.2.1", port: 1 });
  stream.close();
});

// Refusals, after which the stream is as it was

/** States of a stream that refuse an upgrade. */
const REFUSALS: [string, (stream: SocketStream, conn: FakeConn) => unknown, RegExp, Kind: new () => Error][] = [
  ["a read waits", (stream) => void stream.readLine(), /: readLine\(\) waits on the same stream$/, Deno.errors.Busy],
  [
    "received bytes are unread",
    async (stream, conn) => (conn.give("abc"), await stream.peek(1)),
    /: 3 received bytes are unread; read them, or close$/,
    Deno.errors.Busy,
  ],
  [
    "a read that timed out is still under way",
    async (stream) => {
      stream.timeout = 1;
      await rejectionOf(stream.recv());
      stream.timeout = Infinity;
    },
    /: an earlier read waits on the same stream$/,
    Deno.errors.Busy,
  ],
  [
    "the peer has ended its side",
    async (stream, conn) => (conn.end(), await stream.recv()),
    /: the peer has ended its side of the stream$/,
    Deno.errors.BrokenPipe,
  ],
  [
    "the connection was reset",
    async (stream, conn) => (conn.failReads(connectionReset()), await rejectionOf(stream.recv())),
    /reset/,
    Deno.errors.ConnectionReset,
  ],
];

Deno.test("upgrade() calls no filter if the stream is closed while written data is sent", async () => {
  for (const written of ["go ahead\n", ""]) {
    const { conn, stream } = twoConns();
    if (written !== "") stream.write(written);
    let calls = 0;
    const upgrading = stream.upgrade((conn) => (calls++, conn));
    stream.close();
    assertEquals((await rejectionOf(upgrading)).message, "The stream is closed");
    await turnEnd();
    assertEquals([calls, conn.isClosed], [0, true]);
  }
});

Deno.test("upgrade() without a filter is refused, and the stream is as it was", async () => {
  const { conn, stream } = twoConns();
  for (const filter of [undefined, null, 5]) {
    const upgrading: Promise<void> = Reflect.apply(stream.upgrade, stream, [filter]);
    const error = await rejectionOf(upgrading);
    assertEquals(String(error), `TypeError: Filter must be a function: it is ${filter}`);
  }
  await stream.send("still open");
  assertEquals(textOf(conn.written), "still open");
  stream.close();
});

for (const [what, prepare, sentence, Kind] of REFUSALS) {
  Deno.test(`upgrade() while ${what} is refused, and the stream is as it was`, async () => {
    const { conn, stream } = twoConns();
    await prepare(stream, conn);
    const error = await rejectionOf(stream.upgrade(() => fail("the filter was called")));
    assert(error instanceof Kind, `${error}`);
    assertMatch(error.message, sentence);
    assert(!conn.isClosed);
    await stream.send("still open");
    assertEquals(textOf(conn.written), "still open");
    stream.close();
  });
}

Deno.test("upgrade() after closeWrite() is refused, and reads go on", async () => {
  const { conn, stream } = twoConns();
  await stream.closeWrite();
  await assertRejects(() => stream.upgrade((conn) => conn), Deno.errors.BrokenPipe);
  assert(!conn.isClosed);
  conn.give("abc");
  assertEquals(textOf(await stream.recv()), "abc");
  stream.close();
});

Deno.test("upgrade() after close() rejects with BadResource", async () => {
  const { stream } = twoConns();
  stream.close();
  await assertRejects(() => stream.upgrade((conn) => conn), Deno.errors.BadResource);
});

Deno.test("reads, writes and another upgrade() are refused while one is under way, and do not disturb it", async () => {
  const { made, stream } = twoConns();
  const gate = Promise.withResolvers<StreamConn>();
  const upgrading = stream.upgrade(() => gate.promise);
  const calls = [
    () => stream.recv(),
    () => stream.peek(1),
    () => stream.write("a"),
    () => stream.send("a"),
    () => stream.writeFrame("a"),
    () => stream.closeWrite(),
    () => stream.upgrade((conn) => conn),
  ];
  for (const call of calls) {
    const error = await rejectionOf(call());
    assert(error instanceof Deno.errors.Busy, `${call}: ${error}`);
    assertMatch(error.message, /upgrade\(\)/);
  }
  assert(await isPending(upgrading));
  gate.resolve(made);
  await upgrading;
  await stream.send("abc");
  assertEquals(textOf(made.written), "abc");
  stream.close();
});

// Failures, after which the stream is closed

/** Ways in which a filter fails. */
const FAILURES: [string, () => StreamConn | null | Promise<StreamConn | null>, RegExp][] = [
  ["throws", () => {
    throw new TypeError("no hello");
  }, /^no hello$/],
  ["rejects", () => Promise.reject(new TypeError("no hello")), /^no hello$/],
  ["refuses", () => null, /^Cannot upgrade\(\): the filter has refused the connection$/],
  ["refuses later", () => Promise.resolve(null), /the filter has refused the connection$/],
];

for (const [how, filter, sentence] of FAILURES) {
  Deno.test(`upgrade() with a filter that ${how} rejects, and closes the stream`, async () => {
    const { conn, stream } = twoConns();
    let released = 0;
    const failing = (_conn: StreamConn, { onEnd }: FilterContext) => {
      onEnd(() => released++);
      return filter();
    };
    const error = await rejectionOf(stream.upgrade(failing));
    assertMatch(error.message, sentence);
    assertEquals([conn.isClosed, released], [true, 1]);
    assertStrictEquals(await rejectionOf(stream.recv()), error);
    assertStrictEquals(await rejectionOf(stream.send("a")), error);
  });
}

for (const [options, most] of [[{}, 5_000], [{ handshakeTimeout: 200 }, 200]] as const) {
  Deno.test(`upgrade(filter, ${Deno.inspect(options)}) gives the filter ${most} ms`, async () => {
    await withFakeTime(async (time) => {
      const { conn, stream } = twoConns();
      const reasons: unknown[] = [];
      const upgrading = rejectionOf(stream.upgrade((_conn, { signal }) => {
        signal.addEventListener("abort", () => reasons.push(signal.reason));
        return new Promise(() => {});
      }, options));
      await time.advance(most - 1);
      assert(!conn.isClosed);
      await time.advance(Math.max(most / 16, 10) + 1);
      const error = await upgrading;
      assert(error instanceof Deno.errors.TimedOut);
      assertMatch(error.message, new RegExp(`^upgrade\\(\\) waited for the timeout of ${most} ms$`));
      assertEquals([conn.isClosed, reasons], [true, [error]]);
    });
  });
}

Deno.test("upgrade(filter, { handshakeTimeout: Infinity }) waits for ever", async () => {
  await withFakeTime(async (time) => {
    const { conn, stream } = twoConns();
    const upgrading = stream.upgrade(() => new Promise(() => {}), { handshakeTimeout: Infinity });
    await time.advance(86_400);
    assert(!conn.isClosed && await isPending(upgrading));
    stream.close();
    await assertRejects(() => upgrading, Deno.errors.BadResource);
  });
});

Deno.test("close() while upgrade() is under way ends it, aborts its signal, and closes the connection", async () => {
  const { conn, stream } = twoConns();
  const signals: AbortSignal[] = [];
  const upgrading = stream.upgrade((_conn, { signal }) => {
    signals.push(signal);
    return new Promise(() => {});
  });
  await turnEnd();
  stream.close();
  await assertRejects(() => upgrading, Deno.errors.BadResource);
  assertEquals([conn.isClosed, signals[0]?.aborted], [true, true]);
});

Deno.test("a connection that a filter gives after its upgrade() has ended is closed", async () => {
  const { conn, made, stream } = twoConns();
  const gate = Promise.withResolvers<StreamConn>();
  const upgrading = stream.upgrade(() => gate.promise);
  await turnEnd();
  stream.close();
  await assertRejects(() => upgrading, Deno.errors.BadResource);
  gate.resolve(made);
  await turnEnd();
  assertEquals([conn.isClosed, made.isClosed], [true, true]);
});

Deno.test("a connection that a filter gives in the moment of close() is closed", async () => {
  for (let microtasks = 0; microtasks < 20; microtasks++) {
    const { made, stream } = twoConns();
    const gate = Promise.withResolvers<StreamConn>();
    const upgrading = stream.upgrade(() => gate.promise).catch(() => {});
    await turnEnd();
    gate.resolve(made);
    for (let passed = 0; passed < microtasks; passed++) await undefined;
    stream.close();
    await upgrading;
    await turnEnd();
    assert(made.isClosed, `it was closed ${microtasks} microtasks later, and the new connection stayed open`);
  }
});

Deno.test("upgrade() to a peer that does not take the written data has its timeout, too", async () => {
  await withFakeTime(async (time) => {
    const { conn, made, stream } = twoConns();
    conn.holdWrites();
    stream.write("go ahead\n");
    const upgrading = rejectionOf(stream.upgrade(() => made));
    await time.advance(6_000);
    assert(conn.isClosed);
    assert(await upgrading instanceof Deno.errors.TimedOut);
  });
});

Deno.test("release functions of an upgrade's filter run when the stream is closed", async () => {
  const { made, stream } = twoConns();
  let released = 0;
  await stream.upgrade((_conn, { onEnd }) => {
    onEnd(() => released++);
    return made;
  });
  assertEquals(released, 0);
  stream.close();
  assertEquals(released, 1);
});
