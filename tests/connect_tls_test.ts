/** connect() with filters and with the runtime's TLS: both are part of each try. */

import { assert, assertEquals, assertMatch, assertStrictEquals } from "../deps.ts";
import {
  connect,
  type ConnectionFilter,
  type ConnectTlsOptions,
  formatAddress,
  type StreamConn,
  TcpServer,
} from "../mod.ts";
import { type Certificates, withCertificates } from "./certificates.ts";
import { FakeTcpConn, turnEnd } from "./fake_conn.ts";
import { withFakeTime } from "./fake_time.ts";
import { Program } from "./programs.ts";
import { Echo, networkTest, peerTest, rejectionOf, unixTest, until, withDeno, withServer } from "./testing.ts";

/** Runs `test` with the port of a TLS server that sends back what it gets. */
async function withTlsServer(
  test: (port: number, certificates: Certificates) => Promise<void>,
  hostname = "127.0.0.1",
): Promise<void> {
  await withCertificates(async (certificates) => {
    const { cert, key } = certificates.server;
    const listener = Deno.listenTls({ hostname, port: 0, cert, key, alpnProtocols: ["echo/2", "echo/1"] });
    const ends: Promise<void>[] = [];
    const serving = (async () => {
      for await (const conn of listener) {
        ends.push(conn.readable.pipeTo(conn.writable).catch(() => {})); // Some clients refuse the certificate.
      }
    })();
    try {
      await test(listener.addr.port, certificates);
    } finally {
      listener.close();
      await serving;
      await Promise.all(ends);
    }
  });
}

peerTest(
  ["openssl"],
  "connect({ tls }) speaks TLS with a server that an authority of the options vouches for",
  async () => {
    await withTlsServer(async (port, { ca }) => {
      for (const hostname of ["127.0.0.1", "localhost"]) {
        await using stream = await connect({ hostname, port, tls: { caCerts: [ca.cert] } });
        await stream.send("hello\n");
        assertEquals(await stream.readLine(), "hello");
        assertEquals(formatAddress(stream.remoteAddress), `127.0.0.1:${port}`);
        assertEquals(stream.localAddress.transport, "tcp");
        const sent = stream.send(new Uint8Array(1_000_000)).then(() => stream.closeWrite());
        assertEquals((await stream.readExactly(1_000_000)).length, 1_000_000);
        await sent;
        assertEquals(await stream.recv(), null);
      }
    });
  },
);

peerTest(
  ["openssl"],
  "connect({ tls }) checks the certificate for the address in the brackets of a hostname",
  async () => {
    await withTlsServer(async (port, { ca }) => {
      await using stream = await connect({ hostname: "[::1]", port, tls: { caCerts: [ca.cert] } });
      await stream.send("hello\n");
      assertEquals(await stream.readLine(), "hello");
    }, "::1");
  },
);

/** Options whose handshake fails. */
const REFUSED: [string, (certificates: Certificates) => true | ConnectTlsOptions][] = [
  ["a certificate that nobody vouches for", () => true],
  ["a certificate of another authority", ({ rogue }) => ({ caCerts: [rogue.cert] })],
  ["a certificate for another name", ({ ca }) => ({ caCerts: [ca.cert], serverName: "example.com" })],
];

for (const [what, options] of REFUSED) {
  peerTest(["openssl"], `connect({ tls }) refuses ${what}, and does not try again`, async () => {
    await withTlsServer(async (port, certificates) => {
      const error = await rejectionOf(connect({ port, tls: options(certificates), retries: Infinity }));
      assert(error instanceof Deno.errors.InvalidData, error.name);
      assertMatch(error.message, new RegExp(`^Cannot connect to 127.0.0.1:${port}: .*certificate`));
    });
  });
}

peerTest(["openssl"], "connect({ tls: { serverName } }) checks the certificate for that name", async () => {
  await withTlsServer(async (port, { ca }) => {
    const tls = { caCerts: [ca.cert], serverName: "localhost" };
    await using stream = await connect({ hostname: "127.0.0.1", port, tls });
    await stream.send("hello\n");
    assertEquals(await stream.readLine(), "hello");
  });
});

peerTest(["openssl"], "connect({ tls: { alpnProtocols } }) asks for them, the best one first", async () => {
  await withTlsServer(async (port, { ca }) => {
    await using stream = await connect({ port, tls: { caCerts: [ca.cert], alpnProtocols: ["echo/1", "other"] } });
    const { under } = stream.under;
    assert(under !== undefined && "handshake" in under && typeof under.handshake === "function");
    assertEquals((await under.handshake()).alpnProtocol, "echo/1");
  });
});

/** A TLS server that sends a line and closes the connection without close_notify, as many do. */
const CURT_SERVER = `
import socket, ssl, sys
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(sys.argv[1], sys.argv[2])
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
conn = context.wrap_socket(listener.accept()[0], server_side=True)
conn.sendall(b"bye\\n")
socket.socket(fileno=conn.detach()).close()
`;

peerTest(["openssl"], "a TLS peer that closes without close_notify is read as the end of the stream", async () => {
  await withCertificates(async ({ ca, server: { certFile, keyFile } }) => {
    await using server = Program.start("python3", ["-c", CURT_SERVER, certFile, keyFile]);
    const [, port] = await server.printed(/(\d+)\n/);
    await using stream = await connect({ port: Number(port), tls: { caCerts: [ca.cert] } });
    assertEquals(await Array.fromAsync(stream.lines()), ["bye"]);
    assertEquals(await stream.recv(), null);
    await server.ended();
  });
});

// The runtime keeps the descriptor of a stalled TLS peer until the peer leaves (Deno 2.9.6).

networkTest("the TLS handshake has the timeout of the try", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  const failed = rejectionOf(connect({ port, tls: true, timeout: 50, retries: 1 }));
  using _first = await listener.accept();
  using _second = await listener.accept();
  const error = await failed;
  assert(error instanceof Deno.errors.TimedOut);
  assertMatch(error.message, /after 2 tries: no answer within 50 ms$/);
});

networkTest("the TLS handshake ends with the reason of the signal", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const controller = new AbortController();
  const failed = rejectionOf(connect({ port: listener.addr.port, tls: true, signal: controller.signal }));
  using conn = await listener.accept();
  assert(await conn.read(new Uint8Array(1_024)));
  const reason = new TypeError("changed my mind");
  controller.abort(reason);
  assertStrictEquals(await failed, reason);
});

networkTest("connect({ tls }) over a filter's connection is the program's mistake", async () => {
  await withServer(new TcpServer({ port: 0 }, Echo), async (server) => {
    const { port } = server.address;
    const error = await rejectionOf(connect({ port, tls: true, filters: [wrap], retries: Infinity }));
    assert(error instanceof TypeError);
    assertMatch(error.message, /"tls" needs a bare TCP connection/);
    await until(() => server.stats.accepted === 1 && server.stats.active === 0);
  });
});

unixTest("connect({ path, tls }) is the program's mistake", async (folder) => {
  const path = `${folder}/tls.sock`;
  using _listener = Deno.listen({ transport: "unix", path });
  const error = await rejectionOf(connect({ path, tls: true }));
  assert(error instanceof TypeError);
  assertMatch(error.message, /"tls" needs a bare TCP connection/);
});

for (const [what, options] of [["a misspelt option", { servername: "a" }], ["a text", "yes"]] as const) {
  networkTest(`connect({ tls }) refuses ${what}`, async () => {
    using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    const tls = Object.assign(Object(options)) as ConnectTlsOptions;
    const error = await rejectionOf(connect({ port: listener.addr.port, tls, retries: Infinity }));
    assert(error instanceof TypeError, `${error}`);
  });
}

// Filters

/** A filter that puts a connection around another. */
const wrap: ConnectionFilter = (conn) => ({
  under: conn,
  localAddr: conn.localAddr,
  remoteAddr: conn.remoteAddr,
  read: (into) => conn.read(into),
  write: (data) => conn.write(data),
  closeWrite: () => conn.closeWrite(),
  close: () => conn.close(),
});

networkTest("connect({ filters }) runs its filters in order, each over the connection of the one before", async () => {
  await withServer(new TcpServer({ port: 0 }, Echo), async (server) => {
    const { port } = server.address;
    const seen: unknown[] = [];
    const conns: StreamConn[] = [];
    const filters: ConnectionFilter[] = [wrap, (conn, { hostname, signal }) => {
      seen.push(hostname, signal.aborted);
      conns.push(conn);
      return Promise.resolve(wrap(conn, { hostname, signal, onEnd: () => {} }));
    }];
    await using stream = await connect({ hostname: "localhost", port, filters });
    await stream.send("hello\n");
    assertEquals(await stream.readLine(), "hello");
    assertEquals(seen, ["localhost", false]);
    assertStrictEquals(stream.under.under, conns[0]);
    assert(conns[0]?.under !== undefined && conns[0].under.under === undefined);
  });
});

/** Filters that end a try, and the error of connect(). */
const ENDINGS: [string, ConnectionFilter, RegExp, new (message: string) => Error][] = [
  ["refuses", () => null, /after 2 tries: a filter has refused the connection$/, Deno.errors.ConnectionAborted],
  ["refuses later", () => Promise.resolve(null), /a filter has refused/, Deno.errors.ConnectionAborted],
  [
    "rejects",
    () => Promise.reject(new Deno.errors.ConnectionReset("gone")),
    /2 tries: gone/,
    Deno.errors.ConnectionReset,
  ],
  ["does not end", () => new Promise(() => {}), /after 2 tries: no answer within 50 ms$/, Deno.errors.TimedOut],
];

for (const [how, filter, sentence, Kind] of ENDINGS) {
  networkTest(`a filter that ${how} ends the try, releases what filters hold, and closes the connection`, async () => {
    await withServer(new TcpServer({ port: 0 }, Echo), async (server) => {
      const { port } = server.address;
      let released = 0;
      const signals: AbortSignal[] = [];
      const filters: ConnectionFilter[] = [(conn, { onEnd, signal }) => {
        onEnd(() => released++);
        signals.push(signal);
        return conn;
      }, filter];
      const error = await rejectionOf(connect({ port, filters, timeout: 50, retries: 1 }));
      assert(error instanceof Kind, error.name);
      assertMatch(error.message, sentence);
      assertEquals([released, signals.length, new Set(signals).size], [2, 2, 2]);
      if (how === "does not end") assert(signals.every(({ reason }) => reason instanceof Deno.errors.TimedOut));
      await until(() => server.stats.accepted === 2 && server.stats.active === 0);
    });
  });
}

networkTest("what a filter of connect() gave to onEnd() runs once the stream is closed", async () => {
  await withServer(new TcpServer({ port: 0 }, Echo), async (server) => {
    let released = 0;
    const filters: ConnectionFilter[] = [(conn, { onEnd }) => {
      onEnd(() => released++);
      return conn;
    }];
    const stream = await connect({ port: server.address.port, filters });
    assertEquals(released, 0);
    stream.close();
    stream.close();
    assertEquals(released, 1);
  });
});

Deno.test("a dial that succeeds after connect() gave up is closed", async () => {
  const gate = Promise.withResolvers<void>();
  const dialled = new FakeTcpConn();
  await withDeno("connect", () => gate.promise.then(() => dialled), () =>
    withFakeTime(async (time) => {
      const failed = rejectionOf(connect({ path: "/run/late.sock", timeout: 1_000 }));
      await time.advance(1_000);
      assert(await failed instanceof Deno.errors.TimedOut);
      gate.resolve();
      await turnEnd();
      assert(dialled.isClosed);
    }));
});

Deno.test("a filter's connection that comes after connect() gave up is closed", async () => {
  const gate = Promise.withResolvers<void>();
  const [dialled, made] = [new FakeTcpConn(), new FakeTcpConn()];
  Object.assign(dialled, { remoteAddr: { ...dialled.remoteAddr, port: 1 } });
  await withDeno("connect", () => Promise.resolve(dialled), () =>
    withFakeTime(async (time) => {
      const filters = [() => gate.promise.then(() => made)];
      const failed = rejectionOf(connect({ port: 1, filters, timeout: 1_000 }));
      await time.advance(1_000);
      assert(await failed instanceof Deno.errors.TimedOut);
      assert(dialled.isClosed);
      gate.resolve();
      await turnEnd();
      assert(made.isClosed);
    }));
});

Deno.test("connect() rejects with the very error of the program's own class that a filter throws", async () => {
  class Unwelcome extends Error {
    constructor(readonly details: { readonly code: number }) {
      super(`unwelcome: ${details.code}`);
    }
  }
  const error = new Unwelcome({ code: 7 });
  const filters: ConnectionFilter[][] = [
    [() => {
      throw error;
    }],
    [() => Promise.reject(error)],
  ];
  for (const failing of filters) {
    const dialled = new FakeTcpConn();
    Object.assign(dialled, { remoteAddr: { ...dialled.remoteAddr, port: 1 } });
    await withDeno("connect", () => Promise.resolve(dialled), async () => {
      assertStrictEquals(await rejectionOf(connect({ port: 1, filters: failing })), error);
      assert(dialled.isClosed);
    });
  }
});
