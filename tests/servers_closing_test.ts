/** `close()`: the end of a server now. */

import { assert, assertEquals, fail } from "../deps.ts";
import { type ConnectionReport, StreamRequestHandler, StreamServer, TcpServer } from "../mod.ts";
import { FakeTcpConn } from "./fake_conn.ts";
import { withFakeTime } from "./fake_time.ts";
import { onStage } from "./stage.ts";
import { Echo, FakeListener, FakeServer } from "./testing.ts";

/** Never ends by itself, whatever happens to its stream. */
class Endless extends StreamRequestHandler {
  override async handle() {
    await new Promise(() => {});
  }
}

Deno.test("close() cuts everything off, and serveForever() resolves", async () => {
  await onStage(Endless, {}, async ({ server, time, serving, accept }) => {
    const conn = await accept();
    server.close();
    server.close();
    assertEquals([conn.isClosed, server.signal.aborted, server.outcomes], [true, true, ["cut"]]);
    await time.advanceUntil(serving, 300);
  });
});

Deno.test("a client that connects in the moment of close() is closed, and not served", async () => {
  await onStage(Endless, {}, async ({ server, time, serving, listener }) => {
    const conn = new FakeTcpConn();
    server.verifyRequest = () => fail("it was served");
    listener.give(conn);
    server.close();
    await time.advanceUntil(serving, 300);
    assertEquals([conn.isClosed, server.outcomes, server.errors], [true, [], []]);
  });
});

Deno.test("close() ends a handleRequest() that waits out an exhaustion, at once", async () => {
  await withFakeTime(async (time) => {
    const exhausted = Object.assign(new Error("Too many open files (os error 24)"), { code: "EMFILE" });
    const listener = new FakeListener(Array(1_000).fill(exhausted));
    const server = new FakeServer(listener);
    server.handleOverload = () => {};
    const handling = server.handleRequest();
    await time.advance(5_000);
    server.close();
    await time.advanceUntil(Promise.all([handling, server.shutdown()]), 250);
    assert(listener.closed);
  });
});

Deno.test("close() ends a handleRequest() whose handler is stuck", async () => {
  await withFakeTime(async (time) => {
    const listener = new FakeListener([new FakeTcpConn()]);
    const server = new FakeServer(listener, Endless);
    const handling = server.handleRequest();
    await time.advance(1_000);
    assertEquals(server.stats.active, 1);
    server.close();
    await time.advanceUntil(handling, 1_000);
    assert(listener.closed);
  });
});

Deno.test("close() before anything else opens nothing", async () => {
  const server = new TcpServer({ port: 0 }, Echo);
  server.close();
  await server.serveForever();
});

Deno.test("a server that was closed while it was about to listen closes the listener", async () => {
  const fake = new FakeListener([]);
  class Late extends FakeServer {
    override listen(): Deno.NetAddr {
      this.close();
      return super.listen();
    }
  }
  await new Late(fake).serveForever();
  assert(fake.closed);
});

Deno.test("a listener whose close() rejects when the server was closed meanwhile ends nothing", async () => {
  class Stubborn extends StreamServer<Deno.NetAddr> {
    override listen(): Deno.NetAddr {
      const accept = () => Promise.reject(new Error("never called"));
      const close = () => Promise.reject(new Error("a late close"));
      this.close();
      return this.adopt({ accept, close }, { transport: "tcp", hostname: "127.0.0.1", port: 1 });
    }

    constructor() {
      super(Echo, {});
    }
  }
  await new Stubborn().serveForever();
});

/** The hook in which the server closes itself, and what still runs after it. */
const CLOSING: ["handleOpen" | "verifyRequest", isLater: boolean, calls: string[]][] = [
  ["handleOpen", false, ["handleOpen", "cut"]],
  ["verifyRequest", false, ["handleOpen", "verifyRequest", "cut"]],
  ["verifyRequest", true, ["handleOpen", "verifyRequest", "cut"]],
];

for (const [hook, isLater, expected] of CLOSING) {
  const when = isLater ? "while verifyRequest() waits" : `in ${hook}()`;
  Deno.test(`a client that close() meets ${when} has no handler`, async () => {
    const calls: string[] = [];
    class Closing extends FakeServer {
      override handleOpen() {
        this.#note("handleOpen");
      }
      override verifyRequest() {
        this.#note("verifyRequest");
        return isLater ? Promise.resolve().then(() => this.#close()) : true;
      }
      override processRequest() {
        calls.push("processRequest");
      }
      override handleClose({ outcome }: ConnectionReport) {
        calls.push(outcome);
      }
      #note(name: string) {
        calls.push(name);
        if (name === hook && !isLater) this.close();
      }
      #close() {
        this.close();
        return true;
      }
    }
    const conn = new FakeTcpConn();
    await new Closing(new FakeListener([conn])).serveForever();
    assertEquals([calls, conn.isClosed], [expected, true]);
  });
}
