/**
 * The works that are measured, and what ours is held to in each.
 *
 * @module
 */

import { ALL_PEERS, BARE, type Contender, LINE_PEERS, NODE, OURS, type Peer, type Transport } from "./servers.ts";
import type { FigureName, Goal, Topic } from "./statistics.ts";

/** What the load generator does to servers that it finds running. */
export interface Work extends Topic {
  /** Its options, but for where the server is and for how long. */
  load: Load;
  /** Ours is the first one. */
  contenders: Contender[];
  /** How many times as long as others it is measured, as what is seldom needs longer to be seen. */
  length?: number;
  /** Whether each round has new servers, as with figures that remember what was before. */
  isFresh?: boolean;
}

export interface Load {
  mode: "echo" | "idle" | "stream" | "udp";
  connections: number;
  /** Of a message; of all in a stream. */
  bytes: number;
  /** Of each answer that is not an echo. */
  reply?: number;
  /** Of each line in a message. */
  line?: number;
  /** After which a connection is replaced. */
  exchanges?: number;
  newcomers?: number;
  /** Seconds before the memory of idle connections is measured; 1 if it is not said. */
  silence?: number;
}

const SMALL = 64;
const LARGE = 16 * 1_024;
const HASHED = 64 * 1_024;
const DIGEST = 32;
/** Asked for at once, so that the load, which shares a core with a worker, takes little of it. */
const BATCH = 8;
const BUSY = 1_000;
const LINES = { count: 64, bytes: 32 };
const NEWCOMERS = 48;
const STREAM_BYTES = 2 ** 30;
const QUICK_STREAM_BYTES = 2 ** 27;
const IDLE = 10_000;
/** Seconds in which V8 sees that nothing happens, and gives back what it needed for new objects; 25 are enough. */
const LONG_SILENCE = 40;
/** What is seldom is measured so many times longer. */
const LONG = 2;

const ONE_WORKER = "1 worker";

/** The numbers of connections in "how it grows". */
const GROWTH = [1, 10, 100, 1_000, 5_000];
const QUICK_GROWTH = [1, 100, 1_000];
export const GROWTH_ID = "growth";

const MS = 1_000; // microseconds
const MIB = 2 ** 20; // bytes

function contender(
  peer: Peer,
  service: string,
  { name = peer.name, transport = "tcp" }: { name?: string; transport?: Transport } = {},
): Contender {
  return { name, peer, service, transport };
}

/** Ours against others, all over TCP. */
function among(service: string, peers: Peer[], theirs = "echo"): Contender[] {
  return [contender(OURS, service), ...peers.map((peer) => contender(peer, theirs))];
}

/** Ours is so many times as good. */
function times(figure: FigureName, target: number, against = BARE.name): Goal {
  return { figure, target, against, by: "ratio" };
}

function within(figure: FigureName, target: number): Goal {
  return { figure, target, by: "value" };
}

function echo(connections: number, bytes: number): Load {
  return { mode: "echo", connections, bytes };
}

const BASE = { unit: "replies/s", figures: ["rate", "cpu"] } satisfies Partial<Topic>;

/** Echo of both sizes over 50 connections, with the ratio to the bare loop that each is held to. */
function echoes(id: string, title: string, contenders: Contender[], [small, large]: [number, number]): [Work, Work] {
  const work = { ...BASE, contenders };
  return [
    { ...work, id: `${id}-64`, title: `${title}, 64 B`, load: echo(50, SMALL), goals: [times("rate", small)] },
    { ...work, id: `${id}-16k`, title: `${title}, 16 KiB`, load: echo(50, LARGE), goals: [times("rate", large)] },
  ];
}

function handlerEchoes(): Work[] {
  const works = echoes("recv", "echo, recv()", among("recv", ALL_PEERS), [0.95, 0.62]);
  works[1].goals.push(times("rate", 1.05, NODE.name));
  return [
    ...works,
    ...echoes("iterate", "echo, for await", among("iterate", [BARE]), [0.95, 0.62]),
    ...echoes("read", "echo, read(into)", among("read", [BARE]), [0.98, 0.97]),
    ...echoes("pipe", "echo, pipeTo()", among("pipe", [BARE]), [0.95, 0.95]),
  ];
}

function crowds(): Work[] {
  const work = { ...BASE, length: LONG };
  const crowd = (connections: number): Work => ({
    ...work,
    id: `crowd-${connections}`,
    title: `${connections} busy connections`,
    load: echo(connections, SMALL),
    contenders: among("recv", [BARE]),
    goals: [times("rate", 0.97), times("p999", 5)],
  });
  return [crowd(200), crowd(300), {
    ...work,
    id: "crowd-1000",
    title: "1,000 busy connections",
    load: echo(BUSY, SMALL),
    contenders: among("recv", ALL_PEERS),
    goals: [times("rate", 0.8), times("p999", 10), within("p999", 40 * MS), within("jain", 0.99)],
    figures: ["rate", "cpu", "p50", "p999", "jain", "slowestFirstReply"],
  }, {
    ...work,
    id: "newcomers",
    title: "newcomers while 1,000 are busy",
    load: { ...echo(BUSY, SMALL), newcomers: NEWCOMERS },
    contenders: among("recv", ALL_PEERS),
    goals: [times("newcomerMax", 1 / 0.7, NODE.name), times("newcomerP50", 5)],
    figures: ["newcomerP50", "newcomerMax"],
  }];
}

function lines(): Work[] {
  const work = {
    ...BASE,
    unit: "batches/s",
    load: { ...echo(50, LINES.count * LINES.bytes), line: LINES.bytes },
    goals: [times("rate", 14), times("rate", 5, NODE.name)],
  };
  return [
    { ...work, id: "readLine", title: "64 lines, readLine()", contenders: among("readLine", LINE_PEERS, "lines") },
    { ...work, id: "lines", title: "64 lines, lines()", contenders: among("lines", [BARE, NODE], "lines") },
  ];
}

function stream(isQuick: boolean): Work[] {
  const bytes = isQuick ? QUICK_STREAM_BYTES : STREAM_BYTES;
  const work = {
    ...BASE,
    unit: "MiB/s",
    load: { mode: "stream", connections: 1, bytes },
    goals: [times("rate", 0.95)],
  } satisfies Partial<Work>;
  const title = `one connection, ${bytes / MIB} MiB`;
  return [
    { ...work, id: "stream-pipe", title: `${title}, pipeTo()`, contenders: among("pipe", [BARE]) },
    { ...work, id: "stream", title: `${title}, recv()`, contenders: among("recv", [BARE]) },
  ];
}

function churn(): Work {
  return {
    ...BASE,
    id: "churn",
    title: "connect, one exchange, close",
    unit: "connections/s",
    load: { ...echo(20, SMALL), exchanges: 1 },
    contenders: among("recv", ALL_PEERS),
    goals: [times("rate", 1.2)],
  };
}

function idle(): Work[] {
  const work = {
    ...BASE,
    load: { mode: "idle", connections: IDLE, bytes: SMALL, line: SMALL },
    figures: ["memory"],
    isFresh: true,
  } satisfies Partial<Work>;
  const long = { ...work, load: { ...work.load, silence: LONG_SILENCE } };
  const plain = contender(BARE, "class", { name: "plainest handler class" });
  const lean = contender(BARE, "lean", { name: "leanest bare loop" });
  return [{
    ...work,
    id: "idle",
    title: "10,000 idle connections, recv()",
    contenders: [...among("recv", ALL_PEERS), plain, lean],
    goals: [times("memory", 1 / 1.1, plain.name), times("memory", 101 / 120, lean.name)],
  }, {
    ...work,
    id: "idle-lines",
    title: "10,000 idle connections, lines()",
    contenders: [contender(OURS, "lines"), plain],
    goals: [times("memory", 1 / 1.22, plain.name)],
  }, {
    ...long,
    id: "idle-long",
    title: `the same after ${LONG_SILENCE} s, recv()`,
    contenders: [contender(OURS, "recv"), plain, lean],
    goals: [within("memory", 135 * MIB), times("memory", 1 / 1.1, plain.name)],
  }, {
    ...long,
    id: "idle-long-lines",
    title: `the same after ${LONG_SILENCE} s, lines()`,
    contenders: [contender(OURS, "lines"), plain],
    goals: [within("memory", 150 * MIB), times("memory", 1 / 1.22, plain.name)],
  }];
}

function deadlines(): Work {
  const without = contender(OURS, "recv", { name: "without" });
  return {
    ...BASE,
    id: "deadlines",
    title: "timeout and idleTimeout, 64 B",
    load: echo(50, SMALL),
    contenders: [contender(OURS, "recv with deadlines"), without],
    goals: [times("rate", 0.98, without.name)],
  };
}

function over(transport: Transport, theirs = transport): Contender[] {
  return [contender(OURS, "recv", { transport }), contender(BARE, "echo", { transport: theirs })];
}

function datagrams(): Work {
  const [bare, copying, reusing] = [
    contender(BARE, "udp"),
    contender(BARE, "udp, one array, copied", { name: "one array, copied" }),
    contender(BARE, "udp, one array", { name: "one array" }),
  ];
  return {
    ...BASE,
    id: "udp",
    title: "UDP echo, 64 B",
    load: { mode: "udp", connections: 50, bytes: SMALL },
    contenders: [contender(OURS, "udp"), bare, reusing, copying],
    goals: [times("rate", 0.95, bare.name), times("rate", 0.95, reusing.name), times("rate", 1, copying.name)],
  };
}

function everyCore(): Work[] {
  const threads = (service: string) =>
    [2, 1].map((workers) => ({
      ...contender(OURS, service, { name: workers === 1 ? ONE_WORKER : `${workers} workers` }),
      workers,
    }));
  const work = { ...BASE, figures: ["rate", "cpu", "p999", "jain"] } satisfies Partial<Work>;
  return [{
    ...work,
    id: "workers-compute",
    title: `${BATCH} × SHA-256 of 64 KiB, two workers`,
    unit: "batches/s",
    load: { ...echo(50, BATCH * SMALL), reply: BATCH * DIGEST },
    contenders: threads("compute"),
    goals: [times("rate", 1.8, ONE_WORKER)],
  }, {
    ...work,
    id: "workers-digest",
    title: "SHA-256 of 64 KiB that are sent, two workers",
    load: { ...echo(50, HASHED), reply: DIGEST },
    contenders: threads("digest"),
    goals: [times("rate", 1, ONE_WORKER)],
  }, {
    ...work,
    id: "workers-64",
    title: "echo, two workers, 64 B",
    load: echo(50, SMALL),
    contenders: threads("recv"),
    goals: [times("rate", 1, ONE_WORKER)],
  }];
}

function growth(isQuick: boolean): Work[] {
  return (isQuick ? QUICK_GROWTH : GROWTH).map((connections) => ({
    ...BASE,
    id: GROWTH_ID,
    title: `growth, ${connections}`,
    load: echo(connections, SMALL),
    contenders: among("recv", ALL_PEERS),
    goals: [],
  }));
}

/** All works, in the order in which they are measured. */
export function allWorks(isQuick: boolean): Work[] {
  const works = [
    ...handlerEchoes(),
    ...crowds(),
    ...lines(),
    ...stream(isQuick),
    churn(),
    ...idle(),
    deadlines(),
    ...echoes("unix", "Unix socket", over("unix"), [0.95, 0.6]),
    ...echoes("tls", "TLS, by the filter", over("tls"), [0.6, 0.45]),
    ...echoes("native-tls", "TLS, by the runtime", over("native-tls", "tls"), [0.95, 0.6]),
    datagrams(),
    ...everyCore(),
    ...growth(isQuick),
  ];
  return isQuick ? works.map(withoutSpectators) : works;
}

/** With those only that matter to what ours is held to. */
function withoutSpectators(work: Work): Work {
  const names = rivals(work);
  return { ...work, contenders: work.contenders.filter(({ name }) => names.has(name)) };
}

/** Ours, whom it is compared with, and the bare loop; the others are spectators. */
export function rivals({ contenders, goals }: Work): Set<string> {
  return new Set([contenders[0]?.name ?? "", BARE.name, ...goals.map(({ against }) => against ?? "")]);
}
