/** Streams over TLS: every way of reading and writing, ends, deadlines, STARTTLS, what was negotiated. */

import { assert, assertEquals, assertMatch } from "../../deps.ts";
import { connect, IncompleteReadError, socketPair, StreamRequestHandler, TcpServer } from "../../mod.ts";
import type { ConnectionFilter, SocketStream, StreamConn } from "../../mod.ts";
import { tls, tlsClient, tlsSessionOf } from "../../extras/tls.ts";
import type { Certificates } from "../certificates.ts";
import { brokenPipe, isPending, pattern } from "../fake_conn.ts";
import { Program } from "../programs.ts";
import { Echo, rejectionOf, until } from "../testing.ts";
import { dial, pythonClient, serving, servingNatively, tlsTest, Watched } from "./tls_peers.ts";

const encode = (text: string) => new TextEncoder().encode(text);

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

tlsTest("messages of every size around those of records and arrays come back whole", async (certificates) => {
  await serving(certificates, Echo, async (_server, port) => {
    await using client = await dial(certificates, port);
    for (const size of [1, 2_047, 2_048, 2_049, 16_384, 16_385, 65_535, 65_536, 65_537, 200_000, 1, 1]) {
      await client.send(pattern(size));
      assertEquals(await client.readExactly(size), pattern(size));
    }
    for (let count = 0; count < 20; count++) { // Its array becomes small again.
      await client.send("x");
      assertEquals(await client.recv(), encode("x"));
    }
    await client.send(pattern(40_000));
    assertEquals(await client.readExactly(40_000), pattern(40_000));
  });
});

tlsTest("a hundred small messages are read into one array", async (certificates) => {
  const arrays = new Set<ArrayBufferLike>();
  /** Notes the arrays that are read into. */
  const noting: ConnectionFilter = (conn) => ({
    localAddr: conn.localAddr,
    remoteAddr: conn.remoteAddr,
    under: conn,
    read: (into) => {
      arrays.add(into.buffer);
      return conn.read(into);
    },
    write: (data) => conn.write(data),
    closeWrite: () => conn.closeWrite(),
    close: () => conn.close(),
  });
  await serving(certificates, Echo, async (_server, port) => {
    await using client = await dial(certificates, port);
    await client.send("a");
    await client.readExactly(1);
    const { size } = arrays;
    for (let count = 0; count < 100; count++) {
      await client.send("b");
      await client.readExactly(1);
    }
    assertEquals(arrays.size, size);
  }, { filters: [noting] });
});

tlsTest("every way of reading and writing works over TLS", async (certificates) => {
  await serving(certificates, Echo, async (_server, port) => {
    await using client = await dial(certificates, port);
    await client.write("one\r\n");
    await client.write("two\n");
    assertEquals(await client.readLine(), "one");
    assertEquals(await client.readLine(), "two");
    await client.send("a;b");
    assertEquals(await client.readUntil(";"), encode("a;"));
    assertEquals(await client.readExactly(1), encode("b"));
    await client.writeFrame(pattern(30_000));
    const { value } = await client.frames().next();
    assertEquals(value, pattern(30_000));
    await client.send("xyz");
    const into = new Uint8Array(2);
    assertEquals(await client.read(into), 2);
    assertEquals(await client.recv(), encode("z"));
    await client.send("lines\nof\ntext");
    await client.closeWrite();
    assertEquals(await Array.fromAsync(client.lines()), ["lines", "of", "text"]);
    assertEquals(tlsSessionOf(client)?.truncated, false);
  });
});

tlsTest("either side may end its half first and still read the other", async (certificates) => {
  class Half extends StreamRequestHandler {
    override async handle() {
      await this.request.send("first\n");
      await this.request.closeWrite();
      assertEquals(await this.request.readLine(), "second");
      assertEquals(await this.request.readLine(), null);
      assertEquals(tlsSessionOf(this.request)?.truncated, false);
    }
  }
  await serving(certificates, Half, async (server, port) => {
    await using client = await dial(certificates, port);
    assertEquals(await client.readLine(), "first");
    assertEquals(await client.readLine(), null);
    assertEquals(tlsSessionOf(client)?.truncated, false);
    await client.send("second\n");
    await client.closeWrite();
    await until(() => server.stats.active === 0);
    assertEquals(server.stats.errors, 0);
  });
});

/** The two ends of a handshake over a pair in memory; the client's encrypted bytes go through `write`. */
async function securedPair(
  { ca, server: { cert, key } }: Certificates,
  write: (data: Uint8Array, conn: StreamConn) => Promise<number>,
): Promise<[client: SocketStream, server: SocketStream]> {
  const [client, server] = socketPair();
  const { localAddr, remoteAddr } = client.under;
  const through: ConnectionFilter = (conn) => ({
    ...{ under: conn, localAddr, remoteAddr },
    read: (into) => conn.read(into),
    write: (data) => write(data, conn),
    closeWrite: () => conn.closeWrite(),
    close: () => conn.close(),
  });
  await client.upgrade(through);
  const caCerts = [ca.cert];
  await Promise.all([
    client.upgrade(tlsClient({ serverName: "localhost", caCerts })),
    server.upgrade(tls({ cert, key })),
  ]);
  return [client, server];
}

tlsTest("closeWrite() waits until the close_notify has left, which may go in parts", async (certificates) => {
  let gate = Promise.resolve();
  const [client, server] = await securedPair(certificates, async (data, conn) => {
    await gate;
    return await conn.write(data.subarray(0, 1));
  });
  const { promise, resolve } = Promise.withResolvers<void>();
  gate = promise;
  const ended = client.closeWrite();
  assert(await isPending(ended));
  resolve();
  await ended;
  assertEquals(await server.recv(), null);
  assertEquals(tlsSessionOf(server)?.truncated, false);
  client.close();
  server.close();
});

tlsTest("closeWrite() and a write reject if the encrypted bytes cannot leave", async (certificates) => {
  for (const call of ["closeWrite", "send"] as const) {
    const failure = brokenPipe();
    let isBroken = false;
    const [client, server] = await securedPair(certificates, (data, conn) => {
      return isBroken ? Promise.reject(failure) : conn.write(data);
    });
    isBroken = true;
    assertEquals(await rejectionOf(client[call]("x")), failure);
    assertEquals(await rejectionOf(client.recv()), failure);
    client.close();
    server.close();
  }
});

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
    assertEquals(tlsSessionOf(client)?.truncated, false);
  });
});

tlsTest(
  "a write waits for a peer that does not read; close() ends a read at once, and the write at its timeout",
  async (certificates) => {
    class Silent extends StreamRequestHandler {
      override async handle() {
        await new Promise((resolve) => this.signal.addEventListener("abort", resolve));
      }
    }
    await serving(certificates, Silent, async (_server, port) => {
      const client = await dial(certificates, port);
      client.timeout = 500;
      const failed = rejectionOf(client.send(new Uint8Array(20_000_000)));
      const read = rejectionOf(client.recv());
      await until(() => client.bytesWritten > 0);
      client.close();
      assert(await read instanceof Deno.errors.BadResource);
      assert(await failed instanceof Deno.errors.TimedOut);
    });
  },
);

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

for (const [serve, whose] of [[serving, "the filter's"], [servingNatively, "the runtime's"]] as const) {
  tlsTest(`a reset is reported as on a plain connection, with ${whose} TLS`, async (certificates) => {
    Watched.forget();
    await serve(certificates, Watched, async (server, port) => {
      const python = `${pythonClient(port)}
tls.sendall(b"hello")
tls.recv(5)
tls.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
tls.close()`;
      await using program = Program.start("python3", ["-c", python]);
      assertEquals((await program.ended()).code, 0);
      await until(() => Watched.ends.length === 1 && server.stats.active === 0);
      assertEquals(Watched.ends, ["ConnectionReset"]);
    });
  }, "python3");
}

/** Two ways to leave: with a close_notify, and by only ending the TCP connection's side. */
const WAYS_TO_LEAVE = {
  ended: `
try: tls.unwrap()
except ssl.SSLError: pass # It was answered first.
print("goodbye")`,
  truncated: `
half = socket.socket(fileno=tls.fileno()); half.shutdown(socket.SHUT_WR); half.detach()
rest = b""
while not rest.endswith(b"\\n"): rest += tls.recv(100)
print(rest.decode(), end="")`,
};

for (const [end, leave] of Object.entries(WAYS_TO_LEAVE)) {
  tlsTest(`the stream of a peer that leaves is ${end}, and can be answered`, async (certificates) => {
    Watched.forget();
    await serving(certificates, Watched, async (server, port) => {
      const python = `${pythonClient(port)}
tls.sendall(b"hello")
print(tls.recv(5).decode())${leave}`;
      await using program = Program.start("python3", ["-c", python]);
      const { stdout, stderr } = await program.ended();
      assertEquals([stdout, stderr], ["hello\ngoodbye\n", ""]);
      await until(() => server.stats.active === 0);
      assertEquals(Watched.ends, [end]);
    });
  }, "python3");
}

// What was negotiated

tlsTest("both sides see what was negotiated", async (certificates) => {
  Watched.forget();
  await serving(certificates, Watched, async (_server, port) => {
    await using client = await dial(certificates, port, { serverName: "localhost", alpnProtocols: ["none", "echo/1"] });
    await client.send("x");
    await client.recv();
    const [seen] = Watched.seen;
    const session = seen && tlsSessionOf(seen);
    assertEquals([session?.protocol, session?.alpnProtocol, session?.serverName], ["TLSv1.3", "echo/1", "localhost"]);
    assertEquals(session?.peerCertificate, undefined);
    assertMatch(session?.cipher ?? "", /^TLS_/);
    const ours = tlsSessionOf(client);
    assertEquals([ours?.protocol, ours?.alpnProtocol], ["TLSv1.3", "echo/1"]);
    const peer = ours?.peerCertificate;
    assertEquals(peer?.commonName, "server");
    assertMatch(peer?.altNames ?? "", /^DNS:localhost, IP Address:127.0.0.1, IP Address:/);
    assertEquals([peer?.subject, peer?.issuer], ["CN=server", "CN=Test authority"]);
    assertMatch(peer?.fingerprint256 ?? "", /^([0-9A-F]{2}:){31}[0-9A-F]{2}$/);
    assert(peer !== undefined && peer.validFrom < peer.validTo && peer.raw.length > 100 && peer.serialNumber !== "");
  }, { address: { alpnProtocols: ["echo/2", "echo/1"] } });
});

Deno.test("a stream without TLS has no session", () => {
  const [ours, theirs] = socketPair();
  assertEquals(tlsSessionOf(ours), undefined);
  ours.close();
  theirs.close();
});

// STARTTLS

/** Answers lines; after STARTTLS over TLS. */
async function mailing(
  { server: { cert, key } }: Certificates,
  test: (port: number) => Promise<void>,
): Promise<string[]> {
  const startTls = tls({ cert, key });
  const errors: string[] = [];
  class Mail extends StreamRequestHandler {
    override async handle() {
      for (let line; (line = await this.request.readLine()) !== null;) {
        await this.request.write(`${tlsSessionOf(this.request) === undefined ? "plain" : "secret"} ${line}\n`);
        if (line === "STARTTLS") await this.request.upgrade(startTls);
      }
    }
  }
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
  return errors;
}

tlsTest("both sides turn to TLS in the middle of a conversation", async (certificates) => {
  const caCerts = [certificates.ca.cert];
  const errors = await mailing(certificates, async (port) => {
    await using client = await connect({ port });
    await client.send("one\n");
    assertEquals(await client.readLine(), "plain one");
    await client.send("STARTTLS\n");
    assertEquals(await client.readLine(), "plain STARTTLS");
    await client.upgrade(tlsClient({ serverName: "localhost", caCerts }));
    assertEquals(tlsSessionOf(client)?.protocol, "TLSv1.3");
    await client.send("two\n");
    assertEquals(await client.readLine(), "secret two");
    await client.closeWrite();
    assertEquals(await client.readLine(), null);
  });
  assertEquals(errors, []);
});

tlsTest("a stream that has TLS refuses to begin it again", async (certificates) => {
  await serving(certificates, Echo, async (_server, port) => {
    await using client = await dial(certificates, port);
    const error = await rejectionOf(client.upgrade(tlsClient({ serverName: "localhost" })));
    assert(error instanceof TypeError);
    assertEquals(error.message, "Cannot begin TLS: the connection has TLS already");
  });
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
}, "python3");

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
  await client.upgrade(tlsClient({ serverName: "localhost", caCerts: [ca.cert] }));
  await client.send("hello\n");
  assertEquals(await client.readLine(), "HELLO");
  assertEquals(await client.readLine(), null);
  assertEquals(tlsSessionOf(client)?.truncated, false);
  await client.closeWrite();
  assertEquals((await program.ended()).stderr, "");
}, "python3");

tlsTest("bytes that an attacker slips in before TLS are not taken for the peer's", async (certificates) => {
  const errors = await mailing(certificates, async (port) => {
    await using client = await connect({ port });
    await client.send("STARTTLS\nDELETE\n");
    assertEquals(await client.readLine(), "plain STARTTLS");
    assertEquals(await client.readLine(), null);
  });
  assertEquals(errors.length, 1);
  assertMatch(errors[0] ?? "", /^Cannot upgrade\(\): 7 received bytes are unread/);
});

tlsTest(
  "an upgrade over a pair in memory works, and other calls are refused until it is over",
  async (certificates) => {
    const { ca, server: { cert, key } } = certificates;
    const [ours, theirs] = socketPair();
    const started = ours.upgrade(tls({ cert, key }));
    for (const call of [ours.recv(), ours.write("x"), ours.send("x"), ours.closeWrite()]) {
      const error = await rejectionOf(call);
      assert(error instanceof Deno.errors.Busy && /upgrade\(\)/.test(error.message), `${error}`);
    }
    await theirs.upgrade(tlsClient({ serverName: "127.0.0.1", caCerts: [ca.cert] }));
    await started;
    await ours.send("hello\n");
    assertEquals(await theirs.readLine(), "hello");
    ours.close();
    assertEquals(await theirs.readLine(), null);
    assertEquals(tlsSessionOf(theirs)?.truncated, false);
    theirs.close();
  },
);

tlsTest("an upgrade has a deadline, and then the stream is closed", async ({ server: { cert, key } }) => {
  const [ours, theirs] = socketPair();
  const error = await rejectionOf(ours.upgrade(tls({ cert, key }), { handshakeTimeout: 10 }));
  assert(error instanceof Deno.errors.TimedOut);
  assertEquals(error.message, "upgrade() waited for the timeout of 10 ms");
  assert(await rejectionOf(ours.recv()) instanceof Deno.errors.TimedOut);
  theirs.close();
});

tlsTest("close() ends an upgrade that waits", async ({ server: { cert, key } }) => {
  const [ours, theirs] = socketPair();
  const failed = rejectionOf(ours.upgrade(tls({ cert, key })));
  ours.close();
  assert(await failed instanceof Deno.errors.BadResource);
  theirs.close();
});

for (const when of ["before", "during"] as const) {
  tlsTest(
    `a filter that is aborted ${when} its handshake rejects with the reason and closes the connection`,
    async (certificates) => {
      const { cert, key } = certificates.server;
      const [ours, theirs] = socketPair();
      const controller = new AbortController();
      const reason = new TypeError("enough");
      if (when === "before") controller.abort(reason);
      const failed = rejectionOf(
        Promise.resolve(tls({ cert, key })(ours.under, { signal: controller.signal, onEnd() {} })),
      );
      controller.abort(reason);
      assertEquals(await failed, reason);
      assertEquals(await theirs.recv(), null);
      ours.close();
      theirs.close();
    },
  );
}
