import { IncompleteReadError, SocketStream } from "../mod.ts";
import { assert, assertEquals, assertRejects } from "../deps.ts";
import { assertSameBytes, concat, FakeConn, pattern, randomNumbers, textOf, turnEnd } from "./fake_conn.ts";
import { rejectionOf } from "./testing.ts";

/** Sizes around those at which the buffer grows, copies and hands out parts of itself. */
const SIZES = [1, 511, 512, 513, 1_024, 1_025, 2_048, 10_000, 65_535, 65_536, 65_537];

for (const size of SIZES) {
  Deno.test(`chunks of ${size} bytes are the caller's: later reads never change them`, async () => {
    const conn = new FakeConn();
    const stream = new SocketStream(conn);
    const chunks: Uint8Array[] = [];
    const sent: Uint8Array[] = [];
    for (let round = 0; round < 20; round++) {
      sent.push(pattern(size, round));
      conn.give(pattern(size, round));
      for (let came = 0; came < size;) {
        const chunk = await stream.recv();
        assert(chunk !== null);
        chunks.push(chunk);
        came += chunk.length;
      }
    }
    assertSameBytes(concat(chunks), concat(sent));
    stream.close();
  });

  Deno.test(`a caller that overwrites its chunks of ${size} bytes changes nothing that is still to be read`, async () => {
    const conn = new FakeConn().give(pattern(3 * size)).end();
    const stream = new SocketStream(conn);
    const came: Uint8Array[] = [];
    for (let chunk = await stream.recv(size); chunk !== null; chunk = await stream.recv(size)) {
      came.push(chunk.slice());
      chunk.fill(255);
    }
    assertSameBytes(concat(came), pattern(3 * size));
    stream.close();
  });

  Deno.test(`readExactly() of ${size} bytes that come one chunk of 100 after the other`, async () => {
    const conn = new FakeConn();
    const stream = new SocketStream(conn);
    const bytes = pattern(size + 100);
    for (let at = 0; at < bytes.length; at += 100) conn.give(bytes.slice(at, at + 100));
    const first = await stream.readExactly(size);
    const second = await stream.readExactly(100);
    assertSameBytes(first, bytes.subarray(0, size));
    assertSameBytes(second, bytes.subarray(size));
    stream.close();
  });
}

Deno.test("chunks stay as they are when small and large ones alternate", async () => {
  const random = randomNumbers(11);
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  const kept: [Uint8Array, Uint8Array][] = [];
  for (let round = 0; round < 500; round++) {
    conn.give(pattern(1 + Math.floor(random() * (random() < 0.3 ? 70_000 : 600)), round));
    if (random() < 0.3) conn.give(pattern(10, round));
    const chunk = await stream.recv(random() < 0.5 ? Infinity : 1 + Math.floor(random() * 3_000));
    assert(chunk !== null);
    kept.push([chunk, chunk.slice()]);
  }
  for (const [chunk, copy] of kept) assertSameBytes(chunk, copy);
  stream.close();
});

Deno.test("a chunk that is kept does not keep a buffer alive that is much larger", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  conn.give(pattern(1 << 20));
  await stream.readExactly(1 << 20); // The buffer has grown.
  for (const size of [1, 100, 1_000, 2_000, 20_000]) {
    for (let round = 0; round < 40; round++) {
      conn.give(pattern(size));
      const chunk = await stream.readExactly(size);
      assert(chunk.buffer.byteLength <= Math.max(2_048, 64 * size), `${size} bytes keep ${chunk.buffer.byteLength}`);
    }
  }
  stream.close();
});

Deno.test("recv() gives 64 KiB at most, and a fast peer's bytes in large chunks", async () => {
  const stream = new SocketStream(new FakeConn().give(pattern(1 << 20)).end());
  const chunks = await Array.fromAsync(stream);
  assertSameBytes(concat(chunks), pattern(1 << 20));
  assert(chunks.every(({ length }) => length <= 65_536));
  assert(chunks.length < 40, `${chunks.length} chunks`);
  stream.close();
});

Deno.test("the first recv(1024) gives a message of 1,000 bytes in one piece, and recv() all of it in its pieces", async () => {
  const message = pattern(1_000);
  const whole = new SocketStream(new FakeConn().give(message));
  assertEquals(await whole.recv(1_024), message);
  const cut = new SocketStream(new FakeConn().give(message).end());
  assertSameBytes(concat(await Array.fromAsync(cut)), message);
  for (const stream of [whole, cut]) stream.close();
});

Deno.test("recv(maxBytes) leaves the rest for the next read", async () => {
  const stream = new SocketStream(new FakeConn().give("abcdefgh").end());
  const chunks: string[] = [];
  for (const maxBytes of [1, 2, 3, 100]) chunks.push(textOf(await stream.recv(maxBytes)));
  assertEquals(chunks, ["a", "bc", "def", "gh"]);
  assertEquals(await stream.recv(1), null);
  stream.close();
});

Deno.test("readExactly() of a terabyte takes no more memory than what came", async () => {
  const conn = new FakeConn().give(pattern(1_000));
  const stream = new SocketStream(conn);
  const reading = stream.readExactly(2 ** 40);
  conn.end();
  const error = await rejectionOf(reading);
  assert(error instanceof IncompleteReadError);
  assertEquals(error.expected, 2 ** 40);
  assertSameBytes(error.partial, pattern(1_000));
  stream.close();
});

Deno.test("a frame that announces 4 GB takes no more memory than what came", async () => {
  const prefix = new Uint8Array(4).fill(255);
  const stream = new SocketStream(new FakeConn().give(prefix, "abc").end(), { limit: Infinity });
  const error = await rejectionOf(stream.frames().next());
  assert(error instanceof IncompleteReadError);
  assertEquals(error.expected, 2 ** 32 - 1 + 4);
  assertEquals(error.partial.length, 7);
  stream.close();
});

Deno.test("readExactly() is answered from two reads of which the first left bytes in the buffer", async () => {
  const conn = new FakeConn().give("head;body-");
  const stream = new SocketStream(conn);
  assertEquals(textOf(await stream.readUntil(";")), "head;");
  const body = stream.readExactly(9);
  conn.give("goes on;tail");
  assertEquals(textOf(await body), "body-goes");
  assertEquals(textOf(await stream.recv()), " on;tail");
  stream.close();
});

Deno.test("read(into) is answered from the buffer first, and touches nothing behind what it has read", async () => {
  const conn = new FakeConn().give("line\nrest");
  const stream = new SocketStream(conn);
  assertEquals(await stream.readLine(), "line");
  const into = new Uint8Array(8).fill(7);
  assertEquals(await stream.read(into), 4);
  assertEquals(textOf(into.subarray(0, 4)), "rest");
  assertEquals(into.subarray(4), new Uint8Array(4).fill(7));
  stream.close();
});

Deno.test("read(into) of an array that is smaller than what is there leaves the rest", async () => {
  const stream = new SocketStream(new FakeConn().give("abcde").end());
  const into = new Uint8Array(2);
  const came: string[] = [];
  for (let count = await stream.read(into); count !== null; count = await stream.read(into)) {
    came.push(textOf(into.subarray(0, count)));
  }
  assertEquals(came.join(""), "abcde");
  stream.close();
});

Deno.test("read(into) fills a part of a larger array in its place", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  const whole = new Uint8Array(9).fill(0x2e);
  const reading = stream.read(whole.subarray(3, 6));
  conn.give("abcdef");
  assertEquals(await reading, 3);
  assertEquals(textOf(whole), "...abc...");
  assertEquals(textOf(await stream.recv()), "def");
  stream.close();
});

Deno.test("bytes that a read(into) has taken are not handed out again", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  const into = new Uint8Array(4);
  for (const word of ["one", "two", "four"]) {
    const reading = stream.read(into);
    conn.give(word);
    assertEquals(await reading, word.length);
    const chunk = stream.recv();
    conn.give("between");
    assertEquals(textOf(await chunk), "between");
  }
  stream.close();
});

for (const maxBytes of [0, -1, NaN, 0.5, 1.5]) {
  Deno.test(`recv(${maxBytes}) rejects, and reads nothing`, async () => {
    const stream = new SocketStream(new FakeConn().give("abcdef").end());
    await stream.readExactly(1);
    await assertRejects(() => stream.recv(maxBytes), RangeError);
    assertEquals(textOf(await stream.recv()), "bcdef");
    stream.close();
  });
}

for (const bytes of [-1, 1.5, NaN, Infinity, 2 ** 53]) {
  Deno.test(`readExactly(${bytes}) rejects, and reads nothing`, async () => {
    const stream = new SocketStream(new FakeConn().give("abc").end());
    await assertRejects(() => stream.readExactly(bytes), RangeError);
    assertEquals(textOf(await stream.recv()), "abc");
    stream.close();
  });
}

Deno.test("read() into an empty array rejects, and reads nothing", async () => {
  const stream = new SocketStream(new FakeConn().give("abc").end());
  await assertRejects(() => stream.read(new Uint8Array(0)), RangeError);
  assertEquals(textOf(await stream.recv()), "abc");
  stream.close();
});

Deno.test("a delimiter that was left over in the buffer by an earlier read is not found", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  conn.give("a longer line\n");
  assertEquals(await stream.readLine(), "a longer line");
  const line = stream.readLine();
  conn.give("short");
  await turnEnd();
  conn.give("er\n");
  assertEquals(await line, "shorter");
  stream.close();
});

Deno.test("a read that waited with bytes in the buffer loses none when the buffer is made larger", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  const line = stream.readLine();
  const text = "0123456789".repeat(2_000);
  for (let at = 0; at < text.length; at += 300) {
    conn.give(text.slice(at, at + 300));
    await turnEnd();
  }
  conn.give("\n");
  assertEquals(await line, text);
  stream.close();
});

Deno.test("lines that were decoded ahead are forgotten when other reads take their bytes", async () => {
  const conn = new FakeConn().give("a\nb\n");
  const stream = new SocketStream(conn);
  assertEquals(await stream.readLine(), "a");
  const into = new Uint8Array(2);
  assertEquals([await stream.read(into), textOf(into)], [2, "b\n"]);
  conn.give("zzq\n");
  await stream.peek(4); // They lie where the others lay.
  assertEquals([await stream.read(into), textOf(into)], [2, "zz"]);
  assertEquals(await stream.readLine(), "q");
  stream.close();
});

for (const kept of [10, 56, 100, 128, 200]) {
  Deno.test(`the ${kept} bytes of a half line at the end of a full buffer stay what they are when they are moved`, async () => {
    const first = "x".repeat(256 - kept - 1);
    const conn = new FakeConn().give(`${first}\n${"y".repeat(kept)}`);
    const stream = new SocketStream(conn);
    assertEquals(await stream.readLine(), first);
    const line = stream.readLine();
    await turnEnd();
    conn.give("z\n");
    assertEquals(await line, `${"y".repeat(kept)}z`);
    stream.close();
  });
}

Deno.test("the buffer of a connection that has become slow shrinks again", async () => {
  const conn = new FakeConn().give(pattern(1 << 20));
  const stream = new SocketStream(conn);
  await stream.readExactly(1 << 20);
  let size = Infinity;
  for (let count = 0; count < 40; count++) {
    conn.give(pattern(1_000));
    size = (await stream.recv())?.buffer.byteLength ?? Infinity;
  }
  assert(size <= 8_192, `${size} bytes`);
  stream.close();
});

Deno.test("bytesRead counts what came, also what waits to be read", async () => {
  const conn = new FakeConn().give("abcdef");
  const stream = new SocketStream(conn);
  assertEquals(stream.bytesRead, 0);
  await stream.recv(2);
  assertEquals(stream.bytesRead, 6);
  await stream.readExactly(4);
  assertEquals(stream.bytesRead, 6);
  const reading = stream.read(new Uint8Array(8));
  conn.give("gh");
  await reading;
  assertEquals(stream.bytesRead, 8);
  stream.close();
});

/** A connection that fills whatever room it is given, and counts the reads that `total` bytes take. */
class Flood extends FakeConn {
  reads = 0;
  #left: number;

  constructor(total: number) {
    super();
    this.#left = total;
  }

  override read(into: Uint8Array): Promise<number | null> {
    this.reads++;
    const count = Math.min(into.length, this.#left);
    this.#left -= count;
    into.subarray(0, count).fill(0x61);
    return Promise.resolve(count === 0 ? null : count);
  }
}

/** What a caller reads before the bulk, which leaves a part of the first buffer. */
const BEFORE = [0, 100, 128, 192, 250];

const BULK: [string, (stream: SocketStream) => Promise<unknown>][] = [
  ["read(into), with a timeout", async (stream) => {
    stream.timeout = 60_000;
    for (const into = new Uint8Array(65_536); await stream.read(into) !== null;);
  }],
  ["recv()", (stream) => Array.fromAsync(stream)],
  ["readLine()", (stream) => stream.readLine()],
  ["readExactly()", (stream) => stream.readExactly(2_900_000)],
  ["pipeTo(), with a timeout", (stream) => {
    stream.timeout = 60_000;
    return stream.pipeTo(new SocketStream(new FakeConn()));
  }],
];

for (const [name, read] of BULK) {
  for (const count of BEFORE) {
    Deno.test(`the buffer grows with bulk that is read by ${name} behind ${count} bytes`, async () => {
      const conn = new Flood(3_000_000);
      const stream = new SocketStream(conn, { limit: Infinity });
      if (count > 0) await stream.recv(count);
      await read(stream);
      assert(conn.reads < 200, `${conn.reads} reads`);
      stream.close();
    });
  }
}
