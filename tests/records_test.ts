/** Lines, delimited records, exact counts and frames: how they are read, and how frames are written. */

import { type FrameOptions, IncompleteReadError, LimitOverrunError, SocketStream } from "../mod.ts";
import { assert, assertEquals, assertMatch, assertRejects } from "../deps.ts";
import { bytesOf, concat, connectionReset, FakeConn, isPending, textOf, turnEnd } from "./fake_conn.ts";
import { rejectionOf } from "./testing.ts";

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

Deno.test("a line over the limit is refused behind a short one that came with it", async () => {
  const stream = new SocketStream(new FakeConn().give("ab\nfar too long\nc\n").end(), { limit: 4 });
  assertEquals(await stream.readLine(), "ab");
  await assertRejects(() => stream.readLine(), LimitOverrunError);
  stream.close();
});

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

Deno.test("readUntil() refuses an empty delimiter, and none at all", async () => {
  const stream = new SocketStream(new FakeConn().give("abc").end());
  await assertRejects(() => stream.readUntil(""), RangeError);
  await assertRejects(() => stream.readUntil(new Uint8Array(0)), RangeError);
  await assertRejects(() => stream.readUntil([]), RangeError);
  await assertRejects(() => stream.readUntil(["a", ""]), RangeError);
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

/** What comes, the delimiters, and the records that it is. */
const recordCases: [string, string[], string[]][] = [
  ["a;b\nc;", [";", "\n"], ["a;", "b\n", "c;"]],
  ["a;b\nc;", ["\n", ";"], ["a;", "b\n", "c;"]],
  ["one\r\ntwo\nthree\r\n", ["\n", "\r\n"], ["one\r\n", "two\n", "three\r\n"]],
  ["a--->b->", ["->", "--->"], ["a--->", "b->"]],
  ["ab\0\0c\0", ["\0\0", "\0"], ["ab\0", "\0", "c\0"]],
  ["xabcb", ["abc", "b"], ["xab", "cb"]],
  ["xaabyb", ["aab", "b"], ["xaab", "yb"]],
];

for (const [text, delimiters, records] of recordCases) {
  Deno.test(`readUntil(${Deno.inspect(delimiters)}) ends a record where the first delimiter ends, in any cut of ${Deno.inspect(text)}`, async () => {
    for (let cut = 0; cut <= text.length; cut++) {
      const stream = new SocketStream(new FakeConn().give(text.slice(0, cut), text.slice(cut)).end());
      for (const record of records) {
        // Bytes and text may be mixed.
        const given = delimiters.map((delimiter, index) => index === 0 ? bytesOf(delimiter) : delimiter);
        assertEquals(textOf(await stream.readUntil(given)), record, `cut at ${cut}`);
      }
      assertEquals(await stream.readUntil(delimiters), null);
      stream.close();
    }
  });
}

Deno.test("readUntil() does not wait for a longer delimiter when a shorter one has ended the record", async () => {
  const conn = new FakeConn().give("a\n");
  const stream = new SocketStream(conn);
  assertEquals(textOf(await stream.readUntil(["\n", "\n\n"])), "a\n");
  stream.close();
});

Deno.test("readUntil() of several delimiters refuses a record over the limit, and skips none of a delimiter", async () => {
  const stream = new SocketStream(new FakeConn().give("abcdefgh-", "-;next").end(), { limit: 4 });
  const error = await rejectionOf(stream.readUntil(["--;", ";"]));
  assert(error instanceof LimitOverrunError);
  assertEquals(textOf(await stream.readExactly(error.consumed)), "abcdefg");
  assertEquals(textOf(await stream.readUntil(["--;", ";"])), "h--;");
  stream.close();
});

Deno.test("readUntil() of many delimiters searches no byte twice, however often it waits", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn, { limit: Infinity });
  const record = stream.readUntil(Array.from({ length: 20 }, (_, index) => `\0${String.fromCharCode(97 + index)}`));
  const begun = performance.now();
  for (let count = 0; count < 200; count++) {
    conn.give(new Uint8Array(1_000));
    await turnEnd();
  }
  conn.give("t");
  assertEquals((await record)?.length, 200_001);
  const took = performance.now() - begun;
  assert(took < 5_000, `${took} ms`); // It takes a hundred times as long if it begins anew each time.
  stream.close();
});

// peek()

Deno.test("peek() gives bytes that the next read gives again", async () => {
  const stream = new SocketStream(new FakeConn().give("abc", "def").end());
  assertEquals(textOf(await stream.peek(2)), "ab");
  assertEquals(textOf(await stream.peek(5)), "abcde");
  assertEquals(textOf(await stream.peek(5)), "abcde");
  assertEquals(textOf(await stream.readExactly(6)), "abcdef");
  stream.close();
});

Deno.test("peek() gives fewer bytes if the stream ends before, and none at its end", async () => {
  const stream = new SocketStream(new FakeConn().give("abc").end());
  assertEquals(textOf(await stream.peek(10)), "abc");
  assertEquals(textOf(await stream.recv()), "abc");
  assertEquals((await stream.peek(1)).length, 0);
  assertEquals(await stream.recv(), null);
  stream.close();
});

Deno.test("peek() waits for all of its bytes", async () => {
  const conn = new FakeConn().give("ab");
  const stream = new SocketStream(conn);
  const peeked = stream.peek(3);
  assert(await isPending(peeked));
  conn.give("cd");
  assertEquals(textOf(await peeked), "abc");
  assertEquals(textOf(await stream.recv()), "abcd");
  stream.close();
});

Deno.test("peek() gives a copy: changing it changes nothing that is read", async () => {
  const stream = new SocketStream(new FakeConn().give("abc\nd"));
  (await stream.peek(3)).fill(0);
  assertEquals(await stream.readLine(), "abc");
  stream.close();
});

Deno.test("peek(0) resolves at once to nothing", async () => {
  const stream = new SocketStream(new FakeConn());
  assertEquals((await stream.peek(0)).length, 0);
  stream.close();
});

Deno.test("peek() may look further than the limit of lines", async () => {
  const stream = new SocketStream(new FakeConn().give("abcdefgh"), { limit: 4 });
  assertEquals(textOf(await stream.peek(8)), "abcdefgh");
  stream.close();
});

Deno.test("peek() before a reset gives what came, and rejects beyond it", async () => {
  const stream = new SocketStream(new FakeConn().give("abc").failReads(connectionReset()));
  assertEquals(textOf(await stream.peek(3)), "abc");
  await assertRejects(() => stream.peek(4), Deno.errors.ConnectionReset);
  assertEquals(textOf(await stream.recv()), "abc");
  stream.close();
});

for (const count of [-1, 0.5, NaN, Infinity]) {
  Deno.test(`peek(${count}) rejects, and reads nothing`, async () => {
    const stream = new SocketStream(new FakeConn().give("abc").end());
    await assertRejects(() => stream.peek(count), RangeError);
    assertEquals(textOf(await stream.recv()), "abc");
    stream.close();
  });
}

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
