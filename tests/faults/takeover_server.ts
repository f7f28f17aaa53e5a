/**
 * A server of lines that shares its port, so that the next process can take the
 * port over while this one drains: `takeover_server.ts PORT`.
 *
 * @module
 */

import { StreamRequestHandler, TcpServer } from "../../mod.ts";

class Answers extends StreamRequestHandler {
  override async handle() {
    for await (const line of this.request.lines()) await this.request.write(`[answer] ${line}\n`);
  }
}

const server = new TcpServer({ hostname: "127.0.0.1", port: Number(Deno.args[0]), reusePort: true }, Answers);
Deno.addSignalListener("SIGTERM", () => server.shutdown());
console.log(`on 127.0.0.1:${server.listen().port}`);
await server.serveForever();
const { cut } = await server.shutdown();
console.log(`cut off: ${cut.length}, bytes out: ${server.stats.bytesWritten}`);
