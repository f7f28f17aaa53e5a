import { assert, assertEquals, assertMatch, assertRejects } from "../deps.ts";
import { connect, TcpServer, UnixServer } from "../mod.ts";
import { FakeTcpConn, turnEnd } from "./fake_conn.ts";
import { freePort } from "./programs.ts";
import { countListeners, Echo, networkTest, peerTest, rejectionOf, unixTest, withDeno } from "./testing.ts";

/** Runs `test` with the port of a listener that takes no more connections: dials wait. */
async function withFullBacklog(test: (port: number) => Promise<void>): Promise<void> {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0, tcpBacklog: 1 });
  const { port } = listener.addr;
  const controller = new AbortController();
  const conns: Deno.Conn[] = [];
  const dials = Array.from({ length: 8 }, async () => {
    conns.push(await Deno.connect({ port, signal: controller.signal }));
  });
  try {
    await Promise.race(dials);
    await test(port);
  } finally {
    controller.abort();
    await Promise.allSettled(dials);
    for (const conn of conns) conn.close();
  }
}

networkTest("connect() opens a stream that reads and writes", async () => {
  await using server = new TcpServer({ port: 0 }, Echo);
  const { port } = server.listen();
  server.serveForever();
  await using stream = await connect({ port });
  await stream.send("hello\n");
  assertEquals(await stream.readLine(), "hello");
  assertEquals(stream.remoteAddress, server.address);
});

networkTest("connect() says what was dialled, why it failed and what to do", async () => {
  const port = await freePort();
  const error = await rejectionOf(connect({ port }));
  assert(error instanceof Deno.errors.ConnectionRefused);
  assertEquals(
    error.message,
    `Cannot connect to 127.0.0.1:${port}: connection refused; start the server or check the address`,
  );
  assertEquals("code" in error && error.code, "ECONNREFUSED");
  assert(error.cause instanceof Deno.errors.ConnectionRefused);
});

Deno.test("connect() reports a connection that was reset before the runtime could look at it as reset", async () => {
  // What Deno 2.9.6 says then, which is a race.
  const rejected = () => Promise.reject(new Error("Transport endpoint is not connected (os error 107)"));
  await withDeno("connect", rejected, async () => {
    const error = await rejectionOf(connect({ port: 8009 }));
    assert(error instanceof Deno.errors.ConnectionReset);
    assertMatch(
      error.message,
      /^Cannot connect to 127\.0\.0\.1:8009: transport .*; the server has reset the connection at once$/,
    );
  });
});

Deno.test("connect() takes a connection to itself for a refused one, closes it, and tries again", async () => {
  const itself = { transport: "tcp", hostname: "127.0.0.1", port: 8009 } as const;
  const made: FakeTcpConn[] = [];
  class Meeting extends FakeTcpConn {
    constructor(override readonly localAddr: Deno.NetAddr, override readonly remoteAddr: Deno.NetAddr) {
      super();
      made.push(this);
    }
  }
  await withDeno("connect", () => Promise.resolve(new Meeting(itself, itself)), async () => {
    const error = await rejectionOf(connect({ port: 8009, retries: 1 }));
    assert(error instanceof Deno.errors.ConnectionRefused);
    assertEquals("code" in error && error.code, "ECONNREFUSED");
    assertMatch(error.message, /^Cannot connect to 127\.0\.0\.1:8009 after 2 tries: connection refused; start /);
    assertEquals(made.map(({ isClosed }) => isClosed), [true, true]);
  });
  for (const other of [{ ...itself, port: 8010 }, { ...itself, hostname: "127.0.0.2" }]) {
    await withDeno("connect", () => Promise.resolve(new Meeting(other, itself)), async () => {
      (await connect({ port: 8009 })).close();
    });
  }
  await turnEnd();
});

Deno.test("connect() sends small writes at once, and with noDelay: false as the system does", async () => {
  for (const noDelay of [undefined, true, false]) {
    const conn = new FakeTcpConn();
    await withDeno("connect", () => Promise.resolve(conn), async () => {
      (await connect({ port: 8009, noDelay })).close();
    });
    assertEquals(conn.calls, noDelay === false ? ["close()"] : ["setNoDelay(true)", "close()"]);
  }
});

/** Dials a dead port, which one dial of four has for its own; prints the names of the errors. */
const DIALS = `
import { connect } from ${JSON.stringify(import.meta.resolve("../mod.ts"))};
const outcomes = new Set();
for (let count = 0; count < 200; count++) {
  outcomes.add(await connect({ port: 40_000 }).then(() => "connected", ({ name }) => name));
}
console.log([...outcomes].join());
Deno.exit();
`;

const FOUR_PORTS = 'ip link set lo up && echo 40000 40003 > /proc/sys/net/ipv4/ip_local_port_range && exec "$@"';

peerTest(
  ["ip"],
  "connect() never meets itself in a namespace of four ports, where one may be made",
  async () => {
    const enter = (...args: string[]) =>
      new Deno.Command("unshare", {
        args: ["--map-root-user", "--net", "sh", "-c", FOUR_PORTS, "sh", ...args],
        env: { DENO_NO_UPDATE_CHECK: "1", NO_COLOR: "1" },
      }).output().catch(() => undefined);
    if (!(await enter("true"))?.success) return; // The unit test above has to do.
    const file = await Deno.makeTempFile({ suffix: ".ts" });
    await Deno.writeTextFile(file, DIALS);
    const dialled = await enter(Deno.execPath(), "run", "--no-config", "--allow-net", file);
    await Deno.remove(file);
    assertEquals(new TextDecoder().decode(dialled?.stdout), "ConnectionRefused\n");
  },
);

networkTest("connect() says after how many tries it gave up", async () => {
  const error = await rejectionOf(connect({ port: await freePort(), retries: 2 }));
  assertMatch(error.message, /^Cannot connect to 127\.0\.0\.1:\d+ after 3 tries: connection refused; /);
});

networkTest(
  "connect() leaves no listener on its signal, neither of its dials nor of the waits between them",
  async () => {
    const { signal } = new AbortController();
    const listeners = countListeners(signal);
    const dialing = connect({ port: await freePort(), retries: 2, signal });
    assertEquals(listeners(), 1);
    await rejectionOf(dialing);
    assertEquals(listeners(), 0);
  },
);

networkTest("connect() tries again until the server is there", async () => {
  const port = await freePort();
  const dialing = connect({ port, retries: Infinity });
  await assertRejects(() => connect({ port }), Deno.errors.ConnectionRefused);
  await using server = new TcpServer({ port }, Echo);
  server.serveForever();
  (await dialing).close();
});

networkTest("connect() gives a name that cannot be resolved a sentence of its own", async () => {
  const error = await rejectionOf(connect({ hostname: "no-such-host.invalid", port: 1 }));
  assertMatch(
    error.message,
    /^Cannot connect to no-such-host\.invalid:1: the name cannot be resolved \(failed to lookup .*\); check its spelling$/,
  );
});

/** Names, and what the runtime is asked for. */
const HOSTNAMES: [string, string][] = [
  ["[::1]", "::1"],
  ["::1", "::1"],
  ["localhost", "localhost"],
  ["my_host", "my_host"],
  ["bücher.example", "xn--bcher-kva.example"],
  ["BÜCHER.example", "xn--bcher-kva.example"],
  ["例え.jp", "xn--r8jz45g.jp"],
];

for (const [hostname, asked] of HOSTNAMES) {
  Deno.test(`connect() dials ${hostname} as ${asked}`, async () => {
    const dialled: unknown[] = [];
    const dial = (options: Deno.ConnectOptions) => {
      dialled.push(options.hostname);
      return Promise.reject(new Deno.errors.ConnectionRefused("Connection refused (os error 111)"));
    };
    await withDeno("connect", dial, async () => void await rejectionOf(connect({ hostname, port: 1 })));
    assertEquals(dialled, [asked]);
  });
}

networkTest("connect() gives up after its timeout", async () => {
  await withFullBacklog(async (port) => {
    const error = await rejectionOf(connect({ port, timeout: 20, retries: 1 }));
    assert(error instanceof Deno.errors.TimedOut);
    assertMatch(error.message, /after 2 tries: no answer within 20 ms$/);
  });
});

networkTest("connect() ends with the reason of its signal: before, while it dials, and between tries", async () => {
  const reason = new TypeError("changed my mind");
  await withFullBacklog(async (port) => {
    const controller = new AbortController();
    const dialing = connect({ port, signal: controller.signal });
    controller.abort(reason);
    assertEquals(await rejectionOf(dialing), reason);
  });
  const port = await freePort();
  assertEquals(await rejectionOf(connect({ port, signal: AbortSignal.abort(reason) })), reason);
  const controller = new AbortController();
  const dialing = connect({ port, retries: Infinity, signal: controller.signal });
  await assertRejects(() => connect({ port }), Deno.errors.ConnectionRefused);
  controller.abort(reason);
  assertEquals(await rejectionOf(dialing), reason);
});

Deno.test("connect() without the permission names the least flag, and does not try again", {
  permissions: { net: false, read: false, write: false },
}, async () => {
  const tcp = await rejectionOf(connect({ hostname: "::1", port: 8009, retries: Infinity }));
  assert(tcp instanceof Deno.errors.NotCapable);
  assertEquals(
    tcp.message,
    "Cannot connect to [::1]:8009: permission is missing; run again with --allow-net=[::1]:8009",
  );
  const unix = await rejectionOf(connect({ path: "/tmp/a.sock", retries: Infinity }));
  assertMatch(
    unix.message,
    /--allow-read=\/tmp\/a\.sock --allow-write=\/tmp\/a\.sock --allow-net=unix:\/tmp\/a\.sock$/,
  );
});

for (
  const [name, dial, kind] of [
    ["a port out of range", () => connect({ port: -1 }), RangeError],
    ["an empty hostname", () => connect({ hostname: "", port: 1 }), TypeError],
    ["a timeout of 0", () => connect({ port: 1, timeout: 0 }), RangeError],
    ["half a retry", () => connect({ port: 1, retries: 0.5 }), RangeError],
    ["an option that does not exist", () => connect({ port: 1, ...{ retrys: 1 } }), TypeError],
  ] as const
) {
  Deno.test(`connect() refuses ${name}`, async () => {
    await assertRejects(dial, kind);
  });
}

unixTest("connect() dials Unix sockets", async (folder) => {
  const path = `${folder}/echo.sock`;
  await using server = new UnixServer({ path }, Echo);
  await server.listen();
  server.serveForever();
  await using stream = await connect({ path });
  await stream.send("hello\n");
  assertEquals(await stream.readLine(), "hello");
});

unixTest("connect() to a path that is not there says so", async (folder) => {
  const error = await rejectionOf(connect({ path: `${folder}/none.sock` }));
  assert(error instanceof Deno.errors.NotFound);
  assertMatch(error.message, /none\.sock: no such file or directory; start the server or check the path$/);
});
