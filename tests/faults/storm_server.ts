/**
 * A server that the tests of faults run in a process of its own: its first
 * argument has the options. Its handler does what the first line of a client asks
 * for. Answers "stats", "heap" and "restart" on the standard input with a line each.
 *
 * @module
 */

import { LimitOverrunError, type ServerOptions, StreamRequestHandler, TcpServer } from "../../mod.ts";
import { freePort } from "../programs.ts";

const GIGABYTE = 1_000_000_000;

class Obedient extends StreamRequestHandler {
  override async handle() {
    switch (await this.request.readLine()) {
      case "echo":
        for await (const data of this.request) await this.request.send(data);
        break;
      case "gigabyte": {
        const part = new Uint8Array(65_536);
        for (let sent = 0; sent < GIGABYTE; sent += part.length) await this.request.send(part);
        break;
      }
      case "line":
        await this.#countLine();
        break;
    }
  }

  /** Tells how long the next line is, and how often it was over the limit. */
  async #countLine(): Promise<void> {
    let [bytes, overruns] = [0, 0];
    for (;;) {
      try {
        bytes += (await this.request.readLine() ?? "").length;
        break;
      } catch (error) {
        if (!(error instanceof LimitOverrunError)) throw error;
        bytes += (await this.request.readExactly(error.consumed)).length;
        overruns++;
      }
    }
    await this.request.send(`${bytes} bytes, ${overruns > 0 ? "over the limit" : "within the limit"}\n`);
  }
}

const options: ServerOptions = JSON.parse(Deno.args[0] ?? "{}");

function start(port: number): { server: TcpServer; port: number; over: Promise<void> } {
  const server = new TcpServer({ hostname: "127.0.0.1", port }, Obedient, options);
  const { port: bound } = server.listen();
  return { server, port: bound, over: server.serveForever() };
}

/** Collects what nobody holds any more; the runtime has it by `--v8-flags=--expose-gc`. */
declare function gc(): void;

function heapBytes(): number {
  gc();
  return Deno.memoryUsage().heapUsed;
}

let running = start(await freePort());
console.log(`listens on 127.0.0.1:${running.port}`);
let answered = 0;
for await (const commands of Deno.stdin.readable.pipeThrough(new TextDecoderStream())) {
  for (const command of commands.trim().split("\n")) {
    if (command === "restart") {
      await running.server.shutdown();
      await running.over;
      running = start(running.port);
    }
    const answer = command === "heap" ? { heapBytes: heapBytes() } : running.server.stats;
    console.log(JSON.stringify({ answer: ++answered, ...answer }));
  }
}
running.server.close();
await running.over;
