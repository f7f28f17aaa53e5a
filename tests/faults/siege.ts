/**
 * A server in a process of its own, and clients that mean it no good.
 *
 * @module
 */

import { assert, assertEquals } from "../../deps.ts";
import { connect, type ServerOptions, type ServerStats, type SocketStream } from "../../mod.ts";
import { bytesOf, textOf } from "../fake_conn.ts";
import { heldSockets, Program } from "../programs.ts";

/** What a process may grow by, in bytes. The runtime keeps some of what it once had; what is buffered for nobody would take more. */
export const MEMORY_SLACK = 100e6;

/** What may be left on the heap, in bytes: 100 for each of 50,000 clients would be more. */
const HEAP_SLACK = 5e6;

/** What a process holds. */
export interface Holdings {
  residentBytes: number;
  cpuSeconds: number;
}

/** What a process holds when nobody is there. */
export interface Remains extends Holdings {
  /** Without what is garbage. */
  heapBytes: number;
}

const HOLDINGS = `grep VmRSS /proc/$0/status; cut -d ' ' -f 14,15 /proc/$0/stat; getconf CLK_TCK`;

const here = (file: string) => new URL(file, import.meta.url).pathname;

/** The server of storm_server.ts, and the peers of attackers.py. */
export class Siege implements AsyncDisposable {
  readonly server: Program;
  #peers: Program | undefined;
  #port: number | undefined;
  #answers = 0;
  #orders = 0;

  constructor(options: ServerOptions, descriptors?: number) {
    const script = here("storm_server.ts");
    const limit = descriptors === undefined ? "" : `ulimit -n ${descriptors}; `;
    const run = `${limit}exec "$0" run --no-config --no-prompt --v8-flags=--expose-gc --allow-net=127.0.0.1 "$1" "$2"`;
    this.server = Program.start("sh", ["-c", run, Deno.execPath(), script, JSON.stringify(options)]);
  }

  async port(): Promise<number> {
    return this.#port ??= Number((await this.server.printed(/127\.0\.0\.1:(\d+)\n/))[1]);
  }

  /** Lets the peers do something; resolves to what they say when it is done. */
  async order(what: string, count: number): Promise<string> {
    this.#peers ??= Program.start("python3", [here("attackers.py"), String(await this.port())]);
    await this.#peers.write(`${what} ${count}\n`);
    const answers = new RegExp(`^(?:done .*\\n){${this.#orders++}}done (.*)\\n`);
    return (await this.#peers.printed(answers))[1] ?? "";
  }

  async stats(): Promise<ServerStats> {
    return JSON.parse(await this.#ask("stats"));
  }

  /** The server's answer to a command. */
  async #ask(command: string): Promise<string> {
    await this.server.write(`${command}\n`);
    const [line] = await this.server.printed(new RegExp(`\\{"answer":${++this.#answers},.*\\}\n`));
    return line;
  }

  /** Lets the server shut down and a new one take over its port, in the same process. */
  async restart(): Promise<void> {
    await this.#ask("restart");
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

  /** What a shell prints that has the server's process id as `$0`: reading /proc takes all permissions here. */
  #lookAt(commands: string): string {
    const { stdout } = new Deno.Command("sh", { args: ["-c", commands, String(this.server.pid)] }).outputSync();
    return new TextDecoder().decode(stdout);
  }

  /** What the server holds. */
  holdings(): Holdings {
    const text = this.#lookAt(HOLDINGS);
    const [, kilobytes, user, system, ticks] = /^\D*(\d+) kB\n(\d+) (\d+)\n(\d+)\n$/.exec(text) ?? [];
    return {
      residentBytes: Number(kilobytes) * 1_024,
      cpuSeconds: (Number(user) + Number(system)) / Number(ticks),
    };
  }

  /** What it holds when no more than `active` clients are left: one that has closed may still be there. */
  async holdingsWith(active: number): Promise<Remains> {
    await this.until(`all but ${active} clients to be gone`, (stats) => stats.active === active);
    const { heapBytes } = JSON.parse(await this.#ask("heap"));
    return { ...this.holdings(), heapBytes };
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

  /** Nothing is left of those who attacked, but for `slack` bytes that the process has not given back. */
  async assertAsBefore(before: Remains, slack = MEMORY_SLACK): Promise<void> {
    const port = await this.port();
    // A connection that was closed has its descriptor until the event loop comes round.
    await this.until("all sockets but the listener's to be free", ({ active }) => {
      return active === 0 && heldSockets(port) === 1;
    });
    const { heapBytes, residentBytes } = await this.holdingsWith(0);
    const heapGrown = heapBytes - before.heapBytes;
    assert(heapGrown < HEAP_SLACK, `the heap has grown by ${heapGrown} bytes`);
    const grown = residentBytes - before.residentBytes;
    assert(grown < slack, `the server has grown by ${grown} bytes`);
    assertEquals((await this.stats()).errors, 0);
    assertEquals(this.server.stderr, "");
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#peers?.[Symbol.asyncDispose]();
    await this.server[Symbol.asyncDispose]();
  }
}

/** Says something, and hears it back. */
export async function ping(client: SocketStream, text: string): Promise<void> {
  await client.send(text);
  assertEquals(textOf(await client.readExactly(bytesOf(text).length)), text);
}
