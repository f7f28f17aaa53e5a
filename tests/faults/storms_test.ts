/**
 * The faults of HAZARDS, caused for real: a server in a process of its own, and
 * clients that mean it no good. `deno task soak` causes them by the thousand.
 */

import { assert, assertEquals, assertMatch } from "../../deps.ts";
import { connect, type SocketStream } from "../../mod.ts";
import { MEMORY_SLACK, ping, Siege } from "./siege.ts";
import { Program } from "../programs.ts";
import { peerTest, programTest, scaled } from "../testing.ts";

const RESETS_OF_EACH = scaled(100, 3_400);
const DRIPPING = scaled(200, 5_000);
const DEAF = scaled(20, 100);

/** More than what a connection takes while it is open. */
const CONNECTION_BYTES = 50_000;

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

peerTest(
  ["python3"],
  "200 clients at 64 descriptors: one report, no spin, and service again when they leave",
  async () => {
    await using siege = new Siege({}, 64);
    await siege.order("hold", 200);
    await siege.server.complained("Cannot accept connections on ");
    const before = siege.holdings().cpuSeconds;
    await new Promise((resolve) => setTimeout(resolve, 1_000)); // What it spends in a second is what is asked for.
    const spent = siege.holdings().cpuSeconds - before;
    assert(spent < 0.5, `${spent} s of processor time in a second of waiting`);
    await siege.order("leave", 0);
    await siege.assertServes();
    assertEquals((await siege.stats()).overloads, 1);
    assertMatch(siege.server.stderr, /^[^\n]*Too many open files[^\n]*\n$/);
  },
);

peerTest(
  ["python3"],
  "200 clients at 64 descriptors with maxConnections below it: nothing happens at all",
  async () => {
    await using siege = new Siege({ maxConnections: 20 }, 64);
    await siege.order("hold", 200);
    await siege.until("20 clients", ({ active }) => active === 20);
    assertEquals((await siege.stats()).accepted, 20);
    await siege.order("leave", 0);
    await siege.assertServes();
    assertEquals((await siege.stats()).overloads, 0);
    assertEquals(siege.server.stderr, "");
  },
);

peerTest(["python3"], `a storm of ${RESETS_OF_EACH * 3} resets: before accept, in read, in write`, async () => {
  await using siege = new Siege({});
  const phases = ["reset_before_accept", "reset_in_read", "reset_in_write"];
  for (const phase of phases) await siege.order(phase, 50); // What it makes once, it has made by then.
  await siege.until(
    "the first ones to be gone",
    ({ active, accepted, lost }) => active === 0 && accepted + lost >= 150,
  );
  const before = await siege.holdingsWith(0);
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
  const { aborted, lost } = await siege.stats();
  assert(aborted >= 2 * (RESETS_OF_EACH + 50) && lost > 0, `${aborted} in read and write, ${lost} before accept`);
  await siege.assertAsBefore(before);
});

peerTest(
  ["python3"],
  `a storm of ${DRIPPING} clients that drip a byte now and then: closed in time, nobody else is`,
  async () => {
    const timeout = 1_500;
    await using siege = new Siege({ timeout });
    await siege.assertServes();
    await using client = await siege.dial();
    await ping(client, "before");
    const before = await siege.holdingsWith(1);
    const dripping = siege.order("drip", DRIPPING);
    const pings = await pingUntil(client, dripping);
    const longest = Number(await dripping) * 1_000;
    // A byte every 0.2 s would prolong it for ever.
    assert(longest >= timeout && longest < 5 * timeout, `one lasted ${longest} ms, and the timeout is ${timeout} ms`);
    assert(pings > 2, `${pings} pings were answered meanwhile`);
    assertEquals((await siege.stats()).timedOut, DRIPPING);
    assertEquals((await siege.stats()).active, 1);
    await client[Symbol.asyncDispose]();
    // The runtime keeps for a while what so many connections took at once.
    const slack = MEMORY_SLACK + DRIPPING * CONNECTION_BYTES;
    await siege.assertAsBefore(before, slack);
  },
);

peerTest(
  ["python3"],
  `a storm of ${DEAF} clients that ask for a gigabyte and never read: memory is flat, others are served`,
  async () => {
    await using siege = new Siege({ timeout: 1_000 });
    await siege.assertServes();
    await using client = await siege.dial();
    await ping(client, "before");
    const before = await siege.holdingsWith(1);
    await siege.order("deaf", DEAF);
    let most = 0;
    const closed = siege.until("all to be closed", ({ timedOut }) => {
      most = Math.max(most, siege.holdings().residentBytes);
      return timedOut === DEAF;
    });
    const pings = await pingUntil(client, closed);
    assert(pings > 2, `${pings} pings were answered meanwhile`);
    const grown = most - before.residentBytes;
    assert(grown < MEMORY_SLACK, `the server has grown by ${grown} bytes`);
    await client[Symbol.asyncDispose]();
    await siege.assertAsBefore(before);
  },
);

programTest("a line of 100 MB is refused with LimitOverrunError, can be skipped, and takes no memory", async () => {
  await using siege = new Siege({});
  await siege.assertServes();
  const before = await siege.holdingsWith(0);
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

/** Prints by how many bytes the heap has grown from 2,000 calls of handleRequest() that nobody came for. */
const POLLS = `
import { StreamRequestHandler, TcpServer } from ${JSON.stringify(import.meta.resolve("../../mod.ts"))};
class Idle extends StreamRequestHandler { handle() {} }
await using server = new TcpServer({ port: 0 }, Idle);
server.listen();
async function poll(count) {
  for (let polled = 0; polled < count; polled++) await server.handleRequest({ timeout: 0.1 });
  gc();
  return Deno.memoryUsage().heapUsed;
}
const before = await poll(100);
console.log(await poll(2_000) - before);
`;

programTest("a server that is polled leaves nothing on the heap", async () => {
  const file = await Deno.makeTempFile({ suffix: ".js" });
  await Deno.writeTextFile(file, POLLS);
  const args = ["run", "--no-config", "--v8-flags=--expose-gc", "--allow-net=127.0.0.1", file];
  await using program = Program.start(Deno.execPath(), args);
  const { stdout, stderr } = await program.ended();
  await Deno.remove(file);
  assert(stdout !== "" && Number(stdout) < 500_000, `${stdout} bytes ${stderr}`); // 600 bytes of each were 1.2 MB.
});
