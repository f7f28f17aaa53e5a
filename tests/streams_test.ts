/** A stream as its callers see it: one reader, two sides, iterators, web streams, its end. */

import { IncompleteReadError, socketPair, SocketStream } from "../mod.ts";
import { assert, assertEquals, assertRejects, assertStrictEquals } from "../deps.ts";
import {
  assertSameBytes,
  brokenPipe,
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
  "peek()": (stream) => stream.peek(8),
  "for await": (stream) => stream[Symbol.asyncIterator]().next(),
};

Deno.test("a chunk whose buffer was transferred takes nothing from what comes later", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  for (const text of ["hello", "again", "and again"]) {
    conn.give(text);
    const chunk = await stream.recv();
    assertEquals(textOf(chunk), text);
    structuredClone(chunk, { transfer: [chunk?.buffer ?? new ArrayBuffer()] });
  }
  stream.close();
});

/** Reads behind a chunk whose buffer was transferred. */
const READS_OF_NOTHING: Record<string, (stream: SocketStream) => Promise<unknown>> = {
  "read()": (stream) => stream.read(new Uint8Array(8)),
  "readExactly(0)": (stream) => stream.readExactly(0),
  "peek()": (stream) => stream.peek(8),
  "readLine()": (stream) => stream.readLine(),
};

for (const [call, read] of Object.entries(READS_OF_NOTHING)) {
  Deno.test(`${call} goes on behind a chunk whose buffer was transferred`, async () => {
    const conn = new FakeConn().give("hello");
    const stream = new SocketStream(conn);
    const chunk = await stream.recv();
    structuredClone(chunk, { transfer: [chunk?.buffer ?? new ArrayBuffer()] });
    const reading = read(stream);
    conn.give("again\n").end();
    assert(await reading !== null);
    stream.close();
  });
}

Deno.test("an empty chunk belongs to its caller as well: its buffer may be transferred", async () => {
  const [first, second] = [new SocketStream(new FakeConn()), new SocketStream(new FakeConn())];
  for (const stream of [first, second]) {
    const chunk = await stream.readExactly(0);
    assertEquals(structuredClone(chunk, { transfer: [chunk.buffer] }).length, 0);
    stream.close();
  }
});

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

Deno.test("pipeTo() of a stream to itself is an echo that ends with its peer's side, and counts the bytes", async () => {
  const [ours, theirs] = socketPair();
  const echoed = ours.pipeTo(ours);
  const sent = pattern(500_000);
  const sending = theirs.send(sent).then(() => theirs.closeWrite());
  const came = await Array.fromAsync(theirs);
  await sending;
  assertSameBytes(concat(came), sent);
  assertEquals(await echoed, sent.length);
  ours.close();
  theirs.close();
});

Deno.test("pipeTo() in both directions is a proxy: each side ends on its own", async () => {
  const [client, front] = socketPair();
  const [back, server] = socketPair();
  const counts = Promise.all([front.pipeTo(back), back.pipeTo(front)]);
  await client.send("question");
  await client.closeWrite();
  assertEquals(await Array.fromAsync(server, textOf), ["question"]);
  await server.send("a long answer");
  await server.closeWrite();
  assertEquals(await Array.fromAsync(client, textOf), ["a long answer"]);
  assertEquals(await counts, [8, 13]);
  for (const stream of [client, front, back, server]) stream.close();
});

Deno.test("pipeTo() waits for a destination that does not read", async () => {
  const [client, front] = socketPair();
  const conn = new FakeConn().holdWrites();
  const slow = new SocketStream(conn);
  const piped = front.pipeTo(slow);
  const sent = client.send(pattern(500_000));
  assert(await isPending(sent));
  conn.releaseWrites();
  await sent;
  await client.closeWrite();
  assertEquals(await piped, 500_000);
  for (const stream of [client, front, slow]) stream.close();
});

Deno.test("pipeTo() rejects with the error of either side, and closes neither", async () => {
  const [client, front] = socketPair();
  const conn = new FakeConn().failWrites(brokenPipe());
  const gone = new SocketStream(conn);
  const piped = front.pipeTo(gone);
  await client.send("lost");
  assert(await rejectionOf(piped) instanceof Deno.errors.BrokenPipe);
  await client.send("and this is read");
  assertEquals(textOf(await front.recv() ?? new Uint8Array()), "and this is read");
  const busy = front.recv();
  assert(await rejectionOf(front.pipeTo(front)) instanceof Deno.errors.Busy);
  await client.closeWrite();
  assertEquals(await busy, null);
  for (const stream of [client, front, gone]) stream.close();
});

Deno.test("pipeTo() takes nothing if it cannot send anything", async () => {
  const [client, front] = socketPair();
  const [back] = socketPair();
  await client.send("first");
  back.close();
  assert(await rejectionOf(front.pipeTo(back)) instanceof Deno.errors.BadResource);
  const piped: Promise<number> = Reflect.apply(front.pipeTo, front, [new WritableStream()]);
  assert(await rejectionOf(piped) instanceof TypeError);
  assertEquals(textOf(await front.readExactly(5)), "first");
  for (const stream of [client, front]) stream.close();
});

Deno.test("pipeTo() goes on with the same array once it is large", async () => {
  const arrays = new Set<ArrayBufferLike>();
  class Noting extends FakeConn {
    override write(data: Uint8Array): Promise<number> {
      arrays.add(data.buffer);
      return Promise.resolve(data.length);
    }
  }
  const [client, front] = socketPair();
  const piped = front.pipeTo(new SocketStream(new Noting()));
  await client.send(pattern(5_000_000));
  await client.closeWrite();
  assertEquals(await piped, 5_000_000);
  assert(arrays.size <= 4, `${arrays.size} arrays`); // And an empty one, by which it asks whether it can send.
  for (const stream of [client, front]) stream.close();
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
