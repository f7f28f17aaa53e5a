import { assert, assertEquals, assertMatch } from "../deps.ts";
import { type AcceptFailure, acceptFailure, connect, StreamServer, TcpServer } from "../mod.ts";
import { FakeTcpConn } from "./fake_conn.ts";
import { Echo, FakeListener, programTest, rejectionOf, until } from "./testing.ts";

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

Deno.test('acceptFailure() calls what is no error "fatal"', () => {
  assertEquals(acceptFailure(undefined), "fatal");
});

/** Listens on a listener that the test has made. */
class FakeServer extends StreamServer {
  readonly overloads: unknown[] = [];
  readonly #fake: FakeListener;

  constructor(fake: FakeListener) {
    super(Echo, {});
    this.#fake = fake;
  }

  override listen(): Deno.Addr {
    return this.adopt(this.#fake, this.#fake.addr);
  }

  override handleOverload(error: unknown): void | Promise<void> {
    this.overloads.push(error);
  }
}

Deno.test("serveForever() outlives clients that leave before they are accepted", async () => {
  const listener = new FakeListener([systemError("ENOTCONN"), systemError("ECONNABORTED")]);
  const server = new FakeServer(listener);
  const serving = server.serveForever();
  await listener.drained;
  assertEquals(server.stats.lost, 2);
  await server.shutdown();
  await serving;
});

Deno.test("serveForever() waits an exhaustion of descriptors out, and reports it once", async () => {
  const listener = new FakeListener([systemError("EMFILE"), systemError("EMFILE"), systemError("ENFILE")]);
  const server = new FakeServer(listener);
  const serving = server.serveForever();
  await listener.drained;
  assertEquals(server.overloads.length, 1);
  assertEquals(server.stats.overloads, 1);
  await server.shutdown();
  await serving;
});

Deno.test("an exhaustion 5 s after the last one is reported again, and a sooner one is not", async () => {
  const listener = new FakeListener([systemError("EMFILE")]);
  const server = new FakeServer(listener);
  const serving = server.serveForever();
  await listener.drained;
  const { now } = performance;
  try {
    for (const [ms, reports] of [[4_000, 1], [8_500, 1], [14_000, 2]] as const) {
      performance.now = () => now.call(performance) + ms;
      const accepts = listener.accepts;
      listener.fail(systemError("EMFILE"));
      await until(() => listener.accepts > accepts);
      assertEquals(server.overloads.length, reports, `after ${ms} ms`);
    }
  } finally {
    performance.now = now;
  }
  assertEquals(server.stats.overloads, 2);
  await server.shutdown();
  await serving;
});

/** Runs `action`, in which timers fire at once; returns the milliseconds that they were set to. */
async function withoutWaiting(action: () => Promise<void>): Promise<number[]> {
  const set: number[] = [];
  const { setTimeout } = globalThis;
  const hurried = (callback: () => void, ms = 0) => {
    set.push(ms);
    return setTimeout(callback, 0);
  };
  globalThis.setTimeout = Object.assign(hurried, setTimeout);
  try {
    await action();
  } finally {
    globalThis.setTimeout = setTimeout;
  }
  return set;
}

Deno.test("an exhaustion is waited out for twice the time each, up to 1 s, and from the beginning after a success", async () => {
  const exhausted = Array(10).fill(systemError("EMFILE"));
  const listener = new FakeListener([...exhausted, new FakeTcpConn(), ...exhausted.slice(0, 2)]);
  const server = new FakeServer(listener);
  let serving: Promise<void> | undefined;
  const waits = await withoutWaiting(async () => {
    serving = server.serveForever();
    await listener.drained;
  });
  assertEquals(waits, [5, 10, 20, 40, 80, 160, 320, 640, 1_000, 1_000, 5, 10]);
  server.close();
  await serving;
});

Deno.test("shutdown() interrupts the wait of an exhaustion of descriptors", async () => {
  const listener = new FakeListener(Array(1_000).fill(systemError("EMFILE")));
  const server = new FakeServer(listener);
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
  const server = new FakeServer(listener);
  const error = await rejectionOf(server.serveForever());
  assertMatch(error.message, /EINVAL/);
  assert(listener.closed);
});

Deno.test("serveForever() resolves when someone else closes the listener", async () => {
  const listener = new FakeListener([]);
  const server = new FakeServer(listener);
  const serving = server.serveForever();
  await listener.drained;
  listener.close();
  await serving;
});

Deno.test("handleOverload() that throws does not end the server", async () => {
  const listener = new FakeListener([systemError("EMFILE")]);
  const server = new FakeServer(listener);
  server.handleOverload = () => {
    throw new TypeError("a bug in the hook");
  };
  const serving = server.serveForever();
  await listener.drained;
  await server.shutdown();
  await serving;
});

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

Deno.test("handleOverload() that rejects does not end the server", async () => {
  const listener = new FakeListener([systemError("EMFILE")]);
  class Rejecting extends FakeServer {
    override async handleOverload(error: unknown) {
      super.handleOverload(error);
      await Promise.reject(new TypeError("a bug in the hook"));
    }
  }
  const server = new Rejecting(listener);
  const print = console.error;
  console.error = () => {};
  const serving = server.serveForever();
  await listener.drained;
  await server.shutdown();
  await serving;
  console.error = print;
  assertEquals(server.overloads.length, 1);
});

programTest("200 clients and throwing handlers at 64 descriptors do not end the server", async () => {
  await floodSmallServer({ "main.ts": SMALL_SERVER });
});

if (Deno.build.os === "linux") {
  programTest("200 clients at 64 descriptors wait in the backlog where the descriptors can be known", async () => {
    await floodSmallServer({ "main.ts": SMALL_SERVER }, "--allow-all", 0);
  });
}

programTest("200 clients and throwing handlers of another file at 64 descriptors do not end the server", async () => {
  await floodSmallServer({ "main.ts": SMALL_SERVER_OF_TWO_FILES, "handler.ts": HANDLER_FILE });
});

/** Expects so many reports of the exhaustion. */
async function floodSmallServer(files: Record<string, string>, flag = "--allow-net", reports = 1): Promise<void> {
  const folder = await Deno.makeTempDir();
  for (const [name, text] of Object.entries(files)) await Deno.writeTextFile(`${folder}/${name}`, text);
  const run = `ulimit -n 64; exec "$0" run --no-config "$@"`;
  const server = new Deno.Command("bash", {
    args: ["-c", run, Deno.execPath(), flag, `${folder}/main.ts`],
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
  assertEquals(told.length, reports);
  await server.status;
  await Deno.remove(folder, { recursive: true });
}

/** Prints how many connections it would serve. */
const ASKED_SERVER = `
import { StreamRequestHandler, TcpServer } from ${JSON.stringify(import.meta.resolve("../mod.ts"))};
class Idle extends StreamRequestHandler {
  override handle() {}
}
await using server = new TcpServer({ port: 0 }, Idle, JSON.parse(Deno.args[0] ?? "{}"));
server.listen();
console.log(server.maxConnections);
`;

/** What a server finds in a process that may open `descriptors` files. */
async function askMaxConnections(descriptors: number, flags: string[], options = "{}"): Promise<string> {
  const file = await Deno.makeTempFile({ suffix: ".ts" });
  await Deno.writeTextFile(file, ASKED_SERVER);
  const run = `ulimit -n ${descriptors}; exec "$0" run --no-config "$@"`;
  const { stdout, stderr } = await new Deno.Command("bash", {
    args: ["-c", run, Deno.execPath(), ...flags, file, options],
    env: { DENO_NO_UPDATE_CHECK: "1", NO_COLOR: "1" },
  }).output();
  await Deno.remove(file);
  const decoder = new TextDecoder();
  return `${decoder.decode(stdout)}${decoder.decode(stderr)}`;
}

programTest(
  "maxConnections leaves descriptors to the runtime and to the program, where they can be known",
  async () => {
    const isKnown = Deno.build.os === "linux";
    assertEquals(await askMaxConnections(64, ["--allow-all"]), isKnown ? "28\n" : "Infinity\n");
    assertEquals(await askMaxConnections(1024, ["--allow-all"]), isKnown ? "868\n" : "Infinity\n");
  },
);

programTest("maxConnections is Infinity where the descriptors cannot be known, and what the option says", async () => {
  assertEquals(await askMaxConnections(64, ["--allow-net"]), "Infinity\n");
  assertEquals(await askMaxConnections(64, ["--allow-net", "--allow-read"]), "Infinity\n");
  assertEquals(await askMaxConnections(64, ["--allow-all"], '{ "maxConnections": 1000 }'), "1000\n");
});

/** Connects and resets, before anybody can accept. */
const RESETS = `
import socket, struct, sys
for _ in range(100):
    client = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()
`;

programTest("clients that reset before they are accepted do not end the server", async () => {
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
