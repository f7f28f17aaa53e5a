/**
 * The servers that are compared, and how each is started.
 *
 * @module
 */

import { commandOf, type Kit, LOAD_CORE, type ProgramName, SERVER_CORE } from "./kit.ts";

/** A program that can be measured. */
export interface Peer {
  name: string;
  /** What has to be on the machine. */
  program: ProgramName;
  /** The program and its arguments, before those that say what it serves. */
  command: (kit: Kit) => string[] | Promise<string[]>;
}

export const OURS = onDeno("ours", "ours.ts");
export const BARE = onDeno("bare loop", "bare.ts");
export const NODE = interpreted("Node's net", "node", "node_net.mjs");
const NODE_IN_DENO = onDeno("node:net in Deno", "node_net.mjs");
const THREADS = interpreted("Python's threads", "python3", "threads.py");
const ASYNCIO = interpreted("Python's asyncio", "python3", "asyncio_server.py");
const BUN = interpreted("Bun", "bun", "bun.mjs");
const GO = compiled("Go", "go", "goroutines.go");
const EPOLL = compiled("C, epoll", "cc", "epoll.c");

/** Those that know lines. */
export const LINE_PEERS = [BARE, NODE_IN_DENO, NODE, THREADS, ASYNCIO, BUN, GO];
export const ALL_PEERS = [...LINE_PEERS, EPOLL];

function onDeno(name: string, file: string): Peer {
  // Reading and writing are for certificates and Unix sockets.
  const flags = ["--quiet", "--unstable-net", "--allow-net", "--allow-read", "--allow-write"];
  return { name, program: "deno", command: () => [commandOf("deno"), "run", ...flags, pathOf(file)] };
}

function interpreted(name: string, program: ProgramName, file: string): Peer {
  return { name, program, command: () => [commandOf(program), pathOf(file)] };
}

function compiled(name: string, program: "cc" | "go", file: string): Peer {
  return { name, program, command: async (kit) => [await kit.build(program, pathOf(file))] };
}

function pathOf(file: string): string {
  return new URL(`peers/${file}`, import.meta.url).pathname;
}

export type Transport = "tcp" | "unix" | "tls" | "native-tls";

/** A peer in a work. */
export interface Contender {
  /** Its name in the tables. */
  name: string;
  peer: Peer;
  /** What it serves, as its source names it. */
  service: string;
  transport: Transport;
  /** Threads that serve, on all cores; without it, one on the server's own. */
  workers?: number;
}

/** Long enough for a busy machine, and for nobody to wait for ever. */
const START_PATIENCE_MS = 20_000;

/** A server in a process of its own, which lives until it is disposed of. */
export class Server implements AsyncDisposable {
  readonly name: string;
  /** What tells the load generator where it is, and which process. */
  readonly loadArguments: string[];
  readonly #process: Deno.ChildProcess;

  private constructor(name: string, process: Deno.ChildProcess, loadArguments: string[]) {
    this.name = name;
    this.#process = process;
    this.loadArguments = [...loadArguments, `server=${process.pid}`];
  }

  /** Resolves when the server listens; rejects if it does not. */
  static async start({ name, peer, service, transport, workers }: Contender, kit: Kit): Promise<Server> {
    const path = `${kit.folder}/${crypto.randomUUID()}`;
    const where = {
      tcp: [],
      unix: ["unix", path],
      tls: ["tls", ...kit.certificate],
      "native-tls": ["native-tls", ...kit.certificate],
    }[transport];
    const threads = workers === undefined ? [] : ["workers", String(workers)];
    const cores = workers === undefined ? [SERVER_CORE] : [SERVER_CORE, LOAD_CORE];
    const process = kit.command([...await peer.command(kit), service, ...where, ...threads], ...cores).spawn();
    const port = await firstLine(process);
    const loadArguments = transport === "unix" ? [`path=${path}`] : [`port=${port}`];
    if (transport.endsWith("tls")) loadArguments.push("tls=1");
    return new Server(name, process, loadArguments);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await end(this.#process);
  }
}

/** The microseconds until a program of Deno's prints its first line. */
export async function timeStart(file: string, kit: Kit): Promise<number> {
  const args = [commandOf("deno"), "run", "--quiet", "--allow-net", file, "--port=0"];
  const begun = performance.now();
  const process = kit.command(args, SERVER_CORE).spawn();
  await firstLine(process);
  const milliseconds = performance.now() - begun;
  await end(process);
  return milliseconds * 1_000;
}

/** What a server prints when it listens; ends one that does not. */
async function firstLine(process: Deno.ChildProcess): Promise<string> {
  const timer = setTimeout(() => process.kill("SIGKILL"), START_PATIENCE_MS);
  const reader = process.stdout.getReader();
  const { value } = await reader.read();
  reader.releaseLock();
  clearTimeout(timer);
  if (value !== undefined) return new TextDecoder().decode(value).trim();
  await process.status;
  throw new TypeError("it did not start");
}

async function end(process: Deno.ChildProcess): Promise<void> {
  try {
    process.kill("SIGKILL");
  } catch (error) {
    if (!(error instanceof TypeError)) throw error; // It has ended already.
  }
  await process.status;
  await process.stdout.cancel();
}
