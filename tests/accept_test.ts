import { assert, assertEquals, assertMatch } from "../deps.ts";
import { type AcceptFailure, acceptFailure, connect, TcpServer } from "../mod.ts";
import { FakeTcpConn, turnEnd } from "./fake_conn.ts";
import { withFakeTime } from "./fake_time.ts";
import { Echo, FakeListener, FakeServer, FAULTS, peerTest, printedBy, rejectionOf } from "./testing.ts";

function systemError(code: string): Error {
  return Object.assign(new TypeError(`${code} (os error 0)`), { code });
}

const FAILURES: [Error, AcceptFailure][] = [
  [new Deno.errors.BadResource("Listener has been closed"), "closed"],
  [new Deno.errors.Interrupted("operation canceled"), "closed"],
  [Object.assign(new Deno.errors.NotConnected("gone"), { code: "ENOTCONN" }), "peer"],
  [systemError("ECONNABORTED"), "peer"],
  [systemError("EPERM"), "peer"],
  [systemError("ECONNRESET"), "peer"],
  [systemError("ENOTSUP"), "peer"],
  [systemError("ETIMEDOUT"), "peer"],
  [new Deno.errors.InvalidData("not valid UTF-8"), "peer"],
  [systemError("EMFILE"), "overload"],
  [systemError("ENOBUFS"), "overload"],
  [systemError("ENOMEM"), "overload"],
  [systemError("EINVAL"), "fatal"],
  [new TypeError("a bug"), "fatal"],
];

/** As Deno 2.9.6 on Linux reports what strace makes of accept4(): `-e inject=accept4:error=ENFILE`. */
const WITHOUT_CODES: [Error, AcceptFailure][] = [
  [new Error("Too many open files in system (os error 23)"), "overload"],
  [new Error("Machine is not on the network (os error 64)"), "peer"],
  [new Error("Protocol error (os error 71)"), "peer"],
  [new Error("Protocol not available (os error 92)"), "peer"],
  [new Error("Network is down (os error 100)"), "peer"],
  [new Error("Host is down (os error 112)"), "peer"],
  [new Error("Invalid argument (os error 22)"), "fatal"],
];

for (const [error, expected] of [...FAILURES, ...WITHOUT_CODES]) {
  Deno.test(`acceptFailure() calls ${error.name} ${error.message} "${expected}"`, () => {
    assertEquals(acceptFailure(error), expected);
  });
}

Deno.test("acceptFailure() never reads the stack of an error, which would open a file", () => {
  const error = systemError("EMFILE");
  Object.defineProperty(error, "stack", { get: () => assert(false, "stack was read") });
  assertEquals(acceptFailure(error), "overload");
});

Deno.test('acceptFailure() calls anything that is no error "fatal"', () => {
  assertEquals(acceptFailure(undefined), "fatal");
});

/** Keeps the reports of exhaustion. */
class Overloaded extends FakeServer {
  readonly overloads: unknown[] = [];
  override handleOverload(error: unknown): void | Promise<void> {
    this.overloads.push(error);
  }
}

Deno.test("clients that leave before they are accepted are counted, and end nothing", async () => {
  const listener = new FakeListener([systemError("ENOTCONN"), systemError("ECONNABORTED")]);
  const server = new Overloaded(listener);
  const serving = server.serveForever();
  await listener.drained;
  assertEquals(server.stats.lost, 2);
  await server.shutdown();
  await serving;
});

Deno.test("serveForever() waits an exhaustion of descriptors out, and reports it once", async () => {
  const listener = new FakeListener([systemError("EMFILE"), systemError("EMFILE"), systemError("ENFILE")]);
  const server = new Overloaded(listener);
  const serving = server.serveForever();
  await listener.drained;
  assertEquals(server.overloads.length, 1);
  assertEquals(server.stats.overloads, 1);
  await server.shutdown();
  await serving;
});

Deno.test("an exhaustion 5 s after the last one is reported again, and a sooner one is not", async () => {
  await withFakeTime(async (time) => {
    const listener = new FakeListener([systemError("EMFILE")]);
    const server = new Overloaded(listener);
    const serving = server.serveForever();
    await time.advanceUntil(listener.drained);
    for (const [ms, reports] of [[4_000, 1], [4_500, 1], [5_100, 2]] as const) {
      await time.advance(ms);
      listener.fail(systemError("EMFILE"));
      await time.advance(100);
      assertEquals(server.overloads.length, reports, `after ${ms} ms`);
    }
    assertEquals(server.stats.overloads, 2);
    server.close();
    await time.advanceUntil(serving);
  });
});

Deno.test("an exhaustion is waited out for twice the time each, up to 1 s, and from the beginning after a success", async () => {
  await withFakeTime(async (time) => {
    const exhausted = Array(10).fill(systemError("EMFILE"));
    const listener = new FakeListener([...exhausted, new FakeTcpConn(), ...exhausted.slice(0, 2)]);
    const accepts: number[] = [];
    const { accept } = listener;
    listener.accept = () => {
      accepts.push(time.passed);
      return accept.call(listener);
    };
    const server = new Overloaded(listener);
    const serving = server.serveForever();
    await time.advanceUntil(listener.drained);
    const waits = accepts.slice(1).map((at, index) => at - (accepts[index] ?? 0));
    assertEquals(waits, [5, 10, 20, 40, 80, 160, 320, 640, 1_000, 1_000, 0, 5, 10]);
    server.close();
    await time.advanceUntil(serving);
  });
});

Deno.test("handleOverload() prints one line by default, with what to do about EMFILE, and reads no stack", async () => {
  const error = Object.assign(new Error("Too many open files (os error 24)"), { code: "EMFILE" });
  Object.defineProperty(error, "stack", { get: () => assert(false, "stack was read") });
  const listener = new FakeListener([error]);
  const server = new FakeServer(listener);
  const printed = await printedBy(async () => {
    const serving = server.serveForever();
    await listener.drained;
    server.close();
    await serving;
  });
  assertEquals(printed, [[
    "Cannot accept connections on 127.0.0.1:1 for now: Too many open files (os error 24); " +
    'raise "ulimit -n" or lower maxConnections',
  ]]);
});

Deno.test("an error's stack is not printed within 5 s of an exhaustion, as reading it opens a file", async () => {
  await withFakeTime(async (time) => {
    const listener = new FakeListener([systemError("EMFILE")]);
    const server = new Overloaded(listener);
    const serving = server.serveForever();
    await time.advanceUntil(listener.drained);
    const bug = new TypeError("a bug");
    const { remoteAddr } = new FakeTcpConn();
    const printed = await printedBy(async () => {
      await server.handleError(bug, remoteAddr, "error");
      await time.advance(5_100);
      await server.handleError(bug, remoteAddr, "error");
    });
    assertEquals(printed.map(([, what]) => what), ["a bug", bug]);
    server.close();
    await time.advanceUntil(serving);
  });
});

Deno.test("a listener that is closed by someone else while an exhaustion is waited out ends the server", async () => {
  await withFakeTime(async (time) => {
    const listener = new FakeListener([systemError("EMFILE")]);
    const serving = new Overloaded(listener).serveForever();
    await turnEnd();
    listener.close();
    await time.advanceUntil(serving, 1_000);
  });
});

Deno.test("a listener of plain JavaScript may give a connection without a promise", async () => {
  const conn = new FakeTcpConn().give("hello").end();
  const listener = new FakeListener([]);
  const conns: unknown[] = [conn];
  listener.accept = new Proxy(listener.accept, {
    apply: (accept, self) => conns.shift() ?? Reflect.apply(accept, self, []),
  });
  const server = new FakeServer(listener);
  const serving = server.serveForever();
  await conn.whenClosed;
  assertEquals(server.stats.accepted, 1);
  await server.shutdown();
  await serving;
});

Deno.test("shutdown() interrupts the wait of an exhaustion of descriptors", async () => {
  const listener = new FakeListener(Array(1_000).fill(systemError("EMFILE")));
  const server = new Overloaded(listener);
  const reported = Promise.withResolvers<void>();
  server.handleOverload = () => reported.resolve();
  const serving = server.serveForever();
  await reported.promise;
  await server.shutdown();
  await serving;
  assert(listener.accepts < 1_000);
});

Deno.test("serveForever() rejects with an error that it does not know, and closes the listener", async () => {
  const listener = new FakeListener([systemError("EINVAL")]);
  const server = new Overloaded(listener);
  const error = await rejectionOf(server.serveForever());
  assertMatch(error.message, /EINVAL/);
  assert(listener.closed);
});

for (const [when, script] of [["at once", []], ["after a client that left", [systemError("ECONNABORTED")]]] as const) {
  Deno.test(`serveForever() rejects with what accept() throws ${when}, and close() and shutdown() do not`, async () => {
    class Throwing extends FakeListener {
      readonly #left = [...script];
      override accept(): Promise<never> {
        const failure = this.#left.shift();
        if (failure === undefined) throw new TypeError("a bug in accept()");
        return Promise.reject(failure);
      }
    }
    const listener = new Throwing([]);
    const server = new Overloaded(listener);
    assertMatch((await rejectionOf(server.serveForever())).message, /a bug in accept\(\)/);
    assert(listener.closed);
    server.close();
    assertEquals((await server.shutdown()).cut, []);
  });
}

Deno.test("serveForever() resolves when someone else closes the listener", async () => {
  const listener = new FakeListener([]);
  const server = new Overloaded(listener);
  const serving = server.serveForever();
  await listener.drained;
  listener.close();
  await serving;
});

for (const [how, fail] of FAULTS) {
  Deno.test(`a handleOverload() that ${how} does not end the server`, async () => {
    const listener = new FakeListener([systemError("EMFILE")]);
    class Faulty extends FakeServer {
      override handleOverload = fail;
    }
    const server = new Faulty(listener);
    const printed = await printedBy(async () => {
      const serving = server.serveForever();
      await listener.drained;
      await server.shutdown();
      await serving;
    });
    assertEquals(printed.map(([what]) => what), ["Error in handleOverload():"]);
  });
}

/** Takes all descriptors, lets the handlers throw meanwhile, and leaves. */
const FLOOD = `
import socket, sys
clients = [socket.create_connection(("127.0.0.1", int(sys.argv[1]))) for _ in range(200)]
for client in clients:
    client.sendall(b"throw\\n")
print("flooded", flush=True)
sys.stdin.read()
`;

/** A server whose handlers throw, in a process that may open 64 files. */
const SMALL_SERVER = `
import { StreamRequestHandler, TcpServer } from ${JSON.stringify(import.meta.resolve("../mod.ts"))};
class Throwing extends StreamRequestHandler {
  override async handle() {
    for await (const line of this.request.lines()) {
      if (line === "throw") throw new TypeError("handler boom");
      await this.request.send(line + "\\n");
    }
  }
}
const server = new TcpServer({ port: 0 }, Throwing);
console.log(server.listen().port);
await server.serveForever();
`;

/** The same, but the handler is another file's, whose stack was never read. */
const SMALL_SERVER_OF_TWO_FILES = SMALL_SERVER.replace(/class[^]*?\n}\n/, 'import { Throwing } from "./handler.ts";\n');
const HANDLER_FILE = SMALL_SERVER.replace(", TcpServer", "").replace("class", "export class").replace(
  /const server[^]*/,
  "",
);

peerTest(["python3"], "200 clients and throwing handlers at 64 descriptors do not end the server", async () => {
  await floodSmallServer({ "main.ts": SMALL_SERVER });
});

peerTest(
  ["python3"],
  "200 clients and throwing handlers of another file at 64 descriptors do not end the server",
  async () => {
    await floodSmallServer({ "main.ts": SMALL_SERVER_OF_TWO_FILES, "handler.ts": HANDLER_FILE });
  },
);

/** Floods a server, and expects one report of the exhaustion. */
async function floodSmallServer(files: Record<string, string>): Promise<void> {
  const folder = await Deno.makeTempDir();
  for (const [name, text] of Object.entries(files)) await Deno.writeTextFile(`${folder}/${name}`, text);
  const run = `ulimit -n 64; exec "$0" run --no-config "$@"`;
  const server = new Deno.Command("bash", {
    args: ["-c", run, Deno.execPath(), "--allow-net", `${folder}/main.ts`],
    env: { DENO_NO_UPDATE_CHECK: "1", NO_COLOR: "1" },
    stdout: "piped",
    stderr: "piped",
  }).spawn();
  const [ports, output] = server.stdout.tee();
  const ended = new Response(output).text();
  const printed = new Response(server.stderr).text();
  const reader = ports.getReader();
  const port = Number(new TextDecoder().decode((await reader.read()).value));
  const flood = new Deno.Command("python3", { args: ["-c", FLOOD, String(port)], stdin: "piped", stdout: "piped" })
    .spawn();
  await flood.stdout.getReader().read();
  await flood.stdin.close();
  await flood.status;
  const client = await connect({ port, retries: 5 });
  await client.send("still there\n");
  assertEquals(await client.readLine(), "still there");
  client.close();
  server.kill();
  await reader.cancel();
  await ended;
  const told = (await printed).match(
    /Cannot accept connections on 127\.0\.0\.1:\d+ for now: Too many open files .*; raise "ulimit -n" or/g,
  ) ?? [];
  assertEquals(told.length, 1);
  await server.status;
  await Deno.remove(folder, { recursive: true });
}

/** Connects and resets, before anybody can accept. */
const RESETS = `
import socket, struct, sys
for _ in range(100):
    client = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
`;

peerTest(["python3"], "clients that reset before they are accepted do not end the server", async () => {
  await using server = new TcpServer({ port: 0 }, Echo);
  const { port } = server.listen();
  const python = new Deno.Command("python3", { args: ["-c", RESETS, String(port)], stderr: "inherit" });
  assert((await python.output()).success);
  server.serveForever();
  await using client = await connect({ port });
  await client.send("still there\n");
  assertEquals(await client.readLine(), "still there");
  assertEquals(server.stats.lost, 100);
});
