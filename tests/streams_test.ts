import { type FrameOptions, IncompleteReadError, LimitOverrunError, socketPair, SocketStream } from "../mod.ts";
import { assert, assertEquals, assertMatch, assertRejects, assertStrictEquals } from "../deps.ts";
import {
  assertSameBytes,
  bytesOf,
  concat,
  connectionReset,
  FakeConn,
  isPending,
  pattern,
  tcpConns,
  textOf,
  turnEnd,
} from "./fake_conn.ts";
import { networkTest, rejectionOf } from "./testing.ts";

Deno.test("readLine() reads a line that is split over 50 segments", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  const text = "0123456789".repeat(5);
  const line = stream.readLine();
  for (const digit of text) {
    conn.give(digit);
    await turnEnd();
  }
  conn.give("\n");
  assertEquals(await line, text);
  stream.close();
});

Deno.test("lines() reads 1,000 lines that come in one segment", async () => {
  const lines = Array.from({ length: 1_000 }, (_, index) => `line ${index}`);
  const stream = new SocketStream(new FakeConn().give(lines.join("\n") + "\n").end());
  assertEquals(await Array.fromAsync(stream.lines()), lines);
  stream.close();
});

/** What comes, in these segments, and the lines that it is. */
const lineCases: Record<string, [segments: (string | Uint8Array)[], lines: string[]]> = {
  "ended by \\r\\n": [["one\r\ntwo\r\n"], ["one", "two"]],
  "ended by \\n and \\r\\n in turn": [["one\ntwo\r\nthree\n"], ["one", "two", "three"]],
  "whose \\r\\n is cut in two": [["one\r", "\ntwo\r", "\n"], ["one", "two"]],
  "with a lone \\r inside": [["one\rtwo\n\rthree\n"], ["one\rtwo", "\rthree"]],
  "with two \\r at the end": [["one\r\r\n"], ["one\r"]],
  "that are empty": [["\n\r\n\n"], ["", "", ""]],
  "of which the last has no end": [["one\ntwo"], ["one", "two"]],
  "of which the last ends with a lone \\r": [["one\ntwo\r"], ["one", "two\r"]],
  "whose last segment is the end of the line": [["one", "\n"], ["one"]],
  "of no bytes at all": [[], []],
  "of one byte": [["a"], ["a"]],
  "with a byte order mark, which is the caller's to see": [["\ufeffone\n\ufefftwo\n"], ["\ufeffone", "\ufefftwo"]],
  "with NUL": [["a\0b\n"], ["a\0b"]],
  "with other line separators, which are text": [["a\u2028b\u0085c\fd\ve\n"], ["a\u2028b\u0085c\fd\ve"]],
  "whose characters are cut in two": [cutEverywhere("é€😀\nß\n"), ["é€😀", "ß"]],
  "that are no UTF-8": [[new Uint8Array([0x61, 0xff, 0x62, 0x0a, 0xc3, 0x0a, 0x63, 0x0a])], [
    "a\ufffdb",
    "\ufffd",
    "c",
  ]],
};

for (const [which, [segments, lines]] of Object.entries(lineCases)) {
  Deno.test(`readLine() reads lines ${which}`, async () => {
    const stream = new SocketStream(new FakeConn().give(...segments).end());
    for (const line of lines) assertEquals(await stream.readLine(), line);
    assertEquals(await stream.readLine(), null);
    assertEquals(await stream.readLine(), null);
    stream.close();
  });

  Deno.test(`lines() iterates over lines ${which}`, async () => {
    const stream = new SocketStream(new FakeConn().give(...segments).end());
    assertEquals(await Array.fromAsync(stream.lines()), lines);
    stream.close();
  });
}

for (const end of ["\n", "\r\n"]) {
  Deno.test(`a line of exactly the limit is read, ended by ${Deno.inspect(end)} and in any cut`, async () => {
    const text = `abcd${end}efgh${end}`;
    for (let cut = 0; cut <= text.length; cut++) {
      const conn = new FakeConn().give(text.slice(0, cut));
      const stream = new SocketStream(conn, { limit: 4 });
      const lines = [await lineBehind(stream, conn, text.slice(cut)), await stream.readLine()];
      assertEquals(lines, ["abcd", "efgh"], `cut at ${cut}`);
      stream.close();
    }
  });

  Deno.test(`a line of one byte over the limit is refused, ended by ${Deno.inspect(end)} and in any cut`, async () => {
    const text = `abcde${end}f\n`;
    for (let cut = 0; cut <= text.length; cut++) {
      const conn = new FakeConn().give(text.slice(0, cut));
      const stream = new SocketStream(conn, { limit: 4 });
      const error = await rejectionOf(lineBehind(stream, conn, text.slice(cut)));
      assert(error instanceof LimitOverrunError, `cut at ${cut}`);
      assertEquals(error.limit, 4);
      stream.close();
    }
  });
}

Deno.test("a last line without an end is refused as well when it is over the limit", async () => {
  const stream = new SocketStream(new FakeConn().give("abcd").end(), { limit: 4 });
  assertEquals(await stream.readLine(), "abcd");
  stream.close();
  const over = new SocketStream(new FakeConn().give("abcde").end(), { limit: 4 });
  await assertRejects(() => over.readLine(), LimitOverrunError);
  over.close();
});

Deno.test("a last line without an end is refused over the limit, also if it ends with half an end", async () => {
  const stream = new SocketStream(new FakeConn().give("aaa\r").end(), { limit: 3 });
  assertEquals(await stream.readLine().catch((error) => error.name), "LimitOverrunError");
  stream.close();
});

Deno.test("after LimitOverrunError the bytes are still there, and the same read rejects again", async () => {
  const stream = new SocketStream(new FakeConn().give("far too long\n").end(), { limit: 4 });
  for (let tries = 0; tries < 3; tries++) await assertRejects(() => stream.readLine(), LimitOverrunError);
  assertEquals(textOf(await stream.recv()), "far too long\n");
  stream.close();
});

Deno.test("after LimitOverrunError the stream goes on behind readExactly(error.consumed)", async () => {
  const stream = new SocketStream(new FakeConn().give("far too long", " a line\nnext\n").end(), { limit: 4 });
  const skipped: string[] = [];
  for (;;) {
    const line = await stream.readLine().catch((error) => error);
    if (!(line instanceof LimitOverrunError)) break;
    assert(line.consumed > 0);
    skipped.push(textOf(await stream.readExactly(line.consumed)));
  }
  assertEquals(skipped.join(""), "far too long a line");
  assertEquals(await stream.readLine(), "next");
  stream.close();
});

Deno.test("lines() goes on after LimitOverrunError when the caller has skipped the line", async () => {
  const stream = new SocketStream(new FakeConn().give("far too long\nnext\n").end(), { limit: 4 });
  const lines = stream.lines();
  const error = await rejectionOf(lines.next());
  assert(error instanceof LimitOverrunError);
  await stream.readExactly(error.consumed + 1);
  assertEquals(await lines.next(), { done: false, value: "next" });
  assertEquals(await lines.next(), { done: true, value: undefined });
  stream.close();
});

Deno.test("readUntil() keeps the delimiter, and finds it however it is cut", async () => {
  const text = "one--two----";
  for (let cut = 0; cut <= text.length; cut++) {
    const stream = new SocketStream(new FakeConn().give(text.slice(0, cut), text.slice(cut)).end());
    const records: string[] = [];
    for (let record = await stream.readUntil("--"); record !== null; record = await stream.readUntil("--")) {
      records.push(textOf(record));
    }
    assertEquals(records, ["one--", "two--", "--"]);
    stream.close();
  }
});

Deno.test("readUntil() finds a delimiter whose beginning comes several times", async () => {
  for (const segments of [["aaab|"], ["aa", "ab|"], ["a", "a", "a", "b", "|"]]) {
    const stream = new SocketStream(new FakeConn().give(...segments).end());
    assertEquals(textOf(await stream.readUntil("aab")), "aaab");
    assertEquals(textOf(await stream.recv()), "|");
    stream.close();
  }
});

Deno.test("readUntil() takes bytes, of which it keeps a copy", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  const delimiter = new Uint8Array([0, 255]);
  const record = stream.readUntil(delimiter);
  delimiter.fill(1);
  conn.give(new Uint8Array([1, 1, 0, 255, 2]));
  assertEquals(await record, new Uint8Array([1, 1, 0, 255]));
  stream.close();
});

Deno.test("readUntil() of a record inside of which the stream ends rejects with what came", async () => {
  const stream = new SocketStream(new FakeConn().give("whole;ha", "lf").end());
  assertEquals(textOf(await stream.readUntil(";")), "whole;");
  const error = await rejectionOf(stream.readUntil(";"));
  assert(error instanceof IncompleteReadError);
  assertEquals(textOf(error.partial), "half");
  assertEquals(error.expected, null);
  assertEquals(await stream.readUntil(";"), null);
  stream.close();
});

Deno.test("readUntil() of a record that ends with half a delimiter rejects with what came", async () => {
  const stream = new SocketStream(new FakeConn().give("abc-").end());
  const error = await rejectionOf(stream.readUntil("--"));
  assert(error instanceof IncompleteReadError);
  assertEquals(textOf(error.partial), "abc-");
  stream.close();
});

Deno.test("readUntil() refuses an empty delimiter", async () => {
  const stream = new SocketStream(new FakeConn().give("abc").end());
  await assertRejects(() => stream.readUntil(""), RangeError);
  await assertRejects(() => stream.readUntil(new Uint8Array(0)), RangeError);
  stream.close();
});

Deno.test("readUntil() reads a record of exactly the limit, and refuses one byte more, in any cut", async () => {
  for (const [record, isOver] of [["abcd", false], ["abcde", true]] as const) {
    const text = `${record}--f`;
    for (let cut = 0; cut <= text.length; cut++) {
      const stream = new SocketStream(new FakeConn().give(text.slice(0, cut), text.slice(cut)), { limit: 4 });
      const outcome = await stream.readUntil("--").catch((error) => error);
      if (isOver) assert(outcome instanceof LimitOverrunError, `cut at ${cut}`);
      else assertEquals(outcome, bytesOf("abcd--"), `cut at ${cut}`);
      stream.close();
    }
  }
});

Deno.test("the bytes that LimitOverrunError says can be skipped hold no part of the delimiter", async () => {
  const stream = new SocketStream(new FakeConn().give("abcdefgh-", "-next").end(), { limit: 4 });
  const error = await rejectionOf(stream.readUntil("--"));
  assert(error instanceof LimitOverrunError);
  assertEquals(textOf(await stream.readExactly(error.consumed)), "abcdefgh");
  assertEquals(textOf(await stream.readUntil("--")), "--");
  stream.close();
});

Deno.test("readExactly(0) resolves at once to nothing, also at the end of the stream", async () => {
  const stream = new SocketStream(new FakeConn());
  assertEquals((await stream.readExactly(0)).length, 0);
  stream.close();
  const ended = new SocketStream(new FakeConn().end());
  assertEquals(await ended.recv(), null);
  assertEquals((await ended.readExactly(0)).length, 0);
  ended.close();
});

Deno.test("readExactly() at the end of the stream rejects with what came and what was asked for", async () => {
  const stream = new SocketStream(new FakeConn().give("ab", "c").end());
  const error = await rejectionOf(stream.readExactly(10));
  assert(error instanceof IncompleteReadError);
  assertEquals(textOf(error.partial), "abc");
  assertEquals(error.expected, 10);
  const again = await rejectionOf(stream.readExactly(1));
  assert(again instanceof IncompleteReadError);
  assertEquals(again.partial.length, 0);
  stream.close();
});

const formats: FrameOptions[] = [
  { lengthBytes: 1 },
  { lengthBytes: 1, littleEndian: true },
  { lengthBytes: 2 },
  { lengthBytes: 2, littleEndian: true },
  { lengthBytes: 4 },
  { lengthBytes: 4, littleEndian: true },
  {},
];

for (const format of formats) {
  const prefixBytes = format.lengthBytes ?? 4;

  Deno.test(`frames(${Deno.inspect(format)}) reads what writeFrame() has written, in any cut`, async () => {
    const records = ["", "a", "x".repeat(255), "", "é€😀"];
    const conn = new FakeConn();
    const writer = new SocketStream(conn);
    for (const record of records) await writer.writeFrame(record, format);
    await writer.flush();
    writer.close();
    for (const size of [1, 2, 3, 100, 1_000]) {
      const stream = new SocketStream(new FakeConn().give(...chunksOf(conn.written, size)).end());
      assertEquals((await Array.fromAsync(stream.frames(format))).map(textOf), records);
      stream.close();
    }
  });

  Deno.test(`frames(${Deno.inspect(format)}) says what came when the stream ends inside a frame`, async () => {
    const conn = new FakeConn();
    const writer = new SocketStream(conn);
    await writer.writeFrame("abc", format);
    await writer.flush();
    writer.close();
    for (let length = 1; length < conn.written.length; length++) {
      const stream = new SocketStream(new FakeConn().give(conn.written.slice(0, length)).end());
      const error = await rejectionOf(stream.frames(format).next());
      assert(error instanceof IncompleteReadError);
      assertEquals(error.partial, conn.written.slice(0, length));
      assertEquals(error.expected, length < prefixBytes ? prefixBytes : prefixBytes + 3);
      stream.close();
    }
  });

  Deno.test(`frames(${Deno.inspect(format)}) reads a frame of exactly the limit, and refuses one byte more`, async () => {
    const conn = new FakeConn();
    const writer = new SocketStream(conn);
    await writer.writeFrame("abcd", format);
    await writer.writeFrame("abcde", format);
    await writer.flush();
    writer.close();
    const stream = new SocketStream(new FakeConn().give(conn.written).end(), { limit: 4 });
    const frames = stream.frames(format);
    assertEquals((await frames.next()).value, bytesOf("abcd"));
    const error = await rejectionOf(frames.next());
    assert(error instanceof LimitOverrunError);
    assertEquals(error.limit, 4);
    await stream.readExactly(error.consumed);
    assertEquals(textOf(await stream.recv()), "abcde");
    stream.close();
  });
}

Deno.test("a frame over the limit is refused as soon as its prefix has come", async () => {
  const stream = new SocketStream(new FakeConn().give(new Uint8Array([1, 0])), { limit: 255 });
  await assertRejects(() => stream.frames({ lengthBytes: 2 }).next(), LimitOverrunError);
  stream.close();
});

Deno.test("writeFrame() writes the length in the order of bytes that it is told", async () => {
  const prefixes: [FrameOptions, number[]][] = [
    [{ lengthBytes: 1 }, [3]],
    [{ lengthBytes: 2 }, [0, 3]],
    [{ lengthBytes: 2, littleEndian: true }, [3, 0]],
    [{ lengthBytes: 4 }, [0, 0, 0, 3]],
    [{ lengthBytes: 4, littleEndian: true }, [3, 0, 0, 0]],
  ];
  for (const [format, prefix] of prefixes) {
    const conn = new FakeConn();
    const stream = new SocketStream(conn);
    await stream.writeFrame("abc", format);
    await stream.flush();
    assertEquals(conn.written, concat([new Uint8Array(prefix), bytesOf("abc")]));
    stream.close();
  }
});

for (const [lengthBytes, most] of [[1, 255], [2, 65_535]] as const) {
  Deno.test(`writeFrame() takes ${most} bytes behind a prefix of ${lengthBytes}, and refuses one more`, async () => {
    const conn = new FakeConn();
    const stream = new SocketStream(conn);
    await stream.writeFrame(new Uint8Array(most), { lengthBytes });
    const error = await rejectionOf(stream.writeFrame(new Uint8Array(most + 1), { lengthBytes }));
    assert(error instanceof RangeError);
    assertMatch(error.message, new RegExp(`\\b${most + 1} bytes\\b`));
    await stream.flush();
    assertEquals(conn.written.length, lengthBytes + most);
    stream.close();
  });
}

Deno.test("writeFrame() of text counts its bytes and not its characters", async () => {
  const stream = new SocketStream(new FakeConn());
  await assertRejects(() => stream.writeFrame("€".repeat(100), { lengthBytes: 1 }), RangeError);
  stream.close();
});

/** The stream's iterators, which are left after their first item, and what is read behind it. */
const iterators: Record<string, (stream: SocketStream) => AsyncIterable<unknown>> = {
  "for await": (stream) => stream,
  "lines()": (stream) => stream.lines(),
  "frames()": (stream) => stream.frames({ lengthBytes: 1 }),
};

for (const [name, iterate] of Object.entries(iterators)) {
  Deno.test(`leaving ${name} early leaves the stream open, and what has come in it`, async () => {
    const conn = new FakeConn().give("\x02a\n");
    const stream = new SocketStream(conn);
    for await (const item of iterate(stream)) {
      assert(item !== undefined);
      break;
    }
    assert(!conn.isClosed);
    const line = stream.readLine();
    conn.give("second\n");
    assertEquals(await line, "second");
    await stream.send("answer");
    stream.close();
  });

  Deno.test(`${name} that an exception leaves keeps the stream open`, async () => {
    const stream = new SocketStream(new FakeConn().give("\x02a\n"));
    await assertRejects(async () => {
      for await (const _ of iterate(stream)) throw new RangeError("mine");
    }, RangeError);
    await stream.send("answer");
    stream.close();
  });

  Deno.test(`${name} throws what the read rejects with`, async () => {
    const stream = new SocketStream(new FakeConn().failReads(connectionReset()));
    await assertRejects(() => Array.fromAsync(iterate(stream)), Deno.errors.ConnectionReset);
    stream.close();
  });

  Deno.test(`${name} ends with the stream, and stays at its end`, async () => {
    const stream = new SocketStream(new FakeConn().end());
    for (let tries = 0; tries < 3; tries++) assertEquals(await Array.fromAsync(iterate(stream)), []);
    stream.close();
  });
}

Deno.test("for await gives the chunks as they come", async () => {
  const conn = new FakeConn().give("one", "two", "three").end();
  const stream = new SocketStream(conn);
  assertEquals((await Array.fromAsync(stream)).map(textOf), ["one", "two", "three"]);
  stream.close();
});

const reads: Record<string, (stream: SocketStream) => Promise<unknown>> = {
  "recv()": (stream) => stream.recv(),
  "read()": (stream) => stream.read(new Uint8Array(8)),
  "readExactly()": (stream) => stream.readExactly(8),
  "readUntil()": (stream) => stream.readUntil("--"),
  "readLine()": (stream) => stream.readLine(),
  "lines()": (stream) => stream.lines().next(),
  "frames()": (stream) => stream.frames().next(),
  "for await": (stream) => stream[Symbol.asyncIterator]().next(),
};

Deno.test("a recv() that is refused does not change how much the one that waits may take", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  const waiting = stream.recv(2);
  await assertRejects(() => stream.recv(1), Deno.errors.Busy);
  conn.give("abc");
  assertEquals(textOf(await waiting), "ab");
  stream.close();
});

Deno.test("a read(into) that is refused does not get the bytes of the one that waits", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  const [ours, other] = [new Uint8Array(4), new Uint8Array(4)];
  const waiting = stream.read(ours);
  await assertRejects(() => stream.read(other), Deno.errors.Busy);
  conn.give("abc");
  assertEquals(await waiting, 3);
  assertEquals([textOf(ours.subarray(0, 3)), other[0]], ["abc", 0]);
  stream.close();
});

for (const [waiting, first] of Object.entries(reads)) {
  Deno.test(`a read while ${waiting} waits rejects, naming both, and does not disturb the first`, async () => {
    const conn = new FakeConn();
    const stream = new SocketStream(conn);
    const answer = first(stream);
    for (const [refused, second] of Object.entries(reads)) {
      const error = await rejectionOf(second(stream));
      assert(error instanceof Deno.errors.Busy);
      assertEquals(error.message.startsWith(`Cannot ${refused}: ${waiting} `), true, error.message);
    }
    assert(await isPending(answer));
    conn.end();
    await answer.catch((error) => assert(error instanceof IncompleteReadError));
    stream.close();
  });

  Deno.test(`${waiting} that waits rejects when the stream is closed, and so do later calls`, async () => {
    const conn = new FakeConn();
    const stream = new SocketStream(conn);
    const answer = first(stream);
    stream.close();
    await assertRejects(() => answer, Deno.errors.BadResource);
    assert(conn.isClosed);
    await assertRejects(() => first(stream), Deno.errors.BadResource);
  });

  Deno.test(`${waiting} rejects with the reset of a connection, each time`, async () => {
    const stream = new SocketStream(new FakeConn().failReads(connectionReset()));
    for (let tries = 0; tries < 2; tries++) {
      await assertRejects(() => first(stream), Deno.errors.ConnectionReset);
    }
    stream.close();
  });
}

Deno.test("what came before a reset is read before the reset shows", async () => {
  const conn = new FakeConn().give("one\ntwo\nth").failReads(connectionReset());
  const stream = new SocketStream(conn);
  assertEquals(await stream.readLine(), "one");
  assertEquals(await stream.readLine(), "two");
  await assertRejects(() => stream.readLine(), Deno.errors.ConnectionReset);
  assertEquals(textOf(await stream.recv()), "th");
  await assertRejects(() => stream.recv(), Deno.errors.ConnectionReset);
  stream.close();
});

Deno.test("a reset is no end: lines() does not give the half of a line as a line", async () => {
  const stream = new SocketStream(new FakeConn().give("whole\nha").failReads(connectionReset()));
  const lines: string[] = [];
  await assertRejects(async () => {
    for await (const line of stream.lines()) lines.push(line);
  }, Deno.errors.ConnectionReset);
  assertEquals(lines, ["whole"]);
  stream.close();
});

Deno.test("after the end of the peer's side, ours goes on writing", async () => {
  const conn = new FakeConn().end();
  const stream = new SocketStream(conn);
  assertEquals(await stream.recv(), null);
  await stream.send("still here");
  assertEquals(textOf(conn.written), "still here");
  assert(!conn.isClosed);
  stream.close();
});

Deno.test("after closeWrite(), reading goes on", async () => {
  const conn = new FakeConn().give("still ", "here").end();
  const stream = new SocketStream(conn);
  await stream.closeWrite();
  assertEquals(textOf(await stream.readExactly(10)), "still here");
  assertEquals(await stream.recv(), null);
  stream.close();
});

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
    ...Object.values(reads),
    () => stream.write("a"),
    () => stream.send("a"),
    () => stream.flush(),
    () => stream.writeFrame("a"),
    () => stream.closeWrite(),
  ];
  for (const call of calls) await assertRejects(() => call(stream), Deno.errors.BadResource);
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

Deno.test("readable gives all that comes, then its end", async () => {
  const stream = new SocketStream(new FakeConn().give("one", "two").end());
  assertEquals((await Array.fromAsync(stream.readable)).map(textOf).join(" "), "one two");
  await stream.send("the end of readable closes nothing");
  stream.close();
});

Deno.test("readable and writable are made once", () => {
  const stream = new SocketStream(new FakeConn());
  assertStrictEquals(stream.readable, stream.readable);
  assertStrictEquals(stream.writable, stream.writable);
  stream.close();
});

Deno.test("readable reads nothing ahead: what it was not asked for is there for other reads", async () => {
  const stream = new SocketStream(new FakeConn().give("one", "two").end());
  const reader = stream.readable.getReader();
  assertEquals(textOf((await reader.read()).value ?? null), "one");
  await turnEnd();
  reader.releaseLock();
  assertEquals(textOf(await stream.recv()), "two");
  stream.close();
});

Deno.test("readable fails with the error of the connection", async () => {
  const stream = new SocketStream(new FakeConn().give("one").failReads(connectionReset()));
  await assertRejects(() => Array.fromAsync(stream.readable), Deno.errors.ConnectionReset);
  stream.close();
});

Deno.test("cancelling readable closes both sides", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  await stream.readable.cancel();
  assert(conn.isClosed);
});

Deno.test("cancelling readable while it waits closes both sides", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  const reader = stream.readable.getReader();
  const reading = reader.read();
  await reader.cancel();
  assertEquals((await reading).done, true);
  assert(conn.isClosed);
});

Deno.test("writable sends what is written, and closing it ends our side only", async () => {
  const conn = new FakeConn().give("answer").end();
  const stream = new SocketStream(conn);
  const writer = stream.writable.getWriter();
  await writer.write(bytesOf("one"));
  await writer.write(bytesOf("two"));
  await writer.close();
  assertEquals(conn.calls, ["write(3)", "write(3)", "closeWrite()"]);
  assertEquals(textOf(await stream.recv()), "answer");
  stream.close();
});

Deno.test("writable holds its writer back until the peer takes the bytes", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn);
  const writer = stream.writable.getWriter();
  const written = writer.write(bytesOf("one"));
  assert(await isPending(written));
  conn.releaseWrites();
  await written;
  stream.close();
});

Deno.test("aborting writable closes both sides", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  await stream.writable.abort(new Error("mine"));
  await conn.whenClosed;
});

Deno.test("readable.pipeTo(writable) is an echo that ends with its peer's side", async () => {
  const [ours, theirs] = socketPair();
  const echoed = ours.readable.pipeTo(ours.writable);
  const sent = pattern(500_000);
  const sending = theirs.send(sent).then(() => theirs.closeWrite());
  const came = await Array.fromAsync(theirs);
  await Promise.all([sending, echoed]);
  assertSameBytes(concat(came), sent);
  ours.close();
  theirs.close();
});

Deno.test("a web stream can be piped to the peer", async () => {
  const [ours, theirs] = socketPair();
  await ReadableStream.from([bytesOf("one "), bytesOf("two")]).pipeTo(ours.writable);
  assertEquals(textOf(await theirs.readExactly(7)), "one two");
  assertEquals(await theirs.recv(), null);
  ours.close();
  theirs.close();
});

Deno.test("localAddress and remoteAddress are those of the connection", () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  assertEquals(stream.localAddress, conn.localAddr);
  assertEquals(stream.remoteAddress, conn.remoteAddr);
  stream.close();
});

networkTest("over TCP, each side ends on its own, and reads on", async () => {
  const [client, server] = (await tcpConns()).map((conn) => new SocketStream(conn));
  assert(client !== undefined && server !== undefined);
  await client.send("question\n");
  await client.closeWrite();
  assertEquals(await Array.fromAsync(server.lines()), ["question"]);
  await server.send("answer\n");
  await server.closeWrite();
  assertEquals(await Array.fromAsync(client.lines()), ["answer"]);
  client.close();
  server.close();
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

networkTest("over TCP, a peer that resets makes writes reject, and not the process end", async () => {
  const [client, server] = (await tcpConns()).map((conn) => new SocketStream(conn));
  assert(client !== undefined && server !== undefined);
  await server.send("never read");
  await client.send("to be read");
  assertEquals(textOf(await client.recv(1)), "n");
  client.close(); // Linux resets a connection that is closed with bytes unread, so this may be an end or a reset.
  const error = await rejectionOf((async () => {
    for (;;) await server.send(pattern(100_000));
  })());
  assert(error instanceof Deno.errors.ConnectionReset || error instanceof Deno.errors.BrokenPipe, error.name);
  server.close();
});

networkTest("over TCP, a read(into) is answered, and close() ends one that waits", async () => {
  const [client, server] = (await tcpConns()).map((conn) => new SocketStream(conn));
  assert(client !== undefined && server !== undefined);
  const into = new Uint8Array(16);
  const reading = server.read(into);
  await client.send("abc");
  assertEquals(await reading, 3);
  const waiting = server.read(into);
  server.close();
  await assertRejects(() => waiting, Deno.errors.BadResource);
  assertEquals(await client.recv(), null);
  client.close();
});

/** A line whose `rest` comes only when the stream waits for it. */
async function lineBehind(stream: SocketStream, conn: FakeConn, rest: string): Promise<string | null> {
  const line = stream.readLine();
  await turnEnd();
  conn.give(rest);
  return await line;
}

/** `text`, one byte after the other. */
function cutEverywhere(text: string): Uint8Array[] {
  return chunksOf(bytesOf(text), 1);
}

function chunksOf(bytes: Uint8Array, size: number): Uint8Array[] {
  return Array.from({ length: Math.ceil(bytes.length / size) }, (_, at) => bytes.slice(at * size, (at + 1) * size));
}
