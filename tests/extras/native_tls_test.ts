/** NativeTlsServer: the runtime's own TLS. */

import { assert, assertEquals, assertMatch, assertThrows } from "../../deps.ts";
import { connect, perHost } from "../../mod.ts";
import { NativeTlsServer, tlsSessionOf } from "../../extras/tls.ts";
import { pattern } from "../fake_conn.ts";
import { freePort, Peer, Program } from "../programs.ts";
import { Echo, listenAgain, rejectionOf, until } from "../testing.ts";
import { dial, pythonClient, QuietNativeServer, servingNatively, tlsTest, Watched } from "./tls_peers.ts";

tlsTest("a native server serves the runtime's clients and those of the filter", async (certificates) => {
  Watched.forget();
  await servingNatively(certificates, Watched, async (server, port) => {
    const caCerts = [certificates.ca.cert];
    const dials = [connect({ port, tls: { caCerts, serverName: "localhost" } }), dial(certificates, port)];
    for (const dialled of dials) {
      await using client = await dialled;
      const data = pattern(1_000_000);
      const sent = client.send(data);
      assertEquals(await client.readExactly(data.length), data);
      await sent;
      await client.closeWrite();
      assertEquals(await client.readLine(), "goodbye");
      assertEquals(await client.readLine(), null);
    }
    await until(() => server.stats.active === 0);
    assertEquals([server.stats.accepted, server.stats.errors, Watched.ends], [2, 0, ["ended", "ended"]]);
    assertEquals(Watched.seen.map(tlsSessionOf), [undefined, undefined]);
  });
});

tlsTest("an end without a close_notify is an end, and can be answered", async (certificates) => {
  Watched.forget();
  await servingNatively(certificates, Watched, async (server, port) => {
    const python = `${pythonClient(port)}
tls.sendall(b"hello")
print(tls.recv(5).decode())
half = socket.socket(fileno=tls.fileno()); half.shutdown(socket.SHUT_WR); half.detach()
rest = b""
while not rest.endswith(b"\\n"): rest += tls.recv(100)
print(rest.decode(), end="")`;
    await using program = Program.start("python3", ["-c", python]);
    const { stdout, stderr } = await program.ended();
    assertEquals([stdout, stderr], ["hello\ngoodbye\n", ""]);
    await until(() => server.stats.active === 0);
    assertEquals([Watched.ends, server.errors.length], [["ended"], 0]);
  });
}, "python3");

tlsTest(
  "peers that stall, speak HTTP, leave or distrust it hold nobody up and are told apart",
  async (certificates) => {
    await servingNatively(certificates, Echo, async (server, port) => {
      using _stalled = await Peer.connect(port);
      using http = await Peer.connect(port);
      await http.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
      await until(() => server.errors.length === 1);
      (await Peer.connect(port))[Symbol.dispose]();
      await until(() => server.errors.length === 2);
      await rejectionOf(connect({ port, tls: true }));
      await until(() => server.errors.length === 3);
      await using honest = await dial(certificates, port);
      await honest.send("hello\n");
      assertEquals(await honest.readLine(), "hello");
      await until(() => server.errors.length === 4);
      const names = server.errors.map(({ name }) => name);
      assertEquals(names, ["InvalidData", "ConnectionReset", "InvalidData", "TimedOut"]);
      const [plain, gone, distrusted, late] = server.errors.map(({ message }) => message);
      assertMatch(
        plain ?? "",
        /^Cannot begin TLS: the peer does not speak TLS \(.*\); check/,
      );
      assertMatch(gone ?? "", /^Cannot begin TLS: the peer has closed the connection \(.*\)$/);
      assertMatch(
        distrusted ?? "",
        /^Cannot begin TLS: the peer does not accept this side's certificate \(.*UnknownCA\)$/,
      );
      assertMatch(late ?? "", /500 ms/);
      assertEquals([server.stats.handshakeFailures, server.stats.errors], [4, 0]);
    }, { handshakeTimeout: 500 });
  },
);

tlsTest("filters of a native server run behind its handshake", async (certificates) => {
  await servingNatively(certificates, Echo, async (server, port) => {
    using _stalled = await Peer.connect(port);
    await using client = await dial(certificates, port);
    await client.send("hello\n");
    assertEquals(await client.readLine(), "hello");
    await using other = await dial(certificates, port);
    assertEquals(await other.recv(), null);
    assertEquals([server.stats.refused, server.stats.handshakeFailures], [1, 0]);
  }, { filters: [perHost(1)] });
});

tlsTest("a native server listens once, says where, and gives the port back", async ({ server: { cert, key } }) => {
  const port = await freePort();
  const server = new NativeTlsServer({ port, cert, key }, Echo);
  const address = server.listen();
  assertEquals([address.port, server.listen(), server.address], [port, address, address]);
  const other = new NativeTlsServer({ port, cert, key }, Echo);
  assertThrows(() => other.listen(), Deno.errors.AddrInUse);
  await server.shutdown();
  await listenAgain(() => other.listen());
  await other.shutdown();
  assertThrows(() => server.listen(), TypeError);
});

tlsTest("a shutdown of a native server ends a client that waits, and cuts a handshake", async (certificates) => {
  const { cert, key } = certificates.server;
  const server = new QuietNativeServer({ port: 0, cert, key }, Echo, { handshakeTimeout: 60_000 });
  const { port } = server.listen();
  const over = server.serveForever();
  await using client = await dial(certificates, port);
  await client.send("hello\n");
  assertEquals(await client.readLine(), "hello");
  using _stalled = await Peer.connect(port);
  await until(() => server.stats.active === 2);
  const { finished, cut } = await server.shutdown();
  await over;
  assertEquals(await client.recv(), null);
  assertEquals([finished, cut.length, server.stats.handshakeFailures], [1, 1, 0]);
  assert(server.errors.length === 0, `${server.errors}`);
});

tlsTest(
  "what keeps a native server from listening is said as a TcpServer says it",
  async ({ server: { cert, key } }) => {
    await using first = new NativeTlsServer({ port: 0, cert, key }, Echo);
    const { port } = first.listen();
    const second = new NativeTlsServer({ port, cert, key }, Echo);
    assertThrows(() => second.listen(), (error) => {
      assert(error instanceof Deno.errors.AddrInUse);
      assertMatch(error.message, new RegExp(`^Cannot listen on 127\\.0\\.0\\.1:${port}: `));
      return true;
    });
  },
);

tlsTest("reusePort of a native server without --unstable-net is one sentence", async ({ server: { cert, key } }) => {
  const extra = new URL("../../extras/tls.ts", import.meta.url);
  const program = `
import { NativeTlsServer } from ${JSON.stringify(extra)};
const [cert, key] = ${JSON.stringify([cert, key])};
const server = new NativeTlsServer({ port: 0, cert, key, reusePort: true }, class { handle() {} });
try {
  server.listen();
} catch (error) {
  console.log(error.name, error.message);
}
console.log("goes on");`;
  const folder = await Deno.makeTempDir({ prefix: "socketserver-" });
  try {
    await Deno.writeTextFile(`${folder}/program.js`, program);
    const args = ["run", "--no-config", "--allow-net=127.0.0.1", `${folder}/program.js`];
    await using running = Program.start(Deno.execPath(), args);
    const { code, stdout, stderr } = await running.ended();
    assertMatch(stdout, /^TypeError Cannot listen with reusePort: .*--unstable-net\ngoes on\n$/);
    assertEquals([code, stderr], [0, ""]);
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
});
