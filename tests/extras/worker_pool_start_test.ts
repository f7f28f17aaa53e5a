/** WorkerPool: starts that fail, and mistakes. */

import { WorkerPool } from "../../extras/worker_pool.ts";
import { assert, assertEquals, assertMatch, assertThrows } from "../../deps.ts";
import { freePort } from "../programs.ts";
import { poolTest, programTest, rejectionOf, untilRefused } from "../testing.ts";
import { makePool } from "./pool_program.ts";
import { closeAll, dial, makeUnused, SCRIPT, startPool, startProgram, withTimers } from "./pools.ts";

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
  await withTimers((ms) => ms === 60_000 ? 0 : ms, async () => {
    const { message } = await rejectionOf(pool.serveForever());
    assertMatch(message, /^Cannot start worker 1: its module did not call serveForever\(\) within 60000 ms$/);
  });
});

poolTest("a worker that has begun to serve is not ended after 60 s", async () => {
  const limits: (() => void)[] = [];
  await withTimers((ms, callback) => {
    if (ms === 60_000) limits.push(callback);
    return ms;
  }, async () => {
    await using started = await startPool(1);
    for (const callback of limits) callback();
    closeAll([await dial(started.port)]);
    assertEquals([started.pool.activeWorkers, started.pool.crashes], [1, []]);
  });
  assert(limits.length > 0);
});

poolTest("a port that is taken fails the start as that of a server does, and listen() may be tried again", async () => {
  const port = await freePort();
  const listener = Deno.listen({ hostname: "127.0.0.1", port });
  const pool = makePool(1, port);
  const error = await rejectionOf(pool.listen());
  listener.close();
  assert(error instanceof Deno.errors.AddrInUse);
  assertMatch(error.message, /^Cannot listen on 127\.0\.0\.1:\d+: address already in use; /);
  await untilRefused(() => Deno.connect({ port }));
  assertEquals((await pool.listen()).port, port);
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
