/** WorkerPool: one port for several threads, their ends and their replacements. */

import { WorkerPool } from "../../extras/worker_pool.ts";
import { connect } from "../../mod.ts";
import { assert, assertEquals, assertMatch, assertRejects } from "../../deps.ts";
import { freePort, Program } from "../programs.ts";
import {
  poolTest,
  printedBy,
  programTest,
  programTestIn,
  rejectionOf,
  scaled,
  until,
  untilRefused,
} from "../testing.ts";
import { makePool, type NotedPool } from "./pool_program.ts";
import {
  ask,
  clientOf,
  closeAll,
  dial,
  dialAll,
  hangUp,
  makeUnused,
  PATIENCE_MS,
  startPool,
  startProgram,
  withoutBackoff,
  withTimers,
} from "./pools.ts";

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
  const pool = makePool(1);
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
  const port = await freePort();
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
  const port = await freePort();
  const program = sample.replaceAll(/^ \* ?/gm, "").replace("8009", String(port));
  await using server = await startModule(folder, program, `127.0.0.1:${port}`);
  await using client = await connect({ port, retries: Infinity, timeout: PATIENCE_MS });
  await client.send("hello\n");
  assertEquals(await client.readLine(), "hello");
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

poolTest("a worker goes on after an error that its module handles", async () => {
  await using started = await startPool(1);
  const { stream } = await dial(started.port);
  await ask(stream, "crash handled");
  await ask(stream, "still here");
  stream.close();
  await started.end();
  assertEquals(started.pool.crashes, []);
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

programTest("a new worker that cannot begin to serve is replaced, too", async () => {
  using gate = Deno.listen({ port: 0 });
  /** Lets the next worker begin, or fail. */
  const answer = async (byte: 0 | 1) => {
    using worker = await gate.accept();
    await worker.write(new Uint8Array([byte]));
  };
  await using program = startProgram(["1", "asks the test", String(gate.addr.port)]);
  await answer(1);
  const port = Number(await program.printed(/^\d+\n/));
  const victim = await dial(port);
  await ask(victim.stream, "crash reject");
  await answer(0);
  await program.complained("Worker 1 ended, another starts in 200 ms: RangeError: there is no database\n");
  await answer(1);
  closeAll([victim, await dial(port)]);
  program.kill("SIGTERM");
  assertEquals((await program.ended()).code, 0);
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
  await using program = startProgram(["1", "without back-off"]);
  const port = Number((await program.printed(/^(\d+)\n/))[1]);
  /** Another process has to look, as reading /proc takes all permissions. */
  const descriptors = async () => {
    const look = new Deno.Command("sh", { args: ["-c", `ls /proc/${program.pid}/fd | wc -l`] });
    return Number(new TextDecoder().decode((await look.output()).stdout));
  };
  const crash = async () => {
    const { stream } = await dial(port); // It waits in the kernel until the next worker serves.
    await ask(stream, "crash reject");
    await hangUp(stream);
  };
  await crash(); // What the runtime opens at the first time is there now.
  closeAll([await dial(port)]);
  const before = await descriptors();
  for (let count = ENDS; count > 0; count--) await crash();
  closeAll([await dial(port)]);
  // The last client's are closed a moment later.
  let after = await descriptors();
  for (let looks = 0; looks < 100 && after > before; looks++) after = await descriptors();
  assert(after <= before, `${before} descriptors before ${ENDS} ends, and ${after} after them`);
});

poolTest("an end is printed as one sentence with the error of the worker", async () => {
  const pool = new WorkerPool("file:///server.ts", makeUnused, { port: 0 });
  const printed = await printedBy(() => {
    pool.handleCrash(2, "TypeError: 100% wrong", 200);
    pool.handleCrash(2, "TypeError: oh", undefined);
  });
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
  await untilRefused(() => Deno.connect({ port }));
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
  await untilRefused(() => Deno.connect({ port }));
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

  const listening = makePool(2, await freePort());
  const { port } = await listening.listen();
  await listening.shutdown();
  await assertRejects(() => listening.listen(), TypeError);
  await untilRefused(() => Deno.connect({ port }));

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
  await untilRefused(() => Deno.connect({ port }));
});

poolTest("a shutdown that waits for a handler refuses new clients", async () => {
  await using started = await startPool(2);
  const { pool, port } = started;
  const { stream } = await dial(port);
  await stream.send("stall\n");
  await until(() => pool.stats.bytesRead === "who\nstall\n".length);
  const ended = pool.shutdown({ grace: Infinity });
  /** Connects again as soon as the pool has hung up. */
  const refusal = async () => {
    for (;;) {
      using conn = await Deno.connect({ port });
      await conn.read(new Uint8Array(1)).catch(() => null);
    }
  };
  assert(await rejectionOf(refusal()) instanceof Deno.errors.ConnectionRefused);
  pool.close();
  assertEquals((await ended).cut.length, 1);
  await hangUp(stream);
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
  await using program = startProgram(["1", "asks the test", String(gate.addr.port)]);
  using preparing = await gate.accept();
  const port = Number(await program.printed(/^\d+\n/));
  await using client = await connect({ port, timeout: PATIENCE_MS });
  await client.send("hello\n");
  program.kill("SIGTERM");
  await program.printed("stopping");
  await preparing.write(new Uint8Array([1]));
  assertEquals(await client.readLine(), "1 hello");
  assertMatch((await program.ended()).stdout, /"finished":1,"cut":\[\]/);
});
