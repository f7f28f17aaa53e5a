/** Filters: what becomes of a connection before it is a stream, and in the middle of one. */

import { assert, assertEquals, assertMatch, assertStrictEquals } from "../deps.ts";
import {
  type ConnectionFilter,
  type ErrorOutcome,
  type FilterContext,
  perHost,
  type ServerOptions,
  SocketStream,
  type StreamConn,
  StreamRequestHandler,
  TcpServer,
} from "../mod.ts";
import { FakeConn, FakeTcpConn, textOf, turnEnd } from "./fake_conn.ts";
import { type FakeTime, withFakeTime } from "./fake_time.ts";
import { Echo, FakeListener, FakeServer, networkTest, peerTest, printedBy, withServer } from "./testing.ts";

/** Exchanges the letters A and B, over another connection. */
class Swapped implements StreamConn {
  constructor(readonly under: StreamConn) {}
  get localAddr(): Deno.Addr {
    return this.under.localAddr;
  }
  get remoteAddr(): Deno.Addr {
    return this.under.remoteAddr;
  }
  async read(into: Uint8Array) {
    const count = await this.under.read(into);
    into.set(into.subarray(0, count ?? 0).map(swap));
    return count;
  }
  write(data: Uint8Array) {
    return this.under.write(data.map(swap));
  }
  closeWrite() {
    return this.under.closeWrite();
  }
  close() {
    this.under.close();
  }
}

function swap(byte: number): number {
  return byte === 0x41 ? 0x42 : byte === 0x42 ? 0x41 : byte;
}

/** A client that a filter has made one of. */
class From extends FakeTcpConn {
  constructor(override readonly remoteAddr: Deno.NetAddr) {
    super();
  }
}

function clientOf(hostname: string): FakeTcpConn {
  return new From({ transport: "tcp", hostname, port: 50_000 });
}

/** Keeps what its hooks get. */
class Witness extends FakeServer {
  readonly errors: [error: unknown, outcome: ErrorOutcome][] = [];
  readonly refused: Deno.Addr[] = [];
  readonly others: string[] = [];
  override handleError(error: unknown, _clientAddress: Deno.Addr, outcome: ErrorOutcome): void | Promise<void> {
    this.errors.push([error, outcome]);
  }
  override handleRefuse(clientAddress: Deno.Addr) {
    this.refused.push(clientAddress);
  }
  override handleOpen() {
    this.others.push("handleOpen");
  }
  override handleClose() {
    this.others.push("handleClose");
  }
  override verifyRequest() {
    this.others.push("verifyRequest");
    return true;
  }
}

interface Served {
  readonly server: Witness;
  readonly time: FakeTime;
  give(conn: FakeTcpConn): Promise<void>;
}

/** Runs `test` with a server of fake clients that has these filters. */
async function withFilters(
  filters: readonly ConnectionFilter[],
  test: (served: Served) => Promise<void>,
  options: ServerOptions = {},
): Promise<void> {
  await withFakeTime(async (time) => {
    const listener = new FakeListener([]);
    const server = new Witness(listener, Echo, { filters, ...options });
    const serving = server.serveForever();
    await turnEnd();
    const give = async (conn: FakeTcpConn) => {
      listener.give(conn);
      await turnEnd();
    };
    await test({ server, time, give });
    server.close();
    await time.advanceUntil(serving);
  });
}

// A filter's answer

const later = <T>(value: T) => Promise.resolve().then(() => value);

Deno.test("each filter gets the connection of the one before, and the handler that of the last", async () => {
  const under: unknown[] = [];
  const filters: ConnectionFilter[] = [
    (conn) => new Swapped(conn),
    (conn) => later(conn),
    (conn) => later(new Swapped(conn)),
    (conn) => {
      under.push(conn);
      return new Swapped(conn);
    },
  ];
  await withFilters(filters, async ({ give }) => {
    const conn = new FakeTcpConn().give("ABC");
    await give(conn);
    assertEquals(textOf(conn.written), "ABC"); // It came in as BAC, and went out as ABC again.
    const layers: unknown[] = [];
    for (let layer = under[0] as StreamConn | undefined; layer; layer = layer.under) layers.push(layer.constructor);
    assertEquals(layers, [Swapped, Swapped, FakeTcpConn]);
  });
});

Deno.test("under walks from the stream's connection to the accepted one", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(new Swapped(new Swapped(conn)));
  const layers: unknown[] = [];
  for (let layer: StreamConn | undefined = stream.under; layer; layer = layer.under) layers.push(layer.constructor);
  assertEquals(layers, [Swapped, Swapped, FakeConn]);
  stream.close();
  assert(conn.isClosed);
  await turnEnd();
});

Deno.test("the last filter's remoteAddr is the client's address for all hooks and the handler", async () => {
  const client = { transport: "tcp", hostname: "192.0.2.1", port: 1 } as const;
  const seen: Deno.Addr[] = [];
  class Seeing extends StreamRequestHandler {
    override handle() {
      seen.push(this.clientAddress, this.request.remoteAddress);
    }
  }
  class Server extends FakeServer {
    override handleOpen(_request: SocketStream, clientAddress: Deno.Addr) {
      seen.push(clientAddress);
    }
    override handleClose(_report: unknown, clientAddress: Deno.Addr) {
      seen.push(clientAddress);
      this.close();
    }
  }
  await new Server(new FakeListener([new FakeTcpConn()]), Seeing, { filters: [() => new From(client)] }).serveForever();
  assertEquals(seen, Array(4).fill(client));
});

/** Filters that refuse, and whether they do so later. */
const REFUSALS: [string, ConnectionFilter][] = [["null", () => null], ["a promise of null", () => later(null)]];

for (const [what, refuse] of REFUSALS) {
  Deno.test(`a filter that gives ${what} refuses the connection, and no hook but handleRefuse() runs`, async () => {
    const after: unknown[] = [];
    const filters: ConnectionFilter[] = [(conn) => new Swapped(conn), refuse, (conn) => (after.push(conn), conn)];
    await withFilters(filters, async ({ server, give }) => {
      const conn = new FakeTcpConn();
      await give(conn);
      assert(conn.isClosed);
      const { accepted, active, refused, rejected, errors } = server.stats;
      assertEquals([accepted, active, refused, rejected, errors], [1, 0, 1, 0, 0]);
      assertEquals([server.refused, server.errors, server.others, after], [[conn.remoteAddr], [], [], []]);
    });
  });
}

Deno.test("a hole that somebody makes in the filters of a server refuses the connection", async () => {
  const filters: ConnectionFilter[] = [(conn) => conn, (conn) => conn];
  await withFilters(filters, async ({ server, give }) => {
    delete filters[0];
    await give(new FakeTcpConn());
    assertEquals([server.stats.refused, server.others], [1, []]);
  });
});

Deno.test("a filter that closes the server and then refuses has cut its connection off, once", async () => {
  const released: string[] = [];
  let witness: Witness | undefined;
  const closing: ConnectionFilter = (_conn, { onEnd }) => {
    onEnd(() => released.push("once"));
    witness?.close();
    return null;
  };
  await withFilters([closing], async ({ server, give }) => {
    witness = server;
    await give(new FakeTcpConn());
    assertEquals([server.stats.refused, server.stats.active, server.refused], [0, 0, []]);
  });
  assertEquals(released, ["once"]);
});

Deno.test("a handleRefuse() that throws hurts nobody", async () => {
  const printed = await printedBy(() =>
    withFilters([() => null], async ({ server, give }) => {
      server.handleRefuse = () => {
        throw new TypeError("a bug in the hook");
      };
      for (let refused = 1; refused <= 2; refused++) {
        await give(new FakeTcpConn());
        assertEquals([server.stats.refused, server.stats.errors, server.stats.active], [refused, refused, 0]);
      }
    })
  );
  assertEquals(printed.map(([what]) => what), Array(2).fill("Error in handleRefuse():"));
});

/** Ways in which a filter fails. */
const FAILURES: [string, ConnectionFilter][] = [
  ["throws", () => {
    throw new Deno.errors.InvalidData("no hello");
  }],
  ["rejects", () => Promise.reject(new Deno.errors.InvalidData("no hello"))],
  ["gives no connection", () => Reflect.get({}, "connection")],
];

for (const [how, fail] of FAILURES) {
  Deno.test(`a filter that ${how} is a failed handshake of its own connection`, async () => {
    await withFilters([fail], async ({ server, give }) => {
      const conns = [new FakeTcpConn(), new FakeTcpConn()];
      for (const conn of conns) await give(conn);
      assert(conns.every(({ isClosed }) => isClosed));
      const { accepted, active, handshakeFailures, errors, refused } = server.stats;
      assertEquals([accepted, active, handshakeFailures, errors, refused], [2, 0, 2, 0, 0]);
      assertEquals(server.errors.map(([error, outcome]) => [error instanceof Error, outcome]), [
        [true, "handshakeFailed"],
        [true, "handshakeFailed"],
      ]);
      assertEquals([server.others, server.refused], [[], []]);
    });
  });
}

Deno.test("a client in a filter holds up nobody else", async () => {
  let asked = 0;
  await withFilters([(conn) => asked++ === 0 ? new Promise(() => {}) : conn], async ({ give }) => {
    const [stuck, other] = [new FakeTcpConn(), new FakeTcpConn().give("hello")];
    await give(stuck);
    await give(other);
    assertEquals([textOf(other.written), stuck.isClosed], ["hello", false]);
  });
});

// The time and the signal of the filters

for (const handshakeTimeout of [undefined, 200, Infinity]) {
  const most = handshakeTimeout ?? 5_000;
  Deno.test(`all filters of a connection together have a handshakeTimeout of ${most} ms`, async () => {
    const reasons: unknown[] = [];
    const slow: ConnectionFilter = async (conn) => {
      await new Promise((resolve) => setTimeout(resolve, 180));
      return conn;
    };
    const stuck: ConnectionFilter = (_conn, { signal }) => {
      signal.addEventListener("abort", () => reasons.push(signal.reason));
      return new Promise(() => {});
    };
    await withFilters([slow, stuck], async ({ server, time, give }) => {
      const conn = new FakeTcpConn();
      await give(conn);
      await time.advance(most === Infinity ? 1e6 : most - 1);
      assertEquals([conn.isClosed, server.errors], [false, []]);
      if (most === Infinity) return;
      await time.advance(1);
      assertEquals([conn.isClosed, server.stats.handshakeFailures, server.stats.active], [true, 1, 0]);
      const [[error, outcome] = []] = server.errors;
      assert(error instanceof Deno.errors.TimedOut);
      assertEquals([error.message, outcome], [`filters took longer than ${most} ms`, "handshakeFailed"]);
      assertEquals(reasons, [error]);
    }, { handshakeTimeout });
  });
}

Deno.test("close() aborts the filters of a connection, and reports nothing", async () => {
  const reasons: unknown[] = [];
  const stuck: ConnectionFilter = (_conn, { signal }) => {
    signal.addEventListener("abort", () => reasons.push(signal.reason));
    return new Promise(() => {});
  };
  await withFilters([stuck], async ({ server, give }) => {
    const conn = new FakeTcpConn();
    await give(conn);
    server.close();
    assert(conn.isClosed && reasons[0] instanceof Deno.errors.BadResource);
    await turnEnd();
    const { active, handshakeFailures, errors } = server.stats;
    assertEquals([active, handshakeFailures, errors, server.errors, server.others], [0, 0, 0, [], []]);
  });
});

/** Ways in which a connection ends while a filter that minds no signal works on it. */
const EARLY_ENDS: [string, (served: Served) => unknown][] = [
  ["the server is closed", ({ server }) => server.close()],
  ["the handshakeTimeout is over", ({ time }) => time.advance(5_000)],
];

for (const [what, end] of EARLY_ENDS) {
  Deno.test(`a filter's connection that comes after ${what} is closed, and meets no other filter`, async () => {
    const gate = Promise.withResolvers<void>();
    const made = clientOf("192.0.2.1");
    let others = 0;
    const filters: ConnectionFilter[] = [() => gate.promise.then(() => made), (conn) => (others++, conn)];
    await withFilters(filters, async (served) => {
      await served.give(new FakeTcpConn());
      await end(served);
      await turnEnd();
      gate.resolve();
      await turnEnd();
      assertEquals([made.isClosed, others, served.server.others], [true, 0, []]);
    });
  });
}

Deno.test("a connection that ended in its filters does not count for its host", async () => {
  const gate = Promise.withResolvers<void>();
  let asked = 0;
  const slow: ConnectionFilter = (conn) => asked++ === 0 ? gate.promise.then(() => conn) : conn;
  await withFilters([slow, perHost(1)], async ({ server, time, give }) => {
    await give(clientOf("192.0.2.1"));
    await time.advance(5_000);
    assertEquals(server.stats.handshakeFailures, 1);
    gate.resolve();
    await turnEnd();
    const later = clientOf("192.0.2.1");
    await give(later);
    assertEquals([later.isClosed, server.stats.refused], [false, 0]);
  });
});

/** Connections that end in different ways, and what they do. */
const ENDS: [string, ConnectionFilter | undefined, (conn: FakeTcpConn, server: Witness) => void][] = [
  ["is served", undefined, (conn) => void conn.end()],
  ["is cut off", undefined, (_conn, server) => server.close()],
  ["is refused later", () => null, () => {}],
  ["fails a later filter", () => Promise.reject(new TypeError("no hello")), () => {}],
];

for (const [how, next, end] of ENDS) {
  Deno.test(`what a filter gave to onEnd() runs once when its connection ${how}`, async () => {
    const released: string[] = [];
    const first: ConnectionFilter = (conn, { onEnd }: FilterContext) => {
      onEnd(() => released.push("first"));
      onEnd(() => released.push("second"));
      return conn;
    };
    await withFilters(next === undefined ? [first] : [first, next], async ({ server, give }) => {
      const conn = new FakeTcpConn();
      await give(conn);
      assertEquals(released, next === undefined ? [] : ["first", "second"]);
      end(conn, server);
      await turnEnd();
      assertEquals(released, ["first", "second"]);
    });
    assertEquals(released, ["first", "second"]);
  });
}

Deno.test("what a filter gives to onEnd() after the end of its connection runs at once", async () => {
  const gate = Promise.withResolvers<void>();
  let released = 0;
  const late: ConnectionFilter = async (conn, { onEnd }) => {
    await gate.promise;
    onEnd(() => released++);
    return conn;
  };
  await withFilters([late], async ({ time, give }) => {
    await give(new FakeTcpConn());
    await time.advance(5_000);
    gate.resolve();
    await turnEnd();
    assertEquals(released, 1);
  });
});

const nothing = () => Reflect.get({}, "forgotten");
const thenable = () =>
  Reflect.get({ thenable: { then: (resolve: (value: string) => void) => resolve("a") } }, "thenable");

/** Ways to give no connection, as plain JavaScript can. */
const WRONG: [string, ConnectionFilter, string][] = [
  ["returns undefined", nothing, "undefined"],
  ["resolves to undefined", () => Promise.resolve(nothing()), "undefined"],
  ["returns another object", () => Reflect.get({ other: { pid: 1 } }, "other"), "{ pid: 1 }"],
  ["returns a thenable", thenable, '"a"'],
];

for (const [how, wrong, given] of WRONG) {
  Deno.test(`a filter that ${how} is a failed handshake with a sentence of its own`, async () => {
    await withFilters([wrong], async ({ server, give }) => {
      const conn = new FakeTcpConn();
      await give(conn);
      assertEquals(
        server.errors.map(([error, outcome]) => [`${error}`, outcome]),
        [[`TypeError: A filter must give a connection or null: it has given ${given}`, "handshakeFailed"]],
      );
      assertEquals([conn.isClosed, server.stats.handshakeFailures, server.stats.errors], [true, 1, 0]);
    });
  });
}

// Notices

Deno.test("failed handshakes are printed once a second at most, with a count of those left out", async () => {
  class Printing extends FakeServer {}
  const failure = "\x1b[2Jno hello";
  const printed = await printedBy(() =>
    withFakeTime(async (time) => {
      const listener = new FakeListener([]);
      const server = new Printing(listener, Echo, { filters: [() => Promise.reject(new TypeError(failure))] });
      const serving = server.serveForever();
      await turnEnd();
      for (const pause of [0, 0, 999, 1, 1_000, 5_000]) {
        await time.advance(pause);
        listener.give(new FakeTcpConn());
        await turnEnd();
      }
      assertEquals(server.stats.handshakeFailures, 6);
      server.close();
      await time.advanceUntil(serving);
    })
  );
  const line = String.raw`Handshake with 127.0.0.1:50000 failed: \x1b[2Jno hello`;
  assertEquals(printed.map(([, text]) => text), [
    line,
    `${line} (2 similar lines were left out before)`,
    line,
    line,
  ]);
});

// perHost()

Deno.test("perHost() refuses the connection over its limit, and makes room when one ends", async () => {
  await withFilters([perHost(2)], async ({ server, give }) => {
    const [first, second, third, fourth] = Array.from({ length: 4 }, () => clientOf("192.0.2.1"));
    assert(first && second && third && fourth);
    for (const conn of [first, second, third]) await give(conn);
    const other = clientOf("192.0.2.2");
    await give(other);
    assertEquals([first, second, third, other].map(({ isClosed }) => isClosed), [false, false, true, false]);
    assertEquals([server.stats.refused, server.stats.accepted, server.stats.active], [1, 4, 3]);
    first.end();
    await turnEnd();
    await give(fourth);
    assertEquals([fourth.isClosed, server.stats.refused], [false, 1]);
  });
});

/** Pairs of hosts, and whether they are one to perHost(1). */
const PAIRS: [string, string, boolean][] = [
  ["192.0.2.1", "::ffff:192.0.2.1", true],
  ["2001:db8::1", "2001:db8::2", true],
  ["2001:db8::1", "2001:db8:0:1::1", false],
  ["fe80::1", "fe80::2", false],
  ["fd00::1", "fd00::2", false],
];

for (const [one, other, isOne] of PAIRS) {
  Deno.test(`perHost() takes ${one} and ${other} for ${isOne ? "one host" : "two hosts"}`, async () => {
    await withFilters([perHost(1)], async ({ server, give }) => {
      for (const hostname of [one, other]) await give(clientOf(hostname));
      assertEquals(server.stats.refused, isOne ? 1 : 0);
    });
  });
}

Deno.test("perHost() after a filter that tells the clients counts clients, and before it their proxies", async () => {
  let next = 0;
  const proxied: ConnectionFilter = () => clientOf(`192.0.2.${next++}`);
  for (const [filters, refused] of [[[proxied, perHost(1)], 0], [[perHost(1), proxied], 2]] as const) {
    await withFilters(filters, async ({ server, give }) => {
      for (let count = 0; count < 3; count++) await give(new FakeTcpConn());
      assertEquals(server.stats.refused, refused);
    });
  }
});

Deno.test("perHost() lets clients without a host pass", () => {
  class Local extends FakeConn {
    override readonly remoteAddr: Deno.Addr = { transport: "unix", path: "" };
  }
  const filter = perHost(1);
  for (let count = 0; count < 2; count++) {
    const conn = new Local();
    assertStrictEquals(filter(conn, { signal: new AbortController().signal, onEnd: () => {} }), conn);
  }
});

Deno.test("perHost() refuses limits that are not whole or below 1", () => {
  for (const limit of [0, -1, 1.5, NaN]) {
    const error = (() => {
      try {
        return perHost(limit);
      } catch (error) {
        return error;
      }
    })();
    assert(error instanceof RangeError);
    assertMatch(error.message, /^perHost\(\) takes a whole number of 1 or more/);
  }
  perHost(Infinity);
});

networkTest("a connection that getRequest() failed for does not count for its host", async () => {
  class Faulty extends TcpServer {
    #connections = 0;
    override getRequest(conn: StreamConn) {
      if (++this.#connections <= 2) throw new TypeError("a bug in the hook");
      return super.getRequest(conn);
    }
    override handleError() {}
  }
  await withServer(new Faulty({ port: 0 }, Echo, { filters: [perHost(1)] }), async (server, dial) => {
    for (let failed = 0; failed < 2; failed++) assertEquals(await (await dial()).recv(), null);
    const client = await dial();
    await client.send("hello\n");
    assertEquals(await client.readLine(), "hello");
    assertEquals(await (await dial()).recv(), null);
    assertEquals(server.stats.refused, 1);
  });
});

/** Connects from 127.0.0.2, and prints what it gets. */
const OTHER_HOST = `
import socket, sys
client = socket.create_connection(("127.0.0.1", int(sys.argv[1])), source_address=("127.0.0.2", 0))
client.sendall(b"hello\\n")
print(client.recv(100).decode(), end="")
`;

peerTest(
  ["python3"],
  "a host that has as many connections as perHost() allows costs no other host anything",
  async () => {
    await withServer(new TcpServer({ port: 0 }, Echo, { filters: [perHost(1)] }), async (server, dial) => {
      await (await dial()).send("hello\n");
      assertEquals(await (await dial()).recv(), null);
      const other = new Deno.Command("python3", { args: ["-c", OTHER_HOST, String(server.address.port)] });
      assertEquals(new TextDecoder().decode((await other.output()).stdout), "hello\n");
    });
  },
);
