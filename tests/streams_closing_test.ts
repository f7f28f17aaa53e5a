/** The end of a stream: what it does to calls that wait, and to bytes that are still buffered. */

import { SocketStream, type StreamOptions, StreamRequestHandler } from "../mod.ts";
import { assert, assertEquals, assertRejects, assertStrictEquals } from "../deps.ts";
import {
  assertSameBytes,
  brokenPipe,
  concat,
  connectionReset,
  FakeConn,
  FakeTcpConn,
  isPending,
  pattern,
  tcpConns,
  textOf,
  turnEnd,
} from "./fake_conn.ts";
import { type FakeTime, withFakeTime } from "./fake_time.ts";
import { onStage } from "./stage.ts";
import { networkTest, rejectionOf } from "./testing.ts";

Deno.test("close() rejects what waits and each later call with BadResource, and closes once", async () => {
  const conn = new FakeConn().give("unread");
  const stream = new SocketStream(conn);
  await stream.recv(1);
  stream.close();
  stream.close();
  stream[Symbol.dispose]();
  await stream[Symbol.asyncDispose]();
  assertEquals(conn.calls, ["close()"]);
  const calls = [
    () => stream.recv(),
    () => stream.readLine(),
    () => stream.peek(1),
    () => stream.upgrade((conn) => conn),
    () => stream.write("a"),
    () => stream.send("a"),
    () => stream.flush(),
    () => stream.writeFrame("a"),
    () => stream.closeWrite(),
  ];
  for (const call of calls) await assertRejects(call, Deno.errors.BadResource);
});

Deno.test("close() does not mind a connection that is closed already", () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  conn.close();
  stream.close();
});

Deno.test("close() ends a read that waits at once, while what was buffered still leaves", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn);
  const reading = stream.recv();
  stream.write("abc");
  stream.close();
  await assertRejects(() => reading, Deno.errors.BadResource);
  assert(!conn.isClosed);
  conn.releaseWrites();
  await conn.whenClosed;
  assertEquals(textOf(conn.written), "abc");
});

Deno.test("a read(into) that close() ends rejects no earlier than nothing can be put into the array any more", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn);
  const reading = stream.read(new Uint8Array(8));
  stream.write("abc");
  stream.close();
  assert(await isPending(reading));
  conn.releaseWrites();
  await assertRejects(() => reading, Deno.errors.BadResource);
  assert(conn.isClosed);
});

Deno.test("bytes that come after close() answer no read, and are not counted", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn);
  const reading = rejectionOf(stream.read(new Uint8Array(8)));
  stream.write("abc");
  stream.close();
  conn.give("late");
  assert(await reading instanceof Deno.errors.BadResource);
  assertEquals(stream.bytesRead, 0);
  conn.releaseWrites();
  await conn.whenClosed;
});

Deno.test("close() right after closeWrite() of nothing still sends the end", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn);
  const ended = stream.closeWrite();
  stream.close();
  await turnEnd();
  assert(!conn.isClosed);
  conn.releaseWrites();
  await ended;
  await conn.whenClosed;
  assertEquals(conn.calls, ["closeWrite()", "close()"]);
});

Deno.test('"using" closes the stream', () => {
  const conn = new FakeConn();
  {
    using _ = new SocketStream(conn);
  }
  assert(conn.isClosed);
});

Deno.test('"using" after write() still delivers', async () => {
  const conn = new FakeConn();
  {
    using stream = new SocketStream(conn);
    stream.write("abc");
  }
  await conn.whenClosed;
  assertEquals(conn.calls, ["write(3)", "close()"]);
});

Deno.test('"await using" does not throw when what is buffered cannot be sent', async () => {
  const conn = new FakeConn().failWrites(connectionReset());
  {
    await using stream = new SocketStream(conn);
    stream.write("abc");
  }
  assert(conn.isClosed);
});

Deno.test("close() right after closeWrite() still sends what was written and the end", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  stream.write("abc");
  stream.closeWrite();
  stream.close();
  await conn.whenClosed;
  assertEquals(conn.calls, ["write(3)", "closeWrite()", "close()"]);
});

Deno.test("close() with a send() under way still sends it if the peer takes it", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn);
  const sent = stream.send("abc");
  stream.write("def");
  stream.close();
  await turnEnd();
  assert(!conn.isClosed);
  conn.releaseWrites();
  await sent;
  await conn.whenClosed;
  assertEquals(textOf(conn.written), "abcdef");
});

Deno.test("close() with writes that then fail closes the connection", async () => {
  const conn = new FakeConn().failWrites(brokenPipe());
  const stream = new SocketStream(conn);
  stream.write("abc");
  stream.close();
  await conn.whenClosed;
});

networkTest("over TCP, what was buffered is delivered when the stream is closed", async () => {
  for (const size of [10, 16_384, 60_000]) {
    const [client, server] = (await tcpConns()).map((conn) => new SocketStream(conn));
    assert(client !== undefined && server !== undefined);
    client.write(pattern(size));
    client.close();
    assertSameBytes(concat(await Array.fromAsync(server)), pattern(size));
    server.close();
  }
});

// Bytes that the peer does not take

/** Ways to close a stream. */
const WAYS: [string, (stream: SocketStream) => Promise<void>][] = [
  ["close()", (stream) => Promise.resolve(stream.close())],
  ['"using"', (stream) => Promise.resolve(stream[Symbol.dispose]())],
  ['"await using"', (stream) => stream[Symbol.asyncDispose]()],
  ["cancelling readable", (stream) => stream.readable.cancel()],
];

/** Options, and the milliseconds without a byte after which buffered bytes are dropped. */
const PATIENCE: [StreamOptions, number][] = [
  [{}, 30_000],
  [{ timeout: 1_000 }, 1_000],
  [{ timeout: 600_000 }, 30_000],
  [{ idleTimeout: 10 }, 30_000],
  [{ maxLifetime: 1_000 }, 1_000],
];

/** Runs `test` in a time of its own, with a stream whose peer takes nothing. */
async function withDeafPeer(
  options: StreamOptions,
  test: (stream: SocketStream, conn: FakeConn, time: FakeTime) => Promise<void>,
): Promise<void> {
  await withFakeTime(async (time) => {
    const conn = new FakeConn().holdWrites();
    await test(new SocketStream(conn, options), conn, time);
    assert(conn.isClosed);
  });
}

for (const [way, close] of WAYS) {
  for (const [options, patience] of PATIENCE) {
    Deno.test(`bytes that the peer does not take are dropped ${patience} ms after ${way}, with ${Deno.inspect(options)}`, async () => {
      await withDeafPeer(options, async (stream, conn, time) => {
        stream.write("abc");
        const closed = close(stream);
        await time.advance(patience - 1);
        assert(!conn.isClosed);
        await time.advance(Math.max(patience / 16, 10) + 1);
        assert(conn.isClosed);
        await closed; // It never rejects.
        assertEquals(conn.calls, ["close()"]);
      });
    });
  }

  Deno.test(`bytes are sent after ${way} as long as the peer takes some within 30 s`, async () => {
    await withDeafPeer({}, async (stream, conn, time) => {
      conn.takes = () => 1;
      const sent = stream.send("abcd");
      const closed = close(stream);
      for (let taken = 0; taken < 4; taken++) {
        await time.advance(29_000);
        assert(!conn.isClosed, `after ${time.passed} ms`);
        conn.releaseOneWrite();
      }
      await time.advanceUntil(closed);
      await sent;
      await turnEnd();
      assertEquals([textOf(conn.written), conn.calls.at(-1)], ["abcd", "close()"]);
    });
  });
}

Deno.test("writes that wait reject with TimedOut when their bytes are dropped, and reads and later calls with BadResource", async () => {
  await withDeafPeer({ highWaterMark: 2 }, async (stream, conn, time) => {
    const read = rejectionOf(stream.recv());
    const writes = [stream.send("a"), stream.write("over the mark"), stream.flush(), stream.closeWrite()];
    const failures = writes.map(rejectionOf);
    stream.close();
    assert(await read instanceof Deno.errors.BadResource);
    await assertRejects(() => stream.send("b"), Deno.errors.BadResource);
    await time.advance(32_000);
    const [first] = await Promise.all(failures);
    assert(first instanceof Deno.errors.TimedOut);
    for (const failure of failures) assertStrictEquals(await failure, first);
    assertEquals([conn.calls, stream.bytesBuffered], [["close()"], 0]);
  });
});

Deno.test("close() after close() neither prolongs nor shortens the wait for the peer", async () => {
  await withDeafPeer({}, async (stream, conn, time) => {
    stream.write("abc");
    for (let passed = 0; passed < 30_000; passed += 10_000) {
      stream.close();
      await time.advance(9_999);
      assert(!conn.isClosed);
      await time.advance(1);
    }
    await time.advanceUntil(stream[Symbol.asyncDispose](), 2_000);
  });
});

Deno.test("a timeout that is set after close() does not prolong the wait for the peer", async () => {
  await withDeafPeer({}, async (stream, conn, time) => {
    stream.write("abc");
    stream.close();
    stream.timeout = 3_600_000;
    await time.advance(40_000);
    assert(conn.isClosed);
  });
});

// A closeWrite() that the connection never settles

/** Takes the end of its stream, and never says so. */
class Unending extends FakeTcpConn {
  override closeWrite(): Promise<void> {
    this.calls.push("closeWrite()");
    return new Promise(() => {});
  }
}

Deno.test("a closeWrite() that the connection never settles rejects at the deadline, which closes the stream", async () => {
  await withFakeTime(async (time) => {
    const conn = new Unending();
    const stream = new SocketStream(conn, { timeout: 1_000 });
    const ended = rejectionOf(stream.closeWrite());
    await time.advance(900);
    assert(await isPending(ended));
    await time.advance(300);
    assert(await time.advanceUntil(ended, 0) instanceof Deno.errors.TimedOut);
    assert(conn.isClosed);
  });
});

Deno.test('"await using" of a stream whose closeWrite() never settles ends after 30 s', async () => {
  await withFakeTime(async (time) => {
    const conn = new Unending();
    const use = async () => {
      await using stream = new SocketStream(conn);
      stream.closeWrite();
    };
    await time.advanceUntil(use(), 33_000);
    assertEquals(conn.calls, ["closeWrite()", "close()"]);
  });
});

class LeavesItsEnd extends StreamRequestHandler {
  override handle() {
    this.request.closeWrite();
  }
}

Deno.test("a session whose closeWrite() never settles ends after 30 s", async () => {
  await onStage(LeavesItsEnd, {}, async ({ server, time, accept }) => {
    const conn = await accept(new Unending());
    assertEquals([conn.isClosed, server.stats.active], [false, 1]);
    await time.advance(33_000);
    assertEquals([conn.isClosed, server.stats.active], [true, 0]);
  });
});

Deno.test("a closeWrite() that never settles rejects when its session is cut off", async () => {
  const failures: Error[] = [];
  class WaitsForItsEnd extends StreamRequestHandler {
    override async handle() {
      failures.push(await rejectionOf(this.request.closeWrite()));
    }
  }
  await onStage(WaitsForItsEnd, {}, async ({ server, time, serving, accept }) => {
    const conn = await accept(new Unending());
    server.close();
    await time.advanceUntil(serving, 1_000);
    assertEquals([conn.isClosed, failures.map(({ name }) => name)], [true, ["BadResource"]]);
  });
});
