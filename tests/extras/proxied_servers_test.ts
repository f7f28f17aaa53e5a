/** Servers that believe a proxy: over TCP, TLS and Unix sockets, with proxies and clients that mean no good. */

import { assert, assertEquals, assertMatch, assertRejects } from "../deps.ts";
import {
  connect,
  type ConnectionReport,
  encodeProxyHeader,
  formatAddress,
  hostOf,
  type ProxyHeader,
  type ServerOptions,
  type SocketStream,
  StreamRequestHandler,
  TcpServer,
  TlsServer,
  UnixServer,
} from "../mod.ts";
import { type Certificates, withCertificates } from "./certificates.ts";
import { bytesOf, concat, connectionReset, FakeTcpConn } from "./fake_conn.ts";
import { FakeServer, Peer } from "./programs.ts";
import { FakeListener, networkTest, programTest, scaled, unixTest, until } from "./testing.ts";

function tcp(hostname: string, port: number): Deno.NetAddr {
  return { transport: "tcp", hostname, port };
}

const CLIENT = tcp("203.0.113.7", 50_000);
const FRONT = tcp("198.51.100.2", 443);

const FROM_LOOPBACK = { proxyProtocol: { from: ["127.0.0.0/8"] } };
const FROM_ELSEWHERE = ["192.0.2.0/24", "::/0"];

/** Headers of the same client. */
const HEADERS: Record<string, Uint8Array> = {
  "version 1": encodeProxyHeader({ version: 1, source: CLIENT, destination: FRONT }),
  "version 2": encodeProxyHeader({ source: CLIENT, destination: FRONT, authority: "example.org", hasChecksum: true }),
};

/** Headers that name nobody. */
const NAMELESS: Record<string, Uint8Array> = {
  LOCAL: encodeProxyHeader({ command: "LOCAL" }),
  UNKNOWN: encodeProxyHeader({ version: 1 }),
  UNSPEC: encodeProxyHeader({}),
};

/** Says who the client is, and then each line back; a line "fail" is thrown. */
class Namer extends StreamRequestHandler {
  override async handle() {
    await this.request.send(`${formatAddress(this.clientAddress)}\n`);
    for await (const line of this.request.lines()) {
      if (line === "fail") throw new TypeError("on purpose");
      await this.request.send(`${line}\n`);
    }
  }
}

/** What a server has told. */
interface Events {
  opened: string[];
  closed: string[];
  errors: string[];
  verified: string[];
}

/** A server that keeps what it is told. */
class Witness extends TcpServer implements Events {
  readonly opened: string[] = [];
  readonly closed: string[] = [];
  readonly errors: string[] = [];
  readonly verified: string[] = [];

  override handleOpen(request: SocketStream, clientAddress: Deno.Addr) {
    assertEquals(request.remoteAddress, clientAddress);
    this.opened.push(formatAddress(clientAddress));
  }

  override verifyRequest(_request: SocketStream, clientAddress: Deno.Addr) {
    this.verified.push(formatAddress(clientAddress));
    return true;
  }

  override handleClose({ reason }: ConnectionReport, clientAddress: Deno.Addr) {
    this.closed.push(`${formatAddress(clientAddress)} ${reason}`);
  }

  override handleError(error: unknown, clientAddress: Deno.Addr) {
    this.errors.push(`${formatAddress(clientAddress)} ${error instanceof Error ? error.message : error}`);
  }
}

/** The same, with connections of the test. */
class FakeWitness extends Witness {
  readonly #listener: FakeListener;

  constructor(...conns: FakeTcpConn[]) {
    super({ port: 0 }, Namer, FROM_LOOPBACK);
    this.#listener = new FakeListener(conns);
  }

  override listen(): Deno.NetAddr {
    return this.adopt(this.#listener, tcp("127.0.0.1", 1));
  }
}

/** Serves until `test` is over. */
async function serving(
  test: (server: Witness, port: number) => Promise<void>,
  options: ServerOptions = FROM_LOOPBACK,
  Handler = Namer,
): Promise<void> {
  await using server = new Witness({ port: 0 }, Handler, options);
  const { port } = server.listen();
  server.serveForever();
  await test(server, port);
}

// Who the client is

for (const [what, header] of Object.entries(HEADERS)) {
  networkTest(`the client is whom a header of ${what} names, in every cut of it and what follows`, async () => {
    await serving(async (server, port) => {
      const bytes = concat([header, bytesOf("hello\nyou\n")]);
      const talk = async (cut: number) => {
        using peer = await Peer.connect(port);
        await peer.send(bytes.subarray(0, cut));
        // Before the second part comes, the first one was read.
        const arrived = cut < header.length ? cut : cut - header.length;
        await until(() => server.openConnections.some(({ bytesRead }) => bytesRead === arrived));
        await peer.send(bytes.subarray(cut));
        await peer.closeWrite();
        assertEquals(new TextDecoder().decode(await peer.receiveAll()), "203.0.113.7:50000\nhello\nyou\n");
      };
      for (let cut = 0; cut <= bytes.length; cut++) await talk(cut);
      await until(() => server.stats.active === 0);
      assertEquals(server.opened, Array(bytes.length + 1).fill("203.0.113.7:50000"));
      assertEquals(server.verified, server.opened);
      assertEquals(server.closed, server.opened.map((address) => `${address} finished`));
      assertEquals(server.errors, []);
      assertEquals(server.stats.bytesRead, 10 * (bytes.length + 1)); // The headers are not the clients'.
    });
  });

  networkTest(`a header of ${what} that comes byte by byte is read`, async () => {
    await serving(async (_server, port) => {
      using peer = await Peer.connect(port);
      for (const byte of header) await peer.send(new Uint8Array([byte]));
      assertEquals(await peer.receive("\n"), "203.0.113.7:50000\n");
    });
  });
}

/** Keeps what its handler saw. */
class Looking extends StreamRequestHandler {
  static seen: Partial<SocketStream>[] = [];

  override async handle() {
    const { localAddress, remoteAddress, proxy, proxyAddress, bytesRead } = this.request;
    Looking.seen.push({ localAddress, remoteAddress, proxy, proxyAddress, bytesRead } as Partial<SocketStream>);
    await this.request.send("seen\n");
  }
}

networkTest("the stream has the client's addresses, the header and the proxy's own address", async () => {
  Looking.seen = [];
  await using server = new TcpServer({ port: 0 }, Looking, FROM_LOOPBACK);
  const { port } = server.listen();
  server.serveForever();
  const uniqueId = bytesOf("unique");
  await using stream = await connect({
    port,
    proxyHeader: { source: CLIENT, destination: FRONT, authority: "example.org", uniqueId },
  });
  assertEquals(await stream.readLine(), "seen");
  assertEquals(stream.bytesWritten, 0);
  assertEquals(stream.proxy, undefined);
  const [seen] = Looking.seen;
  assertEquals([seen?.remoteAddress, seen?.localAddress, seen?.proxyAddress, seen?.bytesRead], [
    CLIENT,
    FRONT,
    stream.localAddress,
    0,
  ]);
  const { authority, source, command, version } = seen?.proxy ?? {};
  assertEquals([authority, source, command, version], ["example.org", CLIENT, "PROXY", 2]);
  assertEquals(seen?.proxy?.uniqueId, uniqueId);
});

for (const [what, header] of Object.entries(NAMELESS)) {
  networkTest(`with ${what} the addresses are the connection's own`, async () => {
    await serving(async (server, port) => {
      using peer = await Peer.connect(port);
      await peer.send(concat([header, bytesOf("hello\n")]));
      const own = `127.0.0.1:${peer.port}`;
      assertEquals(await peer.receive("hello\n"), `${own}\nhello\n`);
      assertEquals(server.opened, [own]);
    });
  });
}

networkTest("a request that has no header is told of none, where proxies are not believed", async () => {
  Looking.seen = [];
  await using server = new TcpServer({ port: 0 }, Looking);
  const { port } = server.listen();
  server.serveForever();
  await using stream = await connect({ port });
  assertEquals(await stream.readLine(), "seen");
  assertEquals([Looking.seen[0]?.proxy, Looking.seen[0]?.proxyAddress], [undefined, undefined]);
});

networkTest("an error is reported with the client's address", async () => {
  await serving(async (server, port) => {
    await using stream = await connect({ port, proxyHeader: { source: CLIENT, destination: FRONT } });
    await stream.send("fail\n");
    await until(() => server.closed.length === 1);
    assertEquals(server.errors, ["203.0.113.7:50000 on purpose"]);
    assertEquals(server.closed, ["203.0.113.7:50000 error"]);
  });
});

networkTest("a client that is cut off by a shutdown is reported with its own address", async () => {
  class Stuck extends StreamRequestHandler {
    override async handle() {
      await this.request.send("stuck\n");
      await new Promise<void>((resolve) => this.signal.addEventListener("abort", () => setTimeout(resolve, 100)));
      await this.request.recv().catch(() => {});
    }
  }
  await using server = new Witness({ port: 0 }, Stuck, FROM_LOOPBACK);
  const { port } = server.listen();
  server.serveForever();
  await using stream = await connect({ port, proxyHeader: { source: CLIENT, destination: FRONT } });
  assertEquals(await stream.readLine(), "stuck");
  assertEquals((await server.shutdown({ grace: 0 })).cut, [CLIENT]);
  assertEquals(server.closed, ["203.0.113.7:50000 cut"]);
});

networkTest("handleRequest() reads the header too", async () => {
  await using server = new Witness({ port: 0 }, Namer, FROM_LOOPBACK);
  const { port } = server.listen();
  const handled = server.handleRequest();
  await using stream = await connect({ port, proxyHeader: { version: 1, source: CLIENT, destination: FRONT } });
  assertEquals(await stream.readLine(), "203.0.113.7:50000");
  await stream.closeWrite();
  await handled;
});

// Who is not believed

networkTest("who is no proxy is closed at once, and nobody is told", async () => {
  await serving(async (server, port) => {
    for (const header of [new Uint8Array(), ...Object.values(HEADERS)]) {
      using peer = await Peer.connect(port);
      await peer.send(header).catch(() => {}); // It may be closed already.
      assertEquals(await peer.receiveAll().catch(() => new Uint8Array()), new Uint8Array());
    }
    assertEquals(server.stats.refused, 3);
    assertEquals([server.stats.accepted, server.stats.handshakeFailures, server.stats.lost], [0, 0, 0]);
    assertEquals([server.opened, server.closed, server.errors], [[], [], []]);
  }, { proxyProtocol: { from: FROM_ELSEWHERE } });
});

networkTest('with others: "direct" who is no proxy is served, and a header of its own is not believed', async () => {
  await serving(async (server, port) => {
    using peer = await Peer.connect(port);
    const own = `127.0.0.1:${peer.port}`;
    assertEquals(await peer.receive("\n"), `${own}\n`); // It need not say anything first.
    await peer.send(concat([HEADERS["version 1"] ?? new Uint8Array(), bytesOf("hello\n")]));
    const echo = "PROXY TCP4 203.0.113.7 198.51.100.2 50000 443\nhello\n";
    assertEquals(await peer.receive("hello\n"), echo);
    await peer.closeWrite();
    await until(() => server.stats.active === 0);
    assertEquals([server.opened, server.closed], [[own], [`${own} finished`]]);
  }, { proxyProtocol: { from: FROM_ELSEWHERE, others: "direct" } });
});

networkTest('with others: "direct" a proxy still has to send a header', async () => {
  await serving(async (server, port) => {
    using peer = await Peer.connect(port);
    await peer.send("hello\n");
    assertEquals(await peer.receiveAll().catch(() => new Uint8Array()), new Uint8Array());
    assertEquals(server.stats.handshakeFailures, 1);
    assertEquals(server.opened, []);
  }, { proxyProtocol: { from: ["127.0.0.1"], others: "direct" } });
});

// Proxies that mean no good, and those that only look

/** What is sent instead of a header, and what handleError() is told. */
const WRONG: [string, Uint8Array, RegExp][] = [
  ["plain text", bytesOf("GET / HTTP/1.1\r\n"), /this one with "GET \/ HTTP\/1\.1\\r\\n" \(PROXY 2\.2\)$/],
  ["a TLS hello", new Uint8Array([0x16, 3, 1, 2, 0]), /this one with "\\x16\\x03\\x01\\x02\\x00" \(PROXY 2\.2\)$/],
  ["a wrong address", bytesOf("PROXY TCP4 203.0.113.07 198.51.100.2 1 2\r\n"), /"203\.0\.113\.07" is no IPv4 address/],
  ["an endless line", bytesOf(`PROXY UNKNOWN ${"x".repeat(10_000)}`), /more than 107 bytes/],
];

for (const [what, bytes, sentence] of WRONG) {
  networkTest(`a proxy that sends ${what} is closed, counted and reported with its own address`, async () => {
    await serving(async (server, port) => {
      using peer = await Peer.connect(port);
      await peer.send(bytes);
      assertEquals(await peer.receiveAll().catch(() => new Uint8Array()), new Uint8Array());
      await until(() => server.stats.active === 0);
      assertEquals(server.errors.length, 1);
      assert(server.errors[0]?.startsWith(`127.0.0.1:${peer.port} Cannot read the PROXY header: `));
      assertMatch(server.errors[0] ?? "", sentence);
      assertEquals([server.stats.handshakeFailures, server.stats.errors, server.stats.lost], [1, 0, 0]);
      assertEquals([server.opened, server.closed, server.verified], [[], [], []]);
    });
  });
}

/** What is no header, each kind of it. */
const STORMERS: Uint8Array[] = [
  new Uint8Array(),
  ...WRONG.map(([, bytes]) => bytes),
  ...Object.values(HEADERS).map((header) => header.subarray(0, -1)),
];

/** How many of each. */
const STORM = scaled(30, 1_000);

networkTest("what is printed of a wrong header is one line without a stack", async () => {
  const printed: unknown[][] = [];
  const { error } = console;
  console.error = (...data) => void printed.push(data);
  try {
    await using server = new TcpServer({ port: 0 }, Namer, FROM_LOOPBACK);
    const { port } = server.listen();
    server.serveForever();
    using peer = await Peer.connect(port);
    await peer.send("HELO\x1b[2J\n");
    await until(() => printed.length === 1);
    assertEquals(printed, [[
      `Error while serving 127.0.0.1:${peer.port}:`,
      'Cannot read the PROXY header: a connection begins with one, and this one with "HELO\\x1b[2J\\n" (PROXY 2.2)',
    ]]);
  } finally {
    console.error = error;
  }
});

for (const [what, header] of Object.entries(HEADERS)) {
  networkTest(`a proxy that leaves in the middle of a header of ${what} is reported`, async () => {
    await serving(async (server, port) => {
      using peer = await Peer.connect(port);
      await peer.send(header.subarray(0, 20));
      await peer.closeWrite();
      assertEquals((await peer.receiveAll()).length, 0);
      const sentence = "Cannot read the PROXY header: the connection has ended after 20 bytes of it (PROXY 2)";
      assertEquals(server.errors, [`127.0.0.1:${peer.port} ${sentence}`]);
      assertEquals([server.stats.handshakeFailures, server.stats.lost], [1, 0]);
    });
  });
}

Deno.test("a check that leaves with a reset is counted as lost, and one that has sent a byte is not", async () => {
  for (const [sent, lost] of [["", 1], ["P", 0]] as const) {
    const server = new FakeWitness(new FakeTcpConn().give(sent).failReads(connectionReset()));
    const over = server.serveForever();
    await until(() => server.stats.accepted === 1 && server.stats.active === 0);
    assertEquals([server.stats.lost, server.stats.handshakeFailures, server.errors.length], [lost, 1 - lost, 1 - lost]);
    assertEquals([server.opened, server.closed], [[], []]);
    server.close();
    await over;
  }
});

networkTest("a check that connects and leaves is counted as lost, and nobody is told", async () => {
  await serving(async (server, port) => {
    for (let checks = 1; checks <= 3; checks++) {
      using _peer = await Peer.connect(port);
    }
    await until(() => server.stats.lost === 3 && server.stats.active === 0);
    assertEquals([server.stats.handshakeFailures, server.stats.errors, server.stats.aborted], [0, 0, 0]);
    assertEquals([server.opened, server.closed, server.errors], [[], [], []]);
  });
});

networkTest("who says nothing, or too slowly, is cut off by handshakeTimeout, and nobody is told", async () => {
  await serving(async (server, port) => {
    using silent = await Peer.connect(port);
    using half = await Peer.connect(port);
    await half.send("PROXY TCP4 ");
    using dripping = await Peer.connect(port);
    const drip = async () => {
      await dripping.send("PROXY UNKNOWN ");
      for (;;) {
        await dripping.send("x");
        await new Promise((resolve) => setTimeout(resolve, 20));
        if (server.stats.handshakeFailures === 3) return;
      }
    };
    await Promise.all([
      silent.receiveAll(),
      half.receiveAll(),
      dripping.receiveAll().catch(() => {}),
      drip().catch(() => {}),
    ]);
    await until(() => server.stats.active === 0);
    assertEquals([server.stats.handshakeFailures, server.stats.timedOut, server.stats.errors], [3, 0, 0]);
    assertEquals([server.opened, server.closed, server.errors], [[], [], []]);
  }, { ...FROM_LOOPBACK, handshakeTimeout: 200 });
});

networkTest("a long handshakeTimeout does not delay a handler's short timeout", async () => {
  await serving(async (server, port) => {
    await using stream = await connect({ port, proxyHeader: { source: CLIENT, destination: FRONT } });
    assertEquals(await stream.readLine(), "203.0.113.7:50000");
    assertEquals(await stream.readLine(), null);
    assertEquals(server.stats.timedOut, 1);
  }, { ...FROM_LOOPBACK, handshakeTimeout: 3_600_000, timeout: 50 });
});

networkTest("who has sent no header yet counts as a connection, and the deadline makes room", async () => {
  await serving(async (server, port) => {
    using _silent = await Peer.connect(port);
    await until(() => server.openConnections[0]?.waitsFor === "PROXY header");
    await using stream = await connect({ port, proxyHeader: { source: CLIENT, destination: FRONT } });
    assertEquals(await stream.readLine(), "203.0.113.7:50000");
    assertEquals(server.stats.handshakeFailures, 1);
  }, { ...FROM_LOOPBACK, maxConnections: 1, handshakeTimeout: 50 });
});

networkTest("openConnections shows the proxy until it has said whose the connection is", async () => {
  await serving(async (server, port) => {
    using peer = await Peer.connect(port);
    await until(() => server.openConnections[0]?.waitsFor === "PROXY header");
    const shown = () => server.openConnections.map(({ clientAddress }) => formatAddress(clientAddress));
    assertEquals(shown(), [`127.0.0.1:${peer.port}`]);
    await peer.send(HEADERS["version 2"] ?? "");
    await until(() => server.openConnections[0]?.waitsFor === "lines()");
    assertEquals(shown(), ["203.0.113.7:50000"]);
  });
});

networkTest(`a storm of ${STORM * STORMERS.length} broken headers leaves the server as it was`, async () => {
  await serving(async (server, port) => {
    for (let done = 0; done < STORM; done += 10) {
      const round = Math.min(10, STORM - done);
      const peers = await Promise.all(Array.from({ length: round * STORMERS.length }, () => Peer.connect(port)));
      // The server may have closed it already.
      await Promise.all(peers.map((peer, index) => peer.send(STORMERS[index % STORMERS.length] ?? "").catch(() => {})));
      for (const [index, peer] of peers.entries()) if (index % 3 === 0) peer[Symbol.dispose](); // Some leave, some stay.
      await using honest = await connect({ port, proxyHeader: { source: CLIENT, destination: FRONT } });
      assertEquals(await honest.readLine(), "203.0.113.7:50000");
      await until(() => server.stats.active <= 1);
      for (const [index, peer] of peers.entries()) if (index % 3 !== 0) peer[Symbol.dispose]();
      await honest.closeWrite();
      assertEquals(await honest.readLine(), null);
      await until(() => server.stats.active === 0);
    }
    const { handshakeFailures, lost, refused, errors } = server.stats;
    assertEquals([handshakeFailures + lost, refused, errors], [STORM * STORMERS.length, 0, 0]);
    assertEquals(server.opened.length, Math.ceil(STORM / 10));
  }, { ...FROM_LOOPBACK, handshakeTimeout: 300, maxConnectionsPerHost: 1 });
});

// Limits

networkTest("maxConnectionsPerHost counts clients, not the proxy, and not who has no name", async () => {
  await serving(async (server, port) => {
    const dial = (proxyHeader: Partial<ProxyHeader>) => connect({ port, proxyHeader });
    using _waiting = await Peer.connect(port);
    using _waitingToo = await Peer.connect(port);
    await until(() => server.stats.active === 2); // The proxy has two already.
    const other = tcp("203.0.113.8", 50_000);
    await using first = await dial({ source: CLIENT, destination: FRONT });
    await using second = await dial({ source: other, destination: FRONT });
    assertEquals(await first.readLine(), "203.0.113.7:50000");
    assertEquals(await second.readLine(), "203.0.113.8:50000");
    await using again = await dial({ version: 1, source: { ...CLIENT, port: 50_001 }, destination: FRONT });
    assertEquals(await again.readLine(), null);
    assertEquals([server.stats.refused, server.stats.handshakeFailures, server.opened.length], [1, 0, 2]);
    for (let count = 0; count < 2; count++) {
      const nameless = await dial(count === 0 ? { command: "LOCAL" } : { version: 1 });
      assertMatch(await nameless.readLine() ?? "", /^127\.0\.0\.1:/);
      await nameless[Symbol.asyncDispose]();
    }
    await first.closeWrite();
    assertEquals(await first.readLine(), null);
    await until(() => server.closed.includes("203.0.113.7:50000 finished"));
    await using back = await dial({ source: CLIENT, destination: FRONT });
    assertEquals(await back.readLine(), "203.0.113.7:50000");
  }, { ...FROM_LOOPBACK, maxConnectionsPerHost: 1 });
});

networkTest("maxConnectionsPerHost counts IPv6 clients by their network behind a proxy, too", async () => {
  await serving(async (server, port) => {
    const source = tcp("2001:db8:1:2::1", 50_000);
    const destination = tcp("2001:db8::2", 443);
    await using first = await connect({ port, proxyHeader: { source, destination } });
    assertEquals(await first.readLine(), "[2001:db8:1:2::1]:50000");
    const neighbour = { ...source, hostname: "2001:db8:1:2::ffff" };
    assertEquals(hostOf(neighbour), hostOf(source));
    await using second = await connect({ port, proxyHeader: { source: neighbour, destination } });
    assertEquals(await second.readLine(), null);
    assertEquals(server.stats.refused, 1);
  }, { ...FROM_LOOPBACK, maxConnectionsPerHost: 1 });
});

networkTest('with others: "direct" maxConnectionsPerHost counts them at once', async () => {
  await serving(async (server, port) => {
    using first = await Peer.connect(port);
    assertMatch(await first.receive("\n"), /^127\.0\.0\.1:/);
    using second = await Peer.connect(port);
    assertEquals((await second.receiveAll()).length, 0);
    assertEquals([server.stats.refused, server.stats.accepted], [1, 1]);
  }, { proxyProtocol: { from: FROM_ELSEWHERE, others: "direct" }, maxConnectionsPerHost: 1 });
});

// The end

for (const end of ["shutdown", "close"] as const) {
  networkTest(`${end}() does not wait for headers`, async () => {
    const options = { ...FROM_LOOPBACK, handshakeTimeout: 60_000, grace: 60_000 };
    const server = new Witness({ port: 0 }, Namer, options);
    const { port } = server.listen();
    const over = server.serveForever();
    using silent = await Peer.connect(port);
    using half = await Peer.connect(port);
    await half.send("PROXY TCP4 ");
    await until(() => server.openConnections.some(({ bytesRead }) => bytesRead > 0) && server.stats.active === 2);
    const begun = performance.now();
    server[end]();
    const { finished, cut } = await server.shutdown(); // It is the same one.
    await over;
    assert(performance.now() - begun < 30_000);
    assertEquals([finished, cut.length], [0, 2]);
    assertEquals([(await silent.receiveAll()).length, server.stats.active], [0, 0]);
    assertEquals([server.opened, server.closed, server.errors], [[], [], []]);
    assertEquals(server.stats.handshakeFailures, 0);
  });
}

networkTest("a header that comes during a shutdown is read, and its client served", async () => {
  const server = new Witness({ port: 0 }, Namer, { ...FROM_LOOPBACK, grace: 60_000 });
  const { port } = server.listen();
  const over = server.serveForever();
  using peer = await Peer.connect(port);
  await until(() => server.stats.active === 1);
  const ended = server.shutdown();
  await peer.send(concat([HEADERS["version 1"] ?? new Uint8Array(), bytesOf("last words\n")]));
  assertEquals(new TextDecoder().decode(await peer.receiveAll()), "203.0.113.7:50000\nlast words\n");
  assertEquals((await ended).cut, []);
  await over;
  assertEquals(server.closed, ["203.0.113.7:50000 finished"]);
});

networkTest(
  "a header that comes in a shutdown, after a look at who waits, is read, and its client served",
  async () => {
    const looked = Promise.withResolvers<void>();
    class Looking extends Witness {
      protected override endRequest(request: SocketStream, isLate: boolean) {
        super.endRequest(request, isLate);
        looked.resolve(); // At one who is served already.
      }
    }
    const server = new Looking({ port: 0 }, Namer, { ...FROM_LOOPBACK, grace: 60_000 });
    const { port } = server.listen();
    const over = server.serveForever();
    using served = await Peer.connect(port);
    await served.send(HEADERS["version 1"] ?? "");
    await served.receive("\n");
    await served.send("hello\n"); // Who has spoken need not be late.
    await served.receive("\n");
    using peer = await Peer.connect(port);
    await until(() => server.stats.active === 2);
    const { now } = performance;
    const stopped = performance.now();
    performance.now = () => stopped; // Nothing is late, however slow the machine.
    try {
      const ended = server.shutdown();
      await looked.promise;
      await peer.send(HEADERS["version 1"] ?? "");
      assertEquals(await peer.receive("\n"), "203.0.113.7:50000\n");
      await peer.closeWrite();
      assertEquals((await ended).cut, []);
    } finally {
      performance.now = now;
    }
    await over;
    assertEquals(server.closed, Array(2).fill("203.0.113.7:50000 finished"));
  },
);

Deno.test("handleOpen() and handleClose() are paired whenever close() meets a header", async () => {
  const told = new Set<string>();
  for (let turns = 0; turns < 40; turns++) {
    const conn = new FakeTcpConn();
    const server = new FakeWitness(conn);
    const over = server.serveForever();
    await until(() => server.openConnections[0]?.waitsFor === "PROXY header" && conn.isReading);
    conn.give(HEADERS["version 1"] ?? "");
    for (let turn = 0; turn < turns; turn++) await Promise.resolve();
    server.close();
    await over;
    assertEquals(server.closed, server.opened.map((address) => `${address} cut`), `${turns} turns behind the header`);
    assertEquals(server.stats.active, 0);
    told.add(server.opened.join());
  }
  assertEquals(told, new Set(["", "203.0.113.7:50000"])); // Some were before, and some behind it.
});

// Unix sockets

unixTest('a proxy at a Unix socket is believed as "unix"', async (folder) => {
  const path = `${folder}/app.sock`;
  await using server = new UnixServer({ path }, Namer, { proxyProtocol: { from: ["unix"] } });
  await server.listen();
  server.serveForever();
  await using relayed = await connect({ path, proxyHeader: { source: CLIENT, destination: FRONT } });
  assertEquals(await relayed.readLine(), "203.0.113.7:50000");
  await using nameless = await connect({ path, proxyHeader: { version: 1 } });
  assertEquals(await nameless.readLine(), "(unnamed Unix socket)");
  const source = { transport: "unix", path: "/run/client.sock" } as const;
  await using neighbour = await connect({ path, proxyHeader: { source, destination: source } });
  assertEquals(await neighbour.readLine(), "/run/client.sock");
});

// TLS

function tlsTest(name: string, test: (certificates: Certificates) => Promise<void>): void {
  programTest(name, () => withCertificates(test));
}

/** Tells whose TLS it is. */
class TlsNamer extends StreamRequestHandler {
  override async handle() {
    const { tls, bytesRead } = this.request;
    await this.request.send(`${formatAddress(this.clientAddress)} ${tls?.protocol} ${bytesRead}\n`);
    for await (const data of this.request) await this.request.send(data);
  }
}

class TlsWitness extends TlsServer {
  readonly closed: string[] = [];
  readonly opened: string[] = [];

  override handleOpen(_request: SocketStream, clientAddress: Deno.Addr) {
    this.opened.push(formatAddress(clientAddress));
  }

  override handleClose({ reason }: ConnectionReport, clientAddress: Deno.Addr) {
    this.closed.push(`${formatAddress(clientAddress)} ${reason}`);
  }
}

async function servingTls(
  { server: { cert, key } }: Certificates,
  test: (server: TlsWitness, port: number) => Promise<void>,
  options: ServerOptions = {},
): Promise<void> {
  await using server = new TlsWitness({ port: 0, cert, key }, TlsNamer, { ...FROM_LOOPBACK, ...options });
  const { port } = server.listen();
  server.serveForever();
  await test(server, port);
}

tlsTest(
  "connect({ proxyHeader, tls }) sends the header before TLS, and the server reads it so",
  async (certificates) => {
    await servingTls(certificates, async (server, port) => {
      const tls = { caCerts: [certificates.ca.cert] };
      for (const version of [1, 2] as const) {
        await using stream = await connect({ port, tls, proxyHeader: { version, source: CLIENT, destination: FRONT } });
        assertEquals(await stream.readLine(), "203.0.113.7:50000 TLSv1.3 0");
        await stream.send("hello\n");
        assertEquals(await stream.readLine(), "hello");
      }
      assertEquals(server.opened, ["203.0.113.7:50000", "203.0.113.7:50000"]);
    });
  },
);

/** A proxy that sends its header and what the client says in pieces of `size` bytes, the first of them together. */
function startRelay(port: number, header: Uint8Array, size: number): FakeServer {
  return new FakeServer(async (client) => {
    using server = await Peer.connect(port);
    const toServer = async () => {
      let behind = header;
      for (let chunk; (chunk = await client.receiveBytes()) !== null; behind = new Uint8Array()) {
        const bytes = concat([behind, chunk]);
        for (let at = 0; at < bytes.length; at += size) await server.send(bytes.subarray(at, at + size));
      }
      await server.closeWrite();
    };
    const toClient = async () => {
      for (let chunk; (chunk = await server.receiveBytes()) !== null;) await client.send(chunk);
      await client.closeWrite();
    };
    await Promise.all([toServer(), toClient()]);
  });
}

/** A header of version 2 made `length` bytes long with a vector that says nothing. */
function padded(header: Uint8Array, length: number): Uint8Array {
  const noop = new Uint8Array(length - header.length);
  const whole = concat([header, noop]);
  const view = new DataView(whole.buffer);
  view.setUint8(header.length, 0x04);
  view.setUint16(header.length + 1, noop.length - 3);
  view.setUint16(14, length - 16);
  return whole;
}

for (const size of [Infinity, 100, 1]) {
  tlsTest(`the first bytes of TLS behind a header are not lost in pieces of ${size} bytes`, async (certificates) => {
    await servingTls(certificates, async (server, port) => {
      await using relay = startRelay(port, HEADERS["version 2"] ?? new Uint8Array(), size);
      const stream = await connect({ port: relay.port, tls: { caCerts: [certificates.ca.cert] } });
      assertEquals(await stream.readLine(), "203.0.113.7:50000 TLSv1.3 0");
      await stream.send("hello\n");
      assertEquals(await stream.readLine(), "hello");
      await stream[Symbol.asyncDispose]();
      await until(() => server.closed.length === 1);
      assertEquals([server.closed, server.stats.bytesRead], [["203.0.113.7:50000 finished"], 6]);
    });
  });
}

tlsTest(
  "more first bytes of TLS than fit a read, behind a header in the same segment, are not lost",
  async (certificates) => {
    await servingTls(certificates, async (_server, port) => {
      const short = encodeProxyHeader({ source: CLIENT, destination: FRONT });
      // More than the first room for TLS, which has 512 bytes.
      const alpnProtocols = Array.from({ length: 8 }, (_, index) => String(index).repeat(100));
      for (const length of [28 + 3, 631, 1_024, 4_096]) {
        await using relay = startRelay(port, padded(short, length), Infinity);
        const stream = await connect({ port: relay.port, tls: { caCerts: [certificates.ca.cert], alpnProtocols } });
        assertEquals(await stream.readLine(), "203.0.113.7:50000 TLSv1.3 0", `${length} bytes`);
        await stream[Symbol.asyncDispose]();
      }
    });
  },
);

tlsTest("handshakeTimeout is that of the header and the handshake together", async (certificates) => {
  await servingTls(certificates, async (server, port) => {
    using peer = await Peer.connect(port);
    await until(() => server.openConnections[0]?.waitsFor === "PROXY header");
    const { now } = performance;
    performance.now = () => now.call(performance) + 55_000;
    try {
      await peer.send(HEADERS["version 1"] ?? "");
      await until(() => server.openConnections[0]?.waitsFor === "startTls()");
      // Some 5 s are left, and it would be a minute more if it began again.
      await until(() => server.closed.length === 1, 30_000);
    } finally {
      performance.now = now;
    }
    assertEquals(server.closed, ["203.0.113.7:50000 handshakeFailed"]);
    assertEquals(server.stats.handshakeFailures, 1);
  }, { handshakeTimeout: 60_000 });
});

tlsTest("a handshake that fails behind a header is the client's", async (certificates) => {
  await servingTls(certificates, async (server, port) => {
    using peer = await Peer.connect(port);
    await peer.send(concat([HEADERS["version 1"] ?? new Uint8Array(), bytesOf("GET / HTTP/1.1\r\n\r\n")]));
    await peer.receiveAll().catch(() => {});
    await until(() => server.closed.length === 1);
    assertEquals([server.opened, server.closed], [["203.0.113.7:50000"], ["203.0.113.7:50000 handshakeFailed"]]);
    assertEquals(server.stats.handshakeFailures, 1);
  });
});

tlsTest("handshakeTimeout ends a handshake that stalls behind a header", async (certificates) => {
  await servingTls(certificates, async (server, port) => {
    using peer = await Peer.connect(port);
    await peer.send(HEADERS["version 1"] ?? "");
    await until(() => server.openConnections[0]?.waitsFor === "startTls()");
    assertEquals(server.openConnections[0]?.clientAddress, CLIENT);
    await peer.receiveAll();
    await until(() => server.closed.length === 1);
    assertEquals(server.closed, ["203.0.113.7:50000 handshakeFailed"]);
  }, { handshakeTimeout: 500 });
});

tlsTest("a TLS server that gets TLS without a header says so", async (certificates) => {
  const { cert, key } = certificates.server;
  const errors: string[] = [];
  class Telling extends TlsServer {
    override handleError(error: unknown) {
      errors.push(error instanceof Error ? error.message : "");
    }
  }
  await using server = new Telling({ port: 0, cert, key }, TlsNamer, FROM_LOOPBACK);
  const { port } = server.listen();
  server.serveForever();
  await assertRejects(() => connect({ port, tls: { caCerts: [certificates.ca.cert] } }));
  await until(() => errors.length === 1);
  assertMatch(errors[0] ?? "", /begins with one, and this one with "\\x16\\x03\\x01/);
  assertEquals([server.stats.handshakeFailures, server.stats.errors], [1, 0]);
});

tlsTest("startTls() still refuses what came in plain text behind a header", async (certificates) => {
  const { cert, key } = certificates.server;
  const outcomes: string[] = [];
  class Upgrading extends StreamRequestHandler {
    override async handle() {
      await this.request.readLine();
      const error = await this.request.startTls({ role: "server", cert, key }).catch((error) => error);
      outcomes.push(error instanceof Deno.errors.Busy ? error.message : "it did not");
    }
  }
  await using server = new TcpServer({ port: 0 }, Upgrading, FROM_LOOPBACK);
  const { port } = server.listen();
  server.serveForever();
  using peer = await Peer.connect(port);
  await peer.send(concat([HEADERS["version 1"] ?? new Uint8Array(), bytesOf("STARTTLS\nin plain text")]));
  await until(() => outcomes.length === 1);
  assertMatch(outcomes[0] ?? "", /13 bytes that came in plain text are unread/);
});

// What connect() sends

networkTest("connect({ proxyHeader }) sends it first and whole, and rejects as ever if nobody is there", async () => {
  let port: number;
  {
    await using server = new FakeServer(async (peer) => {
      await peer.send(await peer.receive("hello\n"));
    });
    port = server.port;
    await using stream = await connect({ port, proxyHeader: { version: 1, source: CLIENT, destination: FRONT } });
    await stream.send("hello\n");
    assertEquals(await stream.readLine(), "PROXY TCP4 203.0.113.7 198.51.100.2 50000 443");
    assertEquals(await stream.readLine(), "hello");
  }
  await assertRejects(() => connect({ port, proxyHeader: {} }), Deno.errors.ConnectionRefused);
});
