/** Certificates: what can serve, what is refused and why, who is trusted, and why handshakes fail. */

import { assert, assertEquals, assertMatch, assertRejects, assertThrows } from "../../deps.ts";
import { connect, socketPair, type SocketStream, type StreamConn } from "../../mod.ts";
import { NativeTlsServer, tls, tlsClient, type TlsClientOptions, TlsServer, tlsSessionOf } from "../../extras/tls.ts";
import type { TlsCertificate, TlsServerAddress } from "../../extras/tls.ts";
import { type Certificates, openssl, selfSigned } from "../certificates.ts";
import { Peer, Program } from "../programs.ts";
import { Echo, printedBy, rejectionOf, until } from "../testing.ts";
import { dial, serving, tlsTest, Who } from "./tls_peers.ts";

// What can serve

/** The forms of a certificate and its key that Python and OpenSSL take. */
async function readableForms({ server }: Certificates): Promise<Record<string, TlsCertificate>> {
  const { cert, key, certFile, keyFile } = server;
  const both = `${key}\n${cert}`;
  const trusted = await openssl("x509", "-in", certFile, "-trustout", "-addtrust", "serverAuth", "-setalias", "me");
  const own = async (...args: string[]) => await selfSigned(certFile.replace(/[^/]*$/, ""), await openssl(...args));
  return {
    "as they are": { cert, key },
    "a key in front of its certificate in one file": { cert: both, key: both },
    "a certificate in front of its key in one file": { cert: cert + key, key: cert + key },
    "a TRUSTED CERTIFICATE": { cert: trusted, key },
    "an X509 CERTIFICATE": { cert: cert.replaceAll("CERTIFICATE", "X509 CERTIFICATE"), key },
    "text in front of each": {
      cert: await openssl("x509", "-in", certFile, "-text"),
      key: await openssl("pkey", "-in", keyFile, "-text"),
    },
    "line ends of Windows": { cert: cert.replaceAll("\n", "\r\n"), key: key.replaceAll("\n", "\r\n") },
    "a SEC1 key": { cert, key: await openssl("ec", "-in", keyFile) },
    "a key behind its EC PARAMETERS": await own("ecparam", "-name", "secp384r1", "-genkey"),
    "P-521": await own("ecparam", "-name", "secp521r1", "-genkey", "-noout"),
    "a PKCS #1 key": await own("genrsa", "-traditional", "2048"),
    "a PKCS #8 RSA key": await own("genrsa", "2048"),
    "Ed25519": await own("genpkey", "-algorithm", "ed25519"),
  };
}

tlsTest("whatever form of a certificate Python takes serves, also natively", async (certificates) => {
  for (const [form, certificate] of Object.entries(await readableForms(certificates))) {
    const context = `${form}:`;
    for (const Server of [TlsServer, NativeTlsServer]) {
      await using server = new Server({ port: 0, ...certificate }, Echo);
      const { port } = server.listen();
      server.serveForever();
      const caCerts = [certificates.ca.cert, certificate.cert];
      await using client = await connect({ port, filters: [tlsClient({ caCerts })] });
      await client.send("hello\n");
      assertEquals([context, await client.readLine()], [context, "hello"]);
    }
  }
});

/** What cannot serve, and the sentence that says why. */
async function unusableForms({ server, renewed, ca }: Certificates): Promise<[Partial<TlsCertificate>, RegExp][]> {
  const { cert, key, certFile, keyFile } = server;
  const own = async (...args: string[]) => await selfSigned(certFile.replace(/[^/]*$/, ""), await openssl(...args));
  const damaged = cert.replace(/\n.{20}/, "\n@@@@@@@@@@@@@@@@@@@@");
  return [
    [{ cert: "nonsense" }, /^cert holds no certificate in PEM form; [^.]*$/],
    [{ cert: key }, /^cert holds no certificate in PEM form; [^.]*$/],
    [{ cert: damaged }, /^cert holds a damaged certificate; export it again \(.+\)$/],
    [{ key: "nonsense" }, /^key holds no private key in PEM form; [^.]*$/],
    [{ key: cert }, /^key holds no private key in PEM form; [^.]*$/],
    [{ key: key.replace(/\n.{20}/, "\n@@@@@@@@@@@@@@@@@@@@") }, /^key holds a damaged private key; export it again/],
    [{ key: renewed.key }, /^key is not the key of cert; [^.]*$/],
    [{ cert: ca.cert + cert }, /^cert begins with another certificate than key's; put the server's own first$/],
    [{ key: await openssl("pkey", "-in", keyFile, "-aes256", "-passout", "pass:x") }, /^key is encrypted; decrypt it/],
    [{ key: await openssl("ec", "-in", keyFile, "-aes256", "-passout", "pass:x") }, /^key is encrypted; decrypt it/],
    [await own("genrsa", "1024"), /^key is of a kind that the runtime's TLS does not take; .*key too small\)$/],
    [await own("ecparam", "-name", "secp256k1", "-genkey"), /^key is of a kind that the runtime's TLS does not take; /],
  ];
}

tlsTest("a certificate that cannot serve is refused at once, with the reason", async (certificates) => {
  const { cert, key } = certificates.server;
  const filter = tls({ cert, key });
  for (const [part, sentence] of await unusableForms(certificates)) {
    const certificate = { cert, key, ...part };
    const makers = [
      () => tls(certificate),
      () => tlsClient(certificate),
      () => new TlsServer({ port: 0, ...certificate }, Echo),
      () => new NativeTlsServer({ port: 0, ...certificate }, Echo),
      () => filter.setCertificate(certificate),
    ];
    for (const make of makers) {
      const error = await rejectionOf(Promise.try(make));
      assert(error instanceof Deno.errors.InvalidData, `${error}`);
      assertMatch(error.message, sentence);
    }
  }
});

tlsTest("options that cannot be meant are refused at once", async ({ server: { cert, key }, ca, alice }) => {
  const misspelt = { ...{ cert, key }, ...{ clientCA: ca.cert } };
  const mistakes: [() => unknown, RegExp][] = [
    [() => tls({ cert, key, clientCa: "nonsense" }), /^InvalidData: clientCa holds no certificate/],
    [() => tls({ cert, key, clientCa: [] }), /^InvalidData: clientCa holds no certificate/],
    [() => tls({ cert, key, clientCa: [ca.cert, "nonsense"] }), /^InvalidData: clientCa holds no certificate/],
    [() => tlsClient({ caCerts: [] }), /^InvalidData: caCerts holds no certificate/],
    [() => tlsClient({ cert: alice.cert }), /^InvalidData: key holds no private key/],
    [() => tlsClient({ key: alice.key }), /^InvalidData: cert holds no certificate/],
    [() => tls(misspelt), /^TypeError: tls\(\) has no option "clientCA"; it has cert, key, clientCa, alpnProtocols$/],
    [() => tlsClient({ ...{ serverName: "localhost" }, ...{ ca: ca.cert } }), /^TypeError: .* no option "ca"/],
    [() => new TlsServer({ port: 0, ...misspelt }, Echo), /^TypeError: .*"clientCA"/],
  ];
  for (const [make, sentence] of mistakes) assertMatch(`${await rejectionOf(Promise.try(make))}`, sentence);
  const [ours, theirs] = socketPair();
  const nameless = await rejectionOf(ours.upgrade(tlsClient()));
  assertEquals(`${nameless}`, "TypeError: Cannot begin TLS: set serverName to the name that the certificate must have");
  theirs.close();
});

// Servers' certificates

tlsTest("a client trusts nobody that it was not told to trust", async (certificates) => {
  const { rogue, forged, versionOne, server, ca, expired } = certificates;
  const refusals: [Partial<TlsServerAddress>, TlsClientOptions, RegExp, string][] = [
    [
      {},
      {},
      /from no trusted authority, or not for this purpose \(.+\); add its authority to caCerts or clientCa$/,
      "UNABLE",
    ],
    [{}, { caCerts: [rogue.cert] }, /from no trusted authority/, "UNABLE_TO_VERIFY_LEAF_SIGNATURE"],
    [{}, { caCerts: [ca.cert], serverName: "example.org" }, /is for another name \(.+\); set/, "ERR_TLS_CERT_ALTNAME"],
    [expired, { caCerts: [ca.cert] }, /the peer's certificate has expired \(.+\); renew it$/, "CERT_HAS_EXPIRED"],
    // The runtime's own check accepts these two (2.9.6).
    [forged, { caCerts: [ca.cert], serverName: "localhost" }, /is not valid, or from no trusted authority$/, ""],
    [versionOne, { caCerts: [ca.cert], serverName: "localhost" }, /is not valid, or from no trusted authority$/, ""],
  ];
  for (const [{ cert = server.cert, key = server.key }, options, sentence, code] of refusals) {
    await serving(certificates, Echo, async (_server, port) => {
      const error = await rejectionOf(connect({ port, filters: [tlsClient(options)] }));
      assert(error instanceof Deno.errors.InvalidData, `${error}`);
      assertMatch(error.message, sentence);
      assertMatch(error.message, /^Cannot connect to 127\.0\.0\.1:\d+: cannot begin TLS: [^\n]*[^.]$/);
      assertMatch("code" in error ? `${error.code}` : "", new RegExp(`^${code}`));
    }, { address: { cert, key } });
  }
});

tlsTest(
  "the name to check is the host that connect() was asked for, without the brackets of IPv6",
  async (certificates) => {
    await serving(certificates, Echo, async (_server, port) => {
      await using client = await dial(certificates, port, {}, "[::1]");
      assertMatch(tlsSessionOf(client)?.peerCertificate?.altNames ?? "", /^DNS:localhost, IP Address:127.0.0.1, IP /);
      assertEquals(tlsSessionOf(client)?.serverName, undefined);
    }, { address: { hostname: "::1" } });
  },
);

tlsTest("a certificate from an intermediate authority is trusted if the chain is sent", async (certificates) => {
  const { intermediate, chained, ca } = certificates;
  for (const isSent of [true, false]) {
    await serving(certificates, Echo, async (_server, port) => {
      const dialled = dial(certificates, port, { caCerts: [ca.cert] });
      if (!isSent) return assertMatch((await rejectionOf(dialled)).message, /from no trusted authority/);
      await using client = await dialled;
      assertEquals(tlsSessionOf(client)?.peerCertificate?.commonName, "chained");
    }, { address: { cert: chained.cert + (isSent ? intermediate.cert : ""), key: chained.key } });
  }
});

tlsTest("a new certificate is for later connections, and drops none", async (certificates) => {
  const nameOf = (client: SocketStream) => tlsSessionOf(client)?.peerCertificate?.commonName;
  await serving(certificates, Echo, async (server, port) => {
    await using before = await dial(certificates, port);
    server.setCertificate(certificates.renewed);
    await using after = await dial(certificates, port);
    assertEquals([nameOf(before), nameOf(after)], ["server", "renewed"]);
    for (const client of [before, after]) {
      await client.send("hello\n");
      assertEquals(await client.readLine(), "hello");
    }
    const { cert } = certificates.server;
    assertThrows(() => server.setCertificate({ cert, key: certificates.renewed.key }), Deno.errors.InvalidData);
    await using last = await dial(certificates, port);
    assertEquals(nameOf(last), "renewed");
  });
});

// Client certificates

tlsTest(
  "a client without a valid certificate never reaches a handler, and the server says why",
  async (certificates) => {
    const { alice, rogue, expired, serverOnly, ca } = certificates;
    Who.handlers = 0;
    await serving(certificates, Who, async (server, port) => {
      await using client = await dial(certificates, port, { cert: alice.cert, key: alice.key });
      assertEquals(await client.readLine(), "alice");
      const refused: [TlsClientOptions, RegExp][] = [
        [{}, /^Cannot begin TLS: the client has no certificate \(.+\); give it one from an authority of clientCa$/],
        [
          rogue,
          /^Cannot begin TLS: the peer's certificate is from no trusted authority, or .* \(.+\); add its authority/,
        ],
        [expired, /^Cannot begin TLS: the peer's certificate has expired \(.+\); renew it$/],
        [serverOnly, /^Cannot begin TLS: the peer's certificate is from .*, or not for this purpose/],
      ];
      for (const [{ cert, key }, sentence] of [...refused, ...refused]) {
        const known = server.errors.length;
        const stream = dial(certificates, port, cert && key ? { cert, key } : {});
        const answer = await stream.then((stream) => stream.readLine()).catch(() => "refused");
        assertMatch(String(answer), /^(refused|null)$/);
        (await stream.catch(() => undefined))?.close();
        await until(() => server.errors.length > known);
        const error = server.errors.at(-1);
        assert(error instanceof Deno.errors.InvalidData, `${error}`);
        assertMatch(error.message, sentence);
      }
      assertEquals([Who.handlers, server.stats.errors, server.stats.handshakeFailures], [1, 0, 8]);
    }, { address: { clientCa: ca.cert } });
  },
);

/** Clients whose certificate is refused, by what is wrong with it. */
const REFUSED = { "from another authority": "rogue", "for servers only": "serverOnly" } as const;

for (const version of ["-tls1_2", "-tls1_3"]) {
  for (const [wrong, name] of Object.entries(REFUSED)) {
    tlsTest(
      `a session that is resumed (${version}) does not let a certificate in that is ${wrong}`,
      async (certificates) => {
        const { ca, alice, [name]: refused } = certificates;
        const run = async (port: number, ...args: string[]): Promise<string> => {
          const where = ["s_client", "-connect", `127.0.0.1:${port}`, "-CAfile", ca.certFile, version, ...args];
          await using program = Program.start("openssl", where);
          return (await program.ended()).stdout;
        };
        const session = `${refused.certFile}.session`;
        Who.handlers = 0;
        await serving(certificates, Who, async (_strict, port) => {
          await run(port, "-cert", refused.certFile, "-key", refused.keyFile, "-sess_out", session);
          await run(port, "-sess_in", session);
          assertEquals(Who.handlers, 0);
          await serving(certificates, Who, async (_plain, plainPort) => {
            assertMatch(await run(plainPort, "-sess_out", session), /undefined\n/);
          });
          await run(port, "-sess_in", session);
          assertEquals(Who.handlers, 1); // That of the server that asks for no certificate.
          // Not everybody is turned away.
          const args = ["-cert", alice.certFile, "-key", alice.keyFile];
          assertMatch(await run(port, ...args, "-sess_out", session), /alice\n/);
          assertMatch(await run(port, ...args, "-sess_in", session), /alice\n/);
        }, { address: { clientCa: [ca.cert] } });
      },
    );
  }
}

// Why handshakes fail

/** What a client does wrong, and what the server's `handleError()` is given. */
const FAILURES: [what: string, openssl: string[], address: Partial<TlsServerAddress>, sentence: RegExp][] = [
  ["speaks an old TLS", ["-tls1_1", "-cipher", "ALL:@SECLEVEL=0"], {}, /no TLS version or cipher in common \(.+\)$/],
  [
    "offers other protocols",
    ["-alpn", "http/1.1"],
    { alpnProtocols: ["echo/1"] },
    /no ALPN protocol in common \(.+\)$/,
  ],
  ["distrusts the server", ["-verify_return_error"], {}, /does not accept this side's certificate \(.*UnknownCA\)$/],
];

for (const [what, args, address, sentence] of FAILURES) {
  tlsTest(`a client that ${what} is told why by an alert, and so is the server`, async (certificates) => {
    await serving(certificates, Echo, async (server, port) => {
      await using program = Program.start("openssl", ["s_client", "-connect", `127.0.0.1:${port}`, ...args]);
      const { stderr } = await program.ended();
      if (what !== "distrusts the server") assertMatch(stderr, /alert (handshake failure|no application protocol)/);
      await until(() => server.errors.length === 1);
      const [error] = server.errors;
      assert(error instanceof Deno.errors.InvalidData && "code" in error, `${error}`);
      assertMatch(error.message, sentence);
      assertMatch(error.message, /^Cannot begin TLS: [^\n]*$/);
    }, { address });
  });
}

/** A filter whose writes begin in the next turn of the event loop. */
function slowToWrite(conn: StreamConn): StreamConn {
  const { localAddr, remoteAddr } = conn;
  return {
    ...{ under: conn, localAddr, remoteAddr },
    read: (into) => conn.read(into),
    write: async (data) => {
      await new Promise<void>((resolve) => setImmediate(resolve));
      return await conn.write(data);
    },
    closeWrite: () => conn.closeWrite(),
    close: () => conn.close(),
  };
}

tlsTest("an alert reaches its client also through a filter that takes a moment to write", async (certificates) => {
  await serving(certificates, Echo, async (_server, port) => {
    const args = ["s_client", "-connect", `127.0.0.1:${port}`, "-alpn", "http/1.1"];
    await using program = Program.start("openssl", args);
    assertMatch((await program.ended()).stderr, /alert no application protocol/);
  }, { address: { alpnProtocols: ["echo/1"] }, filters: [slowToWrite] });
});

tlsTest("a client tells a server that it distrusts why, by an alert", async (certificates) => {
  await serving(certificates, Echo, async (server, port) => {
    await rejectionOf(connect({ port, filters: [tlsClient()] }));
    await until(() => server.errors.length === 1);
    assertMatch(server.errors[0]?.message ?? "", /does not accept this side's certificate \(received fatal alert: /);
  });
});

tlsTest("a client that offers none of the server's protocols is served", async (certificates) => {
  await serving(certificates, Echo, async (server, port) => {
    const error = await rejectionOf(dial(certificates, port, { alpnProtocols: ["http/1.1"] }));
    assert(error instanceof Deno.errors.InvalidData);
    assertMatch(error.message, /no ALPN protocol in common/);
    await until(() => server.stats.handshakeFailures === 1);
    await using client = await dial(certificates, port); // It asks for none.
    assertEquals(tlsSessionOf(client)?.alpnProtocol, undefined);
  }, { address: { alpnProtocols: ["echo/1"] } });
});

tlsTest("a client that speaks plain HTTP, leaves or stalls is told apart", async (certificates) => {
  await serving(certificates, Echo, async (server, port) => {
    using http = await Peer.connect(port);
    await http.send("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n");
    await until(() => server.errors.length === 1);
    (await Peer.connect(port))[Symbol.dispose]();
    await until(() => server.errors.length === 2);
    using _stalled = await Peer.connect(port);
    await until(() => server.errors.length === 3);
    const seen = server.errors.map((error) => [error.name, "code" in error && error.code, error.message]);
    assertEquals(seen.map(([name]) => name), ["InvalidData", "ConnectionReset", "TimedOut"]);
    assertEquals(seen.map(([, code]) => code), ["ERR_SSL_WRONG_VERSION_NUMBER", "ECONNRESET", false]);
    assertMatch(
      `${seen[0]?.[2]}`,
      /^Cannot begin TLS: the peer does not speak TLS \(rec/,
    );
    assertEquals(seen[1]?.[2], "Cannot begin TLS: the peer has closed the connection (unexpected end of file)");
    assertMatch(`${seen[2]?.[2]}`, /300 ms/);
  }, { handshakeTimeout: 300 });
});

tlsTest("a failed handshake is printed in one line", async (certificates) => {
  const { cert, key } = certificates.server;
  const [line] = await printedBy(async (printed) => {
    await using server = new TlsServer({ port: 0, cert, key }, Echo);
    const { port } = server.listen();
    server.serveForever();
    using peer = await Peer.connect(port);
    await peer.send("GET / HTTP/1.1\r\n\r\n");
    await until(() => printed.length === 1);
  });
  assertMatch(
    `${line?.at(-1)}`,
    /^Handshake with 127\.0\.0\.1:\d+ failed: Cannot begin TLS: the peer does not [^\n]*$/,
  );
});

tlsTest("connecting to something that is no TLS server fails with the reason", async ({ ca }) => {
  const filters = [tlsClient({ caCerts: [ca.cert] })];
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  const accepted = listener.accept();
  await assertRejects(() => connect({ port, filters, timeout: 50 }), Deno.errors.TimedOut);
  (await accepted).close();
  const greeted = listener.accept().then(async (conn) => {
    await conn.write(new TextEncoder().encode("220 mail.example.org ESMTP\r\n"));
    return conn;
  });
  const plain = await rejectionOf(connect({ port, filters, timeout: 10_000 }));
  assert(plain instanceof Deno.errors.InvalidData && /does not speak TLS/.test(plain.message), `${plain}`);
  (await greeted).close();
  const left = listener.accept().then((conn) => conn.close());
  const gone = await rejectionOf(connect({ port, filters, timeout: 10_000 }));
  assert(gone instanceof Deno.errors.ConnectionReset && /has closed the connection/.test(gone.message), `${gone}`);
  await left;
  const dialled = new AbortController();
  const last = listener.accept();
  const aborted = rejectionOf(connect({ port, filters, signal: dialled.signal }));
  const conn = await last;
  dialled.abort(new TypeError("enough"));
  assertEquals((await aborted).message, "enough");
  conn.close();
});
