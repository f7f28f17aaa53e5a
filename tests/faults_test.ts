/**
 * The faults of HAZARDS, caused for real: a server in a process of its own, and
 * clients that mean it no good. `deno task soak` causes them by the thousand.
 */

import { assert, assertEquals, assertMatch } from "../deps.ts";
import { connect, type ServerOptions, type ServerStats, type SocketStream } from "../mod.ts";
import { bytesOf, textOf } from "./fake_conn.ts";
import { Program, startPython } from "./programs.ts";
import { programTest, scaled } from "./testing.ts";

const RESETS_OF_EACH = scaled(100, 3_400);
const DRIPPING = scaled(200, 5_000);
const DEAF = scaled(20, 100);

/** What memory may grow by, in bytes: far less than what a leak of one of these storms would take. */
const MEMORY_SLACK = 100e6;

/** What a process holds. */
interface Holdings {
  descriptors: number;
  residentBytes: number;
  cpuSeconds: number;
}

const HOLDINGS =
  `ls /proc/$0/fd | wc -l; grep VmRSS /proc/$0/status; cut -d ' ' -f 14,15 /proc/$0/stat; getconf CLK_TCK`;

/** The server of fault_server.ts, and the peers of python/peers.py. */
class Siege implements AsyncDisposable {
  readonly server: Program;
  #peers: Program | undefined;
  #port: number | undefined;
  #answers = 0;
  #orders = 0;

  constructor(options: ServerOptions, descriptors?: number) {
    const script = new URL("fault_server.ts", import.meta.url).pathname;
    const limit = descriptors === undefined ? "" : `ulimit -n ${descriptors}; `;
    const run = `${limit}exec "$0" run --no-config --no-prompt --allow-net=127.0.0.1 "$1" "$2"`;
    this.server = Program.start("sh", ["-c", run, Deno.execPath(), script, JSON.stringify(options)]);
  }

  async port(): Promise<number> {
    return this.#port ??= Number((await this.server.printed(/127\.0\.0\.1:(\d+)\n/))[1]);
  }

  /** Lets the peers do something; resolves to what they say when it is done. */
  async order(what: string, count: number): Promise<string> {
    this.#peers ??= startPython("peers.py", [String(await this.port())]);
    await this.#peers.write(`${what} ${count}\n`);
    const answers = new RegExp(`^(?:done .*\\n){${this.#orders++}}done (.*)\\n`);
    return (await this.#peers.printed(answers))[1] ?? "";
  }

  async stats(): Promise<ServerStats> {
    await this.server.write("stats\n");
    const [line] = await this.server.printed(new RegExp(`\\{"answer":${++this.#answers},.*\\}\n`));
    return JSON.parse(line);
  }

  /** Asks for the stats until `condition` holds; resolves to how many looks that took. */
  async until(what: string, condition: (stats: ServerStats) => boolean, seconds = 30): Promise<void> {
    const deadline = performance.now() + seconds * 1_000;
    let stats = await this.stats();
    while (!condition(stats)) {
      assert(performance.now() < deadline, `waited in vain for ${what}: ${Deno.inspect(stats)}`);
      await new Promise((resolve) => setTimeout(resolve, 20));
      stats = await this.stats();
    }
  }

  /** What the server holds. Another process has to look, as reading /proc takes all permissions. */
  holdings(): Holdings {
    const look = new Deno.Command("sh", { args: ["-c", HOLDINGS, String(this.server.pid)] }).outputSync();
    const text = new TextDecoder().decode(look.stdout);
    const [, descriptors, kilobytes, user, system, ticks] = /^(\d+)\n\D*(\d+) kB\n(\d+) (\d+)\n(\d+)\n$/.exec(text) ??
      [];
    return {
      descriptors: Number(descriptors),
      residentBytes: Number(kilobytes) * 1_024,
      cpuSeconds: (Number(user) + Number(system)) / Number(ticks),
    };
  }

  /** A client that means well. */
  async dial(): Promise<SocketStream> {
    const client = await connect({ port: await this.port(), timeout: 20_000 });
    await client.send("echo\n");
    return client;
  }

  async assertServes(): Promise<void> {
    await using client = await this.dial();
    await ping(client, "still there");
  }

  /** Nothing is left of those who attacked. */
  async assertAsBefore(before: Holdings): Promise<void> {
    await this.until("the clients to be gone", ({ active }) => active === 0);
    const { descriptors, residentBytes } = this.holdings();
    assertEquals(descriptors, before.descriptors);
    const grown = residentBytes - before.residentBytes;
    assert(grown < MEMORY_SLACK, `the server has grown by ${grown} bytes`);
    assertEquals((await this.stats()).errors, 0);
    assertEquals(this.server.stderr, "");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#peers?.[Symbol.asyncDispose]();
    await this.server[Symbol.asyncDispose]();
  }
}

async function ping(client: SocketStream, text: string): Promise<void> {
  await client.send(text);
  assertEquals(textOf(await client.readExactly(bytesOf(text).length)), text);
}

/** Pings until `over` settles; resolves to the number of pings. */
async function pingUntil(client: SocketStream, over: Promise<unknown>): Promise<number> {
  let [count, isOver] = [0, false];
  const end = () => {
    isOver = true;
  };
  over.then(end, end);
  for (; !isOver; count++) {
    await ping(client, `ping ${count}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
  await over;
  return count;
}

programTest("200 clients at 64 descriptors: one report, no spin, and service again when they leave", async () => {
  await using siege = new Siege({}, 64);
  await siege.order("hold", 200);
  await siege.server.complained("Cannot accept connections for now");
  const before = siege.holdings().cpuSeconds;
  await new Promise((resolve) => setTimeout(resolve, 1_000)); // What it spends in a second is what is asked for.
  const spent = siege.holdings().cpuSeconds - before;
  assert(spent < 0.5, `${spent} s of processor time in a second of waiting`);
  await siege.order("leave", 0);
  await siege.assertServes();
  assertEquals((await siege.stats()).overloads, 1);
  assertMatch(siege.server.stderr, /^[^\n]*Too many open files[^\n]*\n$/);
});

programTest("200 clients at 64 descriptors with maxConnections below it: nothing happens at all", async () => {
  await using siege = new Siege({ maxConnections: 20 }, 64);
  await siege.order("hold", 200);
  await siege.until("20 clients", ({ active }) => active === 20);
  assertEquals((await siege.stats()).accepted, 20);
  await siege.order("leave", 0);
  await siege.assertServes();
  assertEquals((await siege.stats()).overloads, 0);
  assertEquals(siege.server.stderr, "");
});

programTest(`a storm of ${RESETS_OF_EACH * 3} resets: before accept, in read, in write`, async () => {
  await using siege = new Siege({});
  const phases = ["reset_before_accept", "reset_in_read", "reset_in_write"];
  for (const phase of phases) await siege.order(phase, 50); // What it makes once, it has made by then.
  await siege.until(
    "the first ones to be gone",
    ({ active, accepted, lost }) => active === 0 && accepted + lost >= 150,
  );
  const before = siege.holdings();
  await using client = await siege.dial();
  for (const phase of phases) {
    for (let done = 0; done < RESETS_OF_EACH; done += 200) {
      await siege.order(phase, Math.min(200, RESETS_OF_EACH - done));
      await ping(client, phase);
    }
  }
  await client[Symbol.asyncDispose]();
  const total = 3 * (RESETS_OF_EACH + 50) + 1;
  await siege.until("all of them", ({ accepted, lost }) => accepted + lost === total);
  await siege.assertAsBefore(before);
});

programTest(
  `a storm of ${DRIPPING} clients that drip a byte now and then: closed in time, nobody else is`,
  async () => {
    const timeout = 1_500;
    await using siege = new Siege({ timeout });
    await siege.assertServes();
    await using client = await siege.dial();
    await ping(client, "before");
    const before = siege.holdings();
    const dripping = siege.order("drip", DRIPPING);
    const pings = await pingUntil(client, dripping);
    const longest = Number(await dripping) * 1_000;
    // A byte every 0.2 s would prolong it for ever.
    assert(longest >= timeout && longest < 5 * timeout, `one lasted ${longest} ms, and the timeout is ${timeout} ms`);
    assert(pings > 20, `${pings} pings were answered meanwhile`);
    assertEquals((await siege.stats()).timedOut, DRIPPING);
    assertEquals((await siege.stats()).active, 1);
    await client[Symbol.asyncDispose]();
    await siege.assertAsBefore({ ...before, descriptors: before.descriptors - 1 });
  },
);

programTest(
  `a storm of ${DEAF} clients that ask for a gigabyte and never read: memory is flat, others are served`,
  async () => {
    await using siege = new Siege({ timeout: 1_000 });
    await siege.assertServes();
    await using client = await siege.dial();
    await ping(client, "before");
    const before = siege.holdings();
    await siege.order("deaf", DEAF);
    let most = 0;
    const closed = siege.until("all to be closed", ({ timedOut }) => {
      most = Math.max(most, siege.holdings().residentBytes);
      return timedOut === DEAF;
    });
    const pings = await pingUntil(client, closed);
    assert(pings > 20, `${pings} pings were answered meanwhile`);
    const grown = most - before.residentBytes;
    assert(grown < MEMORY_SLACK, `the server has grown by ${grown} bytes`);
    await client[Symbol.asyncDispose]();
    await siege.assertAsBefore({ ...before, descriptors: before.descriptors - 1 });
  },
);

programTest("a line of 100 MB is refused with LimitOverrunError, can be skipped, and takes no memory", async () => {
  await using siege = new Siege({});
  await siege.assertServes();
  const before = siege.holdings();
  await using client = await connect({ port: await siege.port(), timeout: 20_000 });
  await client.send("line\n");
  const answer = client.readLine();
  const part = new Uint8Array(1_000_000).fill(0x78);
  let most = 0;
  for (let sent = 0; sent < 100; sent++) {
    await client.send(part);
    if (sent % 10 === 0) most = Math.max(most, siege.holdings().residentBytes);
  }
  await client.send("\n");
  assertEquals(await answer, "100000000 bytes, over the limit");
  const grown = most - before.residentBytes;
  assert(grown < MEMORY_SLACK, `the server has grown by ${grown} bytes`);
  await client[Symbol.asyncDispose]();
  await siege.until("the client to be gone", ({ active }) => active === 0);
});
