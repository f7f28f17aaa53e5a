/**
 * The servers of `mod.ts` and its extras: `ours.ts SERVICE [unix PATH | tls CERT KEY |
 * native-tls CERT KEY | workers N]` prints its port when it listens. The extras are loaded
 * only where they serve, as they take time and memory.
 *
 * @module
 */

import { createHash } from "node:crypto";
import {
  DatagramRequestHandler,
  type ServerOptions,
  StreamRequestHandler,
  type StreamRequestHandlerClass,
  type StreamServer,
  TcpServer,
  type TcpServerAddress,
  UdpServer,
  UnixServer,
} from "../../../mod.ts";

const ADDRESS = { hostname: "127.0.0.1", port: 0 };
const BUFFER_BYTES = 65_536;
const SMALL = 64;
/** Long enough for none to expire while it is measured. */
const DEADLINES = { timeout: 60_000, idleTimeout: 120_000 };

class Recv extends StreamRequestHandler {
  override async handle() {
    for (let data; (data = await this.request.recv()) !== null;) await this.request.send(data);
  }
}

class Iterate extends StreamRequestHandler {
  override async handle() {
    for await (const data of this.request) await this.request.send(data);
  }
}

class Read extends StreamRequestHandler {
  override async handle() {
    const buffer = new Uint8Array(BUFFER_BYTES);
    for (let count; (count = await this.request.read(buffer)) !== null;) {
      await this.request.send(buffer.subarray(0, count));
    }
  }
}

class Pipe extends StreamRequestHandler {
  override async handle() {
    await this.request.pipeTo(this.request);
  }
}

class ReadLine extends StreamRequestHandler {
  override async handle() {
    for (let line; (line = await this.request.readLine()) !== null;) await this.request.write(line + "\n");
  }
}

class Lines extends StreamRequestHandler {
  override async handle() {
    for await (const line of this.request.lines()) await this.request.write(line + "\n");
  }
}

/** SHA-256 of each 64 KiB, on its own thread: `crypto.subtle` would take others. */
class Digest extends StreamRequestHandler {
  override async handle() {
    for (let data; (data = await this.request.readExactly(BUFFER_BYTES)) !== null;) {
      await this.request.send(createHash("sha256").update(data).digest());
    }
  }
}

/** For each 64 B the SHA-256 of 64 KiB that begin with them, so that those who ask have little to do. */
class Compute extends StreamRequestHandler {
  override async handle() {
    const block = new Uint8Array(BUFFER_BYTES);
    for (let data; (data = await this.request.readExactly(SMALL)) !== null;) {
      block.set(data);
      await this.request.write(createHash("sha256").update(block).digest());
    }
  }
}

class Reply extends DatagramRequestHandler {
  override async handle() {
    await this.request.reply(this.request.data);
  }
}

const SERVICES: Record<string, [StreamRequestHandlerClass, ServerOptions?]> = {
  recv: [Recv],
  iterate: [Iterate],
  read: [Read],
  pipe: [Pipe],
  readLine: [ReadLine],
  lines: [Lines],
  digest: [Digest],
  compute: [Compute],
  "recv with deadlines": [Recv, DEADLINES],
};

async function streamServer(service: string, transport = "tcp", file = "", keyFile = ""): Promise<StreamServer> {
  const [Handler, options] = SERVICES[service] ?? [Recv];
  if (transport === "unix") return new UnixServer({ path: file }, Handler, options);
  if (transport === "tcp") return new TcpServer(ADDRESS, Handler, options);
  const { NativeTlsServer, TlsServer } = await import("../../../extras/tls.ts");
  const Server = transport === "native-tls" ? NativeTlsServer : TlsServer;
  const [cert, key] = await Promise.all([Deno.readTextFile(file), Deno.readTextFile(keyFile)]);
  return new Server({ ...ADDRESS, cert, key }, Handler, options);
}

async function workerPool(service: string, workers: number) {
  const { WorkerPool } = await import("../../../extras/worker_pool.ts");
  const [Handler, options] = SERVICES[service] ?? [Recv];
  const makeServer = (address: TcpServerAddress) => new TcpServer(address, Handler, options);
  return new WorkerPool(import.meta.url, makeServer, { ...ADDRESS, workers });
}

function serverOf(service: string, transport: string[]) {
  if (service === "udp") return new UdpServer(ADDRESS, Reply);
  const [kind, workers] = transport;
  return kind === "workers" ? workerPool(service, Number(workers)) : streamServer(service, ...transport);
}

const [service = "recv", ...transport] = Deno.args;
const server = await serverOf(service, transport);
const isWorker = "isWorker" in server && server.isWorker;
const address = await server.listen();
if (!isWorker) console.log("port" in address ? address.port : 0);
await server.serveForever();
