/**
 * `node:net`, for Node and for Deno: `node_net.mjs SERVICE` prints its port when it listens.
 *
 * @module
 */

import { createServer } from "node:net";
import process from "node:process";

const BACKLOG = 4_096;

function echo(socket) {
  socket.on("data", (data) => {
    // A client that reads slower than it writes must not fill the memory.
    if (!socket.write(data)) socket.pause();
  });
  socket.on("drain", () => socket.resume());
}

/** Text that is cut at each "\n", and each line written by itself. */
function echoLines(socket) {
  let rest = "";
  socket.setEncoding("utf8");
  socket.on("data", (text) => {
    const lines = (rest + text).split("\n");
    rest = lines.pop();
    for (const line of lines) socket.write(line + "\n");
  });
}

const talk = process.argv[2] === "lines" ? echoLines : echo;
const server = createServer({ noDelay: true }, (socket) => {
  socket.on("error", () => {}); // The load has ended in the middle of a message.
  talk(socket);
});
server.listen({ host: "127.0.0.1", port: 0, backlog: BACKLOG }, () => console.log(server.address().port));
