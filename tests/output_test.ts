import { SocketStream } from "../mod.ts";
import { assert, assertEquals, assertMatch, assertRejects } from "../deps.ts";
import {
  assertSameBytes,
  brokenPipe,
  bytesOf,
  concat,
  connectionReset,
  FakeConn,
  isPending,
  keptAlive,
  pattern,
  randomNumbers,
  textOf,
  turnEnd,
} from "./fake_conn.ts";
import { rejectionOf } from "./testing.ts";

/** Sizes around those at which `write()` gathers and waits. */
const SIZES = [1, 1_024, 16_383, 16_384, 16_385, 32_768, 49_152, 65_535, 65_536, 65_537, 200_000];

Deno.test("many writes of one turn become one write of the connection", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  for (const word of ["a", "bc", "", "d", "efg"]) stream.write(word);
  assertEquals(conn.writesBegun, 0);
  await turnEnd();
  assertEquals(conn.calls, ["write(7)"]);
  assertEquals(textOf(conn.written), "abcdefg");
  stream.close();
});

Deno.test("what a connection sends from inside its own write goes behind that write", async () => {
  class Chatty extends FakeConn {
    override write(data: Uint8Array) {
      if (this.writesBegun === 0) stream.send("second");
      return super.write(data);
    }
  }
  const conn = new Chatty();
  const stream = new SocketStream(conn);
  await stream.send("first");
  await stream.flush();
  assertEquals(conn.writes.map(textOf), ["first", "second"]);
  stream.close();
});

Deno.test("10,000 small writes become few writes of the connection, and lose nothing", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn, { highWaterMark: Infinity });
  const lines = Array.from({ length: 10_000 }, (_, index) => `line ${index}\n`);
  for (const line of lines) await stream.write(line);
  await stream.flush();
  assertEquals(textOf(conn.written), lines.join(""));
  assert(conn.writes.length < 20, `${conn.writes.length} writes`);
  stream.close();
});

for (const size of SIZES) {
  Deno.test(`write() of ${size} bytes leaves by itself at the end of the turn`, async () => {
    const conn = new FakeConn();
    const stream = new SocketStream(conn);
    stream.write(pattern(size));
    await turnEnd();
    assertSameBytes(conn.written, pattern(size));
    stream.close();
  });

  Deno.test(`write() of ${size} bytes leaves when the handler waits for a read`, async () => {
    const conn = new FakeConn();
    const stream = new SocketStream(conn);
    stream.write(pattern(size));
    stream.recv();
    assertEquals(conn.writesBegun, 1);
    await turnEnd();
    assertSameBytes(conn.written, pattern(size));
    stream.close();
  });

  Deno.test(`flush() after write() of ${size} bytes resolves when all of them are sent`, async () => {
    const conn = new FakeConn().holdWrites();
    const stream = new SocketStream(conn);
    const written = stream.write(pattern(size));
    const flushed = stream.flush();
    assert(await isPending(flushed));
    conn.releaseWrites();
    await flushed;
    await written;
    assertSameBytes(conn.written, pattern(size));
    assertEquals(stream.bytesWritten, size);
    stream.close();
  });

  Deno.test(`write() of ${size} bytes and close() still sends them, then closes`, async () => {
    const conn = new FakeConn();
    const stream = new SocketStream(conn);
    stream.write(pattern(size));
    stream.close();
    await conn.whenClosed;
    assertSameBytes(conn.written, pattern(size));
    assertEquals(conn.calls.at(-1), "close()");
  });

  Deno.test(`write() of ${size} bytes at the end of an "await using" block sends them, then closes`, async () => {
    const conn = new FakeConn();
    {
      await using stream = new SocketStream(conn);
      stream.write(pattern(size));
    }
    assertSameBytes(conn.written, pattern(size));
    assertEquals(conn.calls.at(-1), "close()");
  });

  Deno.test(`write() of ${size} bytes and closeWrite() sends them, then the end`, async () => {
    const conn = new FakeConn();
    const stream = new SocketStream(conn);
    stream.write(pattern(size));
    await stream.closeWrite();
    assertSameBytes(conn.written, pattern(size));
    assertEquals(conn.calls.at(-1), "closeWrite()");
    stream.close();
  });

  Deno.test(`send() of ${size} bytes that the connection takes in parts sends all, in order`, async () => {
    const random = randomNumbers(size);
    const conn = new FakeConn();
    conn.takes = () => 1 + Math.floor(random() * size / 4);
    const stream = new SocketStream(conn);
    await stream.send(pattern(size));
    assertSameBytes(conn.written, pattern(size));
    assertEquals(stream.bytesWritten, size);
    stream.close();
  });
}

Deno.test("what was written leaves also while the handler waits for something else", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  const wrote = conn.nextWrite();
  const somethingElse = setTimeout(() => {}, 60_000);
  await stream.write("abc");
  await wrote;
  clearTimeout(somethingElse);
  assertEquals(textOf(conn.written), "abc");
  stream.close();
});

Deno.test("what is written while a write is under way leaves as one write behind it", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn);
  const sent = stream.send("first");
  for (const word of ["a", "b", "c"]) await stream.write(word);
  await turnEnd();
  conn.releaseWrites();
  await sent;
  await stream.flush();
  assertEquals(conn.writes.map(textOf), ["first", "abc"]);
  stream.close();
});

Deno.test("what is written in a later turn leaves as well", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  for (const word of ["a", "b", "c"]) {
    stream.write(word);
    await turnEnd();
  }
  assertEquals(conn.writes.map(textOf), ["a", "b", "c"]);
  stream.close();
});

Deno.test("several streams that write in one turn all send", async () => {
  const conns = Array.from({ length: 100 }, () => new FakeConn());
  const streams = conns.map((conn) => new SocketStream(conn));
  for (const [index, stream] of streams.entries()) {
    stream.write("of ");
    stream.write(`${index}`);
  }
  await turnEnd();
  for (const [index, conn] of conns.entries()) assertEquals(conn.writes.map(textOf), [`of ${index}`]);
  for (const stream of streams) stream.close();
});

Deno.test("a stream that fails at the end of a turn does not keep others from sending", async () => {
  const broken = new FakeConn().failWrites(brokenPipe());
  const sound = new FakeConn();
  const streams = [broken, sound].map((conn) => new SocketStream(conn));
  for (const stream of streams) stream.write("abc");
  await turnEnd();
  assertEquals(textOf(sound.written), "abc");
  for (const stream of streams) stream.close();
});

Deno.test("send() resolves only when the connection has taken all", async () => {
  const conn = new FakeConn().holdWrites();
  conn.takes = () => 2;
  const stream = new SocketStream(conn);
  const sent = stream.send("abcde");
  for (const taken of [2, 4]) {
    conn.releaseOneWrite();
    assert(await isPending(sent));
    assertEquals(stream.bytesWritten, taken);
  }
  conn.releaseWrites();
  await sent;
  assertEquals(stream.bytesWritten, 5);
  stream.close();
});

Deno.test("write(), send() and writeFrame() go out whole and in the order of the calls, whatever their sizes", async () => {
  const seed = 20_260_801;
  const random = randomNumbers(seed);
  const upTo = (most: number) => Math.floor(random() * (most + 1));
  for (let round = 0; round < 200; round++) {
    const conn = new FakeConn();
    const most = 1 + upTo(20_000);
    conn.takes = () => 1 + upTo(most);
    const stream = new SocketStream(conn, { highWaterMark: upTo(50_000) });
    const expected: Uint8Array[] = [];
    const calls: Promise<void>[] = [];
    for (let call = upTo(20); call >= 0; call--) {
      const data = pattern(random() < 0.1 ? 16_384 * upTo(2) : upTo(random() < 0.8 ? 50 : 40_000), upTo(250));
      const how = upTo(4);
      if (how < 2) calls.push(stream.write(data));
      else if (how === 2) calls.push(stream.send(data));
      else if (how === 3) calls.push(stream.writeFrame(data));
      else calls.push(stream.flush());
      if (how === 3) expected.push(new Uint8Array([0, 0, data.length >> 8, data.length]));
      if (how < 4) expected.push(data);
      if (random() < 0.2) await Promise.resolve();
      if (random() < 0.02) await turnEnd();
    }
    await Promise.all(calls);
    await stream.flush();
    assertSameBytes(conn.written, concat(expected), `round ${round} of seed ${seed}`);
    assertEquals(stream.bytesWritten, concat(expected).length, `round ${round} of seed ${seed}`);
    stream.close();
  }
});

Deno.test("write() resolves at once up to highWaterMark, and beyond it when its bytes were taken", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn, { highWaterMark: 10 });
  await stream.write("0123456789");
  const beyond = stream.write("abc");
  assert(await isPending(beyond));
  conn.releaseWrites();
  await beyond;
  assertEquals(textOf(conn.written), "0123456789abc");
  conn.holdWrites();
  await stream.write("0123456789");
  conn.releaseWrites();
  await stream.flush();
  stream.close();
});

Deno.test("a loop that awaits write() never has more than highWaterMark bytes waiting", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn, { highWaterMark: 1_000 });
  for (let written = 100; written <= 50_000; written += 100) {
    await stream.write(pattern(100));
    const waiting = written - conn.written.length;
    assert(waiting <= 1_000, `${waiting} bytes wait`);
  }
  stream.close();
  await conn.whenClosed;
});

Deno.test("with highWaterMark 0, write() resolves when its bytes were taken", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn, { highWaterMark: 0 });
  const written = stream.write("a");
  assert(await isPending(written));
  conn.releaseWrites();
  await written;
  assertEquals(textOf(conn.written), "a");
  stream.close();
});

Deno.test("with highWaterMark Infinity, write() never waits", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn, { highWaterMark: Infinity });
  for (let count = 0; count < 100; count++) await stream.write(pattern(10_000));
  conn.releaseWrites();
  await stream.flush();
  assertEquals(conn.written.length, 1_000_000);
  stream.close();
});

Deno.test("write() of text counts bytes, not characters, towards highWaterMark", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn, { highWaterMark: 10 });
  stream.send("x");
  await stream.write("€€€");
  assert(await isPending(stream.write("€")), "12 bytes are buffered, and 10 are allowed");
  conn.releaseWrites();
  await stream.flush();
  assertEquals(conn.written, bytesOf("x€€€€"));
  stream.close();
});

Deno.test("writeFrame() of nothing waits, too, for a peer that reads nothing", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn, { highWaterMark: 100 });
  stream.send("x");
  let frames = 0;
  const writing = (async () => {
    for (; frames < 1_000; frames++) await stream.writeFrame("");
  })();
  await turnEnd();
  assert(frames <= 25, `${frames} frames of 4 bytes wait, and 100 bytes are allowed`);
  conn.releaseWrites();
  await writing;
  await stream.flush();
  assertEquals(conn.written.length, 1 + 4_000);
  stream.close();
});

Deno.test("bytes that were sent make room again below highWaterMark", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn, { highWaterMark: 32_768 });
  for (let round = 0; round < 20; round++) {
    conn.holdWrites();
    await stream.write(pattern(20_000));
    await stream.write(pattern(12_768));
    assert(await isPending(stream.write("x")));
    conn.releaseWrites();
    await stream.flush();
  }
  assertEquals(conn.written.length, 20 * 32_769);
  stream.close();
});

for (const call of ["write", "send"] as const) {
  for (const size of [10, 100_000]) {
    Deno.test(`the ${size} bytes of a ${call}() may be changed as soon as it resolves`, async () => {
      const conn = new FakeConn();
      const stream = new SocketStream(conn);
      const bytes = pattern(size);
      await stream[call](bytes);
      bytes.fill(255);
      await stream.flush();
      assertSameBytes(conn.written, pattern(size));
      stream.close();
    });
  }

  Deno.test(`${call}() sends text as UTF-8`, async () => {
    const conn = new FakeConn();
    const stream = new SocketStream(conn);
    await stream[call]("aé€😀");
    await stream.flush();
    assertEquals(conn.written, bytesOf("aé€😀"));
    assertEquals(stream.bytesWritten, 10);
    stream.close();
  });

  Deno.test(`${call}() of nothing resolves, and the connection hears nothing of it`, async () => {
    const conn = new FakeConn();
    const stream = new SocketStream(conn);
    await stream[call]("");
    await stream[call](new Uint8Array(0));
    await stream.flush();
    await turnEnd();
    assertEquals(conn.calls, []);
    stream.close();
  });

  Deno.test(`${call}() after closeWrite() rejects, and says why`, async () => {
    const conn = new FakeConn();
    const stream = new SocketStream(conn);
    await stream.send("abc");
    await stream.closeWrite();
    const error = await rejectionOf(stream[call]("more"));
    assert(error instanceof Deno.errors.BrokenPipe);
    assertMatch(error.message, new RegExp(`${call}\\(\\).*closeWrite\\(\\)`));
    await turnEnd();
    assertEquals(conn.calls, ["write(3)", "closeWrite()"]);
    stream.close();
  });
}

Deno.test("flush() of nothing resolves", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  await stream.flush();
  await stream.closeWrite();
  await stream.flush();
  assertEquals(conn.calls, ["closeWrite()"]);
  stream.close();
});

Deno.test("closeWrite() ends the stream behind all that was written before it", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn, { highWaterMark: 4 });
  stream.send("abc");
  stream.write("def");
  stream.write("over the mark");
  const ended = stream.closeWrite();
  assert(await isPending(ended));
  conn.releaseWrites();
  await ended;
  assertEquals(conn.calls, ["write(3)", "write(3)", "write(13)", "closeWrite()"]);
  stream.close();
});

Deno.test("closeWrite() can be called again, and ends the stream once", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  await stream.closeWrite();
  await stream.closeWrite();
  assertEquals(conn.calls, ["closeWrite()"]);
  stream.close();
});

Deno.test("a second closeWrite() resolves no earlier than the first", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn);
  stream.write("abc");
  const first = stream.closeWrite();
  const second = stream.closeWrite();
  assert(await isPending(second));
  conn.releaseWrites();
  await first;
  await second;
  stream.close();
});

const writes: Record<string, (stream: SocketStream) => Promise<void>> = {
  "write()": (stream) => stream.write("more"),
  "send()": (stream) => stream.send("more"),
  "writeFrame()": (stream) => stream.writeFrame("more"),
  "flush()": (stream) => stream.flush(),
  "closeWrite()": (stream) => stream.closeWrite(),
};

for (const [call, write] of Object.entries(writes)) {
  for (const error of [brokenPipe(), connectionReset()]) {
    Deno.test(`the ${error.name} of a write that nobody awaited shows at the next ${call}`, async () => {
      const stream = new SocketStream(new FakeConn().failWrites(error));
      await stream.write("abc");
      await turnEnd();
      assertEquals(await rejectionOf(write(stream)), error);
      assertEquals(await rejectionOf(write(stream)), error);
      stream.close();
    });
  }
}

Deno.test("a write that fails rejects all that waits behind it, and nothing of it is sent", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn, { highWaterMark: 4 });
  const waiting = [stream.send("a"), stream.write("over the mark"), stream.send("b"), stream.flush()];
  stream.write("c");
  waiting.push(stream.closeWrite());
  conn.failWrites(connectionReset());
  for (const call of waiting) await assertRejects(() => call, Deno.errors.ConnectionReset);
  await turnEnd();
  assertEquals(conn.calls, []);
  stream.close();
});

Deno.test("a write that fails in its middle rejects, and counts what was taken", async () => {
  const conn = new FakeConn().holdWrites();
  conn.takes = () => 2;
  const stream = new SocketStream(conn);
  const sent = stream.send("abcdef");
  conn.releaseOneWrite();
  await turnEnd();
  conn.failWrites(brokenPipe());
  await assertRejects(() => sent, Deno.errors.BrokenPipe);
  assertEquals(stream.bytesWritten, 2);
  stream.close();
});

Deno.test("after a write that failed, what the peer has sent can still be read", async () => {
  const conn = new FakeConn().failWrites(brokenPipe()).give("last ", "words\n").end();
  const stream = new SocketStream(conn);
  await assertRejects(() => stream.send("abc"), Deno.errors.BrokenPipe);
  assertEquals(await stream.readLine(), "last words");
  assertEquals(await stream.readLine(), null);
  stream.close();
});

Deno.test("a write to a peer that takes nothing does not keep reads from being answered", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn);
  const sent = stream.send("abc");
  const line = stream.readLine();
  conn.give("hello\n");
  assertEquals(await line, "hello");
  conn.releaseWrites();
  await sent;
  stream.close();
});

Deno.test("bytesWritten counts what the connection has taken, not what waits", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn);
  await stream.write("abc");
  assertEquals(stream.bytesWritten, 0);
  const flushed = stream.flush();
  conn.releaseWrites();
  await flushed;
  assertEquals(stream.bytesWritten, 3);
  await stream.writeFrame("de", { lengthBytes: 2 });
  await stream.flush();
  assertEquals(stream.bytesWritten, 7);
  stream.close();
});

Deno.test("bytesBuffered counts what waits: in the block, as text, in the queue, and in a send() under way", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn);
  assertEquals(stream.bytesBuffered, 0);
  const sent = stream.send(pattern(10));
  assertEquals(stream.bytesBuffered, 10);
  stream.write("ü");
  stream.write(pattern(100));
  const waiting = stream.write(pattern(100_000));
  assertEquals(stream.bytesBuffered, 100_112);
  conn.releaseWrites();
  await Promise.all([sent, waiting]);
  assertEquals(stream.bytesBuffered, 0);
  stream.close();
});

Deno.test("bytesBuffered leaves a character whole that two writes of a turn cut in two", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  stream.write("\ud83e");
  assertEquals(stream.bytesBuffered, 3);
  stream.write("\udd95");
  assertEquals(stream.bytesBuffered, 4);
  await stream.flush();
  assertEquals(textOf(conn.written), "\ud83e\udd95");
  stream.close();
});

Deno.test("bytesBuffered counts what is left of a write that was taken in parts, and nothing after it failed", async () => {
  const conn = new FakeConn();
  conn.takes = () => {
    conn.holdWrites();
    return 7;
  };
  const stream = new SocketStream(conn, { highWaterMark: 0 });
  const failed = rejectionOf(stream.write(pattern(10)));
  assertEquals(stream.bytesBuffered, 10);
  await turnEnd();
  assertEquals(stream.bytesBuffered, 3);
  conn.failWrites(brokenPipe());
  await failed;
  assertEquals(stream.bytesBuffered, 0);
  stream.close();
});

Deno.test("blocks that streams share never mix their bytes", async () => {
  const conns = Array.from({ length: 20 }, () => new FakeConn());
  const random = randomNumbers(7);
  for (const conn of conns) conn.takes = () => 1 + Math.floor(random() * 10_000);
  const streams = conns.map((conn) => new SocketStream(conn));
  for (let round = 0; round < 20; round++) {
    await Promise.all(streams.map(async (stream, index) => {
      for (let part = 0; part < 5; part++) await stream.write(new Uint8Array(5_000).fill(index));
      if (random() < 0.5) await stream.flush();
    }));
  }
  await keptAlive(Promise.all(streams.map((stream) => stream.flush())));
  for (const [index, conn] of conns.entries()) {
    assertEquals(conn.written.length, 500_000);
    assert(conn.written.every((byte) => byte === index), `stream ${index} sent bytes of another`);
  }
  for (const stream of streams) stream.close();
});
