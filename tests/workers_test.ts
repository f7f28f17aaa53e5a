/** WorkerPool: one port for many threads, their crashes and their end. */

import { assert, assertEquals, assertMatch, assertRejects, assertThrows } from "../deps.ts";
import { connect, type SocketStream, StreamRequestHandler, TcpServer, UnixServer, WorkerPool } from "../mod.ts";
import { makePool, type NotedPool } from "./pool_server.ts";
import { freePort, Program, programTestIn } from "./programs.ts";
import { networkTest, poolTest, programTest, rejectionOf, until } from "./testing.ts";

/** Longer than anything takes on a busy machine, the check of the workers' types included; nothing that passes waits for it. */
const PATIENCE_MS = 60_000;

const SCRIPT = new URL("pool_server.ts", import.meta.url).pathname;

class Unused extends StreamRequestHandler {
  override handle() {}
}

/** Starts a pool; it serves with all its workers when this resolves. */
async function startPool(workers: number): Promise<{ pool: NotedPool; port: number; served: Promise<void> }> {
  const pool = makePool({ workers });
  const { port } = await pool.listen();
  const served = pool.serveForever();
  await until(() => pool.activeWorkers === workers, PATIENCE_MS);
  return { pool, port, served };
}

/** A client, and the number of the worker that serves it. */
interface Client {
  stream: SocketStream;
  number: number;
}

async function dial(port: number): Promise<Client> {
  const stream = await connect({ port, timeout: PATIENCE_MS });
  return { stream, number: await ask(stream, "who") };
}

/** Sends a command; resolves to the number of the worker that answers. */
async function ask(stream: SocketStream, command: string): Promise<number> {
  await stream.send(command + "\n");
  const [number, ...echoed] = (await stream.readLine() ?? "nobody").split(" ");
  assertEquals(echoed.join(" ").trim(), command);
  return Number(number);
}

/** Dials until each of the numbers serves somebody. */
async function dialAll(port: number, numbers: number[]): Promise<Client[]> {
  const clients: Client[] = [];
  while (!numbers.every((number) => clients.some((client) => client.number === number))) {
    // Many at once, as an idle worker takes all that come one by one.
    clients.push(...await Promise.all(Array.from({ length: 10 }, () => dial(port))));
    assert(clients.length < 2_000, `2,000 clients were served by ${new Set(clients.map(({ number }) => number)).size}`);
  }
  return clients;
}

function closeAll(clients: Client[]): void {
  for (const { stream } of clients) stream.close();
}

// --- Serving ------------------------------------------------------------------

poolTest("workers share one port, have a number each, and add their counts up", async () => {
  const { pool, port, served } = await startPool(3);
  assertEquals(pool.isWorker, false);
  assertEquals(pool.address.port, port);
  const clients = await dialAll(port, [1, 2, 3]);
  assertEquals(new Set(clients.map(({ number }) => number)), new Set([1, 2, 3]));
  await until(() => pool.stats.active === clients.length);
  closeAll(clients);
  const report = await pool.shutdown();
  await served;
  assertEquals([report.cut, report.hung], [[], []]);
  const { accepted, active, bytesRead, errors } = pool.stats;
  assertEquals({ accepted, active, bytesRead, errors }, {
    accepted: clients.length,
    active: 0,
    bytesRead: "who\n".length * clients.length,
    errors: 0,
  });
  assertEquals(pool.activeWorkers, 0);
  assertEquals(pool.crashes, []);
});

poolTest("clients that come before the workers do are served", async () => {
  await using pool = makePool({ workers: 1 });
  const { port } = await pool.listen();
  const early = Array.from({ length: 20 }, () => dial(port));
  const served = pool.serveForever();
  const clients = await Promise.all(early);
  assertEquals(clients.map(({ number }) => number), clients.map(() => 1));
  closeAll(clients);
  await pool.shutdown();
  await served;
});

poolTest("a worker that computes holds nobody up but its own clients", async () => {
  const { pool, port, served } = await startPool(2);
  const clients = await dialAll(port, [1, 2]);
  const busy = clients.find(({ number }) => number === 1);
  assert(busy !== undefined);
  let isComputing = true;
  const computed = ask(busy.stream, "compute 1000").then(() => isComputing = false);
  // All that come meanwhile are served by the other.
  for (let count = 0; isComputing && count < 20; count++) {
    const client = await dial(port);
    if (isComputing) assertEquals(client.number, 2);
    client.stream.close();
  }
  await computed;
  closeAll(clients);
  await pool.shutdown();
  await served;
});

// --- Crashes ------------------------------------------------------------------

const CRASHES = [
  { command: "crash throw", message: "thrown by a timer" },
  { command: "crash reject", message: "nobody awaits this" },
  { command: "crash close", message: "it has called self.close()" },
  { command: "crash exit", message: "it has ended itself" },
];

poolTest("a worker that crashes is told of and replaced; the others' clients see nothing", async (t) => {
  for (const { command, message } of CRASHES) {
    await t.step(command, async () => {
      const { pool, port, served } = await startPool(2);
      const clients = await dialAll(port, [1, 2]);
      const victim = clients.find(({ number }) => number === 1);
      assert(victim !== undefined);
      const others = clients.filter(({ number }) => number === 2);
      const lost = clients.length - others.length;
      await ask(victim.stream, command);
      for (const { stream, number } of clients) {
        if (number === 1) assertEquals(await stream.readLine().catch(() => null), null);
      }
      const newcomers = await Promise.all(Array.from({ length: 10 }, () => dial(port)));
      for (const { stream } of [...others, ...newcomers]) await ask(stream, "still here");
      await until(() => pool.activeWorkers === 2, PATIENCE_MS);
      const replaced = await dialAll(port, [1, 2]);
      assertEquals(pool.crashes.map(({ error, ...crash }) => ({ ...crash, message: error.message })), [
        { number: 1, lost, delay: 100, message },
      ]);
      closeAll([...clients, ...newcomers, ...replaced]);
      await pool.shutdown();
      await served;
      // What the crashed worker had counted is there, too.
      assertEquals(pool.stats.accepted, clients.length + newcomers.length + replaced.length);
    });
  }
});

poolTest("with one worker, clients wait while it is replaced", async () => {
  const { pool, port, served } = await startPool(1);
  const victim = await dial(port);
  await ask(victim.stream, "crash throw");
  await until(() => pool.crashes.length === 1);
  const waiting = await Promise.all(Array.from({ length: 10 }, () => dial(port)));
  closeAll([victim, ...waiting]);
  await pool.shutdown();
  await served;
  assertEquals(pool.stats.accepted, 11);
});

poolTest("a worker that crashes again and again is replaced after twice the time each", async () => {
  const { pool, port, served } = await startPool(1);
  for (let count = 1; count <= 3; count++) {
    const { stream } = await dial(port);
    await ask(stream, "crash throw");
    await until(() => pool.crashes.length === count);
    stream.close();
  }
  assertEquals(pool.crashes.map(({ delay }) => delay), [100, 200, 400]);
  await pool.shutdown(); // In its back-off.
  await served;
});

poolTest("nobody is active any more once a worker has crashed", async () => {
  const { pool, port, served } = await startPool(1);
  const [victim, other] = [await dial(port), await dial(port)];
  await until(() => pool.stats.active === 2);
  const active = Promise.withResolvers<number>();
  pool.handleCrash = () => active.resolve(pool.stats.active);
  await ask(victim.stream, "crash throw");
  assertEquals(await active.promise, 0);
  closeAll([victim, other]);
  await pool.shutdown();
  await served;
  assertEquals(pool.stats.active, 0);
});

poolTest("a handleCrash() that throws or rejects is printed, and the worker is replaced", async () => {
  const printed: unknown[][] = [];
  const print = console.error;
  console.error = (...data) => void printed.push(data);
  try {
    for (
      const fail of [() => {
        throw new TypeError("a bug in the hook");
      }, () => Promise.reject(new TypeError("a bug in the hook"))]
    ) {
      const { pool, port, served } = await startPool(1);
      pool.handleCrash = fail;
      const victim = await dial(port);
      await ask(victim.stream, "crash throw");
      assertEquals(await victim.stream.readLine().catch(() => null), null);
      closeAll([victim, await dial(port)]);
      await pool.shutdown();
      await served;
    }
  } finally {
    console.error = print;
  }
  assertEquals(printed.map(([sentence]) => sentence), Array(2).fill("Error in handleCrash():"));
});

/** Longer than any test waits. */
const NEVER_MS = 2_147_483_647;

poolTest("a shutdown does not wait for the end of a back-off", async () => {
  const { pool, port, served } = await startPool(1);
  const { stream } = await dial(port);
  const { setTimeout } = globalThis;
  const waits = Promise.withResolvers<number>();
  const endless = (callback: () => void, ms = 0) => {
    waits.resolve(ms);
    return setTimeout(callback, NEVER_MS);
  };
  pool.handleCrash = ({ delay }) => {
    assertEquals(delay, 100);
    globalThis.setTimeout = Object.assign(endless, setTimeout); // The next one is that of the back-off.
  };
  try {
    await ask(stream, "crash throw");
    assertEquals(await waits.promise, 100);
  } finally {
    globalThis.setTimeout = setTimeout;
  }
  await pool.shutdown();
  await served;
  stream.close();
});

programTest("a worker that crashes leaves no descriptor behind", async () => {
  /** Another process has to look, as reading /proc takes all permissions. */
  const descriptors = async () => {
    const look = new Deno.Command("sh", { args: ["-c", `ls /proc/${Deno.pid}/fd | wc -l`] });
    return Number(new TextDecoder().decode((await look.output()).stdout));
  };
  const { pool, port, served } = await startPool(1);
  const crash = async (count: number) => {
    const { stream } = await dial(port);
    await ask(stream, "crash throw");
    await until(() => pool.crashes.length === count);
    stream.close();
    await until(() => pool.activeWorkers === 1, PATIENCE_MS);
    closeAll([await dial(port)]);
  };
  await crash(1); // What the runtime opens at the first time is there now.
  const before = await descriptors();
  for (let count = 2; count <= 5; count++) await crash(count);
  // The last client's are closed a moment later.
  let after = await descriptors();
  for (let looks = 0; looks < 100 && after > before; looks++) after = await descriptors();
  assert(after <= before, `${before} descriptors before 4 crashes, and ${after} after them`);
  await pool.shutdown();
  await served;
});

poolTest("the default prints one sentence and what the worker did not catch", async () => {
  const printed: unknown[][] = [];
  const print = console.error;
  console.error = (...data) => void printed.push(data);
  try {
    const pool = new WorkerPool("file:///server.ts", () => new TcpServer({ port: 0 }, Unused));
    pool.handleCrash({ number: 2, error: new TypeError("oh"), lost: 3, delay: 200 });
    pool.handleCrash({ number: 2, error: new TypeError("oh"), lost: 0, delay: undefined });
  } finally {
    console.error = print;
  }
  await Promise.resolve();
  assertEquals(printed.map(([sentence]) => sentence), [
    "Worker 2 has crashed, and cuts off some 3 of its clients; another takes its place in 200 ms:",
    "Worker 2 has crashed:",
  ]);
});

// --- The end ------------------------------------------------------------------

poolTest("a shutdown under load answers all that were sent before it, and frees the port", async () => {
  const { pool, port, served } = await startPool(2);
  const clients = await dialAll(port, [1, 2]);
  const inFlight = clients.map(async ({ stream }) => {
    await stream.send("compute 5\n");
    return stream;
  });
  const backlog = Array.from({ length: 50 }, async () => {
    const stream = await connect({ port, timeout: PATIENCE_MS });
    await stream.send("compute 5\n");
    return stream;
  });
  const streams = await Promise.all([...inFlight, ...backlog]);
  const [first, second] = [pool.shutdown(), pool.shutdown()];
  for (const stream of streams) {
    assertMatch(await stream.readLine() ?? "nothing", /^[12] compute 5 $/);
    assertEquals(await stream.readLine(), null);
    stream.close();
  }
  const report = await first;
  assertEquals(await second, report);
  assertEquals([report.finished, report.cut, report.hung], [streams.length, [], []]);
  await served;
  assertEquals(pool.stats.accepted, streams.length);
  Deno.listen({ port }).close();
});

poolTest("grace cuts off those that stall, and the report names them", async () => {
  const { pool, port, served } = await startPool(2);
  const clients = await dialAll(port, [1, 2]);
  for (const { stream } of clients) await stream.send("stall\n");
  await until(() => pool.stats.bytesRead === clients.length * "who\nstall\n".length);
  const { cut, finished, hung } = await pool.shutdown({ grace: 0 });
  await served;
  const addresses = clients.map(({ stream }) => stream.localAddress);
  const portsOf = (all: readonly Deno.Addr[]) => all.map((address) => "port" in address ? address.port : 0).sort();
  assertEquals([portsOf(cut), finished, hung], [portsOf(addresses), 0, []]);
  closeAll(clients);
});

poolTest("shutdown() in a handler ends the whole pool", async () => {
  const { pool, port, served } = await startPool(2);
  const { stream } = await dial(port);
  await ask(stream, "shutdown");
  await served;
  assertEquals(await stream.readLine(), null);
  stream.close();
  assertEquals((await pool.shutdown()).cut, []);
});

poolTest("shutdown() before the start, and while the workers start", async () => {
  const unused = makePool({ workers: 2 });
  const { finished, cut, hung } = await unused.shutdown();
  assertEquals([finished, cut, hung], [0, [], []]);
  await unused.serveForever();
  await assertRejects(() => unused.listen(), TypeError);

  const listening = makePool({ workers: 2 });
  const { port } = await listening.listen();
  await listening.shutdown();
  await assertRejects(() => listening.listen(), TypeError);
  Deno.listen({ port }).close();

  const starting = makePool({ workers: 2 });
  const served = starting.serveForever();
  await starting.shutdown();
  await served;

  const aborted = makePool({ workers: 2 });
  await aborted.serveForever({ signal: AbortSignal.abort() });
});

poolTest("close() cuts all off, and a signal shuts down", async () => {
  const { pool, port, served } = await startPool(2);
  const { stream } = await dial(port);
  pool.close();
  await served;
  assertEquals(await stream.readLine().catch(() => null), null);
  stream.close();
  Deno.listen({ port }).close();

  const controller = new AbortController();
  const other = makePool({ workers: 1 });
  const ended = other.serveForever({ signal: controller.signal });
  await until(() => other.activeWorkers === 1, PATIENCE_MS);
  await assertRejects(() => other.serveForever(), Deno.errors.Busy);
  controller.abort();
  await ended;
});

poolTest("close() ends a shutdown that would wait for ever for a handler that stalls", async () => {
  const { pool, port, served } = await startPool(1);
  const { stream } = await dial(port);
  await stream.send("stall\n");
  await until(() => pool.stats.bytesRead === "who\nstall\n".length);
  const ended = pool.shutdown({ grace: Infinity });
  pool.close();
  const { cut, hung } = await ended;
  await served;
  assertEquals([cut.length, hung], [1, []]);
  assertEquals(await stream.readLine().catch(() => null), null);
  stream.close();
});

poolTest("close() gives a worker up after 5 s, also in a shutdown that would wait for ever", async () => {
  const { pool, port, served } = await startPool(1);
  const { stream } = await dial(port);
  await stream.send("stall\n");
  const ended = pool.shutdown({ grace: Infinity });
  const { setTimeout } = globalThis;
  const waits: number[] = [];
  const passed = (callback: () => void, ms = 0) => {
    waits.push(ms);
    callback(); // Before the worker can answer.
    return setTimeout(() => {}, 0);
  };
  globalThis.setTimeout = Object.assign(passed, setTimeout);
  try {
    pool.close();
  } finally {
    globalThis.setTimeout = setTimeout;
  }
  assertEquals((await ended).hung, [1]);
  assertEquals(waits, [5_000]);
  await served;
  assertEquals(await stream.readLine().catch(() => null), null);
  stream.close();
});

programTest("a worker that computes without end is given up after the grace, and named", async () => {
  await using program = Program.start(Deno.execPath(), ["run", "--allow-net", "--allow-read", SCRIPT, "2"]);
  const port = Number(await program.printed(/^\d+\n/));
  const clients = await dialAll(port, [1, 2]);
  const hung = clients.find(({ number }) => number === 2);
  assert(hung !== undefined);
  await hung.stream.send("hang\n");
  for (const { stream, number } of clients) if (number === 1) await ask(stream, "others are served");
  program.kill("SIGTERM");
  const { code, stdout } = await program.ended();
  assertEquals(code, 0);
  assertMatch(stdout, /"hung":\[2\]/);
  closeAll(clients);
});

programTest("where descriptors are short, workers are not started, or replaced when there are some", async () => {
  const start = (descriptors: number, workers: number) => {
    const command = `ulimit -n ${descriptors}; exec "$0" run -A "$1" ${workers}`;
    return Program.start("sh", ["-c", command, Deno.execPath(), SCRIPT]);
  };
  await using tooMany = start(64, 8);
  const { code, stdout } = await tooMany.ended();
  assertEquals(code, 1);
  assertMatch(stdout, /Cannot start 8 workers: there are too few descriptors; raise "ulimit -n" or ask for fewer/);

  await using program = start(100, 2);
  const port = Number(await program.printed(/^\d+\n/));
  const [first] = await dialAll(port, [1, 2]);
  assert(first !== undefined);
  // The limit of both together is below what the process may open: (100 - 32 - 2 * 12) * 7 / 8 / 2.
  await first.stream.send("limit\n");
  assertMatch(await first.stream.readLine() ?? "", /limit 19$/);
  await ask(first.stream, "crash throw");
  assertEquals(await first.stream.readLine().catch(() => null), null);
  const { stream } = await dial(port);
  await ask(stream, "served");
  stream.close();
  program.kill("SIGTERM");
  assertEquals((await program.ended()).code, 0);
});

programTestIn("a pool needs no permission for the address of the name that it listens on", async (folder) => {
  const [port, mod] = [freePort(), new URL("../mod.ts", import.meta.url)];
  const program = `
    import { StreamRequestHandler, TcpServer, WorkerPool } from ${JSON.stringify(mod.href)};
    class Hello extends StreamRequestHandler {
      override handle() {
        return this.request.send("hello\\n");
      }
    }
    const makeServer = () => new TcpServer({ hostname: "localhost", port: ${port} }, Hello);
    await new WorkerPool(import.meta.url, makeServer, { workers: 2 }).serveForever();
  `;
  await Deno.writeTextFile(`${folder}/main.ts`, program);
  const permissions = [`--allow-net=localhost:${port}`, `--allow-read=${folder},${mod.pathname}`];
  await using server = Program.start(Deno.execPath(), ["run", ...permissions, `${folder}/main.ts`]);
  await using client = await connect({ hostname: "localhost", port, retries: Infinity, timeout: PATIENCE_MS });
  assertEquals(await client.readLine(), "hello");
  assertEquals(server.stderr, "");
});

programTestIn("the program of the README serves on every core, with the permissions that it names", async (folder) => {
  const readme = await Deno.readTextFile(new URL("../README.md", import.meta.url));
  const [, program = ""] = /^```ts ignore\n\/\/ hash_server\.ts\n(.*?)^```/ms.exec(readme) ?? [];
  const [port, mod] = [freePort(), new URL("../mod.ts", import.meta.url)];
  await Deno.writeTextFile(
    `${folder}/hash_server.ts`,
    program.replace("8009", String(port)).replace("./mod.ts", mod.href),
  );
  const permissions = [`--allow-net=127.0.0.1:${port}`, `--allow-read=${folder}/hash_server.ts,${mod.pathname}`];
  await using server = Program.start(Deno.execPath(), ["run", ...permissions, `${folder}/hash_server.ts`]);
  await using client = await connect({ port, retries: Infinity, timeout: PATIENCE_MS });
  await client.writeFrame("abc");
  assertEquals(await client.readLine(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  server.kill("SIGTERM");
  const { code, stderr } = await server.ended();
  assertEquals([code, stderr], [0, ""]);
});

// --- Mistakes -----------------------------------------------------------------

networkTest("a pool that may not read its module names the flag, and opens nothing", async () => {
  const pool = makePool({ workers: 2 });
  const error = await rejectionOf(pool.serveForever());
  assert(error instanceof Deno.errors.NotCapable);
  assertMatch(error.message, /^Cannot start workers: .*--allow-read=\/.*\/tests\/pool_server\.ts$/);
  assertThrows(() => pool.address, TypeError);
});

poolTest("a port that is taken is told as by a server alone", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: freePort() });
  const { port } = listener.addr;
  const pool = makePool({ workers: 2 }, () => new TcpServer({ port }, Unused));
  const error = await rejectionOf(pool.serveForever());
  assert(error instanceof Deno.errors.AddrInUse);
  assertMatch(error.message, /^Cannot listen on 127\.0\.0\.1:\d+: the address is in use; /);
});

poolTest("servers whose address threads cannot share are refused", async () => {
  // @ts-expect-error Plain JavaScript may do it.
  const pool = makePool({}, () => new UnixServer({ path: "/tmp/unused.sock" }, Unused));
  const { message } = await rejectionOf(pool.listen());
  assertEquals(
    message,
    "makeServer must make a TcpServer or a TlsServer, as threads share no others: it has made UnixServer",
  );
  const reusing = makePool({}, () => new TcpServer({ port: 0, reusePort: true }, Unused));
  assertMatch((await rejectionOf(reusing.listen())).message, /^Cannot listen with reusePort: /);
});

poolTest("a module has one pool at a time, and may have another after it", async () => {
  await using first = makePool({ workers: 1 });
  await first.listen();
  const second = makePool({ workers: 1 });
  assertMatch((await rejectionOf(second.listen())).message, /^Cannot start a second pool of file:/);
  await first.shutdown();
  await second.listen();
  await second.shutdown();
});

programTest("a client that waits while the workers still start is served by a shutdown", async () => {
  const mode = "worker takes its time";
  await using program = Program.start(Deno.execPath(), ["run", "--allow-net", "--allow-read", SCRIPT, "1", mode]);
  const [, port] = await program.printed(/^(\d+)\n[^]*preparing/);
  await using client = await connect({ port: Number(port), timeout: PATIENCE_MS });
  await client.send("hello\n");
  program.kill("SIGTERM");
  assertEquals(await client.readLine(), "1 hello ");
  assertMatch((await program.ended()).stdout, /"finished":1,"cut":\[\]/);
});

programTest(
  "a worker that fails before it serves ends the start with one sentence, and the pool is closed",
  async () => {
    const failures = [
      {
        mode: "worker cannot make its server",
        sentence: /^RangeError: Cannot start worker [12]: there is no database$/,
      },
      {
        mode: "module is missing",
        sentence: /^TypeError: Cannot start worker [12]: Module not found "file:.*missing\.ts"/,
      },
    ];
    for (const { mode, sentence } of failures) {
      await using program = Program.start(Deno.execPath(), ["run", "--allow-net", "--allow-read", SCRIPT, "2", mode]);
      const { code, stdout } = await program.ended();
      assertEquals(code, 1);
      const [, told = "", afterwards] = stdout.split("\n");
      assertMatch(told, sentence);
      assertEquals(afterwards, "closed, with 0 workers and a free port");
    }
  },
);

programTest("a worker that may not read what its module imports names the flag", async () => {
  const permissions = ["--allow-net", `--allow-read=${SCRIPT}`];
  await using program = Program.start(Deno.execPath(), ["run", ...permissions, SCRIPT]);
  const { code, stdout } = await program.ended();
  assertEquals(code, 1);
  assertMatch(stdout, /NotCapable: Cannot start worker [12]: .*--allow-read=\S*\/pool_server\.ts,\S*\/mod\.ts\n/);
});

Deno.test("a pool's arguments are checked", () => {
  const make = () => new TcpServer({ port: 0 }, Unused);
  for (const workers of [0, -1, 1.5, NaN, Infinity]) {
    assertThrows(() => new WorkerPool(import.meta.url, make, { workers }), RangeError);
  }
  // @ts-expect-error Plain JavaScript may do it.
  assertThrows(() => new WorkerPool(import.meta.url, make, { worker: 2 }), TypeError, '"worker"');
  assertThrows(() => new WorkerPool("server.ts", make), TypeError, "import.meta.url");
  // @ts-expect-error Plain JavaScript may do it.
  assertThrows(() => new WorkerPool(import.meta.url), TypeError, "makeServer");
  assertThrows(() => new WorkerPool(import.meta.url, make).address, TypeError, "call listen()");
});
