/**
 * Promises of a stream's methods that a handler forgets to await: however they
 * settle, they end nothing but their own connection. An unhandled rejection ends the
 * test run, so most of these tests need no assertion.
 */

import { connect, SocketStream, StreamRequestHandler, TcpServer } from "../mod.ts";
import { brokenPipe, connectionReset, FakeConn, turnEnd } from "./fake_conn.ts";
import { networkTest, until } from "./testing.ts";

const CALLS: [string, (stream: SocketStream) => Promise<unknown>][] = [
  ["send()", (stream) => stream.send("abcdef")],
  ["write()", (stream) => stream.write("abcdef")],
  ["write() of more than highWaterMark", (stream) => stream.write(new Uint8Array(100_000))],
  ["writeFrame()", (stream) => stream.writeFrame("abcdef")],
  ["flush()", (stream) => (stream.write("abc"), stream.flush())],
  ["closeWrite()", (stream) => stream.closeWrite()],
  ["recv()", (stream) => stream.recv()],
  ["read()", (stream) => stream.read(new Uint8Array(10))],
  ["readExactly()", (stream) => stream.readExactly(10)],
  ["readUntil()", (stream) => stream.readUntil("\n")],
  ["readLine()", (stream) => stream.readLine()],
  ["peek()", (stream) => stream.peek(10)],
  ["lines()", (stream) => stream.lines().next()],
  ["frames()", (stream) => stream.frames().next()],
  ["pipeTo()", (stream) => stream.pipeTo(stream)],
  ["upgrade()", (stream) => stream.upgrade((conn) => conn)],
  ["for await", (stream) => stream[Symbol.asyncIterator]().next()],
];

for (const [name, call] of CALLS) {
  Deno.test(`${name} that nobody awaits may fail in its first part, in its second, and by close()`, async () => {
    for (const takes of [0, 3]) {
      const conn = new FakeConn().holdWrites();
      conn.takes = () => takes === 0 ? Infinity : takes;
      const stream = new SocketStream(conn);
      call(stream);
      await turnEnd();
      if (takes > 0) conn.releaseOneWrite();
      await turnEnd();
      conn.failWrites(brokenPipe()).failReads(brokenPipe());
      await turnEnd();
      call(stream);
      stream.close();
      call(stream);
      await turnEnd();
    }
  });
}

const forgotten: Record<string, (stream: SocketStream) => void> = {
  "recv() of a count that is out of range": (stream) => void stream.recv(0),
  "read() into an empty array": (stream) => void stream.read(new Uint8Array(0)),
  "readExactly() of a count that is out of range": (stream) => void stream.readExactly(-1),
  "readUntil() an empty delimiter": (stream) => void stream.readUntil(""),
  "a second read": (stream) => {
    stream.recv();
    stream.readLine();
  },
  "a read of a stream that is closed": (stream) => {
    stream.close();
    stream.recv();
  },
  "a read that waits when the stream is closed": (stream) => {
    stream.recv();
    stream.close();
  },
  "write(), send() and flush() of a stream that is closed": (stream) => {
    stream.close();
    stream.write("a");
    stream.send("a");
    stream.flush();
    stream.closeWrite();
    stream.writeFrame("a");
  },
  "write() and send() after closeWrite()": (stream) => {
    stream.closeWrite();
    stream.write("a");
    stream.send("a");
    stream.writeFrame("a");
  },
  "a frame that is too long for its prefix": (stream) =>
    void stream.writeFrame(new Uint8Array(256), { lengthBytes: 1 }),
  "an iterator's next()": (stream) => {
    stream.lines().next();
    stream.frames().next();
    stream[Symbol.asyncIterator]().next();
  },
};

for (const [what, forget] of Object.entries(forgotten)) {
  Deno.test(`a forgotten rejection ends nothing: ${what}`, async () => {
    const stream = new SocketStream(new FakeConn());
    forget(stream);
    await turnEnd();
    stream.close();
    await turnEnd();
  });
}

Deno.test("a forgotten rejection ends nothing: writes that the connection fails", async () => {
  const conn = new FakeConn().failWrites(brokenPipe());
  const stream = new SocketStream(conn, { highWaterMark: 4 });
  stream.write("abc");
  stream.write("over the mark");
  stream.send("def");
  stream.writeFrame("ghi");
  stream.flush();
  stream.closeWrite();
  await turnEnd();
  stream.close();
  await turnEnd();
});

Deno.test("a forgotten rejection ends nothing: reads that the connection fails", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  stream.readExactly(10);
  conn.give("abc").failReads(connectionReset());
  await turnEnd();
  stream.close();
});

Deno.test("a forgotten rejection ends nothing: limits and early ends", async () => {
  const conn = new FakeConn().give("abcdefgh").end();
  const stream = new SocketStream(conn, { limit: 4 });
  stream.readLine();
  await turnEnd();
  stream.readExactly(100);
  await turnEnd();
  stream.close();
});

networkTest("a client that resets while a long send() that nobody awaits is under way ends nothing", async () => {
  class Forgetful extends StreamRequestHandler {
    override async handle() {
      this.request.send(new Uint8Array(20_000_000));
      await this.request.recv();
    }
  }
  const server = new TcpServer({ port: 0 }, Forgetful);
  const { port } = server.listen();
  const serving = server.serveForever();
  const client = await Deno.connect({ port });
  await client.read(new Uint8Array(1));
  client.close(); // What is unread makes it a reset.
  await until(() => server.stats.accepted === 1 && server.stats.active === 0);
  await server.shutdown();
  await serving;
});

for (const end of ["close", "shutdown"] as const) {
  networkTest(`a send() that nobody awaits, and ${end}() behind it, ends nothing else`, async () => {
    class Last extends StreamRequestHandler {
      override async handle() {
        await this.request.recv();
        this.request.send("bye");
        if (end === "close") this.server.close();
        else this.server.shutdown({ grace: 0 });
      }
    }
    const server = new TcpServer({ port: 0 }, Last);
    const { port } = server.listen();
    const serving = server.serveForever();
    await using client = await connect({ port });
    await client.send("x");
    await serving;
    await turnEnd();
  });
}
