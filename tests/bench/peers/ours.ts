/**
 * The servers of `mod.ts`: `ours.ts SERVICE [unix PATH | tls CERT KEY]` prints its
 * port when it listens.
 *
 * @module
 */

import {
  DatagramRequestHandler,
  type ServerOptions,
  StreamRequestHandler,
  type StreamRequestHandlerClass,
  type StreamServer,
  TcpServer,
  TlsServer,
  UdpServer,
  UnixServer,
} from "../../../mod.ts";

const ADDRESS = { hostname: "127.0.0.1", port: 0 };
const BUFFER_BYTES = 65_536;
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

class Reply extends DatagramRequestHandler {
  override async handle() {
    await this.request.reply(this.request.data);
  }
}

const SERVICES: Record<string, [StreamRequestHandlerClass, ServerOptions?]> = {
  recv: [Recv],
  iterate: [Iterate],
  read: [Read],
  readLine: [ReadLine],
  lines: [Lines],
  "recv with deadlines": [Recv, DEADLINES],
};

async function streamServer(service: string, transport = "tcp", file = "", keyFile = ""): Promise<StreamServer> {
  const [Handler, options] = SERVICES[service] ?? [Recv];
  if (transport === "unix") return new UnixServer({ path: file }, Handler, options);
  if (transport === "tcp") return new TcpServer(ADDRESS, Handler, options);
  const [cert, key] = await Promise.all([Deno.readTextFile(file), Deno.readTextFile(keyFile)]);
  return new TlsServer({ ...ADDRESS, cert, key }, Handler, options);
}

const [service = "recv", ...transport] = Deno.args;
const server = service === "udp" ? new UdpServer(ADDRESS, Reply) : await streamServer(service, ...transport);
const address = await server.listen();
console.log("port" in address ? address.port : 0);
await server.serveForever();
