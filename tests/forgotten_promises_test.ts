/**
 * Promises of a stream's methods that a handler forgets to await: whatever becomes
 * of them, nothing but their own connection ends. A promise that nobody handles
 * ends the test run, so that most of these tests need no assertion.
 */

import { connect, SocketStream, StreamRequestHandler, TcpServer } from "../mod.ts";
import { brokenPipe, FakeConn, turnEnd } from "./fake_conn.ts";
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
  ["lines()", (stream) => stream.lines().next()],
  ["frames()", (stream) => stream.frames().next()],
  ["for await", (stream) => stream[Symbol.asyncIterator]().next()],
];

for (const [name, call] of CALLS) {
  Deno.test(`a ${name} that nobody awaits may fail in its first part, in its second, and by close()`, async () => {
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
