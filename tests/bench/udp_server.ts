/**
 * One of the servers that `udp.ts` compares: `udp_server.ts KIND` prints its port.
 *
 * @module
 */

import { DatagramRequestHandler, UdpServer } from "../../mod.ts";

/** How a person writes the loop by hand. */
const LOOPS: Record<string, (socket: Deno.DatagramConn) => Promise<void>> = {
  /** As the manual shows it. */
  async bare(socket) {
    for await (const [data, client] of socket) await socket.send(data, client);
  },
  /** With one array for all datagrams, so that none outlives the next. */
  async "one array"(socket) {
    const array = new Uint8Array(65_536);
    while (true) {
      const [data, client] = await socket.receive(array);
      await socket.send(data, client);
    }
  },
  /** The same, and each datagram may be kept, as with `UdpServer`. */
  async "one array, copied"(socket) {
    const array = new Uint8Array(65_536);
    while (true) {
      const [data, client] = await socket.receive(array);
      await socket.send(data.slice(), client);
    }
  },
};

class Echo extends DatagramRequestHandler {
  override async handle() {
    await this.request.reply(this.request.data);
  }
}

const loop = LOOPS[Deno.args[0] ?? ""];
if (loop === undefined) {
  const server = new UdpServer({ port: 0 }, Echo);
  console.log(server.listen().port);
  await server.serveForever();
} else {
  const socket = Deno.listenDatagram({ transport: "udp", hostname: "127.0.0.1", port: 0 });
  if (socket.addr.transport === "udp") console.log(socket.addr.port);
  await loop(socket);
}
