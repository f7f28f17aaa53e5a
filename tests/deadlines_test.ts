import { IncompleteReadError, SocketStream, type StreamConn, type StreamOptions } from "../mod.ts";
import { assert, assertEquals, assertMatch, assertRejects, assertStrictEquals, assertThrows } from "../deps.ts";
import { FakeConn, isPending, keptAlive, tcpConns, textOf, turnEnd, unixConns } from "./fake_conn.ts";
import { withFakeTime } from "./fake_time.ts";
import { networkTest, rejectionOf, unixTest } from "./testing.ts";

/** Short enough not to be noticed; for tests in which a deadline passes. */
const SHORT_MS = 5;

/** Longer than any test takes; for tests in which no deadline passes. */
const LONG_MS = 600_000;

/** Each way to read: what comes before the deadline, what comes after it, and what the next try reads. */
const reads: Record<string, { before: string; after: string; read: (stream: SocketStream) => Promise<string> }> = {
  "recv()": { before: "", after: "late", read: async (stream) => textOf(await stream.recv()) },
  "read()": { before: "", after: "late", read: readInto },
  "readExactly()": { before: "in ", after: "time", read: async (stream) => textOf(await stream.readExactly(7)) },
  "readUntil()": { before: "in -", after: "-", read: async (stream) => textOf(await stream.readUntil("--")) },
  "readLine()": { before: "in ", after: "time\n", read: async (stream) => `${await stream.readLine()}\n` },
  "lines()": { before: "in ", after: "time\n", read: async (stream) => `${(await stream.lines().next()).value}\n` },
  "frames()": {
    before: "\x04in",
    after: " t",
    read: async (stream) => `\x04${textOf((await stream.frames({ lengthBytes: 1 }).next()).value ?? null)}`,
  },
  "peek()": {
    before: "in ",
    after: "time",
    read: async (stream) => {
      await stream.peek(7);
      return textOf(await stream.recv());
    },
  },
  "for await": {
    before: "",
    after: "late",
    read: async (stream) => textOf((await stream[Symbol.asyncIterator]().next()).value ?? null),
  },
};

for (const [call, { before, after, read }] of Object.entries(reads)) {
  Deno.test(`${call} that waits longer than the timeout rejects, and loses no byte`, async () => {
    const conn = new FakeConn().give(before);
    const stream = new SocketStream(conn, { timeout: SHORT_MS });
    for (let tries = 0; tries < 3; tries++) {
      const error = await rejectionOf(read(stream));
      assert(error instanceof Deno.errors.TimedOut);
      assert(error.message.startsWith(call), error.message);
      assert(error.message.includes(`${SHORT_MS} ms`), error.message);
    }
    conn.give(after);
    assertEquals(await read(stream), before + after);
    assertEquals(stream.bytesRead, before.length + after.length);
    stream.close();
  });
}

for (const [first, { read }] of Object.entries(reads)) {
  Deno.test(`bytes that come after ${first} has timed out answer each other way to read`, async () => {
    for (const other of Object.values(reads)) {
      const conn = new FakeConn();
      const stream = new SocketStream(conn, { timeout: SHORT_MS });
      await assertRejects(() => read(stream), Deno.errors.TimedOut);
      stream.timeout = Infinity;
      const again = other.read(stream);
      conn.give(other.before);
      conn.give(other.after);
      const whole = await again;
      assertEquals(other.before + other.after, whole);
      stream.close();
    }
  });
}

Deno.test("a read that times out leaves the stream open: it writes, and reads later bytes", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn, { timeout: SHORT_MS });
  await assertRejects(() => stream.readLine(), Deno.errors.TimedOut);
  assert(!conn.isClosed);
  await stream.send("still there?\n");
  stream.timeout = LONG_MS;
  const line = stream.readLine();
  conn.give("yes\n");
  assertEquals(await line, "yes");
  stream.close();
});

Deno.test("a second read waits on the read of the connection that the first one has begun", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn, { timeout: SHORT_MS });
  for (let tries = 0; tries < 3; tries++) await assertRejects(() => stream.recv(), Deno.errors.TimedOut);
  stream.timeout = Infinity;
  const chunk = stream.recv();
  conn.give("abc"); // A second read of the connection would have made the fake reject.
  assertEquals(textOf(await chunk), "abc");
  stream.close();
});

Deno.test("the end of the stream that comes after a timeout is read by the next read", async () => {
  const conn = new FakeConn().give("abc");
  const stream = new SocketStream(conn, { timeout: SHORT_MS });
  await assertRejects(() => stream.readExactly(10), Deno.errors.TimedOut);
  conn.end();
  stream.timeout = Infinity;
  const error = await rejectionOf(stream.readExactly(10));
  assert(error instanceof IncompleteReadError);
  assertEquals(textOf(error.partial), "abc");
  stream.close();
});

Deno.test("a read(into) that timed out never writes into the caller's array later", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn, { timeout: SHORT_MS });
  const into = new Uint8Array(16).fill(7);
  await assertRejects(() => stream.read(into), Deno.errors.TimedOut);
  conn.give("late");
  await turnEnd();
  assertEquals(into, new Uint8Array(16).fill(7));
  assertEquals(textOf(await stream.recv()), "late");
  stream.close();
});

Deno.test("a timeout that is set while a read(into) waits counts from the next call on", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  const into = new Uint8Array(16);
  const reading = stream.read(into);
  stream.timeout = 1;
  await deadlinesWereLookedAt();
  assert(await isPending(reading));
  conn.give("late");
  assertEquals(await reading, 4);
  assertEquals(textOf(into.subarray(0, 4)), "late");
  await assertRejects(() => stream.read(into), Deno.errors.TimedOut);
  stream.close();
});

Deno.test("the second of two reads into the same array gets the bytes of the first, which timed out", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn, { timeout: SHORT_MS });
  const into = new Uint8Array(16);
  await assertRejects(() => stream.read(into), Deno.errors.TimedOut);
  stream.timeout = Infinity;
  for (const word of ["late", "x"]) {
    const reading = stream.read(into);
    conn.give(word);
    assertEquals(await reading, word.length);
    assertEquals(textOf(into.subarray(0, word.length)), word);
  }
  stream.close();
});

Deno.test("the timeout is that of the whole read: bytes that drip in do not prolong it", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn, { timeout: 20 });
  const dripping = setInterval(() => conn.give("."), 1);
  await assertRejects(() => stream.readExactly(1_000_000), Deno.errors.TimedOut);
  clearInterval(dripping);
  stream.close();
});

Deno.test("a timeout that is made shorter while a read waits counts from the next call on", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn, { timeout: LONG_MS });
  const line = stream.readLine();
  stream.timeout = 1;
  await deadlinesWereLookedAt();
  assert(await isPending(line));
  conn.give("abc\n");
  assertEquals(await line, "abc");
  await assertRejects(() => stream.readLine(), Deno.errors.TimedOut);
  stream.close();
});

Deno.test("a timeout that is made longer while a read waits counts from the next call on", async () => {
  const stream = new SocketStream(new FakeConn(), { timeout: SHORT_MS });
  const line = stream.readLine();
  stream.timeout = Infinity;
  await assertRejects(() => line, Deno.errors.TimedOut);
  const next = stream.readLine();
  await deadlinesWereLookedAt();
  assert(await isPending(next));
  stream.close();
});

/** The least and the most milliseconds after which a deadline of `ms` fires. */
function fires(ms: number): [from: number, to: number] {
  return [ms, ms + Math.max(ms / 16, 10)];
}

/** Reads nothing and takes nothing, and sets no timer of its own. */
class Silent implements StreamConn {
  readonly localAddr: Deno.Addr = { transport: "unix", path: "" };
  readonly remoteAddr: Deno.Addr = { transport: "unix", path: "" };
  readonly #closed = Promise.withResolvers<never>();
  read = () => this.#closed.promise;
  write = () => this.#closed.promise;
  closeWrite = () => this.#closed.promise;
  close() {
    this.#closed.promise.catch(() => {});
    this.#closed.reject(new Deno.errors.Interrupted("operation canceled"));
  }
}

/** Ways in which a deadline passes. */
const PASSING: [string, (ms: number) => StreamOptions, (stream: SocketStream) => Promise<unknown>][] = [
  ["the timeout of a read", (timeout) => ({ timeout }), (stream) => stream.recv()],
  ["the timeout of a write", (timeout) => ({ timeout }), (stream) => stream.send("a")],
  ["idleTimeout", (idleTimeout) => ({ idleTimeout }), (stream) => stream.recv()],
  ["maxLifetime", (maxLifetime) => ({ maxLifetime }), (stream) => stream.recv()],
];

for (const [what, options, wait] of PASSING) {
  Deno.test(`${what} fires no earlier than asked, and at most 1/16 or 10 ms late`, async () => {
    for (const ms of [0.5, 1, 5, 20, 100, 333, 1_000, 30_000, 86_400_000, 2 ** 40]) {
      await withFakeTime(async (time) => {
        const [from, to] = fires(ms);
        const stream = new SocketStream(new Silent(), options(ms));
        const passed = await time.advanceUntil(rejectionOf(wait(stream)).then(() => time.passed), to + 1);
        stream.close();
        assert(passed >= from && passed <= to, `${ms} ms fired after ${passed} ms`);
      });
    }
  });
}

for (const ms of [0, -1, NaN]) {
  Deno.test(`timeout cannot be set to ${ms}, and keeps its value`, () => {
    const stream = new SocketStream(new FakeConn(), { timeout: 50 });
    assertThrows(() => {
      stream.timeout = ms;
    }, RangeError);
    assertEquals(stream.timeout, 50);
    stream.close();
  });
}

Deno.test("the stream with the earlier deadline times out first, although the other one waits longer", async () => {
  await withFakeTime(async (time) => {
    const patient = new SocketStream(new FakeConn(), { timeout: 1_000 });
    const hasty = new SocketStream(new FakeConn(), { timeout: 10 });
    const patientRead = patient.recv();
    const hastyRead = hasty.recv();
    await time.advance(20);
    await assertRejects(() => hastyRead, Deno.errors.TimedOut);
    assert(await isPending(patientRead));
    patient.close();
    hasty.close();
  });
});

Deno.test("a stream that waits behind an earlier deadline meets its own", async () => {
  const first = new SocketStream(new FakeConn(), { timeout: 1 });
  const second = new SocketStream(new FakeConn(), { timeout: 12 });
  const reads = [first.recv(), second.recv()];
  for (const read of reads) await assertRejects(() => read, Deno.errors.TimedOut);
  await assertRejects(() => first.recv(), Deno.errors.TimedOut);
  first.close();
  second.close();
});

Deno.test("a timeout longer than any timer of the runtime does not end at once", async () => {
  const stream = new SocketStream(new FakeConn(), { timeout: 2 ** 40, idleTimeout: 2 ** 40 });
  const read = stream.recv();
  await deadlinesWereLookedAt();
  assert(await isPending(read));
  stream.close();
});

Deno.test("a stream with deadlines that is closed leaves no timer behind", async () => {
  const stream = new SocketStream(new FakeConn(), { timeout: LONG_MS, idleTimeout: LONG_MS });
  const read = stream.recv();
  stream.close();
  await assertRejects(() => read, Deno.errors.BadResource);
});

Deno.test("a write that the peer does not take within the timeout rejects, and closes the stream", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn, { timeout: SHORT_MS });
  const error = await keptAlive(rejectionOf(stream.send("abc")));
  assert(error instanceof Deno.errors.TimedOut);
  assertMatch(error.message, /127\.0\.0\.1:\d+ took no byte.*\b5 ms/i);
  assert(conn.isClosed);
  for (const call of [() => stream.send("a"), () => stream.write("a"), () => stream.recv(), () => stream.flush()]) {
    assertStrictEquals(await rejectionOf(call()), error);
  }
  stream.close();
});

Deno.test("a closeWrite() that the connection does not take within the timeout rejects, and closes the stream", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn, { timeout: SHORT_MS });
  assert(await keptAlive(rejectionOf(stream.closeWrite())) instanceof Deno.errors.TimedOut);
  assert(conn.isClosed);
});

Deno.test("a write that times out ends all calls that wait: other writes and the read", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn, { timeout: SHORT_MS, highWaterMark: 2 });
  const sent = stream.send("abc");
  const waiting = [stream.write("over the mark"), stream.flush(), stream.closeWrite(), stream.recv()];
  const error = await rejectionOf(sent);
  assert(error instanceof Deno.errors.TimedOut);
  for (const call of waiting) assertStrictEquals(await rejectionOf(call), error);
  stream.close();
});

Deno.test("bytes that write() gathered and the peer does not take time out as well", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn, { timeout: SHORT_MS });
  await stream.write("abc");
  await keptAlive(conn.whenClosed);
  await assertRejects(() => stream.write("d"), Deno.errors.TimedOut);
});

Deno.test("a write goes on as long as the peer takes something within the timeout", async () => {
  await withFakeTime(async (time) => {
    const conn = new FakeConn().holdWrites();
    conn.takes = () => 1;
    const stream = new SocketStream(conn, { timeout: 20 });
    const sent = stream.send("abcdefgh");
    for (let taken = 0; taken < 8; taken++) {
      await time.advance(15);
      const wrote = conn.nextWrite();
      conn.releaseOneWrite();
      await wrote;
      await turnEnd();
    }
    await sent;
    assertEquals(textOf(conn.written), "abcdefgh");
    stream.close();
  });
});

Deno.test("a write that begins after a rest has its whole timeout", async () => {
  await withFakeTime(async (time) => {
    const conn = new FakeConn();
    const stream = new SocketStream(conn, { timeout: 1_000, idleTimeout: 64_000 });
    await stream.send("abc");
    await time.advance(5_000);
    conn.holdWrites();
    const sent = stream.send("def");
    await time.advance(900);
    assert(!conn.isClosed);
    await time.advance(200);
    await assertRejects(() => sent, Deno.errors.TimedOut);
  });
});

Deno.test("a timeout that is set while a write waits is counted from then on", async () => {
  await withFakeTime(async (time) => {
    await time.advance(1_000_000);
    const conn = new FakeConn().holdWrites();
    const stream = new SocketStream(conn, { idleTimeout: 86_400_000 });
    const sent = stream.send("abc");
    await turnEnd();
    await time.advance(20_000_000);
    stream.timeout = 1_000;
    await time.advance(999);
    assert(!conn.isClosed);
    await time.advance(100);
    assert(conn.isClosed);
    await assertRejects(() => sent, Deno.errors.TimedOut);
  });
});

Deno.test("a stream on which no byte moves for the idleTimeout is closed, and says why", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn, { idleTimeout: SHORT_MS });
  await keptAlive(conn.whenClosed);
  const error = await rejectionOf(stream.recv());
  assert(error instanceof Deno.errors.TimedOut);
  assertMatch(error.message, /\bidleTimeout\b.*\b5 ms/);
  assertStrictEquals(await rejectionOf(stream.write("a")), error);
  stream.close();
});

Deno.test("idleTimeout ends a read that waits", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn, { idleTimeout: SHORT_MS });
  await assertRejects(() => stream.readLine(), Deno.errors.TimedOut);
  assert(conn.isClosed);
});

Deno.test("idleTimeout ends a write that waits", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn, { idleTimeout: SHORT_MS });
  await keptAlive(assertRejects(() => stream.send("abc"), Deno.errors.TimedOut));
  assert(conn.isClosed);
});

for (const way of ["in", "out"]) {
  Deno.test(`idleTimeout does not end a stream on which bytes go ${way}`, async () => {
    await withFakeTime(async (time) => {
      const conn = new FakeConn();
      const stream = new SocketStream(conn, { idleTimeout: 20 });
      for (let moved = 0; moved < 4; moved++) {
        await time.advance(15);
        if (way === "out") await stream.send(".");
        else assertEquals(await stream.read(conn.give(".") && new Uint8Array(1)), 1);
      }
      assert(!conn.isClosed);
      await time.advance(30);
      assert(conn.isClosed);
    });
  });
}

Deno.test("with a timeout and an idleTimeout, the one that passes first holds", async () => {
  const read = new SocketStream(new FakeConn(), { timeout: SHORT_MS, idleTimeout: LONG_MS });
  assertMatch((await rejectionOf(read.recv())).message, /^recv\(\)/);
  read.close();
  const idle = new SocketStream(new FakeConn(), { timeout: LONG_MS, idleTimeout: SHORT_MS });
  assertMatch((await rejectionOf(idle.recv())).message, /idleTimeout/);
});

/** The options whose deadlines are always looked at, but seldom. */
const seldom: StreamOptions[] = [{ idleTimeout: LONG_MS }, { maxLifetime: LONG_MS }];

for (const options of seldom) {
  Deno.test(`with ${Deno.inspect(options)} a shorter timeout is met in its time`, async () => {
    const begun = performance.now();
    const stream = new SocketStream(new FakeConn(), { timeout: SHORT_MS, ...options });
    await assertRejects(() => stream.recv(), Deno.errors.TimedOut);
    await deadlinesWereLookedAt(); // With no read that waits.
    await assertRejects(() => stream.recv(), Deno.errors.TimedOut);
    assert(performance.now() - begun < LONG_MS / 100);
    stream.close();
  });
}

for (const call of ["recv()", "send()"]) {
  Deno.test(`maxLifetime ends a ${call} that waits, closes the stream, and says why`, async () => {
    const conn = new FakeConn().holdWrites();
    const stream = new SocketStream(conn, { maxLifetime: SHORT_MS });
    const error = await keptAlive(rejectionOf(call === "recv()" ? stream.recv() : stream.send("abc")));
    assert(error instanceof Deno.errors.TimedOut);
    assertMatch(error.message, /\bmaxLifetime\b.*\b5 ms/);
    assert(conn.isClosed);
    assertStrictEquals(await rejectionOf(stream.write("a")), error);
  });
}

Deno.test("maxLifetime ends a stream on which bytes go in and out all the time, and not before", async () => {
  await withFakeTime(async (time) => {
    const conn = new FakeConn();
    const stream = new SocketStream(conn, { maxLifetime: 100, idleTimeout: 50, timeout: 50 });
    for (let passed = 0; passed < 80; passed += 20) {
      await time.advance(20);
      conn.give(".");
      await stream.send(textOf(await stream.recv()));
      assert(!conn.isClosed);
    }
    const read = rejectionOf(stream.recv());
    await time.advance(30);
    assert(conn.isClosed);
    assertMatch((await read).message, /maxLifetime/);
  });
});

Deno.test("maxLifetime is Infinity by default, and may be longer than any timer", async () => {
  for (const options of [{}, { maxLifetime: 2 ** 40 }]) {
    const stream = new SocketStream(new FakeConn(), options);
    const read = stream.recv();
    await deadlinesWereLookedAt();
    assert(await isPending(read));
    stream.close();
  }
});

/** How streams come to have a short timeout beside a longer time that is watched for already. */
const SHORT_BESIDE_LONG: [string, () => Promise<SocketStream> | SocketStream][] = [
  ["beside a long idleTimeout", () => new SocketStream(new FakeConn(), { timeout: SHORT_MS, idleTimeout: LONG_MS })],
  ["beside a long idleTimeout that was looked at", async () => {
    const stream = new SocketStream(new FakeConn(), { timeout: SHORT_MS, idleTimeout: LONG_MS });
    await deadlinesWereLookedAt();
    return stream;
  }],
  ["that was longer while an earlier read waited", async () => {
    const conn = new FakeConn();
    const stream = new SocketStream(conn, { timeout: LONG_MS });
    const earlier = stream.recv();
    stream.timeout = SHORT_MS;
    await deadlinesWereLookedAt();
    conn.give("x");
    await earlier;
    return stream;
  }],
];

for (const [how, make] of SHORT_BESIDE_LONG) {
  Deno.test(`a short timeout ${how} is kept in its own time`, async () => {
    const stream = await make();
    const begun = performance.now();
    await assertRejects(() => stream.recv(), Deno.errors.TimedOut);
    const late = performance.now() - begun - SHORT_MS;
    stream.close();
    assert(late < 5_000, `it was ${late} ms late`);
  });
}

networkTest("over TCP, a read that times out loses no byte", async () => {
  await overTcp(async (ours, theirs) => {
    ours.timeout = SHORT_MS;
    await theirs.send("in ");
    await assertRejects(() => ours.readLine(), Deno.errors.TimedOut);
    ours.timeout = LONG_MS;
    await theirs.send("time\n");
    assertEquals(await ours.readLine(), "in time");
  });
});

networkTest("over TCP, a write to a peer that does not read times out, and closes the stream", async () => {
  await overTcp(async (ours) => {
    ours.timeout = 20;
    const chunk = new Uint8Array(1 << 20);
    await assertRejects(async () => {
      for (;;) await ours.send(chunk);
    }, Deno.errors.TimedOut);
    await assertRejects(() => ours.recv(), Deno.errors.TimedOut);
  });
});

networkTest("over TCP, idleTimeout closes the connection, and the peer reads the end", async () => {
  const [dialled, accepted] = await tcpConns();
  const ours = new SocketStream(accepted, { idleTimeout: SHORT_MS });
  const theirs = new SocketStream(dialled);
  assertEquals(await theirs.recv(), null);
  await assertRejects(() => ours.recv(), Deno.errors.TimedOut);
  theirs.close();
});

unixTest("over a Unix socket, a write to a peer that does not read times out", async (folder) => {
  const [dialled, accepted] = await unixConns(folder);
  const ours = new SocketStream(accepted, { timeout: 20 });
  const chunk = new Uint8Array(1 << 20);
  await assertRejects(async () => {
    for (;;) await ours.send(chunk);
  }, Deno.errors.TimedOut);
  dialled.close();
});

async function readInto(stream: SocketStream): Promise<string> {
  const into = new Uint8Array(16);
  const count = await stream.read(into);
  return textOf(count === null ? null : into.subarray(0, count));
}

/** Two ends of a TCP connection, which are closed when `use` is done. */
async function overTcp(use: (ours: SocketStream, theirs: SocketStream) => Promise<void>): Promise<void> {
  const [dialled, accepted] = await tcpConns();
  const ours = new SocketStream(accepted);
  const theirs = new SocketStream(dialled);
  try {
    await use(ours, theirs);
  } finally {
    ours.close();
    theirs.close();
  }
}

/** Resolves when every deadline that has passed was acted upon. */
async function deadlinesWereLookedAt(): Promise<void> {
  const canary = new SocketStream(new FakeConn(), { timeout: 2 * SHORT_MS });
  await assertRejects(() => canary.recv(), Deno.errors.TimedOut);
  canary.close();
}
