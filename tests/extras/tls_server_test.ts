/** TlsServer among peers that mean no good, in a shutdown, and with other programs. */

import { assert, assertEquals, assertThrows } from "../../deps.ts";
import { connect, type ConnectionReport, perHost, StreamRequestHandler } from "../../mod.ts";
import { tlsClient, TlsServer } from "../../extras/tls.ts";
import { proxyProtocol, sendProxyHeader } from "../../extras/proxy_protocol.ts";
import { pattern } from "../fake_conn.ts";
import { heldSockets, Peer, Program } from "../programs.ts";
import { Echo, rejectionOf, scaled, until } from "../testing.ts";
import { dial, pythonClient, QuietTlsServer, serving, tlsTest, Who } from "./tls_peers.ts";

/** Stalled, broken and half handshakes of each kind. */
const STORM = scaled(125, 2_500);

/** Long enough for a storm on a slow machine, short enough not to be noticed. */
const SHORT_HANDSHAKE_MS = 500;

// Peers that mean no good

/** What clients do instead of a handshake. The descriptors of all stay open on their side. */
const BAD_PEERS: [string, (peer: Peer) => Promise<void>][] = [
  ["says nothing", () => Promise.resolve()],
  ["sends garbage", (peer) => peer.send(pattern(500, 77))],
  ["speaks HTTP", (peer) => peer.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")],
  ["stops in the middle of its hello", (peer) => peer.send(new Uint8Array([0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]))],
];

for (const [what, misbehave] of BAD_PEERS) {
  tlsTest(`a peer that ${what} costs only itself, and its descriptor is freed`, async (certificates) => {
    await serving(certificates, Echo, async (server, port) => {
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
        await until(() => heldSockets(port) === 1); // The listener. The peers still hold their ends.
        assertEquals([server.stats.errors, server.errors.length], [0, peers.length]);
      } finally {
        for (const peer of peers) peer[Symbol.dispose]();
      }
    }, { handshakeTimeout: SHORT_HANDSHAKE_MS });
  });
}

tlsTest(
  "openConnections shows a handshake, and handleClose() hears nothing of one that fails",
  async (certificates) => {
    const reports: ConnectionReport[] = [];
    class Witness extends QuietTlsServer {
      override handleClose(report: ConnectionReport) {
        reports.push(report);
      }
    }
    const { cert, key } = certificates.server;
    await using server = new Witness({ port: 0, cert, key }, Echo);
    const { port } = server.listen();
    server.serveForever();
    using peer = await Peer.connect(port);
    await until(() => server.openConnections[0]?.waitsFor === "handshake");
    await peer.send(pattern(500, 77));
    await until(() => server.errors.length === 1 && server.openConnections.length === 0);
    assertEquals(reports, []);
  },
);

tlsTest("perHost() closes a client before its handshake", async (certificates) => {
  await serving(certificates, Echo, async (server, port) => {
    await using client = await dial(certificates, port);
    await client.send("hello\n");
    assertEquals(await client.readLine(), "hello");
    using peer = await Peer.connect(port);
    assertEquals((await peer.receiveAll()).length, 0);
    assertEquals([server.stats.refused, server.stats.handshakeFailures], [1, 0]);
  }, { filters: [perHost(1)] });
});

tlsTest("a PROXY header goes in front of TLS, and names the client", async (certificates) => {
  class Address extends StreamRequestHandler {
    override handle() {
      const { clientAddress } = this;
      return this.request.send(`${"hostname" in clientAddress ? clientAddress.hostname : ""}\n`);
    }
  }
  const source = { transport: "tcp", hostname: "192.0.2.7", port: 1 } as const;
  const destination = { transport: "tcp", hostname: "192.0.2.1", port: 443 } as const;
  await serving(certificates, Address, async (_server, port) => {
    const filters = [sendProxyHeader({ source, destination }), tlsClient({ caCerts: [certificates.ca.cert] })];
    await using client = await connect({ port, filters });
    assertEquals(await client.readLine(), "192.0.2.7");
  }, { filters: [proxyProtocol({ from: ["127.0.0.1"] })] });
});

tlsTest("maxLifetime ends an encrypted connection", async (certificates) => {
  await serving(certificates, Echo, async (server, port) => {
    await using client = await dial(certificates, port);
    assertEquals(await client.recv(), null);
    await until(() => server.stats.active === 0);
    assertEquals([server.stats.timedOut, server.stats.handshakeFailures], [1, 0]);
  }, { maxLifetime: 100 });
});

tlsTest(`a storm of ${STORM * 4} broken handshakes leaves the server as it was`, async (certificates) => {
  await serving(certificates, Echo, async (server, port) => {
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
    await until(() => server.stats.active === 0 && heldSockets(port) === 1); // The listener.
    assertEquals([server.stats.handshakeFailures, server.stats.errors], [STORM * 4, 0]);
  }, { handshakeTimeout: SHORT_HANDSHAKE_MS });
});

/** Prints by how many bytes the heap has grown from 500 handshakes that failed at once, long before their deadline. */
const FAILED_HANDSHAKES = `
import { socketPair } from ${JSON.stringify(import.meta.resolve("../../mod.ts"))};
import { tls } from ${JSON.stringify(import.meta.resolve("../../extras/tls.ts"))};
const [cert, key] = Deno.args;
const filter = tls({ cert, key });
async function fail(count) {
  for (let failed = 0; failed < count; failed++) {
    const [client, server] = socketPair();
    await client.send("GET / HTTP/1.1\\r\\n\\r\\n");
    await server.upgrade(filter, { handshakeTimeout: 600_000 }).catch(() => {});
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

for (const end of ["shutdown", "close"] as const) {
  tlsTest(`${end}() does not wait for handshakes`, async ({ server: { cert, key } }) => {
    const server = new QuietTlsServer({ port: 0, cert, key }, Echo, { handshakeTimeout: 60_000, grace: 60_000 });
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
  });
}

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
  await using program = Program.start("python3", [
    "-c",
    `${pythonClient(port)}print("ready", flush=True); sys.stdin.read()`,
  ]);
  await program.printed("ready");
  await until(() => server.stats.bytesWritten > 1_000_000);
  const { cut } = await server.shutdown({ grace: 50 });
  await over;
  assertEquals(cut.length, 1);
  await until(() => heldSockets(port) === 0);
}, "python3");

tlsTest("a peer that stops reading is noticed in the middle of a large write", async (certificates) => {
  class Large extends StreamRequestHandler {
    override async handle() {
      await this.request.send(new Uint8Array(100_000_000));
    }
  }
  await serving(certificates, Large, async (server, port) => {
    await using program = Program.start("python3", ["-c", `${pythonClient(port)}sys.stdin.read()`]);
    await until(() => server.stats.timedOut === 1 && server.stats.active === 0);
    const { bytesWritten } = server.stats;
    assert(bytesWritten > 65_536 && bytesWritten < 50_000_000, `${bytesWritten}`);
    program.kill("SIGKILL");
  }, { timeout: 200 });
}, "python3");

/** Prints the growth of the memory while a peer sends 60 MB to a handler that does not read. */
const UNREAD_BYTES = `
import { StreamRequestHandler } from ${JSON.stringify(import.meta.resolve("../../mod.ts"))};
import { TlsServer } from ${JSON.stringify(import.meta.resolve("../../extras/tls.ts"))};
const [cert, key] = Deno.args;
class Deaf extends StreamRequestHandler {
  async handle() {
    await this.request.readLine();
    const before = Deno.memoryUsage().rss;
    await new Promise((resolve) => setTimeout(resolve, 500));
    console.log(Deno.memoryUsage().rss - before);
    Deno.exit();
  }
}
const server = new TlsServer({ port: 0, cert, key }, Deaf);
console.log("port", server.listen().port);
await server.serveForever();
`;

tlsTest("a handler that does not read holds its client back, and the runtime keeps nothing", async (certificates) => {
  const file = await Deno.makeTempFile({ suffix: ".js" });
  await Deno.writeTextFile(file, UNREAD_BYTES);
  const { cert, key } = certificates.server;
  await using server = Program.start(Deno.execPath(), ["run", "--no-config", "--allow-net", file, cert, key]);
  const [, port] = await server.printed(/port (\d+)\n/);
  const python = `${pythonClient(Number(port))}
tls.settimeout(5)
try: tls.sendall(b"go\\n" + bytes(60_000_000))
except OSError: pass`;
  await using _client = Program.start("python3", ["-c", python]);
  const [, grown] = await server.printed(/port \d+\n(-?\d+)\n/);
  await Deno.remove(file);
  assert(Number(grown) < 30_000_000, `${grown} bytes`);
}, "python3");

tlsTest("the descriptor of a failed dial is freed, so the other end reads the end", async ({ ca }) => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const filters = [tlsClient({ caCerts: [ca.cert] })];
  const accepted = listener.accept();
  await rejectionOf(connect({ port: listener.addr.port, filters, timeout: 50 }));
  using conn = await accepted;
  const hello = await new Response(conn.readable).bytes();
  assert(hello.length > 0);
});

tlsTest("TlsServer refuses a misspelt option and a wrong number", ({ server: { cert, key } }) => {
  const options = { ...{ grace: 1 }, ...{ handshakeTimeouts: 1 } };
  assertThrows(() => new TlsServer({ port: 0, cert, key }, Echo, options), TypeError);
  assertThrows(() => new TlsServer({ port: 0, cert, key }, Echo, { handshakeTimeout: 0 }), RangeError);
  return Promise.resolve();
});

// Other programs

tlsTest("Python's ssl talks to a server, with its certificate checked", async (certificates) => {
  await serving(certificates, Echo, async (_server, port) => {
    const python = `
import socket, ssl
context = ssl.create_default_context(cafile="${certificates.ca.certFile}")
with context.wrap_socket(socket.create_connection(("127.0.0.1", ${port})), server_hostname="localhost") as tls:
    data = bytes(range(256)) * 4000
    tls.settimeout(10)
    back = b""
    for start in range(0, len(data), 100_000): # Not in two threads: OpenSSL's connection is not made for them.
        part = data[start:start + 100_000]
        tls.sendall(part)
        while len(back) < start + len(part): back += tls.recv(65536)
    print(back == data, tls.version())
    tls.unwrap()`;
    await using program = Program.start("python3", ["-c", python]);
    const { stdout, stderr } = await program.ended();
    assertEquals([stdout, stderr], ["True TLSv1.3\n", ""]);
  });
}, "python3");

for (const version of ["-tls1_2", "-tls1_3"]) {
  tlsTest(`openssl s_client ${version} talks to a server`, async (certificates) => {
    await serving(certificates, Echo, async (_server, port) => {
      const where = ["-connect", `127.0.0.1:${port}`, "-CAfile", certificates.ca.certFile];
      const args = ["s_client", ...where, "-verify_return_error", "-quiet", "-no_ign_eof", version];
      await using program = Program.start("openssl", args);
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
}, "socat");
