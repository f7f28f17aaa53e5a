import { socketPair, StreamRequestHandler, TcpServer } from "../mod.ts";
import { assert, assertEquals, assertRejects } from "../deps.ts";
import { assertSameBytes, bytesOf, concat, isPending, pattern, randomNumbers, textOf, turnEnd } from "./fake_conn.ts";
import { rejectionOf } from "./testing.ts";

/** More than one direction of a pair holds. */
const FAR_TOO_MUCH = 1_000_000;

Deno.test({
  name: "a pair needs no permission",
  permissions: "none",
  fn: async () => {
    const [ours, theirs] = socketPair();
    await ours.send("hello\n");
    assertEquals(await theirs.readLine(), "hello");
    await theirs.send("hi\n");
    assertEquals(await ours.readLine(), "hi");
    ours.close();
    theirs.close();
  },
});

Deno.test({
  name: "a handler is tested over a pair, by a server that was never started",
  permissions: "none",
  fn: async () => {
    class Shout extends StreamRequestHandler {
      override async handle() {
        for await (const line of this.request.lines()) await this.request.write(line.toUpperCase() + "\n");
      }
    }
    const [client, request] = socketPair();
    const server = new TcpServer({ port: 0 }, Shout);
    const served = server.finishRequest(request, request.remoteAddress);
    for (const word of ["one", "two"]) {
      await client.send(`${word}\n`);
      assertEquals(await client.readLine(), word.toUpperCase());
    }
    await client.closeWrite();
    await served;
    request.close();
    assertEquals(await client.readLine(), null);
    client.close();
  },
});

Deno.test("the two directions of a pair are apart", async () => {
  const [ours, theirs] = socketPair();
  await Promise.all([ours.send("from us"), theirs.send("from them")]);
  assertEquals(textOf(await ours.recv()), "from them");
  assertEquals(textOf(await theirs.recv()), "from us");
  ours.close();
  theirs.close();
});

Deno.test("two pairs are apart", async () => {
  const pairs = Array.from({ length: 10 }, () => socketPair());
  for (const [index, [ours]] of pairs.entries()) await ours.send(`${index}\n`);
  for (const [index, [, theirs]] of pairs.entries()) assertEquals(await theirs.readLine(), `${index}`);
  for (const stream of pairs.flat()) stream.close();
});

Deno.test("a read of a pair waits until something is sent", async () => {
  const [ours, theirs] = socketPair();
  const line = theirs.readLine();
  assert(await isPending(line));
  await ours.send("hello\n");
  assertEquals(await line, "hello");
  ours.close();
  theirs.close();
});

Deno.test("a send() to a peer that does not read waits, and goes on when it reads", async () => {
  const [ours, theirs] = socketPair();
  const sent = ours.send(pattern(FAR_TOO_MUCH));
  assert(await isPending(sent));
  assert(ours.bytesWritten < FAR_TOO_MUCH);
  assertSameBytes(await theirs.readExactly(FAR_TOO_MUCH), pattern(FAR_TOO_MUCH));
  await sent;
  assertEquals(ours.bytesWritten, FAR_TOO_MUCH);
  assertEquals(theirs.bytesRead, FAR_TOO_MUCH);
  ours.close();
  theirs.close();
});

Deno.test("two peers that both send more than a pair holds and only then read do not lose a byte", async () => {
  const pair = socketPair();
  const sendings = pair.map((stream) => stream.send(pattern(FAR_TOO_MUCH)));
  const came = await Promise.all(pair.map((stream) => stream.readExactly(FAR_TOO_MUCH)));
  await Promise.all(sendings);
  for (const bytes of came) assertSameBytes(bytes, pattern(FAR_TOO_MUCH));
  for (const stream of pair) stream.close();
});

Deno.test("random sizes of writes and of reads leave the bytes of a pair as they are", async () => {
  const seed = 3;
  const random = randomNumbers(seed);
  for (let round = 0; round < 30; round++) {
    const [ours, theirs] = socketPair();
    const largest = 10 ** (1 + Math.floor(random() * 5));
    const sent = Array.from({ length: 20 }, () => pattern(1 + Math.floor(random() * largest), round));
    const sending = (async () => {
      for (const bytes of sent) await (random() < 0.5 ? ours.send(bytes) : ours.write(bytes));
      await ours.closeWrite();
    })();
    const came: Uint8Array[] = [];
    for (;;) {
      const chunk = await theirs.recv(1 + Math.floor(random() * largest));
      if (chunk === null) break;
      came.push(chunk);
    }
    await sending;
    assertSameBytes(concat(came), concat(sent), `in round ${round} of seed ${seed}`);
    ours.close();
    theirs.close();
  }
});

Deno.test("closeWrite() of one end of a pair is read as the end behind what was sent, and ends nothing else", async () => {
  const [ours, theirs] = socketPair();
  await ours.send("last words");
  await ours.closeWrite();
  assertEquals(textOf(await theirs.recv()), "last words");
  assertEquals(await theirs.recv(), null);
  assertEquals(await theirs.recv(), null);
  await theirs.send("still here");
  assertEquals(textOf(await ours.recv()), "still here");
  ours.close();
  theirs.close();
});

Deno.test("closeWrite() of one end of a pair ends the read that waits at the other", async () => {
  const [ours, theirs] = socketPair();
  const chunk = theirs.recv();
  await ours.closeWrite();
  assertEquals(await chunk, null);
  ours.close();
  theirs.close();
});

Deno.test("the peer of a closed end reads what was sent, and then the end", async () => {
  const [ours, theirs] = socketPair();
  await ours.send("one\ntwo");
  ours.close();
  assertEquals(await Array.fromAsync(theirs.lines()), ["one", "two"]);
  theirs.close();
});

Deno.test("write() and then close() of one end of a pair still delivers", async () => {
  for (const size of [1, 16_384, 60_000, 500_000]) {
    const [ours, theirs] = socketPair();
    ours.write(pattern(size));
    ours.close();
    assertSameBytes(concat(await Array.fromAsync(theirs)), pattern(size));
    theirs.close();
  }
});

Deno.test("a write to a closed end of a pair rejects with BrokenPipe and its code, as a socket does", async () => {
  const [ours, theirs] = socketPair();
  theirs.close();
  const error = await rejectionOf(ours.send("abc"));
  assert(error instanceof Deno.errors.BrokenPipe);
  assert("code" in error && error.code === "EPIPE");
  assertEquals(await ours.recv(), null);
  ours.close();
});

Deno.test("a write that waits at a pair rejects when the peer closes", async () => {
  const [ours, theirs] = socketPair();
  const sent = ours.send(pattern(FAR_TOO_MUCH));
  await turnEnd();
  theirs.close();
  await assertRejects(() => sent, Deno.errors.BrokenPipe);
  ours.close();
});

Deno.test("close() of one end of a pair ends the read that waits at it", async () => {
  const [ours, theirs] = socketPair();
  const chunk = ours.recv();
  ours.close();
  await assertRejects(() => chunk, Deno.errors.BadResource);
  assertEquals(await theirs.recv(), null);
  theirs.close();
});

Deno.test("both ends of a pair may be closed in one turn", async () => {
  const [ours, theirs] = socketPair();
  const reads = [ours.recv(), theirs.recv()];
  ours.close();
  theirs.close();
  for (const read of reads) await assertRejects(() => read, Deno.errors.BadResource);
});

Deno.test("the options of a pair are those of both ends", async () => {
  const pair = socketPair({ limit: 4, timeout: 60_000 });
  for (const stream of pair) {
    assertEquals(stream.timeout, 60_000);
    await stream.send("too long\n");
  }
  for (const stream of pair) {
    assertEquals((await rejectionOf(stream.readLine())).name, "LimitOverrunError");
    stream.close();
  }
});

Deno.test("a timeout holds over a pair, although nothing else keeps the event loop alive", async () => {
  const [ours, theirs] = socketPair({ timeout: 5 });
  await assertRejects(() => ours.readLine(), Deno.errors.TimedOut);
  await theirs.send("late\n");
  assertEquals(await ours.readLine(), "late");
  ours.close();
  theirs.close();
});

Deno.test("a timeout holds for a write over a pair, although nothing else keeps the event loop alive", async () => {
  const [ours, theirs] = socketPair({ timeout: 5 });
  await assertRejects(() => ours.send(pattern(FAR_TOO_MUCH)), Deno.errors.TimedOut);
  ours.close();
  theirs.close();
});

Deno.test("an idleTimeout holds over a pair for a read that waits, although nothing else keeps the event loop alive", async () => {
  const [ours, theirs] = socketPair({ idleTimeout: 5 });
  await assertRejects(() => ours.readLine(), Deno.errors.TimedOut);
  ours.close();
  theirs.close();
});

Deno.test("both ends of a pair have an address without a path", () => {
  for (const stream of socketPair()) {
    assertEquals(stream.localAddress, { transport: "unix", path: "" });
    assertEquals(stream.remoteAddress, { transport: "unix", path: "" });
    stream.close();
  }
});

Deno.test('"await using" of both ends of a pair closes them', async () => {
  const [ours, theirs] = socketPair();
  {
    await using first = ours;
    await using second = theirs;
    first.write("abc");
    assertEquals(await second.readExactly(3), bytesOf("abc"));
  }
  for (const stream of [ours, theirs]) await assertRejects(() => stream.recv(), Deno.errors.BadResource);
});
