/** Servers behind a proxy, and connect() as one, over real sockets: with health checks, and proxies that misbehave. */

import { assert, assertEquals, assertMatch } from "../../deps.ts";
import {
  encodeProxyHeader,
  proxyAddressOf,
  type ProxyHeader,
  proxyHeaderOf,
  type ProxyHeaderOptions,
  proxyProtocol,
  sendProxyHeader,
} from "../../extras/proxy_protocol.ts";
import {
  connect,
  type ConnectionFilter,
  formatAddress,
  perHost,
  type ServerOptions,
  type SocketStream,
  type StreamConn,
  StreamRequestHandler,
  TcpServer,
  UnixServer,
} from "../../mod.ts";
import { bytesOf, concat, FakeTcpConn } from "../fake_conn.ts";
import { FakeServer, Peer } from "../programs.ts";
import { FakeListener, networkTest, printedBy, scaled, unixTest, until, untilRefused } from "../testing.ts";
import { binary, checked, hex, tcp, tlv } from "./proxy_headers.ts";

const CLIENT = tcp("203.0.113.7", 50_000);
const FRONT = tcp("198.51.100.2", 443);

const fromLoopback = proxyProtocol({ from: ["127.0.0.0/8"] });
const FROM_LOOPBACK = { filters: [fromLoopback] };
const FROM_ELSEWHERE = ["192.0.2.0/24", "::/0"];

const VERSION_1 = encodeProxyHeader({ version: 1, source: CLIENT, destination: FRONT });
const ADDRESSES = hex("cb007107 c6336402 c350 01bb");
const VERSION_2 = checked(binary(0x21, 0x11, ADDRESSES, tlv(2, "example.org"), tlv(3, "\0\0\0\0")));

/** Headers of one client. */
const HEADERS: Record<string, Uint8Array> = { "version 1": VERSION_1, "version 2": VERSION_2 };

/** Headers that name no client. */
const NAMELESS: Record<string, Uint8Array> = {
  LOCAL: encodeProxyHeader({ command: "LOCAL" }),
  UNKNOWN: encodeProxyHeader({ version: 1 }),
  UNSPEC: encodeProxyHeader({}),
};

/** Sends the client's address, and then each line back; throws at a line "fail". */
class Namer extends StreamRequestHandler {
  override async handle() {
    await this.request.send(`${formatAddress(this.clientAddress)}\n`);
    for await (const line of this.request.lines()) {
      if (line === "fail") throw new TypeError("on purpose");
      await this.request.send(`${line}\n`);
    }
  }
}

/** A server that keeps the calls of its hooks. */
class Witness extends TcpServer {
  readonly opened: string[] = [];
  readonly closed: string[] = [];
  readonly errors: string[] = [];
  readonly refused: string[] = [];
  readonly verified: string[] = [];

  override handleOpen(request: SocketStream, clientAddress: Deno.Addr) {
    assertEquals(request.remoteAddress, clientAddress);
    this.opened.push(formatAddress(clientAddress));
  }

  override verifyRequest(_request: SocketStream, clientAddress: Deno.Addr) {
    this.verified.push(formatAddress(clientAddress));
    return true;
  }

  override handleClose({ outcome }: { readonly outcome: string }, clientAddress: Deno.Addr) {
    this.closed.push(`${formatAddress(clientAddress)} ${outcome}`);
  }

  override handleRefuse(clientAddress: Deno.Addr) {
    this.refused.push(formatAddress(clientAddress));
  }

  override handleError(error: unknown, clientAddress: Deno.Addr, outcome: string) {
    this.errors.push(`${formatAddress(clientAddress)} ${outcome}: ${error instanceof Error ? error.message : error}`);
  }
}

/** The same, with a connection of the test. */
class FakeWitness extends Witness {
  readonly #listener: FakeListener;

  constructor(conn: FakeTcpConn) {
    super({ port: 0 }, Namer, FROM_LOOPBACK);
    this.#listener = new FakeListener([conn]);
  }

  override listen(): Deno.NetAddr {
    return this.adopt(this.#listener, tcp("127.0.0.1", 1));
  }
}

/** Serves until `test` is over. */
async function serving(
  test: (server: Witness, port: number) => Promise<void>,
  options: ServerOptions = FROM_LOOPBACK,
  Handler: new (...args: ConstructorParameters<typeof Namer>) => StreamRequestHandler = Namer,
): Promise<void> {
  await using server = new Witness({ port: 0 }, Handler, options);
  const { port } = server.listen();
  const over = server.serveForever();
  await test(server, port);
  await server.shutdown();
  await over;
}

/** Connects as a proxy that names `source`. */
function dial(port: number, header: ProxyHeaderOptions = { source: CLIENT, destination: FRONT }) {
  return connect({ port, filters: [sendProxyHeader(header)] });
}

async function receiveNothing(peer: Peer): Promise<void> {
  assertEquals(await peer.receiveAll().catch(() => new Uint8Array()), new Uint8Array());
}

// --- The client -----------------------------------------------------------------

/** A filter that counts the bytes of the connection that was accepted last. */
class Arrivals {
  bytes = 0;

  readonly filter: ConnectionFilter = (under): StreamConn => {
    this.bytes = 0;
    return {
      under,
      localAddr: under.localAddr,
      remoteAddr: under.remoteAddr,
      read: async (into) => {
        const count = await under.read(into);
        this.bytes += count ?? 0;
        return count;
      },
      write: (data) => under.write(data),
      closeWrite: () => under.closeWrite(),
      close: () => under.close(),
    };
  };
}

for (const [what, header] of Object.entries(HEADERS)) {
  networkTest(`a header of ${what} names the client, wherever it and what follows are cut`, async () => {
    const arrivals = new Arrivals();
    await serving(async (server, port) => {
      const bytes = concat([header, bytesOf("hello\nyou\n")]);
      const talk = async (cut: number) => {
        const { accepted } = server.stats;
        using peer = await Peer.connect(port);
        await until(() => server.stats.accepted > accepted);
        await peer.send(bytes.subarray(0, cut));
        await until(() => arrivals.bytes === cut); // The first part is read before the second comes.
        await peer.send(bytes.subarray(cut));
        await peer.closeWrite();
        assertEquals(new TextDecoder().decode(await peer.receiveAll()), "203.0.113.7:50000\nhello\nyou\n");
        await until(() => server.stats.active === 0);
      };
      for (let cut = 0; cut <= bytes.length; cut++) await talk(cut);
      assertEquals(server.opened, Array(bytes.length + 1).fill("203.0.113.7:50000"));
      assertEquals(server.verified, server.opened);
      assertEquals(server.closed, server.opened.map((address) => `${address} finished`));
      assertEquals(server.errors, []);
      assertEquals(server.stats.bytesRead, 10 * (bytes.length + 1)); // Headers are not the client's.
    }, { filters: [arrivals.filter, fromLoopback] });
  });

  networkTest(`a header of ${what} that comes byte by byte is read`, async () => {
    await serving(async (_server, port) => {
      using peer = await Peer.connect(port);
      for (const byte of header) await peer.send(new Uint8Array([byte]));
      assertEquals(await peer.receive("\n"), "203.0.113.7:50000\n");
    });
  });
}

networkTest("the handler has the client's addresses, the header and the proxy's own address", async () => {
  type Seen = Pick<SocketStream, "localAddress" | "remoteAddress" | "bytesRead"> & {
    header: ProxyHeader | undefined;
    proxy: Deno.Addr | undefined;
  };
  const seen: Seen[] = [];
  class Looking extends StreamRequestHandler {
    override async handle() {
      const { localAddress, remoteAddress, bytesRead } = this.request;
      const [header, proxy] = [proxyHeaderOf(this.request), proxyAddressOf(this.request)];
      seen.push({ localAddress, remoteAddress, bytesRead, header, proxy });
      await this.request.send("seen\n");
    }
  }
  await serving(
    async (_server, port) => {
      const tlvs = [{ type: 2, value: bytesOf("example.org") }, { type: 5, value: bytesOf("unique") }];
      await using stream = await dial(port, { source: CLIENT, destination: FRONT, tlvs });
      assertEquals(await stream.readLine(), "seen");
      assertEquals([stream.bytesWritten, proxyHeaderOf(stream)], [0, undefined]);
      const [first] = seen;
      const header = first?.header;
      const wanted = { localAddress: FRONT, remoteAddress: CLIENT, bytesRead: 0, header, proxy: stream.localAddress };
      assertEquals(first, wanted);
      assertEquals([header?.version, header?.command, header?.source], [2, "PROXY", CLIENT]);
      assertEquals([header?.authority, header?.uniqueId], ["example.org", bytesOf("unique")]);
    },
    FROM_LOOPBACK,
    Looking,
  );
});

for (const [what, header] of Object.entries(NAMELESS)) {
  networkTest(`with ${what} the client is the proxy itself`, async () => {
    await serving(async (server, port) => {
      using peer = await Peer.connect(port);
      await peer.send(concat([header, bytesOf("hello\n")]));
      const own = `127.0.0.1:${peer.port}`;
      assertEquals(await peer.receive("hello\n"), `${own}\nhello\n`);
      assertEquals(server.opened, [own]);
    });
  });
}

networkTest("a handler's error is reported with the client's address", async () => {
  await serving(async (server, port) => {
    await using stream = await dial(port);
    await stream.send("fail\n");
    await until(() => server.closed.length === 1);
    assertEquals(server.errors, ["203.0.113.7:50000 error: on purpose"]);
    assertEquals(server.closed, ["203.0.113.7:50000 error"]);
  });
});

networkTest("a client that a shutdown cuts is reported with its own address", async () => {
  class Stuck extends StreamRequestHandler {
    override async handle() {
      await this.request.send("stuck\n");
      await new Promise<void>((resolve) => this.signal.addEventListener("abort", () => setTimeout(resolve, 100)));
      await this.request.recv().catch(() => {});
    }
  }
  await serving(
    async (server, port) => {
      await using stream = await dial(port);
      assertEquals(await stream.readLine(), "stuck");
      assertEquals((await server.shutdown({ grace: 0 })).cut, [CLIENT]);
      assertEquals(server.closed, ["203.0.113.7:50000 cut"]);
    },
    FROM_LOOPBACK,
    Stuck,
  );
});

networkTest("handleRequest() reads the header too", async () => {
  await using server = new Witness({ port: 0 }, Namer, FROM_LOOPBACK);
  const { port } = server.listen();
  const handled = server.handleRequest();
  await using stream = await dial(port, { version: 1, source: CLIENT, destination: FRONT });
  assertEquals(await stream.readLine(), "203.0.113.7:50000");
  await stream.closeWrite();
  await handled;
});

// --- Other peers ----------------------------------------------------------------

networkTest("a peer that is not a proxy is refused at once, with and without a header", async () => {
  await serving(async (server, port) => {
    const refused: string[] = [];
    for (const header of [new Uint8Array(), ...Object.values(HEADERS)]) {
      using peer = await Peer.connect(port);
      refused.push(`127.0.0.1:${peer.port}`);
      await peer.send(header).catch(() => {}); // It may be closed already.
      await receiveNothing(peer);
    }
    await until(() => server.stats.active === 0);
    assertEquals([server.stats.refused, server.stats.handshakeFailures], [3, 0]);
    assertEquals([server.opened, server.closed, server.errors], [[], [], []]);
    assertEquals(server.refused, refused);
  }, { filters: [proxyProtocol({ from: FROM_ELSEWHERE })] });
});

networkTest('with others: "direct" a peer that is not a proxy is served, and reads its header back', async () => {
  await serving(async (server, port) => {
    using peer = await Peer.connect(port);
    const own = `127.0.0.1:${peer.port}`;
    assertEquals(await peer.receive("\n"), `${own}\n`); // It need not send anything first.
    await peer.send(concat([VERSION_1, bytesOf("hello\n")]));
    const echo = "PROXY TCP4 203.0.113.7 198.51.100.2 50000 443\nhello\n";
    assertEquals(await peer.receive("hello\n"), echo);
    await peer.closeWrite();
    await until(() => server.stats.active === 0);
    assertEquals([server.opened, server.closed], [[own], [`${own} finished`]]);
  }, { filters: [proxyProtocol({ from: FROM_ELSEWHERE, others: "direct" })] });
});

networkTest('with others: "direct" a proxy still must send a header', async () => {
  await serving(async (server, port) => {
    using peer = await Peer.connect(port);
    await peer.send("hello\n");
    await receiveNothing(peer);
    await until(() => server.stats.active === 0);
    assertEquals([server.stats.handshakeFailures, server.opened], [1, []]);
  }, { filters: [proxyProtocol({ from: ["127.0.0.1"], others: "direct" })] });
});

// --- Wrong headers, and health checks -------------------------------------------

/** Bytes that are not a header, and the error that handleError() gets. */
const WRONG: [string, Uint8Array, RegExp][] = [
  ["plain text", bytesOf("GET / HTTP/1.1\r\n"), /begins with "GET \/ HTTP\/1\.1\\r\\n" \(PROXY 2\.2\)$/],
  [
    "a ClientHello",
    new Uint8Array([0x16, 3, 1, 2, 0]),
    /begins with "\\x16\\x03\\x01\\x02\\x00", which is TLS: let the proxy send the header \(PROXY 2\.2\)$/,
  ],
  ["a wrong address", bytesOf("PROXY TCP4 203.0.113.07 198.51.100.2 1 2\r\n"), /"203\.0\.113\.07" is not an IPv4/],
  ["an endless line", bytesOf(`PROXY UNKNOWN ${"x".repeat(10_000)}`), /more than 107 bytes/],
];

for (const [what, bytes, sentence] of WRONG) {
  networkTest(`a proxy that sends ${what} is closed, counted and reported with its own address`, async () => {
    await serving(async (server, port) => {
      using peer = await Peer.connect(port);
      await peer.send(bytes);
      await receiveNothing(peer);
      await until(() => server.stats.active === 0 && server.errors.length === 1);
      const start = `127.0.0.1:${peer.port} handshakeFailed: Cannot read the PROXY header: `;
      assertEquals(server.errors[0]?.slice(0, start.length), start);
      assertMatch(server.errors[0] ?? "", sentence);
      assertEquals([server.stats.handshakeFailures, server.stats.errors, server.stats.refused], [1, 0, 0]);
      assertEquals([server.opened, server.closed, server.verified], [[], [], []]);
    });
  });
}

networkTest("a wrong header is printed as one line without control characters and without a stack", async () => {
  await printedBy(async (printed) => {
    await using server = new TcpServer({ port: 0 }, Namer, FROM_LOOPBACK);
    const { port } = server.listen();
    server.serveForever();
    using peer = await Peer.connect(port);
    await peer.send("HELO\x1b[2J\n");
    await until(() => printed.length === 1);
    const line = printed[0]?.join(" ") ?? "";
    assertMatch(line, /begins with "HELO\\x1b\[2J\\n" \(PROXY 2\.2\)$/);
    assert(line.includes(`127.0.0.1:${peer.port}`));
  });
});

for (const [what, header] of Object.entries(HEADERS)) {
  networkTest(`a proxy that leaves inside a header of ${what} is reported`, async () => {
    await serving(async (server, port) => {
      using peer = await Peer.connect(port);
      await peer.send(header.subarray(0, 20));
      await peer.closeWrite();
      await receiveNothing(peer);
      await until(() => server.errors.length === 1);
      const sentence = "Cannot read the PROXY header: the connection ended after 20 bytes of it (PROXY 2)";
      assertEquals(server.errors, [`127.0.0.1:${peer.port} handshakeFailed: ${sentence}`]);
      assertEquals(server.stats.handshakeFailures, 1);
    });
  });
}

networkTest("a health check that connects and leaves is not an error", async () => {
  await serving(async (server, port) => {
    for (let checks = 1; checks <= 3; checks++) {
      using _peer = await Peer.connect(port);
    }
    await until(() => server.stats.refused === 3 && server.stats.active === 0);
    assertEquals([server.stats.handshakeFailures, server.stats.errors, server.stats.aborted], [0, 0, 0]);
    assertEquals([server.opened, server.closed, server.errors], [[], [], []]);
  });
});

networkTest("handshakeTimeout ends a proxy that sends nothing, half a header, or too slowly", async () => {
  await serving(async (server, port) => {
    using silent = await Peer.connect(port);
    using half = await Peer.connect(port);
    await half.send("PROXY TCP4 ");
    using dripping = await Peer.connect(port);
    const drip = async () => {
      for (const byte of bytesOf(`PROXY UNKNOWN ${"x".repeat(80)}`)) {
        await dripping.send(new Uint8Array([byte]));
        await new Promise((resolve) => setTimeout(resolve, 20));
      }
    };
    await Promise.all([...[silent, half, dripping].map(receiveNothing), drip().catch(() => {})]);
    await until(() => server.stats.active === 0);
    assertEquals([server.stats.handshakeFailures, server.stats.timedOut, server.stats.errors], [3, 0, 0]);
    assertEquals([server.opened, server.closed], [[], []]);
  }, { ...FROM_LOOPBACK, handshakeTimeout: 200 });
});

networkTest("a long handshakeTimeout does not delay a handler's short timeout", async () => {
  await serving(async (server, port) => {
    await using stream = await dial(port);
    assertEquals(await stream.readLine(), "203.0.113.7:50000");
    assertEquals(await stream.readLine(), null);
    await until(() => server.stats.active === 0);
    assertEquals(server.stats.timedOut, 1);
  }, { ...FROM_LOOPBACK, handshakeTimeout: 3_600_000, timeout: 50 });
});

networkTest("a proxy without a header counts for maxConnections, and handshakeTimeout makes room", async () => {
  await serving(async (server, port) => {
    using _silent = await Peer.connect(port);
    await until(() => server.stats.active === 1);
    await using stream = await dial(port);
    assertEquals(await stream.readLine(), "203.0.113.7:50000");
    assertEquals(server.stats.handshakeFailures, 1);
  }, { ...FROM_LOOPBACK, maxConnections: 1, handshakeTimeout: 50 });
});

/** All that is not a header. */
const CUT_OFF = Object.values(HEADERS).map((header) => header.subarray(0, -1));
const STORMERS = [new Uint8Array(), ...WRONG.map(([, bytes]) => bytes), ...CUT_OFF];

/** Connections of each. */
const STORM = scaled(30, 1_000);

networkTest(`a storm of ${STORM * STORMERS.length} broken headers leaves the server as it was`, async () => {
  await serving(async (server, port) => {
    for (let done = 0; done < STORM; done += 10) {
      const round = Math.min(10, STORM - done);
      const peers = await Promise.all(Array.from({ length: round * STORMERS.length }, () => Peer.connect(port)));
      // The server may have closed it already.
      await Promise.all(peers.map((peer, index) => peer.send(STORMERS[index % STORMERS.length] ?? "").catch(() => {})));
      for (const [index, peer] of peers.entries()) if (index % 3 === 0) peer[Symbol.dispose](); // Some leave, some stay.
      await using honest = await dial(port);
      assertEquals(await honest.readLine(), "203.0.113.7:50000");
      await until(() => server.stats.active <= 1);
      for (const [index, peer] of peers.entries()) if (index % 3 !== 0) peer[Symbol.dispose]();
      await honest.closeWrite();
      assertEquals(await honest.readLine(), null);
      await until(() => server.stats.active === 0);
    }
    const { handshakeFailures, refused, errors } = server.stats;
    assertEquals([handshakeFailures + refused, errors], [STORM * STORMERS.length, 0]);
    assertEquals(server.opened.length, Math.ceil(STORM / 10));
  }, { filters: [fromLoopback, perHost(1)], handshakeTimeout: 300 });
});

// --- Limits ---------------------------------------------------------------------

networkTest(
  "perHost() behind proxyProtocol() counts clients, not the proxy, which alone may have any number",
  async () => {
    await serving(async (server, port) => {
      using _waiting = await Peer.connect(port);
      using _waitingToo = await Peer.connect(port);
      await until(() => server.stats.active === 2); // The proxy has two already.
      await using first = await dial(port);
      await using second = await dial(port, { source: tcp("203.0.113.8", 50_000), destination: FRONT });
      assertEquals(await first.readLine(), "203.0.113.7:50000");
      assertEquals(await second.readLine(), "203.0.113.8:50000");
      await using again = await dial(port, { version: 1, source: { ...CLIENT, port: 50_001 }, destination: FRONT });
      assertEquals(await again.readLine(), null);
      assertEquals([server.stats.refused, server.stats.handshakeFailures, server.opened.length], [1, 0, 2]);
      for (const header of [{ command: "LOCAL" }, { version: 1 }] as const) {
        await using nameless = await dial(port, header);
        assertMatch(await nameless.readLine() ?? "", /^127\.0\.0\.1:/);
        await nameless.closeWrite();
        assertEquals(await nameless.readLine(), null);
        await until(() => server.closed.at(-1)?.startsWith("127.0.0.1:") ?? false);
        server.closed.length = 0;
      }
      await first.closeWrite();
      assertEquals(await first.readLine(), null);
      await until(() => server.closed.includes("203.0.113.7:50000 finished"));
      await using back = await dial(port);
      assertEquals(await back.readLine(), "203.0.113.7:50000");
    }, { filters: [fromLoopback, perHost(1)] });
  },
);

networkTest("perHost() behind proxyProtocol() counts IPv6 clients by their network", async () => {
  await serving(async (server, port) => {
    const destination = tcp("2001:db8::2", 443);
    await using first = await dial(port, { source: tcp("2001:db8:1:2::1", 50_000), destination });
    assertEquals(await first.readLine(), "[2001:db8:1:2::1]:50000");
    await using neighbour = await dial(port, { source: tcp("2001:db8:1:2::ffff", 50_000), destination });
    assertEquals(await neighbour.readLine(), null);
    assertEquals(server.stats.refused, 1);
  }, { filters: [fromLoopback, perHost(1)] });
});

networkTest('perHost() counts peers of others: "direct" too', async () => {
  await serving(async (server, port) => {
    using first = await Peer.connect(port);
    assertMatch(await first.receive("\n"), /^127\.0\.0\.1:/);
    using second = await Peer.connect(port);
    await receiveNothing(second);
    assertEquals(server.stats.refused, 1);
  }, { filters: [proxyProtocol({ from: FROM_ELSEWHERE, others: "direct" }), perHost(1)] });
});

// --- The end --------------------------------------------------------------------

for (const end of ["shutdown", "close"] as const) {
  networkTest(`${end}() does not wait for headers`, async () => {
    const arrivals = new Arrivals();
    const filters = [arrivals.filter, fromLoopback];
    const server = new Witness({ port: 0 }, Namer, { filters, handshakeTimeout: 60_000, grace: 60_000 });
    const { port } = server.listen();
    const over = server.serveForever();
    using silent = await Peer.connect(port);
    await until(() => server.stats.active === 1);
    using half = await Peer.connect(port);
    await half.send("PROXY TCP4 ");
    await until(() => arrivals.bytes > 0 && server.stats.active === 2);
    const begun = performance.now();
    server[end]();
    const { finished, cut } = await server.shutdown(); // It is the same one.
    await over;
    assert(performance.now() - begun < 30_000);
    assertEquals([finished, cut.length], [0, 2]);
    await receiveNothing(silent);
    assertEquals(server.stats.active, 0);
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
  await peer.send(concat([VERSION_1, bytesOf("last words\n")]));
  assertEquals(new TextDecoder().decode(await peer.receiveAll()), "203.0.113.7:50000\nlast words\n");
  assertEquals((await ended).cut, []);
  await over;
  assertEquals(server.closed, ["203.0.113.7:50000 finished"]);
});

Deno.test("handleOpen() and handleClose() are paired at whatever turn close() meets a header", async () => {
  const seen = new Set<string>();
  for (let turns = 0; turns < 40; turns++) {
    const conn = new FakeTcpConn();
    const server = new FakeWitness(conn);
    const over = server.serveForever();
    await until(() => conn.isReading);
    conn.give(VERSION_1);
    for (let turn = 0; turn < turns; turn++) await Promise.resolve();
    server.close();
    await over;
    assertEquals(server.closed, server.opened.map((address) => `${address} cut`), `${turns} turns behind the header`);
    assertEquals([server.stats.active, server.errors], [0, []]);
    seen.add(server.opened.join());
  }
  assertEquals(seen, new Set(["", "203.0.113.7:50000"])); // Some are before, and some behind it.
});

// --- Unix sockets, and what connect() sends -------------------------------------

unixTest('a proxy at a Unix socket is trusted as "unix"', async (folder) => {
  const path = `${folder}/app.sock`;
  await using server = new UnixServer({ path }, Namer, { filters: [proxyProtocol({ from: ["unix"] })] });
  await server.listen();
  server.serveForever();
  const source = { transport: "unix", path: "/run/client.sock" } as const;
  const named: [ProxyHeaderOptions, string][] = [
    [{ source: CLIENT, destination: FRONT }, "203.0.113.7:50000"],
    [{ version: 1 }, "(unnamed Unix socket)"],
    [{ source, destination: source }, "/run/client.sock"],
  ];
  for (const [header, wanted] of named) {
    await using stream = await connect({ path, filters: [sendProxyHeader(header)] });
    assertEquals(await stream.readLine(), wanted);
  }
});

networkTest("sendProxyHeader() sends it first, and connect() rejects as ever if nothing listens", async () => {
  let port: number;
  {
    await using server = new FakeServer(async (peer) => {
      await peer.send(await peer.receive("hello\n"));
    });
    port = server.port;
    await using stream = await dial(port, { version: 1, source: CLIENT, destination: FRONT });
    await stream.send("hello\n");
    assertEquals(await stream.readLine(), "PROXY TCP4 203.0.113.7 198.51.100.2 50000 443");
    assertEquals(await stream.readLine(), "hello");
  }
  await untilRefused(() => dial(port));
});
