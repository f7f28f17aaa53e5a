/** Fair turns: hundreds of busy streams queue for their reads, and the queue forgets none. */

import { assert, assertEquals, assertRejects } from "../deps.ts";
import { connect, SocketStream, StreamRequestHandler, TcpServer } from "../mod.ts";
import { bytesOf, connectionReset, FakeConn, isPending, keptAlive, textOf, turnEnd } from "./fake_conn.ts";
import { networkTest, rejectionOf, until } from "./testing.ts";

/** More streams than the runtime serves in one turn. */
const CROWD = 300;

/** One of a crowd, on a connection that the test plays by hand. */
class Member {
  readonly conn = new FakeConn();
  readonly stream: SocketStream;

  constructor(timeout = Infinity) {
    this.stream = new SocketStream(this.conn, { timeout });
  }

  /** Whether its read waits in the queue, and not at the connection. */
  get isQueued(): boolean {
    return !this.conn.isReading;
  }

  /** Lets a read be answered, wherever it waits. */
  async hear(text: string): Promise<void> {
    const chunk = this.stream.recv();
    this.conn.give(text);
    assertEquals(textOf(await chunk), text);
  }
}

/** Runs `test` with a crowd whose next reads all have to queue. */
async function withCrowd(test: (crowd: Member[]) => Promise<void>, makeMember = () => new Member()): Promise<void> {
  const crowd = Array.from({ length: CROWD }, makeMember);
  try {
    for (let round = 0; round < 3; round++) await Promise.all(crowd.map((member) => member.hear("hello")));
    await test(crowd);
  } finally {
    for (const { stream } of crowd) stream.close();
    await queueRests();
  }
}

/** Resolves when the queue is empty, and its timer has ended. */
async function queueRests(): Promise<void> {
  const probe = new Member();
  await probe.hear("first"); // A first read does not queue.
  const chunk = rejectionOf(probe.stream.recv());
  await until(() => !probe.isQueued);
  probe.stream.close();
  await chunk;
  for (let timer = 0; timer < 3; timer++) await new Promise((resolve) => setTimeout(resolve, 2));
}

/** Lets all of `crowd` read, and fails unless most of them have to queue. */
function queueUp(crowd: Member[]): Promise<Uint8Array | null>[] {
  const reads = crowd.map(({ stream }) => stream.recv());
  for (const read of reads) read.catch(() => {}); // Some tests end them.
  const queued = crowd.filter((member) => member.isQueued).length;
  assert(queued > CROWD / 2, `${queued} of ${CROWD} queue`);
  return reads;
}

Deno.test("every stream in the queue is served, in any order of arrival", async () => {
  await withCrowd(async (crowd) => {
    const reads = queueUp(crowd);
    for (const [index, { conn }] of [...crowd.entries()].reverse()) conn.give(`answer ${index}`);
    const texts = (await Promise.all(reads)).map(textOf);
    assertEquals(texts, crowd.map((_, index) => `answer ${index}`));
  });
});

Deno.test("the last one in the queue is served although nobody before it has anything to read", async () => {
  await withCrowd(async (crowd) => {
    const reads = queueUp(crowd);
    const last = crowd.findLastIndex((member) => member.isQueued);
    crowd[last]?.conn.give("at last");
    assertEquals(textOf(await reads[last] ?? null), "at last");
  });
});

Deno.test("a new stream's first read does not queue", async () => {
  await withCrowd(async (crowd) => {
    queueUp(crowd);
    const newcomer = new Member();
    const chunk = newcomer.stream.recv();
    assert(!newcomer.isQueued);
    newcomer.conn.give("hello");
    assertEquals(textOf(await chunk), "hello");
    newcomer.stream.close();
  });
});

Deno.test("a stream that always has something to read does not get ahead of the others", async () => {
  await withCrowd(async (crowd) => {
    const rounds = 50;
    const counts = crowd.map(() => 0);
    let widest = 0;
    const serve = async ({ stream }: Member, index: number) => {
      for (let count = 1; count <= rounds; count++) {
        await stream.readExactly(1);
        counts[index] = count;
        widest = Math.max(widest, count - Math.min(...counts));
      }
    };
    for (const { conn } of crowd) for (let round = 0; round < rounds; round++) conn.give("x");
    // They have come one message at a time, so that each takes a read of its own.
    await Promise.all(crowd.map(serve));
    assert(widest <= rounds / 2, `one was ${widest} of ${rounds} messages ahead of another`);
  });
});

Deno.test("the queue moves on from turn to turn, and waits for no timer, as long as streams have something to read", async () => {
  await withCrowd(async (crowd) => {
    const messages = 20;
    for (const { conn } of crowd) for (let count = 0; count < messages; count++) conn.give("x");
    let [left, turns] = [CROWD, 0];
    const readers = crowd.map(async ({ stream }) => {
      for (let count = 0; count < messages; count++) await stream.readExactly(1);
      left--;
    });
    for (; left > 0; turns++) await new Promise<void>((resolve) => setImmediate(resolve));
    await Promise.all(readers);
    assert(turns < 1_000, `it took ${turns} turns`); // It takes thousands if a timer lets it move on.
  });
});

for (
  const [what, leave, name] of [
    ["are closed", ({ stream }: Member) => stream.close(), "BadResource"],
    ["are disposed of", ({ stream }: Member) => stream[Symbol.dispose](), "BadResource"],
    ["are reset", ({ conn }: Member) => conn.failReads(connectionReset()), "ConnectionReset"],
  ] as const
) {
  Deno.test(`streams that ${what} while they queue hold nobody up`, async () => {
    await withCrowd(async (crowd) => {
      const reads = queueUp(crowd);
      crowd.forEach((member, index) => {
        if (index % 3 !== 0) leave(member);
        else member.conn.give("stays");
      });
      for (const [index, read] of reads.entries()) {
        if (index % 3 === 0) assertEquals(textOf(await read), "stays");
        else assertEquals((await rejectionOf(read)).name, name);
      }
    });
  });
}

Deno.test("a stream whose peer ends while it queues reads the end", async () => {
  await withCrowd(async (crowd) => {
    const reads = queueUp(crowd);
    for (const { conn } of crowd) conn.end();
    for (const read of reads) assertEquals(await read, null);
  });
});

Deno.test("close() ends a read that queues at once, whatever was read before, while buffered bytes still leave", async () => {
  await withCrowd(async (crowd) => {
    for (let round = 0; round < 2; round++) {
      const counts = crowd.map(({ stream }) => stream.read(new Uint8Array(8)));
      for (const { conn } of crowd) conn.give("abc");
      await Promise.all(counts);
    }
    const reads = queueUp(crowd);
    const index = crowd.findLastIndex((member) => member.isQueued);
    const last = crowd[index];
    assert(last !== undefined);
    last.conn.holdWrites();
    last.stream.write("goodbye");
    last.stream.close();
    const read = reads[index];
    assert(read !== undefined && !(await isPending(read)));
    last.conn.releaseWrites();
    await last.conn.whenClosed;
    assertEquals(textOf(last.conn.written), "goodbye");
  });
});

Deno.test("reads that time out while they queue lose nothing, and the next ones are served", async () => {
  await withCrowd(async (crowd) => {
    for (const { stream } of crowd) stream.timeout = 1; // Counts from the next read on.
    const reads = queueUp(crowd);
    for (const read of reads) await keptAlive(assertRejects(() => read, Deno.errors.TimedOut));
    for (const { stream } of crowd) stream.timeout = Infinity;
    await Promise.all(crowd.map((member, index) => member.hear(`still here ${index}`)));
  });
});

Deno.test("a second read is refused while the first one queues, and does not disturb it", async () => {
  await withCrowd(async (crowd) => {
    const reads = queueUp(crowd);
    for (const { stream } of crowd) await assertRejects(() => stream.readLine(), Deno.errors.Busy);
    for (const { conn } of crowd) conn.give("x");
    for (const read of reads) assertEquals(textOf(await read), "x");
  });
});

Deno.test("upgrade() is refused while a read queues, and does not disturb it", async () => {
  await withCrowd(async (crowd) => {
    const reads = queueUp(crowd);
    for (const { stream } of crowd) await assertRejects(() => stream.upgrade((conn) => conn), Deno.errors.Busy);
    for (const { conn } of crowd) conn.give("x");
    for (const read of reads) assertEquals(textOf(await read), "x");
  });
});

Deno.test("bytes that are written while a read queues leave at once", async () => {
  await withCrowd(async (crowd) => {
    queueUp(crowd);
    for (const { stream } of crowd) stream.write("unasked");
    await turnEnd();
    for (const { conn } of crowd) assertEquals(conn.written, bytesOf("unasked"));
  });
});

Deno.test("a read(into) that queues fills the array that it was given, and no other", async () => {
  await withCrowd(async (crowd) => {
    const arrays = crowd.map(() => new Uint8Array(8));
    const counts = crowd.map(({ stream }, index) => stream.read(arrays[index] ?? new Uint8Array(1)));
    for (const [index, { conn }] of crowd.entries()) conn.give(String(index).padStart(4, "0"));
    assertEquals(await Promise.all(counts), crowd.map(() => 4));
    for (const [index, array] of arrays.entries()) {
      assertEquals(textOf(array).slice(0, 4), String(index).padStart(4, "0"));
    }
  });
});

Deno.test("when a crowd has left, the streams that stay do not queue any more", async () => {
  const messages = 400;
  const few = Array.from({ length: 100 }, () => new Member());
  const readers = few.map(({ stream }) => Array.fromAsync(stream));
  await withCrowd(async (crowd) => {
    queueUp(crowd);
    for (const { conn } of few) {
      for (let count = 0; count < messages; count++) conn.give("x");
      conn.end();
    }
    for (const { stream } of crowd) stream.close();
    for (let turn = 0; turn < 20; turn++) await turnEnd();
    const least = Math.min(...few.map(({ stream }) => stream.bytesRead));
    assert(least === messages, `one had ${least} of ${messages} messages that were there`);
  });
  await Promise.all(readers);
  for (const { stream } of few) stream.close();
});

Deno.test("a server with many streams that are never read, and one that is, serves the one", async () => {
  await withCrowd(async () => {
    const lone = new Member();
    for (let round = 0; round < 100; round++) await lone.hear(`${round}`);
    lone.stream.close();
  });
});

// Over TCP

/** Answers each line with itself. */
class Lines extends StreamRequestHandler {
  override async handle() {
    for await (const line of this.request.lines()) await this.request.send(`${line}\n`);
  }
}

/** Serves `count` clients of which each has had an answer. */
async function withClients(
  count: number,
  test: (server: TcpServer, clients: SocketStream[], serving: Promise<void>) => Promise<void>,
): Promise<void> {
  const server = new TcpServer({ port: 0 }, Lines, { maxConnections: count });
  const { port } = server.listen();
  const serving = server.serveForever();
  const clients: SocketStream[] = [];
  try {
    for (let index = 0; index < count; index++) clients.push(await connect({ port }));
    await Promise.all(clients.map(async (client) => {
      await client.send("hello\n");
      assertEquals(await client.readLine(), "hello");
    }));
    await test(server, clients, serving);
  } finally {
    for (const client of clients) client.close();
    await server.shutdown();
    await serving;
    await queueRests();
  }
}

networkTest("over TCP, 250 clients that never pause are all served, and none is far ahead", async () => {
  await withClients(250, async (_server, clients) => {
    const rounds = 40;
    const counts = clients.map(() => 0);
    let leastOfFirst = Infinity;
    await Promise.all(clients.map(async (client, index) => {
      for (let count = 1; count <= rounds; count++) {
        await client.send(`${count}\n`);
        assertEquals(await client.readLine(), `${count}`);
        counts[index] = count;
      }
      leastOfFirst = Math.min(leastOfFirst, ...counts);
    }));
    // Without turns some have had one answer or none when the first one is done.
    assert(leastOfFirst >= rounds / 8, `one had ${leastOfFirst} answers when another had all ${rounds}`);
  });
});

networkTest("over TCP, shutdown() while hundreds queue answers all that they asked", async () => {
  await withClients(250, async (server, clients, serving) => {
    for (let round = 0; round < 3; round++) {
      await Promise.all(clients.map((client) => client.send(`${round}\n`)));
      await Promise.all(clients.map((client) => client.readLine()));
    }
    await Promise.all(clients.map((client) => client.send("last\n")));
    const shutdown = server.shutdown();
    const answers = await Promise.all(clients.map((client) => client.readLine()));
    assertEquals(answers.filter((answer) => answer === "last").length, clients.length);
    for (const client of clients) assertEquals(await client.readLine(), null);
    assertEquals((await shutdown).cut, []);
    await serving;
  });
});

networkTest("over TCP, close() while hundreds queue ends them all", async () => {
  await withClients(250, async (server, clients, serving) => {
    await Promise.all(clients.map((client) => client.send("x\n".repeat(100))));
    server.close();
    await serving;
    assertEquals(server.stats.active, 0);
    assertEquals(server.stats.errors, 0);
  });
});
