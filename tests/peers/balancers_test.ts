/** Real balancers in front of a server that believes them: HAProxy and nginx, and their health checks. */

import { assert, assertEquals, assertMatch } from "../../deps.ts";
import { type ProxyHeader, proxyHeaderOf, proxyProtocol, sendProxyHeader } from "../../extras/proxy_protocol.ts";
import { tlsClient, TlsServer } from "../../extras/tls.ts";
import {
  connect,
  formatAddress,
  perHost,
  type ServerOptions,
  type SocketStream,
  StreamRequestHandler,
  TcpServer,
  UnixServer,
} from "../../mod.ts";
import { type Balancer, type ClaimPort, startHaproxy, startNginx } from "./balancers.ts";
import { withCertificates } from "../certificates.ts";
import { Peer } from "../programs.ts";
import { peerTest, printedBy, until } from "../testing.ts";

const FROM_LOOPBACK: ServerOptions = { filters: [proxyProtocol({ from: ["127.0.0.1"] })] };

/** Keeps the headers, says who the client is, and then sends back what comes. */
class Namer extends StreamRequestHandler {
  static headers: (ProxyHeader | undefined)[] = [];

  override async handle() {
    Namer.headers.push(proxyHeaderOf(this.request));
    await this.request.send(`${formatAddress(this.clientAddress)} at ${formatAddress(this.request.localAddress)}\n`);
    for await (const data of this.request) await this.request.send(data);
  }
}

/** Serves until `test` is over, which nothing may be printed in. */
async function serving(
  test: (server: TcpServer, port: number) => Promise<void>,
  options: ServerOptions = FROM_LOOPBACK,
): Promise<void> {
  Namer.headers = [];
  const printed = await printedBy(async () => {
    await using server = new TcpServer({ port: 0 }, Namer, options);
    const { port } = server.listen();
    server.serveForever();
    await test(server, port);
  });
  assertEquals(printed, []);
}

/** A configuration of HAProxy that relays from `bind` to `server`. */
function relay(bind: string, server: string, more = ""): string {
  return `
defaults
  mode tcp
  timeout connect 5s
  timeout client 30s
  timeout server 30s
listen relay
  bind ${bind}
  server one ${server}
  ${more}
`;
}

/** What to install for the balancer that a name begins with. */
function programsOf(what: string): string[] {
  return [what.startsWith("nginx") ? "nginx" : "haproxy"];
}

type Start = (folder: string, port: number) => Promise<Balancer>;

function haproxyWith(options: string): Start {
  return (folder, port) =>
    startHaproxy(folder, (claim) => relay(`127.0.0.1:${claim("front")}`, `127.0.0.1:${port} ${options}`));
}

function nginxConfig(port: number): (claim: ClaimPort) => string {
  return (claim) =>
    `stream { server { listen 127.0.0.1:${claim("front")}; proxy_pass 127.0.0.1:${port}; proxy_protocol on; } }`;
}

const BALANCERS: [string, 1 | 2, Start][] = [
  ["HAProxy's send-proxy", 1, haproxyWith("send-proxy")],
  ["HAProxy's send-proxy-v2", 2, haproxyWith("send-proxy-v2")],
  ["nginx's proxy_protocol on", 1, (folder, port) => startNginx(folder, nginxConfig(port))],
];

for (const [what, version, start] of BALANCERS) {
  peerTest(programsOf(what), `${what} names the client, and its bytes pass`, async (folder) => {
    await serving(async (server, port) => {
      await using balancer = await start(folder, port);
      const front = balancer.port("front");
      using peer = await Peer.connect(front);
      await peer.send("hello\n");
      const name = `127.0.0.1:${peer.port} at 127.0.0.1:${front}\n`;
      assertEquals(await peer.receive("hello\n"), `${name}hello\n`);
      assertEquals(Namer.headers.map((header) => header?.version), [version]);
      assertEquals(server.openConnections.map(({ clientAddress }) => formatAddress(clientAddress)), [
        `127.0.0.1:${peer.port}`,
      ]);
      const megabyte = "x".repeat(1_000_000) + "\n";
      const [, echo] = await Promise.all([peer.send(megabyte), peer.receive("\n")]);
      assertEquals(echo.length, megabyte.length);
    });
  });

  peerTest(programsOf(what), `behind ${what} many clients come at once, each with its own name`, async (folder) => {
    await serving(async (server, port) => {
      await using balancer = await start(folder, port);
      const talk = async () => {
        using peer = await Peer.connect(balancer.port("front"));
        await peer.send("hello\n");
        const [name] = (await peer.receive("hello\n")).split(" ");
        assertEquals(name, `127.0.0.1:${peer.port}`);
      };
      await Promise.all(Array.from({ length: 100 }, talk));
      await until(() => server.stats.active === 0);
      assertEquals([server.stats.handshakeFailures, server.stats.lost, server.stats.errors], [0, 0, 0]);
    });
  });
}

peerTest(["haproxy"], "HAProxy tells what else it knows, a unique id, and its checksum is right", async (folder) => {
  await serving(async (_server, port) => {
    const options = "send-proxy-v2 proxy-v2-options crc32c,unique-id";
    await using haproxy = await startHaproxy(
      folder,
      (claim) =>
        relay(`127.0.0.1:${claim("front")}`, `127.0.0.1:${port} ${options}`, "unique-id-format connection-%cp"),
    );
    using peer = await Peer.connect(haproxy.port("front"));
    assertMatch(await peer.receive("\n"), /^127/);
    const [header] = Namer.headers;
    assertEquals(new TextDecoder().decode(header?.uniqueId), `connection-${peer.port}`);
  });
});

peerTest(["haproxy"], "HAProxy tells of the TLS that it ends: send-proxy-v2-ssl-cn", async (folder) => {
  await withCertificates(async ({ ca, server: { cert, key }, alice }) => {
    const pem = `${folder}/front.pem`;
    await Deno.writeTextFile(pem, cert + key);
    await serving(async (_server, port) => {
      const options = "send-proxy-v2-ssl-cn proxy-v2-options ssl-cipher,cert-key,cert-sig,authority";
      await using haproxy = await startHaproxy(folder, (claim) =>
        relay(
          `127.0.0.1:${claim("front")} ssl crt ${pem} ca-file ${ca.certFile} verify optional alpn echo`,
          `127.0.0.1:${port} ${options}`,
        ));
      const tls = { caCerts: [ca.cert], serverName: "localhost", alpnProtocols: ["echo"] };
      const talk = async (own: { cert?: string; key?: string }) => {
        const filters = [tlsClient({ ...tls, ...own })];
        await using stream = await connect({ port: haproxy.port("front"), filters });
        assertMatch(await stream.readLine() ?? "", /^127/);
      };
      await talk({ cert: alice.cert, key: alice.key });
      await talk({});
      const [known, stranger] = Namer.headers;
      assertEquals(known?.authority, "localhost");
      assertEquals(known?.alpnProtocol, "echo");
      const { cipher, protocol, tlvs: _, ...flags } = known?.tls ?? {};
      assertEquals(flags, { isTls: true, isVerified: true, commonName: "alice" });
      assertMatch(`${protocol} ${cipher}`, /^TLSv1\.\d TLS_\w+$/);
      // HAProxy says 0, which is "verified", of who has shown nothing.
      const { isTls, isVerified, commonName } = stranger?.tls ?? {};
      assertEquals([isTls, isVerified, commonName], [true, false, undefined]);
    });
  });
});

peerTest(["haproxy"], "TLS passes through HAProxy behind its header", async (folder) => {
  await withCertificates(async ({ ca, server: { cert, key } }) => {
    await using server = new TlsServer({ port: 0, cert, key }, Namer, FROM_LOOPBACK);
    const { port } = server.listen();
    server.serveForever();
    await using haproxy = await haproxyWith("send-proxy-v2")(folder, port);
    await using stream = await connect({ port: haproxy.port("front"), tls: { caCerts: [ca.cert] } });
    assertEquals(
      await stream.readLine(),
      `${formatAddress(stream.localAddress)} at 127.0.0.1:${haproxy.port("front")}`,
    );
    await stream.send("hello\n");
    assertEquals(await stream.readLine(), "hello");
    assertEquals(server.stats.handshakeFailures, 0);
  });
});

peerTest(["haproxy"], "HAProxy talks to a Unix socket, too", async (folder) => {
  const path = `${folder}/app.sock`;
  await using server = new UnixServer({ path }, Namer, { filters: [proxyProtocol({ from: ["unix"] })] });
  await server.listen();
  server.serveForever();
  await using haproxy = await startHaproxy(
    folder,
    (claim) => relay(`127.0.0.1:${claim("front")}`, `unix@${path} send-proxy-v2`),
  );
  using peer = await Peer.connect(haproxy.port("front"));
  assertEquals(await peer.receive("\n"), `127.0.0.1:${peer.port} at 127.0.0.1:${haproxy.port("front")}\n`);
});

/** What HAProxy's checks do, and where they are counted. */
const CHECKS: [string, string, "accepted" | "lost"][] = [
  ["send LOCAL", "send-proxy-v2 check inter 20ms", "accepted"],
  ["name themselves", "send-proxy check inter 20ms", "accepted"],
  ["connect and leave", "send-proxy-v2 no-check-send-proxy check inter 20ms", "lost"],
];

for (const [what, options, counter] of CHECKS) {
  peerTest(["haproxy"], `HAProxy's health checks that ${what} disturb nobody and leave no noise`, async (folder) => {
    await serving(async (server, port) => {
      await using haproxy = await haproxyWith(options)(folder, port);
      using peer = await Peer.connect(haproxy.port("front"));
      await peer.send("hello\n");
      assertMatch(await peer.receive("hello\n"), new RegExp(`^127\\.0\\.0\\.1:${peer.port} `));
      const before = server.stats[counter];
      await until(() => server.stats[counter] >= before + 3);
      await peer.send("still here\n");
      assertEquals(await peer.receive("\n"), "still here\n");
      assertEquals([server.stats.errors, server.stats.handshakeFailures], [0, 0]);
      assert(!/DOWN/.test(haproxy.log), haproxy.log);
    });
  });
}

peerTest(["haproxy"], "a handler can tell a health check from a client", async (folder) => {
  class Counting extends StreamRequestHandler {
    static checks = 0;

    override handle() {
      if (proxyHeaderOf(this.request)?.command === "LOCAL") Counting.checks++;
    }
  }
  await using server = new TcpServer({ port: 0 }, Counting, FROM_LOOPBACK);
  const { port } = server.listen();
  server.serveForever();
  await using _haproxy = await haproxyWith("send-proxy-v2 check inter 20ms")(folder, port);
  await until(() => Counting.checks >= 2);
});

/** Balancers that read a header of ours and send one of theirs. */
const CHAINS: [string, Start][] = [
  [
    "HAProxy",
    (folder, port) =>
      startHaproxy(
        folder,
        (claim) => relay(`127.0.0.1:${claim("front")} accept-proxy`, `127.0.0.1:${port} send-proxy-v2`),
      ),
  ],
  ["nginx", (folder, port) =>
    startNginx(folder, (claim) => {
      const listen = `listen 127.0.0.1:${claim("front")} proxy_protocol; set_real_ip_from 127.0.0.1;`;
      return `stream { server { ${listen} proxy_pass 127.0.0.1:${port}; proxy_protocol on; } }`;
    })],
];

/**
 * Clients and where they went. nginx, told of an IPv6 client on an IPv4 port, writes "TCP6" with its own IPv4 address
 * behind the client's, which clause 2.1 forbids and no reader takes; so it is told of IPv4 only.
 */
const ROUTES: Record<string, [string, string][]> = {
  HAProxy: [["203.0.113.7", "198.51.100.2"], ["2001:db8::7", "2001:db8::2"], ["203.0.113.7", "2001:db8::2"]],
  nginx: [["203.0.113.7", "198.51.100.2"]],
};

for (const [what, start] of CHAINS) {
  peerTest(programsOf(what), `${what} believes what sendProxyHeader() sends, of both versions`, async (folder) => {
    await serving(async (_server, port) => {
      await using balancer = await start(folder, port);
      for (const [from, to] of ROUTES[what] ?? []) {
        const source = { transport: "tcp", hostname: from, port: 50_000 } as const;
        const destination = { transport: "tcp", hostname: to, port: 443 } as const;
        const more = { tlvs: [{ type: 0x02, value: new TextEncoder().encode("example.org") }] }; // Its authority.
        for (const header of [{ version: 1 as const }, {}, more]) {
          const filters = [sendProxyHeader({ ...header, source, destination })];
          await using stream = await connect({ port: balancer.port("front"), filters });
          const [name] = (await stream.readLine() ?? "").split(" ");
          assertEquals(name, formatAddress(source)); // Which writes an IPv4 client among IPv6 addresses as such.
        }
      }
    });
  });
}

peerTest(["haproxy"], "perHost counts the clients behind HAProxy", async (folder) => {
  await serving(async (server, port) => {
    await using haproxy = await haproxyWith("send-proxy-v2")(folder, port);
    const dial = (): Promise<SocketStream> => connect({ port: haproxy.port("front") });
    await using first = await dial();
    assertMatch(await first.readLine() ?? "", /^127/);
    await using second = await dial();
    assertEquals(await second.readLine().catch(() => null), null);
    assertEquals(server.stats.refused, 1);
  }, { filters: [...FROM_LOOPBACK.filters ?? [], perHost(1)] });
});
