/**
 * `Bun.listen`: `bun.mjs SERVICE` prints its port when it listens.
 *
 * @module
 */

import process from "node:process";

/** Sends what the socket takes; the rest leaves when it takes more. */
function send(socket, data) {
  if (socket.data.unsent.length > 0) {
    socket.data.unsent = Buffer.concat([socket.data.unsent, data]);
    return;
  }
  const count = socket.write(data);
  if (count < data.length) socket.data.unsent = Buffer.from(data.subarray(count));
}

function sendRest(socket) {
  const { unsent } = socket.data;
  socket.data.unsent = unsent.subarray(socket.write(unsent));
}

/** Text that is cut at each "\n", and each line written by itself. */
function sendLines(socket, data) {
  const lines = (socket.data.rest + socket.data.decoder.decode(data, { stream: true })).split("\n");
  socket.data.rest = lines.pop();
  for (const line of lines) send(socket, Buffer.from(line + "\n"));
}

const server = Bun.listen({
  hostname: "127.0.0.1",
  port: 0,
  socket: {
    open(socket) {
      socket.setNoDelay(true);
      socket.data = { unsent: Buffer.alloc(0), rest: "", decoder: new TextDecoder() };
    },
    data: process.argv[2] === "lines" ? sendLines : send,
    drain: sendRest,
  },
});
console.log(server.port);
