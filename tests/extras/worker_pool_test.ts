/** WorkerPool: one port for several threads, their ends and their replacements. */

import { WorkerPool } from "../../extras/worker_pool.ts";
import { connect, type SocketStream, StreamRequestHandler, TcpServer } from "../../mod.ts";
import { assert, assertEquals, assertMatch, assertRejects, assertThrows } from "../../deps.ts";
import { freePort, Program, programTestIn } from "../programs.ts";
import { poolTest, programTest, rejectionOf, scaled, until } from "../testing.ts";
import { makePool, type NotedPool } from "./pool_program.ts";

/** Longer than anything takes on a busy machine, the check of the workers' types included; a test that passes does not wait for it. */
const PATIENCE_MS = 60_000;

const SCRIPT = new URL("pool_program.ts", import.meta.url).pathname;

class Unused extends StreamRequestHandler {
  override handle() {}
}

const makeUnused = (address: { port: number }) => new TcpServer(address, Unused);

/** Starts a pool whose workers all serve when this resolves; `await using` shuts it down. */
async function startPool(workers: number) {
  const pool = makePool(workers);
  const { port } = await pool.listen();
  const served = pool.serveForever();
  await until(() => pool.activeWorkers === workers, PATIENCE_MS);
  const end = async () => {
    const report = await pool.shutdown();
    await served;
    return report;
  };
  return { pool, port, served, end, [Symbol.asyncDispose]: () => end().then(() => {}, () => {}) };
}

/** Starts the pool as a program. */
function startProgram(args: string[], permissions = ["--allow-net", "--allow-read"]): Program {
  return Program.start(Deno.execPath(), ["run", "--no-prompt", ...permissions, SCRIPT, ...args]);
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
  assertEquals(echoed.join(" "), command);
  return Number(number);
}

/** Dials until each of the numbers serves a client. */
async function dialAll(port: number, numbers: number[]): Promise<Client[]> {
  const clients: Client[] = [];
  while (!numbers.every((number) => clients.some((client) => client.number === number))) {
    // Many at once, as an idle worker takes all that come one by one.
    clients.push(...await Promise.all(Array.from({ length: 10 }, () => dial(port))));
    assert(clients.length < 2_000, `2,000 clients were served by ${new Set(clients.map(({ number }) => number)).size}`);
  }
  return clients;
}

/** A client of worker `number`. */
function clientOf(clients: Client[], number: number): SocketStream {
  const client = clients.find((client) => client.number === number);
  assert(client !== undefined);
  return client.stream;
}

function closeAll(clients: Client[]): void {
  for (const { stream } of clients) stream.close();
}

/** Waits until the server has hung up. */
async function hangUp(stream: SocketStream): Promise<void> {
  assertEquals(await stream.readLine().catch(() => null), null);
  stream.close();
}

/** Runs `run` with timers whose milliseconds `change` changes; "now" calls back at once. */
async function withTimers(change: (ms: number) => number | "now", run: () => void | Promise<void>): Promise<void> {
  const { setTimeout } = globalThis;
  const changed = (callback: () => void, ms = 0) => {
    const wait = change(ms);
    if (wait === "now") callback();
    return setTimeout(wait === "now" ? () => {} : callback, wait === "now" ? 0 : wait);
  };
  globalThis.setTimeout = Object.assign(changed, setTimeout);
  try {
    await run();
  } finally {
    globalThis.setTimeout = setTimeout;
  }
}

/** No back-off takes its time. */
const withoutBackoff = (ms: number) => ms >= 100 && ms <= 10_000 ? 0 : ms;

// --- Serving ------------------------------------------------------------------

poolTest("workers share one port and one queue, and their counts are added up", async () => {
  await using started = await startPool(3);
  const { pool, port } = started;
  assertEquals([pool.isWorker, pool.address.port], [false, port]);
  const clients = await dialAll(port, [1, 2, 3]);
  assertEquals(new Set(clients.map(({ number }) => number)), new Set([1, 2, 3]));
  await until(() => pool.stats.active === clients.length);
  closeAll(clients);
  const report = await started.end();
  assertEquals([report.cut, report.hung], [[], []]);
  const { accepted, active, bytesRead, errors } = pool.stats;
  const sent = "who\n".length * clients.length;
  assertEquals([accepted, active, bytesRead, errors], [clients.length, 0, sent, 0]);
  assertEquals([pool.activeWorkers, pool.crashes], [0, []]);
});

poolTest("clients that come before the workers do are served", async () => {
  await using pool = makePool(1);
  const { port } = await pool.listen();
  const early = Array.from({ length: 20 }, () => dial(port));
  const served = pool.serveForever();
  const clients = await Promise.all(early);
  assertEquals(clients.map(({ number }) => number), clients.map(() => 1));
  closeAll(clients);
  await pool.shutdown();
  await served;
});

poolTest("a worker that computes holds up its own clients only", async () => {
  await using started = await startPool(2);
  const { port } = started;
  const clients = await dialAll(port, [1, 2]);
  let isComputing = true;
  const computed = ask(clientOf(clients, 1), "compute 1000").then(() => isComputing = false);
  // All that come meanwhile are served by the other.
  for (let count = 0; isComputing && count < 20; count++) {
    const client = await dial(port);
    if (isComputing) assertEquals(client.number, 2);
    client.stream.close();
  }
  await computed;
  closeAll(clients);
  await started.end();
});

/** Starts `program` in `folder` with permissions for `host` and for the files that it loads. */
async function startModule(folder: string, program: string, host: string): Promise<Program> {
  const root = new URL("../../", import.meta.url);
  const path = `${folder}/server.ts`;
  const pool = "@socketserver/socketserver/worker_pool";
  const code = program.replace(pool, `${root}extras/worker_pool.ts`).replace(/@socketserver.*(?=")/, `${root}mod.ts`);
  await Deno.writeTextFile(path, code);
  const files = [path, `${root.pathname}mod.ts`, `${root.pathname}extras/worker_pool.ts`];
  return Program.start(Deno.execPath(), ["run", `--allow-net=${host}`, `--allow-read=${files}`, path]);
}

programTestIn("a pool needs no permission for the address of the name that it listens on", async (folder) => {
  const port = freePort();
  const program = `
    import { StreamRequestHandler, TcpServer } from "@socketserver/socketserver";
    import { WorkerPool } from "@socketserver/socketserver/worker_pool";
    class Hello extends StreamRequestHandler {
      override handle() {
        return this.request.send("hello\\n");
      }
    }
    const options = { hostname: "localhost", port: ${port}, workers: 2 };
    await new WorkerPool(import.meta.url, async (address) => new TcpServer(address, Hello), options).serveForever();
  `;
  await using server = await startModule(folder, program, `localhost:${port}`);
  await using client = await connect({ hostname: "localhost", port, retries: Infinity, timeout: PATIENCE_MS });
  assertEquals([await client.readLine(), server.stderr], ["hello", ""]);
});

programTestIn("the sample of the documentation serves with the permissions that it names", async (folder) => {
  const documentation = await Deno.readTextFile(new URL("../../extras/worker_pool.ts", import.meta.url));
  const [, sample = ""] = /^ \* ```ts ignore\n(.*?)^ \* ```/ms.exec(documentation) ?? [];
  const port = freePort();
  const program = sample.replaceAll(/^ \* ?/gm, "").replace("8009", String(port));
  await using server = await startModule(folder, program, `127.0.0.1:${port}`);
  await using client = await connect({ port, retries: Infinity, timeout: PATIENCE_MS });
  await client.writeFrame("abc");
  assertEquals(await client.readLine(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  server.kill("SIGTERM");
  const { code, stderr } = await server.ended();
  assertEquals([code, stderr], [0, ""]);
});

// --- Workers that end ---------------------------------------------------------

const EXITED = /^its thread ended, by Deno\.exit\(\) or self\.close\(\)$/;

/** Ways to end; the counts of a worker that reports its error are exact. */
const CRASHES = [
  { command: "throw", reason: /^TypeError: thrown by a\\ntimer\n {4}at .*pool_program\.ts:\d+:\d+/, isExact: true },
  { command: "reject", reason: /^TypeError: not awaited\n {4}at .*pool_program\.ts:\d+:\d+/, isExact: true },
  { command: "string", reason: /^no error$/, isExact: true },
  { command: "close", reason: EXITED, isExact: false },
  { command: "exit", reason: EXITED, isExact: false },
];

poolTest("a worker that ends is replaced, and the others' clients notice nothing", async (t) => {
  for (const { command, reason, isExact } of CRASHES) {
    await t.step(command, async () => {
      await using started = await startPool(2);
      const { pool, port } = started;
      const clients = await dialAll(port, [1, 2]);
      await ask(clientOf(clients, 1), `crash ${command}`);
      for (const { stream, number } of clients) if (number === 1) await hangUp(stream);
      const others = clients.filter(({ number }) => number === 2);
      const newcomers = await Promise.all(Array.from({ length: 10 }, () => dial(port)));
      for (const { stream } of [...others, ...newcomers]) await ask(stream, "still here");
      await until(() => pool.activeWorkers === 2, PATIENCE_MS);
      const replaced = await dialAll(port, [1, 2]);
      const [crash] = pool.crashes;
      assertEquals([pool.crashes.length, crash?.number, crash?.delay], [1, 1, 100]);
      assertMatch(crash?.reason ?? "", reason);
      closeAll([...others, ...newcomers, ...replaced]);
      await started.end();
      const { length } = [...clients, ...newcomers, ...replaced];
      if (isExact) assertEquals(pool.stats.accepted, length);
    });
  }
});

poolTest("with one worker, clients wait in the queue while it is replaced, and none counts as active", async () => {
  await using started = await startPool(1);
  const { pool, port } = started;
  const [victim, other] = [await dial(port), await dial(port)];
  await until(() => pool.stats.active === 2);
  await ask(victim.stream, "crash throw");
  await until(() => pool.crashes.length === 1);
  assertEquals([pool.activeWorkers, pool.stats.active], [0, 0]);
  const waiting = await Promise.all(Array.from({ length: 10 }, () => dial(port)));
  closeAll([victim, other, ...waiting]);
  await started.end();
  assertEquals([pool.stats.accepted, pool.stats.active], [12, 0]);
});

poolTest("each further end doubles the back-off up to 10 s; one that has served for 30 s resets it", async () => {
  await using started = await startPool(1);
  const { pool, port } = started;
  const expected = [100, 200, 400, 800, 1_600, 3_200, 6_400, 10_000, 10_000, 100];
  const { now } = performance;
  let passed = 0;
  performance.now = () => now.call(performance) + passed;
  try {
    // A back-off is over at once.
    await withTimers(withoutBackoff, async () => {
      for (let count = 1; count <= expected.length; count++) {
        const { stream } = await dial(port);
        if (count === expected.length) passed = 30_000;
        await ask(stream, "crash throw");
        await until(() => pool.crashes.length === count, PATIENCE_MS);
        stream.close();
      }
    });
  } finally {
    performance.now = now;
  }
  assertEquals(pool.crashes.map(({ delay }) => delay), expected);
  await started.end();
});

poolTest("a shutdown does not wait for the end of a back-off", async () => {
  await using started = await startPool(1);
  const { port } = started;
  const { stream } = await dial(port);
  const waits = Promise.withResolvers<void>();
  /** Longer than any test waits. */
  const never = 2_147_483_647;
  await withTimers((ms) => {
    if (ms !== 100) return ms;
    waits.resolve();
    return never;
  }, async () => {
    await ask(stream, "crash throw");
    await waits.promise;
  });
  await started.end();
  stream.close();
});

const ENDS = scaled(5, 100);

programTest("a storm of workers that end leaves no descriptor behind", async () => {
  /** Another process has to look, as reading /proc takes all permissions. */
  const descriptors = async () => {
    const look = new Deno.Command("sh", { args: ["-c", `ls /proc/${Deno.pid}/fd | wc -l`] });
    return Number(new TextDecoder().decode((await look.output()).stdout));
  };
  await using started = await startPool(1);
  const { pool, port } = started;
  const crash = async () => {
    const { stream } = await dial(port);
    const count = pool.crashes.length;
    await ask(stream, "crash reject");
    await until(() => pool.crashes.length > count);
    stream.close();
    closeAll([await dial(port)]);
  };
  await withTimers(withoutBackoff, async () => {
    await crash(); // What the runtime opens at the first time is there now.
    const before = await descriptors();
    for (let count = ENDS; count > 0; count--) await crash();
    // The last client's are closed a moment later.
    let after = await descriptors();
    for (let looks = 0; looks < 100 && after > before; looks++) after = await descriptors();
    assert(after <= before, `${before} descriptors before ${ENDS} ends, and ${after} after them`);
  });
  await started.end();
});

poolTest("an end is printed as one sentence with the error of the worker", () => {
  const pool = new WorkerPool("file:///server.ts", makeUnused, { port: 0 });
  const printed: unknown[][] = [];
  const print = console.error;
  console.error = (...data) => void printed.push(data);
  try {
    pool.handleCrash(2, "TypeError: 100% wrong", 200);
    pool.handleCrash(2, "TypeError: oh", undefined);
  } finally {
    console.error = print;
  }
  assertEquals(printed, [
    ["%s", "Worker 2 ended, another starts in 200 ms: TypeError: 100% wrong"],
    ["%s", "Worker 2 ended: TypeError: oh"],
  ]);
});

poolTest("an error that handleCrash() throws closes the pool, and serveForever() rejects with it", async () => {
  await using started = await startPool(2);
  const { pool, port } = started;
  pool.handleCrash = () => {
    throw new TypeError("enough");
  };
  const victim = await dial(port);
  await ask(victim.stream, "crash throw");
  assertEquals((await rejectionOf(started.served)).message, "enough");
  victim.stream.close();
  Deno.listen({ port }).close();
});

// --- The end ------------------------------------------------------------------

poolTest("a shutdown under load answers all that was sent before it, and frees the port", async () => {
  await using started = await startPool(2);
  const { pool, port } = started;
  const clients = await dialAll(port, [1, 2]);
  for (const { stream } of clients) await stream.send("compute 5\n");
  const backlog = await Promise.all(Array.from({ length: 50 }, async () => {
    const stream = await connect({ port, timeout: PATIENCE_MS });
    await stream.send("compute 5\n");
    return stream;
  }));
  const streams = [...clients.map(({ stream }) => stream), ...backlog];
  const [first, second] = [pool.shutdown(), pool.shutdown()];
  for (const stream of streams) {
    assertMatch(await stream.readLine() ?? "nothing", /^[12] compute 5$/);
    await hangUp(stream);
  }
  const report = await first;
  assertEquals(await second, report);
  assertEquals([report.finished, report.cut, report.hung], [streams.length, [], []]);
  await started.served;
  assertEquals(pool.stats.accepted, streams.length);
  Deno.listen({ port }).close();
});

poolTest("grace cuts off those that stall, and the report names them", async () => {
  await using started = await startPool(2);
  const { pool, port } = started;
  const clients = await dialAll(port, [1, 2]);
  for (const { stream } of clients) await stream.send("stall\n");
  await until(() => pool.stats.bytesRead === clients.length * "who\nstall\n".length);
  const { cut, finished, hung } = await pool.shutdown({ grace: 0 });
  await started.served;
  const addresses = clients.map(({ stream }) => stream.localAddress);
  const portsOf = (all: readonly Deno.Addr[]) => all.map((address) => "port" in address ? address.port : 0).sort();
  assertEquals([portsOf(cut), finished, hung], [portsOf(addresses), 0, []]);
  closeAll(clients);
});

poolTest("shutdown() of a handler's server ends the whole pool", async () => {
  await using started = await startPool(2);
  const { pool, port } = started;
  const { stream } = await dial(port);
  await ask(stream, "shutdown");
  await started.served;
  await hangUp(stream);
  assertEquals((await pool.shutdown()).cut, []);
});

programTest("shutdown() and close() of a worker's pool end the whole pool", async (t) => {
  for (const command of ["pool-shutdown", "pool-close"]) {
    await t.step(command, async () => {
      await using program = startProgram(["2"]);
      const port = Number(await program.printed(/^\d+\n/));
      const stream = await connect({ port, timeout: PATIENCE_MS });
      await stream.send(`${command}\n`);
      assertEquals((await stream.readLine().catch(() => null))?.slice(2) ?? command, command);
      await hangUp(stream);
      program.kill("SIGTERM"); // It prints the report of the shutdown that is under way.
      assertMatch((await program.ended()).stdout, /"hung":\[\]/);
    });
  }
});

poolTest("shutdown() before the start, and while the workers start", async () => {
  const unused = makePool(2);
  const { finished, cut, hung } = await unused.shutdown();
  assertEquals([finished, cut, hung], [0, [], []]);
  await unused.serveForever();
  await assertRejects(() => unused.listen(), TypeError);

  const listening = makePool(2);
  const { port } = await listening.listen();
  await listening.shutdown();
  await assertRejects(() => listening.listen(), TypeError);
  Deno.listen({ port }).close();

  const starting = makePool(2);
  const served = starting.serveForever();
  await new Promise((resolve) => setTimeout(resolve)); // The threads are there, and load their module.
  assertEquals([(await starting.shutdown()).hung, starting.activeWorkers], [[], 0]);
  await served;
});

poolTest("close() cuts all clients off and frees the port", async () => {
  await using started = await startPool(2);
  const { pool, port } = started;
  await assertRejects(() => pool.serveForever(), Deno.errors.Busy);
  const { stream } = await dial(port);
  pool.close();
  await started.served;
  await hangUp(stream);
  Deno.listen({ port }).close();
});

poolTest("close() ends a shutdown that would wait for a handler without limit", async () => {
  await using started = await startPool(1);
  const { pool, port } = started;
  const { stream } = await dial(port);
  await stream.send("stall\n");
  await until(() => pool.stats.bytesRead === "who\nstall\n".length);
  const ended = pool.shutdown({ grace: Infinity });
  pool.close();
  const { cut, hung } = await ended;
  await started.served;
  assertEquals([cut.length, hung], [1, []]);
  await hangUp(stream);
});

poolTest("a worker that does not answer is given up 5 s after grace, or after close()", async (t) => {
  const ends = [
    { name: "shutdown()", waits: [15_000], end: (pool: NotedPool) => void pool.shutdown() },
    { name: "a short grace", waits: [5_100], end: (pool: NotedPool) => void pool.shutdown({ grace: 100 }) },
    {
      name: "a grace beyond all timers",
      waits: [2 ** 31 - 1],
      end: (pool: NotedPool) => void pool.shutdown({ grace: 1e12 }),
    },
    {
      name: "close() in a shutdown without limit",
      waits: [5_000],
      end: (pool: NotedPool) => (void pool.shutdown({ grace: Infinity }), pool.close()),
    },
  ];
  for (const { name, waits, end } of ends) {
    await t.step(name, async () => {
      await using started = await startPool(1);
      const { pool, port } = started;
      const { stream } = await dial(port);
      await stream.send("stall\n");
      const asked: number[] = [];
      await withTimers((ms) => {
        asked.push(ms);
        return "now"; // Before the worker can answer.
      }, () => end(pool));
      assertEquals((await pool.shutdown()).hung, [1]);
      assertEquals(asked, waits);
      await started.served;
      await hangUp(stream);
    });
  }
});

programTest("a worker that computes without end is given up after the grace, and named", async () => {
  await using program = startProgram(["2"]);
  const port = Number(await program.printed(/^\d+\n/));
  const clients = await dialAll(port, [1, 2]);
  await clientOf(clients, 2).send("hang\n");
  for (const { stream, number } of clients) if (number === 1) await ask(stream, "others are served");
  program.kill("SIGTERM");
  const { code, stdout } = await program.ended();
  assertEquals(code, 0);
  assertMatch(stdout, /"hung":\[2\]/);
  closeAll(clients);
});

programTest("a client that waits while the workers still start is served by a shutdown", async () => {
  using gate = Deno.listen({ port: 0 });
  await using program = startProgram(["1", "takes its time", String(gate.addr.port)]);
  using preparing = await gate.accept();
  const port = Number(await program.printed(/^\d+\n/));
  await using client = await connect({ port, timeout: PATIENCE_MS });
  await client.send("hello\n");
  program.kill("SIGTERM");
  await program.printed("stopping");
  await preparing.write(new Uint8Array(1));
  assertEquals(await client.readLine(), "1 hello");
  assertMatch((await program.ended()).stdout, /"finished":1,"cut":\[\]/);
});

// --- Mistakes -----------------------------------------------------------------

const MISTAKE = "the factory must return a StreamServer that listens on the address it is called with";

const FAILED_STARTS = [
  { mode: "throws", told: /^TypeError: Cannot start worker [12]: RangeError: there is no database$/ },
  { mode: "module is missing", told: /^TypeError: Cannot start worker [12]: Module not found "file:.*missing\.ts"/ },
  { mode: "module throws", told: /^TypeError: Cannot start worker [12]: TypeError: no configuration for port number$/ },
  {
    mode: "makes two pools",
    told: /^TypeError: Cannot start worker [12]: TypeError: Cannot make a second pool of file:/,
  },
  ...["ignores the port", "ignores loadBalanced", "makes a Unix server", "makes none"].map((mode) => ({
    mode,
    told: new RegExp(`^TypeError: Cannot start worker [12]: TypeError: ${MISTAKE}$`),
  })),
];

programTest("a worker that fails before it serves ends the start with one sentence", async (t) => {
  for (const { mode, told } of FAILED_STARTS) {
    await t.step(mode, async () => {
      await using program = startProgram(["2", mode]);
      const { code, stdout } = await program.ended();
      assertEquals(code, 1);
      const [, sentence = "", afterwards] = stdout.split("\n");
      assertMatch(sentence, told);
      assertEquals(afterwards, "closed, with 0 workers and a free port");
    });
  }
});

const UNREADABLE = [
  { name: "the module", permissions: ["--allow-net"], file: "pool_program.ts" },
  { name: "what it imports", permissions: ["--allow-net", `--allow-read=${SCRIPT}`], file: "worker_pool.ts" },
];

programTest("a worker that may not read its files fails the start, and the flag is named", async (t) => {
  for (const { name, permissions, file } of UNREADABLE) {
    await t.step(name, async () => {
      await using program = startProgram(["1"], permissions);
      const { code, stdout } = await program.ended();
      assertEquals(code, 1);
      assertMatch(stdout, /Cannot start worker 1: Requires read access to ".*", .* --allow-read flag\n/);
      assertMatch(stdout, new RegExp(`/${file}"`));
    });
  }
});

poolTest("a module that does not call serveForever() fails the start after 60 s", async () => {
  const pool = new WorkerPool(import.meta.resolve("../testing.ts"), makeUnused, { port: 0, workers: 1 });
  let failure: Promise<Error> | undefined;
  await withTimers((ms) => ms === 60_000 ? 0 : ms, async () => {
    failure = rejectionOf(pool.serveForever());
    await failure;
  });
  assertMatch(
    (await failure)?.message ?? "",
    /^Cannot start worker 1: its module did not call serveForever\(\) within/,
  );
});

poolTest("a port that is taken fails the start as that of a server does, and listen() may be tried again", async () => {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: freePort() });
  const pool = makePool(1, listener.addr.port);
  const error = await rejectionOf(pool.listen());
  listener.close();
  assert(error instanceof Deno.errors.AddrInUse);
  assertMatch(error.message, /^Cannot listen on 127\.0\.0\.1:\d+: address already in use; /);
  assertEquals((await pool.listen()).port, listener.addr.port);
  await pool.shutdown();
});

Deno.test("a worker has one pool, that of its own module", () => {
  const worker = "file:///server.ts";
  const make = (module: string) => new WorkerPool(module, makeUnused, { port: 0 });
  Reflect.set(globalThis, "name", `worker 1 of ${worker} on ::1:8009`);
  try {
    assertThrows(
      () => make("file:///other.ts"),
      TypeError,
      `Cannot make a pool of file:///other.ts in a worker of ${worker}`,
    );
    const pool = make(worker);
    assertEquals([pool.isWorker, pool.address.hostname, pool.address.port], [true, "::1", 8009]);
    assertThrows(() => make(worker), TypeError, "Cannot open a second pool");
  } finally {
    Reflect.deleteProperty(globalThis, "name");
  }
});

Deno.test("a pool's arguments are checked", async () => {
  const make = (options: { workers?: number; port?: number; hostname?: string }, module = import.meta.url) =>
    new WorkerPool(module, makeUnused, { port: 0, ...options });
  for (const workers of [0, -1, 1.5, NaN, Infinity]) assertThrows(() => make({ workers }), RangeError);
  assertThrows(() => make({ port: 65_536 }), RangeError);
  assertThrows(() => make({ hostname: "" }), Error);
  // @ts-expect-error Plain JavaScript may do it.
  assertThrows(() => make({ worker: 2 }), TypeError, '"worker"');
  assertThrows(() => make({}, "server.ts"), TypeError, "Invalid URL");
  assertThrows(() => make({}).address, TypeError, "call listen()");
  for (const grace of [-1, NaN]) assertThrows(() => make({}).shutdown({ grace }), RangeError);
  await make({}).shutdown();
});
