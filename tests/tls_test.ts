/** TLS: servers, clients, client certificates, STARTTLS, and peers that mean no good. */

import { assert, assertEquals, assertMatch, assertRejects, assertThrows } from "../deps.ts";
import {
  connect,
  type ConnectionReport,
  IncompleteReadError,
  socketPair,
  type SocketStream,
  StreamRequestHandler,
  type StreamRequestHandlerClass,
  type TlsClientSettings,
  TlsServer,
  type TlsServerAddress,
  type TlsServerOptions,
} from "../mod.ts";
import { type Certificates, withCertificates } from "./certificates.ts";
import { Peer, Program } from "./programs.ts";
import { Echo, programTest, rejectionOf, scaled, until } from "./testing.ts";

/** Stalled, broken and half handshakes of each kind. */
const STORM = scaled(125, 2_500);

/** Long enough for a storm on a slow machine, short enough not to be noticed. */
const SHORT_HANDSHAKE_MS = 500;

function tlsTest(name: string, test: (certificates: Certificates) => Promise<void>): void {
  programTest(name, () => withCertificates(test));
}

interface Setup extends TlsServerOptions {
  address?: Partial<TlsServerAddress>;
}

/** Serves until `test` is over. */
async function serving(
  { server: { cert, key } }: Certificates,
  Handler: StreamRequestHandlerClass,
  test: (server: TlsServer, port: number) => Promise<void>,
  { address = {}, ...options }: Setup = {},
): Promise<void> {
  const server = new TlsServer({ port: 0, cert, key, ...address }, Handler, options);
  const { port } = server.listen();
  const over = server.serveForever();
  try {
    await test(server, port);
  } finally {
    await server.shutdown();
    await over;
  }
}

/** A client that trusts the test's authority. */
function dial({ ca }: Certificates, port: number, tls: TlsClientSettings = {}): Promise<SocketStream> {
  return connect({ port, timeout: 10_000, tls: { caCerts: [ca.cert], ...tls } });
}

/** How many sockets this process has open. Another one has to look, as reading /proc takes all permissions. */
function openSockets(): number {
  const look = new Deno.Command("sh", { args: ["-c", `readlink /proc/${Deno.pid}/fd/*`], stderr: "null" });
  const targets = new TextDecoder().decode(look.outputSync().stdout).split("\n");
  return targets.filter((target) => target.startsWith("socket:")).length;
}

/** Bytes that tell where they belong. */
function pattern(length: number): Uint8Array {
  return Uint8Array.from({ length }, (_, index) => index * 7 + (index >> 8));
}

/** Tells what became of its stream. */
class Watched extends StreamRequestHandler {
  static seen: SocketStream[] = [];
  static ends: string[] = [];

  override async handle() {
    Watched.seen.push(this.request);
    try {
      for await (const data of this.request) await this.request.send(data);
      Watched.ends.push(this.request.tls?.truncated ? "truncated" : "ended");
      await this.request.send("goodbye\n");
    } catch (error) {
      Watched.ends.push(error instanceof Error ? error.name : "unknown");
    }
  }
}

function forgetWatched() {
  Watched.seen = [];
  Watched.ends = [];
}

// Streams

tlsTest("5 MB go out and come back over TLS", async (certificates) => {
  await serving(certificates, Echo, async (server, port) => {
    await using client = await dial(certificates, port);
    const data = pattern(5_000_000);
    const sent = client.send(data);
    assertEquals(await client.readExactly(data.length), data);
    await sent;
    assertEquals([client.bytesRead, client.bytesWritten], [data.length, data.length]);
    assertEquals(server.stats.bytesRead, data.length);
  });
});

tlsTest("every way of reading and writing works over TLS", async (certificates) => {
  await serving(certificates, Echo, async (_server, port) => {
    await using client = await dial(certificates, port);
    await client.write("one\r\n");
    await client.write("two\n");
    assertEquals(await client.readLine(), "one");
    assertEquals(await client.readLine(), "two");
    await client.send("a;b");
    assertEquals(await client.readUntil(";"), new TextEncoder().encode("a;"));
    assertEquals(await client.readExactly(1), new TextEncoder().encode("b"));
    await client.writeFrame(pattern(30_000));
    const { value } = await client.frames().next();
    assertEquals(value, pattern(30_000));
    await client.send("xyz");
    const into = new Uint8Array(2);
    assertEquals(await client.read(into), 2);
    assertEquals(await client.recv(), new TextEncoder().encode("z"));
    await client.send("lines\nof\ntext");
    await client.closeWrite();
    assertEquals(await Array.fromAsync(client.lines()), ["lines", "of", "text"]);
    assertEquals(client.tls?.truncated, false);
  });
});

tlsTest("either side may end its half first and still read the other", async (certificates) => {
  class Half extends StreamRequestHandler {
    override async handle() {
      await this.request.send("first\n");
      await this.request.closeWrite();
      assertEquals(await this.request.readLine(), "second");
      assertEquals(await this.request.readLine(), null);
      assertEquals(this.request.tls?.truncated, false);
    }
  }
  await serving(certificates, Half, async (server, port) => {
    await using client = await dial(certificates, port);
    assertEquals(await client.readLine(), "first");
    assertEquals(await client.readLine(), null);
    assertEquals(client.tls?.truncated, false);
    await client.send("second\n");
    await client.closeWrite();
    await until(() => server.stats.active === 0);
    assertEquals(server.stats.errors, 0);
  });
});

tlsTest("a write waits for a peer that does not read, and close() ends both at once", async (certificates) => {
  class Silent extends StreamRequestHandler {
    override async handle() {
      await new Promise((resolve) => this.signal.addEventListener("abort", resolve));
    }
  }
  await serving(certificates, Silent, async (_server, port) => {
    const client = await dial(certificates, port);
    const sent = client.send(new Uint8Array(20_000_000));
    const failed = rejectionOf(sent);
    const read = rejectionOf(client.recv());
    await until(() => client.bytesWritten > 0);
    client.close();
    assert(await read instanceof Deno.errors.BadResource);
    client.timeout = 10;
    assert(await failed instanceof Deno.errors.BadResource);
  });
});

tlsTest("close() rejects a read that waits", async (certificates) => {
  await serving(certificates, Echo, async (_server, port) => {
    const client = await dial(certificates, port);
    const failed = rejectionOf(client.recv());
    client.close();
    assert(await failed instanceof Deno.errors.BadResource);
    assert(await rejectionOf(client.recv()) instanceof Deno.errors.BadResource);
  });
});

tlsTest("a read has its timeout over TLS and loses nothing", async (certificates) => {
  await serving(certificates, Echo, async (_server, port) => {
    await using client = await dial(certificates, port);
    client.timeout = 10;
    assert(await rejectionOf(client.recv()) instanceof Deno.errors.TimedOut);
    client.timeout = 10_000;
    await client.send("still here\n");
    assertEquals(await client.readLine(), "still here");
  });
});

tlsTest("a short timeout behind a long handshakeTimeout is kept in its own time", async (certificates) => {
  const took = Promise.withResolvers<number>();
  class Waiting extends StreamRequestHandler {
    override async handle() {
      const begun = performance.now();
      await rejectionOf(this.request.recv());
      took.resolve(performance.now() - begun);
    }
  }
  await serving(certificates, Waiting, async (_server, port) => {
    await using client = await dial(certificates, port);
    assertEquals(await client.recv(), null);
  }, { timeout: 50, handshakeTimeout: 6_000_000 });
  assert(await took.promise < 60_000); // A part of the handshake's would be three minutes.
});

tlsTest("a reset is told as on a plain connection", async (certificates) => {
  forgetWatched();
  await serving(certificates, Watched, async (server, port) => {
    const python = `
import socket, ssl, struct, sys
raw = socket.create_connection(("127.0.0.1", ${port}))
tls = ssl._create_unverified_context().wrap_socket(raw)
tls.sendall(b"hello")
tls.recv(5)
tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
tls.close()`;
    await using program = Program.start("python3", ["-c", python]);
    assertEquals((await program.ended()).code, 0);
    await until(() => Watched.ends.length === 1 && server.stats.active === 0);
    assertEquals(Watched.ends, ["ConnectionReset"]);
  });
});

tlsTest("a peer that leaves without close_notify is told apart, and can be answered", async (certificates) => {
  forgetWatched();
  await serving(certificates, Watched, async (server, port) => {
    const python = (leave: string) => `
import socket, ssl
raw = socket.create_connection(("127.0.0.1", ${port}))
tls = ssl._create_unverified_context().wrap_socket(raw, suppress_ragged_eofs=False)
tls.sendall(b"hello")
print(tls.recv(5).decode())
${leave}
rest = b""
while not rest.endswith(b"\\n"): rest += tls.recv(100)
print(rest.decode(), end="")`;
    // The first tells that it ends, the second only stops to send.
    for (
      const leave of [
        "socket.SocketType.sendall",
        "raw2 = socket.socket(fileno=tls.fileno()); raw2.shutdown(1); raw2.detach()",
      ]
    ) {
      const source = leave.startsWith("raw2") ? python(leave) : PYTHON_UNWRAP(port);
      await using program = Program.start("python3", ["-c", source]);
      const { code, stdout, stderr } = await program.ended();
      assertEquals([code, stderr], [0, ""]);
      assertMatch(stdout, /^hello\n/);
      if (leave.startsWith("raw2")) assertEquals(stdout, "hello\ngoodbye\n");
    }
    await until(() => server.stats.active === 0);
    assertEquals(Watched.ends, ["ended", "truncated"]);
  });
});

const PYTHON_UNWRAP = (port: number) => `
import socket, ssl
raw = socket.create_connection(("127.0.0.1", ${port}))
tls = ssl._create_unverified_context().wrap_socket(raw)
tls.sendall(b"hello")
print(tls.recv(5).decode())
try: tls.unwrap()
except ssl.SSLError: pass # It was answered first.
tls.close()`;

tlsTest("reading a message that the peer did not end says so", async (certificates) => {
  class HalfFrame extends StreamRequestHandler {
    override async handle() {
      await this.request.send("abc");
    }
  }
  await serving(certificates, HalfFrame, async (_server, port) => {
    await using client = await dial(certificates, port);
    const error = await rejectionOf(client.readExactly(10));
    assert(error instanceof IncompleteReadError && error.partial.length === 3);
    assertEquals(client.tls?.truncated, false);
  });
});

// What was negotiated

tlsTest("both sides see what was negotiated", async (certificates) => {
  forgetWatched();
  await serving(certificates, Watched, async (_server, port) => {
    await using client = await dial(certificates, port, { serverName: "localhost", alpnProtocols: ["none", "echo/1"] });
    await client.send("x");
    await client.recv();
    const { tls } = Watched.seen[0] ?? {};
    assertEquals([tls?.protocol, tls?.alpnProtocol, tls?.serverName], ["TLSv1.3", "echo/1", "localhost"]);
    assertEquals(tls?.peerCertificate, undefined);
    assertMatch(tls?.cipher ?? "", /^TLS_/);
    assertEquals([client.tls?.protocol, client.tls?.alpnProtocol], ["TLSv1.3", "echo/1"]);
    assertEquals(client.tls?.peerCertificate?.altNames, "DNS:localhost, IP Address:127.0.0.1");
    assertEquals(client.tls?.peerCertificate?.commonName, "server");
  }, { address: { alpnProtocols: ["echo/2", "echo/1"] } });
});

tlsTest("a client that asks for other protocols only is turned away", async (certificates) => {
  await serving(certificates, Echo, async (server, port) => {
    assert(
      await rejectionOf(dial(certificates, port, { alpnProtocols: ["http/1.1"] })) instanceof Deno.errors.InvalidData,
    );
    await until(() => server.stats.handshakeFailures === 1);
    await using client = await dial(certificates, port); // One that asks for none is served.
    assertEquals(client.tls?.alpnProtocol, undefined);
  }, { address: { alpnProtocols: ["echo/1"] } });
});

Deno.test("a plain stream has no TLS", () => {
  const [ours, theirs] = socketPair();
  assertEquals(ours.tls, undefined);
  ours.close();
  theirs.close();
});

// Certificates

tlsTest("a server says in one sentence what is wrong with its certificate", async ({ server, renewed }) => {
  const { cert, key } = server;
  const wrong: [Partial<TlsServerAddress>, RegExp][] = [
    [{ cert: "nonsense" }, /^cert holds no certificate in PEM form; [^.]*$/],
    [{ cert: key }, /^cert holds no certificate in PEM form; [^.]*$/],
    [{ key: "nonsense" }, /^key holds no private key in PEM form, or an encrypted one; [^.]*$/],
    [{ key: renewed.key }, /^key is not the key of cert; [^.]*$/],
    [{ clientCa: "nonsense" }, /^clientCa must hold certificates in PEM form; [^.]*$/],
    [{ clientCa: [] }, /^clientCa must hold certificates in PEM form; [^.]*$/],
  ];
  for (const [part, sentence] of wrong) {
    const server = new TlsServer({ port: 0, cert, key, ...part }, Echo);
    const error = await rejectionOf(Promise.try(() => server.listen()));
    assert(error instanceof Deno.errors.InvalidData);
    assertMatch(error.message, sentence);
    server.close();
  }
});

Deno.test("TlsServer refuses an option that is misspelt", () => {
  const options = { ...{ grace: 1 }, ...{ handshakeTimeouts: 1 } };
  assertThrows(() => new TlsServer({ port: 0, cert: "", key: "" }, Echo, options), TypeError);
  assertThrows(() => new TlsServer({ port: 0, cert: "", key: "" }, Echo, { handshakeTimeout: 0 }), RangeError);
});

tlsTest("a client trusts nobody that it was not told to trust", async (certificates) => {
  const { rogue, forged, server } = certificates;
  const refusals: [Partial<TlsServerAddress>, TlsClientSettings | true, RegExp][] = [
    [{}, true, /nobody who is trusted has vouched for the server's certificate; name its authority in caCerts$/],
    [{}, { caCerts: [rogue.cert] }, /nobody who is trusted has vouched/],
    [{}, { caCerts: [certificates.ca.cert], serverName: "example.org" }, /is for another name; set serverName/],
    // The runtime's own check accepts this one (2.9.6).
    [forged, { caCerts: [certificates.ca.cert], serverName: "localhost" }, /vouched/],
  ];
  for (const [address, tls, sentence] of refusals) {
    await serving(certificates, Echo, async (_server, port) => {
      const error = await rejectionOf(connect({ port, tls }));
      assert(error instanceof Deno.errors.InvalidData, `${error}`);
      assertMatch(error.message, sentence);
      assert(error.message.startsWith(`Cannot connect to 127.0.0.1:${port}: `));
    }, { address: { cert: address.cert ?? server.cert, key: address.key ?? server.key } });
  }
});

tlsTest("a client refuses settings that cannot be meant", async ({ ca, alice }) => {
  await assertRejects(() => connect({ port: 1, tls: { caCerts: [] } }), Deno.errors.InvalidData);
  await assertRejects(() => connect({ port: 1, tls: { caCerts: ["nonsense"] } }), Deno.errors.InvalidData);
  await assertRejects(() => connect({ port: 1, tls: { cert: alice.cert } }), Deno.errors.InvalidData);
  await assertRejects(() => connect({ path: "/nowhere", tls: { caCerts: [ca.cert] } }), TypeError);
  const misspelt = { ...{ serverName: "localhost" }, ...{ ca: ca.cert } };
  await assertRejects(() => connect({ port: 1, tls: misspelt }), TypeError);
});

tlsTest("a new certificate is for later connections, and drops none", async (certificates) => {
  await serving(certificates, Echo, async (server, port) => {
    await using before = await dial(certificates, port);
    server.setCertificate(certificates.renewed);
    await using after = await dial(certificates, port);
    assertEquals(before.tls?.peerCertificate?.commonName, "server");
    assertEquals(after.tls?.peerCertificate?.commonName, "renewed");
    for (const client of [before, after]) {
      await client.send("hello\n");
      assertEquals(await client.readLine(), "hello");
    }
    const { cert } = certificates.server;
    assertThrows(() => server.setCertificate({ cert, key: certificates.renewed.key }), Deno.errors.InvalidData);
    await using last = await dial(certificates, port);
    assertEquals(last.tls?.peerCertificate?.commonName, "renewed");
  });
});

// Client certificates

/** Says who the client is. */
class Who extends StreamRequestHandler {
  static handlers = 0;

  override async handle() {
    Who.handlers++;
    await this.request.send(`${this.request.tls?.peerCertificate?.commonName}\n`);
  }
}

tlsTest("a client without a valid certificate never reaches a handler", async (certificates) => {
  const { alice, rogue, expired, ca } = certificates;
  Who.handlers = 0;
  await serving(certificates, Who, async (server, port) => {
    await using client = await dial(certificates, port, { cert: alice.cert, key: alice.key });
    assertEquals(await client.readLine(), "alice");
    const refused: TlsClientSettings[] = [{}, { cert: rogue.cert, key: rogue.key }, {
      cert: expired.cert,
      key: expired.key,
    }];
    for (const settings of [...refused, ...refused]) {
      const { promise, resolve } = Promise.withResolvers<string>();
      dial(certificates, port, settings).then(async (stream) => {
        await using _closed = stream;
        resolve(String(await stream.readLine().catch(() => "refused")));
      }, () => resolve("refused"));
      assertMatch(await promise, /^(refused|null)$/);
    }
    await until(() => server.stats.handshakeFailures === 6);
    assertEquals([Who.handlers, server.stats.errors], [1, 0]);
  }, { address: { clientCa: ca.cert } });
});

for (const version of ["-tls1_2", "-tls1_3"]) {
  tlsTest(`a session that is resumed (${version}) is no way around client certificates`, async (certificates) => {
    const { ca, rogue, alice } = certificates;
    Who.handlers = 0;
    const run = async (port: number, ...args: string[]): Promise<string> => {
      const where = ["s_client", "-connect", `127.0.0.1:${port}`, "-CAfile", ca.certFile, version, ...args];
      await using program = Program.start("openssl", where);
      return (await program.ended()).stdout;
    };
    const session = `${rogue.certFile}.session`;
    await serving(certificates, Who, async (_strict, port) => {
      await run(port, "-cert", rogue.certFile, "-key", rogue.keyFile, "-sess_out", session);
      await run(port, "-sess_in", session);
      await serving(certificates, Who, async (_plain, plainPort) => {
        assertMatch(await run(plainPort, "-sess_out", session), /undefined\n/);
      });
      Who.handlers = 0;
      await run(port, "-sess_in", session);
      assertEquals(Who.handlers, 0);
      // It is not that nobody is served.
      const args = ["-cert", alice.certFile, "-key", alice.keyFile];
      assertMatch(await run(port, ...args, "-sess_out", session), /alice\n/);
      assertMatch(await run(port, ...args, "-sess_in", session), /alice\n/);
    }, { address: { clientCa: [ca.cert] } });
  });
}

// Peers that mean no good

/** What clients do instead of a handshake. The descriptors of all stay open on their side. */
const BAD_PEERS: [string, (peer: Peer) => Promise<void>][] = [
  ["says nothing", () => Promise.resolve()],
  ["sends garbage", (peer) => peer.send(pattern(500))],
  ["speaks HTTP", (peer) => peer.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")],
  ["stops in the middle of its hello", (peer) => peer.send(new Uint8Array([0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]))],
];

for (const [what, misbehave] of BAD_PEERS) {
  tlsTest(`a peer that ${what} costs only itself, and its descriptor is freed`, async (certificates) => {
    await serving(certificates, Echo, async (server, port) => {
      const before = openSockets();
      const peers = await Promise.all(Array.from({ length: 20 }, () => Peer.connect(port)));
      try {
        await Promise.all(peers.map(misbehave));
        const begun = performance.now();
        const honest = await dial(certificates, port);
        await honest.send("hello\n");
        assertEquals(await honest.readLine(), "hello");
        assert(performance.now() - begun < SHORT_HANDSHAKE_MS);
        await honest[Symbol.asyncDispose]();
        await until(() => server.stats.handshakeFailures === peers.length && server.stats.active === 0);
        await until(() => openSockets() === before + peers.length); // Theirs are open still.
        assertEquals(server.stats.errors, 0);
      } finally {
        for (const peer of peers) peer[Symbol.dispose]();
      }
      await until(() => openSockets() === before);
    }, { handshakeTimeout: SHORT_HANDSHAKE_MS });
  });
}

tlsTest(
  "the hooks are told of a handshake that fails, and openConnections of one that is under way",
  async (certificates) => {
    const reports: ConnectionReport[] = [];
    const { cert, key } = certificates.server;
    class Witness extends TlsServer {
      override handleClose(report: ConnectionReport) {
        reports.push(report);
      }
    }
    await using server = new Witness({ port: 0, cert, key }, Echo);
    const { port } = server.listen();
    server.serveForever();
    using peer = await Peer.connect(port);
    await until(() => server.openConnections[0]?.waitsFor === "startTls()");
    await peer.send(pattern(500));
    await until(() => reports.length === 1);
    assertEquals(reports.map(({ reason }) => reason), ["handshakeFailed"]);
    assertEquals(server.openConnections, []);
  },
);

tlsTest("over maxConnectionsPerHost a client is closed before its handshake", async (certificates) => {
  await serving(certificates, Echo, async (server, port) => {
    await using client = await dial(certificates, port);
    await client.send("hello\n");
    assertEquals(await client.readLine(), "hello");
    using peer = await Peer.connect(port);
    assertEquals((await peer.receiveAll()).length, 0);
    assertEquals([server.stats.refused, server.stats.handshakeFailures, server.stats.accepted], [1, 0, 1]);
  }, { maxConnectionsPerHost: 1 });
});

tlsTest("maxLifetime ends an encrypted connection, and one that is in its handshake", async (certificates) => {
  await serving(certificates, Echo, async (server, port) => {
    using stalled = await Peer.connect(port);
    const client = await dial(certificates, port);
    assertEquals(await client.recv(), null);
    assertEquals((await stalled.receiveAll()).length, 0);
    await until(() => server.stats.active === 0);
    assertEquals([server.stats.timedOut, server.stats.handshakeFailures], [1, 1]);
    client.close();
  }, { maxLifetime: 300 });
});

tlsTest(`a storm of ${STORM * 4} broken handshakes leaves the server as it was`, async (certificates) => {
  await serving(certificates, Echo, async (server, port) => {
    const before = openSockets();
    for (let done = 0; done < STORM; done += 25) {
      const round = Math.min(25, STORM - done);
      const peers = await Promise.all(Array.from({ length: round * BAD_PEERS.length }, () => Peer.connect(port)));
      await Promise.all(peers.map((peer, index) => BAD_PEERS[index % BAD_PEERS.length]?.[1](peer)));
      for (const [index, peer] of peers.entries()) if (index % 3 === 0) peer[Symbol.dispose](); // Some leave, some stay.
      await using honest = await dial(certificates, port);
      await honest.send("hello\n");
      assertEquals(await honest.readLine(), "hello");
      await until(() => server.stats.active <= 1);
      for (const [index, peer] of peers.entries()) if (index % 3 !== 0) peer[Symbol.dispose]();
    }
    await until(() => server.stats.active === 0 && openSockets() === before);
    assertEquals([server.stats.handshakeFailures, server.stats.errors], [STORM * 4, 0]);
  }, { handshakeTimeout: SHORT_HANDSHAKE_MS });
});

/** Prints by how many bytes the heap has grown from 500 handshakes that failed at once, long before their deadline. */
const FAILED_HANDSHAKES = `
import { socketPair } from ${JSON.stringify(import.meta.resolve("../mod.ts"))};
const [cert, key] = Deno.args;
async function fail(count) {
  for (let failed = 0; failed < count; failed++) {
    const [client, server] = socketPair();
    await client.send("GET / HTTP/1.1\\r\\n\\r\\n");
    await server.startTls({ role: "server", cert, key, handshakeTimeout: 600_000 }).catch(() => {});
    client.close();
  }
  await new Promise((resolve) => setTimeout(resolve, 10));
  gc();
  return Deno.memoryUsage().heapUsed;
}
const before = await fail(100);
console.log(await fail(500) - before);
`;

tlsTest("a handshake that has failed leaves nothing on the heap", async ({ server: { cert, key } }) => {
  const file = await Deno.makeTempFile({ suffix: ".js" });
  await Deno.writeTextFile(file, FAILED_HANDSHAKES);
  const args = ["run", "--no-config", "--v8-flags=--expose-gc", file, cert, key];
  await using program = Program.start(Deno.execPath(), args);
  const { stdout } = await program.ended();
  await Deno.remove(file);
  assert(stdout !== "" && Number(stdout) < 1_000_000, `${stdout} bytes`); // 13 KB of each were 6.5 MB.
});

tlsTest("handshakes count as connections, and the deadline makes room", async (certificates) => {
  await serving(certificates, Echo, async (server, port) => {
    using _stalled = await Peer.connect(port);
    await until(() => server.stats.active === 1);
    await using honest = await dial(certificates, port);
    assertEquals(server.stats.handshakeFailures, 1);
    await honest.send("hello\n");
    assertEquals(await honest.readLine(), "hello");
  }, { handshakeTimeout: 50, maxConnections: 1 });
});

tlsTest("a shutdown does not wait for handshakes", async (certificates) => {
  const { cert, key } = certificates.server;
  for (const end of ["shutdown", "close"] as const) {
    const server = new TlsServer({ port: 0, cert, key }, Echo, { handshakeTimeout: 60_000, grace: 60_000 });
    const { port } = server.listen();
    const over = server.serveForever();
    using _stalled = await Peer.connect(port);
    await until(() => server.stats.active === 1);
    const begun = performance.now();
    server[end]();
    const { finished, cut } = await server.shutdown(); // It is the same one.
    await over;
    assert(performance.now() - begun < 5_000);
    const { active, handshakeFailures } = server.stats;
    assertEquals([finished, cut.length, active, handshakeFailures], [0, 1, 0, 0]);
  }
});

tlsTest("a peer that does not read is cut off by a shutdown, and its descriptor is freed", async (certificates) => {
  class Flood extends StreamRequestHandler {
    override async handle() {
      for (const block = new Uint8Array(1_000_000);;) await this.request.send(block);
    }
  }
  const { cert, key } = certificates.server;
  const server = new TlsServer({ port: 0, cert, key }, Flood);
  const { port } = server.listen();
  const over = server.serveForever();
  const before = openSockets();
  const python = `
import socket, ssl, sys
raw = socket.create_connection(("127.0.0.1", ${port}))
tls = ssl._create_unverified_context().wrap_socket(raw)
print("ready", flush=True)
sys.stdin.read()`;
  await using program = Program.start("python3", ["-c", python]);
  await program.printed("ready");
  await until(() => server.stats.bytesWritten > 1_000_000);
  const { cut } = await server.shutdown({ grace: 50 });
  await over;
  assertEquals(cut.length, 1);
  await until(() => openSockets() === before - 1); // The listener is gone too.
});

// Clients of servers that mean no good

tlsTest("connecting to what is no TLS server fails in time and frees the descriptor", async ({ ca }) => {
  const before = openSockets();
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  const tls = { caCerts: [ca.cert] };
  const accepted = listener.accept();
  await assertRejects(() => connect({ port, tls, timeout: 50 }), Deno.errors.TimedOut);
  (await accepted).close();
  const greeted = listener.accept().then(async (conn) => {
    await conn.write(new TextEncoder().encode("220 mail.example.org ESMTP\r\n"));
    return conn;
  });
  await assertRejects(() => connect({ port, tls, timeout: 10_000 }), Deno.errors.InvalidData);
  (await greeted).close();
  const left = listener.accept().then((conn) => conn.close());
  await assertRejects(() => connect({ port, tls, timeout: 10_000 }), Deno.errors.ConnectionReset);
  await left;
  const dialled = new AbortController();
  const last = listener.accept();
  const aborted = rejectionOf(connect({ port, tls, signal: dialled.signal }));
  const conn = await last;
  dialled.abort(new TypeError("enough"));
  assertEquals((await aborted).message, "enough");
  conn.close();
  await until(() => openSockets() === before + 1);
});

// STARTTLS

/** Answers lines; after STARTTLS over TLS. */
class Mail extends StreamRequestHandler {
  static certificates: Certificates | undefined;

  override async handle() {
    const { server } = Mail.certificates ?? {};
    for (let line; (line = await this.request.readLine()) !== null;) {
      await this.request.write(`${this.request.tls === undefined ? "plain" : "secret"} ${line}\n`);
      if (line === "STARTTLS" && server !== undefined) {
        await this.request.startTls({ role: "server", cert: server.cert, key: server.key });
      }
    }
  }
}

/** A plain server of {@linkcode Mail}. */
async function mailing(certificates: Certificates, test: (port: number) => Promise<void>): Promise<void> {
  const { TcpServer } = await import("../mod.ts");
  Mail.certificates = certificates;
  const errors: string[] = [];
  class Quiet extends TcpServer {
    override handleError(error: unknown) {
      errors.push(error instanceof Error ? error.message : "");
    }
  }
  const server = new Quiet({ port: 0 }, Mail);
  const { port } = server.listen();
  const over = server.serveForever();
  try {
    await test(port);
  } finally {
    await server.shutdown();
    await over;
  }
  Mail.certificates = undefined;
  lastErrors = errors;
}

let lastErrors: string[] = [];

tlsTest("both sides turn to TLS in the middle of a conversation", async (certificates) => {
  await mailing(certificates, async (port) => {
    await using client = await connect({ port });
    await client.send("one\n");
    assertEquals(await client.readLine(), "plain one");
    await client.send("STARTTLS\n");
    assertEquals(await client.readLine(), "plain STARTTLS");
    await client.startTls({ role: "client", serverName: "localhost", caCerts: [certificates.ca.cert] });
    assertEquals(client.tls?.protocol, "TLSv1.3");
    await client.send("two\n");
    assertEquals(await client.readLine(), "secret two");
    assert(await rejectionOf(client.startTls({ role: "client", serverName: "localhost" })) instanceof TypeError);
    await client.closeWrite();
    assertEquals(await client.readLine(), null);
  });
  assertEquals(lastErrors, []);
});

tlsTest("Python's ssl turns to TLS with a handler", async (certificates) => {
  await mailing(certificates, async (port) => {
    const python = `
import socket, ssl
raw = socket.create_connection(("127.0.0.1", ${port}))
raw.sendall(b"STARTTLS\\n")
assert raw.recv(100) == b"plain STARTTLS\\n"
tls = ssl.create_default_context(cafile="${certificates.ca.certFile}").wrap_socket(raw, server_hostname="localhost")
tls.sendall(b"two\\n")
print(tls.recv(100).decode(), end="")
tls.unwrap()`;
    await using program = Program.start("python3", ["-c", python]);
    const { stdout, stderr } = await program.ended();
    assertEquals([stdout, stderr], ["secret two\n", ""]);
  });
});

tlsTest("a client turns to TLS with Python's ssl", async ({ ca, server }) => {
  const python = `
import socket, ssl
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
raw, _ = listener.accept()
assert raw.recv(100) == b"STARTTLS\\n"
raw.sendall(b"go ahead\\n")
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain("${server.certFile}", "${server.keyFile}")
tls = context.wrap_socket(raw, server_side=True)
tls.sendall(tls.recv(100).upper())
tls.unwrap()`;
  await using program = Program.start("python3", ["-c", python]);
  const [line] = await program.printed(/\d+\n/);
  await using client = await connect({ port: Number(line), timeout: 10_000 });
  await client.send("STARTTLS\n");
  assertEquals(await client.readLine(), "go ahead");
  await client.startTls({ role: "client", serverName: "localhost", caCerts: [ca.cert] });
  await client.send("hello\n");
  assertEquals(await client.readLine(), "HELLO");
  assertEquals(await client.readLine(), null);
  assertEquals(client.tls?.truncated, false);
  await client.closeWrite();
  assertEquals((await program.ended()).stderr, "");
});

tlsTest("what an attacker has slipped in before TLS is not taken for the peer's", async (certificates) => {
  await mailing(certificates, async (port) => {
    await using client = await connect({ port });
    await client.send("STARTTLS\nDELETE\n");
    assertEquals(await client.readLine(), "plain STARTTLS");
    assertEquals(await client.readLine(), null);
  });
  assertEquals(lastErrors, ["Cannot startTls(): 7 bytes that came in plain text are unread; read them, or close"]);
});

tlsTest(
  "startTls() is refused while a read waits, and refuses others while it waits itself",
  async ({ server, ca }) => {
    const [ours, theirs] = socketPair();
    const { cert, key } = server;
    const read = ours.readLine();
    const busy = await rejectionOf(ours.startTls({ role: "server", cert, key }));
    assert(busy instanceof Deno.errors.Busy && /readLine\(\) waits/.test(busy.message));
    await theirs.send("now\n");
    assertEquals(await read, "now"); // It is as it was.
    const started = ours.startTls({ role: "server", cert, key });
    for (const call of [ours.recv(), ours.write("x"), ours.send("x"), ours.closeWrite()]) {
      const error = await rejectionOf(call);
      assert(error instanceof Deno.errors.Busy && /startTls\(\)/.test(error.message), `${error}`);
    }
    await theirs.startTls({ role: "client", serverName: "127.0.0.1", caCerts: [ca.cert] });
    await started;
    await ours.send("hello\n");
    assertEquals(await theirs.readLine(), "hello");
    ours.close();
    assertEquals(await theirs.readLine(), null);
    assertEquals(theirs.tls?.truncated, false);
    theirs.close();
  },
);

tlsTest("startTls() has a deadline, and then the stream is closed", async ({ server: { cert, key } }) => {
  const [ours, theirs] = socketPair();
  const error = await rejectionOf(ours.startTls({ role: "server", cert, key, handshakeTimeout: 10 }));
  assert(error instanceof Deno.errors.TimedOut);
  assertEquals(error.message, "startTls() waited for the timeout of 10 ms");
  assert(await rejectionOf(ours.recv()) instanceof Deno.errors.TimedOut);
  theirs.close();
});

tlsTest("close() ends a handshake that waits", async ({ server: { cert, key } }) => {
  const [ours, theirs] = socketPair();
  const failed = rejectionOf(ours.startTls({ role: "server", cert, key }));
  ours.close();
  assert(await failed instanceof Deno.errors.BadResource);
  theirs.close();
});

// Other programs

tlsTest("Python's ssl talks to a server, with its certificate checked", async (certificates) => {
  await serving(certificates, Echo, async (_server, port) => {
    const python = `
import socket, ssl
context = ssl.create_default_context(cafile="${certificates.ca.certFile}")
with context.wrap_socket(socket.create_connection(("127.0.0.1", ${port})), server_hostname="localhost") as tls:
    data = bytes(range(256)) * 4000
    tls.sendall(data[:1000])
    tls.settimeout(10)
    import threading
    threading.Thread(target=lambda: tls.sendall(data[1000:])).start()
    back = b""
    while len(back) < len(data): back += tls.recv(65536)
    print(back == data, tls.version())
    tls.unwrap()`;
    await using program = Program.start("python3", ["-c", python]);
    const { stdout, stderr } = await program.ended();
    assertEquals([stdout, stderr], ["True TLSv1.3\n", ""]);
  });
});

for (const version of ["-tls1_2", "-tls1_3"]) {
  tlsTest(`openssl s_client ${version} talks to a server`, async (certificates) => {
    await serving(certificates, Echo, async (_server, port) => {
      const args = [
        "-connect",
        `127.0.0.1:${port}`,
        "-CAfile",
        certificates.ca.certFile,
        "-verify_return_error",
        "-quiet",
      ];
      await using program = Program.start("openssl", ["s_client", ...args, "-no_ign_eof", version]);
      await program.write("hello openssl\n");
      await program.printed("hello openssl\n");
      await program.closeInput();
      assertEquals((await program.ended()).code, 0);
    });
  });
}

tlsTest("socat talks to a server, and a client to socat", async (certificates) => {
  const { ca, server, alice } = certificates;
  await serving(certificates, Who, async (_server, port) => {
    const address =
      `OPENSSL:localhost:${port},pf=ip4,cafile=${ca.certFile},cert=${alice.certFile},key=${alice.keyFile}`;
    await using program = Program.start("socat", ["-", address]);
    await program.printed("alice\n");
    await program.closeInput();
    assertEquals((await program.ended()).stderr, "");
  }, { address: { clientCa: ca.cert } });
  const listening = `OPENSSL-LISTEN:0,bind=127.0.0.1,cert=${server.certFile},key=${server.keyFile},verify=0`;
  await using program = Program.start("socat", ["-d", "-d", listening, "PIPE"]);
  const [, port] = await program.complained(/listening on .*:(\d+)/);
  await using client = await dial(certificates, Number(port));
  await client.send("hello socat\n");
  assertEquals(await client.readLine(), "hello socat");
});
