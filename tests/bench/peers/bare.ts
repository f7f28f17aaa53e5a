/**
 * The loops that a person writes by hand in Deno: `bare.ts SERVICE [unix PATH | tls CERT KEY]`
 * prints its port when it listens.
 *
 * @module
 */

const ADDRESS = { hostname: "127.0.0.1", port: 0 };
const BUFFER_BYTES = 65_536;
/** Of the leanest loop; more would be memory for each idle connection. */
const LEAN_BUFFER_BYTES = 512;
const MAX_DATAGRAM_BYTES = 65_536;

async function writeAll(conn: Deno.Conn, data: Uint8Array): Promise<void> {
  for (let at = 0; at < data.length;) at += await conn.write(at === 0 ? data : data.subarray(at));
}

async function echo(conn: Deno.Conn): Promise<void> {
  const buffer = new Uint8Array(BUFFER_BYTES);
  for (let count; (count = await conn.read(buffer)) !== null;) await writeAll(conn, buffer.subarray(0, count));
  conn.close();
}

/** Text that is cut at each "\n", and each line written by itself. */
async function echoLines(conn: Deno.Conn): Promise<void> {
  const buffer = new Uint8Array(BUFFER_BYTES);
  const [decoder, encoder] = [new TextDecoder(), new TextEncoder()];
  for (let count, rest = ""; (count = await conn.read(buffer)) !== null;) {
    const lines = (rest + decoder.decode(buffer.subarray(0, count), { stream: true })).split("\n");
    rest = lines.pop() ?? "";
    for (const line of lines) await writeAll(conn, encoder.encode(line + "\n"));
  }
  conn.close();
}

/** With as little memory for a connection as can be: a small buffer, and no async function that waits. */
function echoLean(conn: Deno.Conn): Promise<void> {
  const buffer = new Uint8Array(LEAN_BUFFER_BYTES);
  return new Promise((resolve, reject) => {
    const read = () => void conn.read(buffer).then(write, reject);
    const write = (count: number | null) => {
      if (count === null) return resolve(conn.close());
      writeAll(conn, buffer.subarray(0, count)).then(read, reject);
    };
    read();
  });
}

/** A connection with the two methods that a handler needs, and nothing that they would have to promise. */
class PlainStream {
  constructor(readonly conn: Deno.Conn) {}

  async recv(): Promise<Uint8Array | null> {
    const buffer = new Uint8Array(LEAN_BUFFER_BYTES);
    const count = await this.conn.read(buffer);
    return count === null ? null : buffer.subarray(0, count);
  }

  async send(data: Uint8Array): Promise<void> {
    await writeAll(this.conn, data);
  }
}

/** The plainest class that a handler can be. */
class PlainHandler {
  constructor(readonly request: PlainStream) {}

  async handle(): Promise<void> {
    for (let data; (data = await this.request.recv()) !== null;) await this.request.send(data);
  }
}

async function echoPlain(conn: Deno.Conn): Promise<void> {
  await new PlainHandler(new PlainStream(conn)).handle();
  conn.close();
}

const SERVICES: Record<string, (conn: Deno.Conn) => Promise<void>> = {
  echo,
  lines: echoLines,
  lean: echoLean,
  class: echoPlain,
};

type Conn = Deno.TcpConn | Deno.UnixConn | Deno.TlsConn;

async function listen(transport = "tcp", file = "", keyFile = ""): Promise<Deno.Listener<Conn>> {
  if (transport === "unix") return Deno.listen({ transport, path: file });
  if (transport === "tcp") return Deno.listen(ADDRESS);
  const [cert, key] = await Promise.all([Deno.readTextFile(file), Deno.readTextFile(keyFile)]);
  return Deno.listenTls({ ...ADDRESS, cert, key });
}

async function serve(listener: Deno.Listener<Conn>, talk: (conn: Deno.Conn) => Promise<void>): Promise<void> {
  for await (const conn of listener) {
    if ("setNoDelay" in conn) conn.setNoDelay(true);
    talk(conn).catch(() => conn.close()); // The load has ended in the middle of a message.
  }
}

const DATAGRAM_LOOPS: Record<string, (socket: Deno.DatagramConn) => Promise<void>> = {
  /** As the manual shows it. */
  async udp(socket) {
    for await (const [data, client] of socket) await socket.send(data, client);
  },
  /** With one array for all datagrams, so that none outlives the next. */
  async "udp, one array"(socket) {
    const array = new Uint8Array(MAX_DATAGRAM_BYTES);
    while (true) {
      const [data, client] = await socket.receive(array);
      await socket.send(data, client);
    }
  },
  /** The same, and each datagram may be kept, as with `UdpServer`. */
  async "udp, one array, copied"(socket) {
    const array = new Uint8Array(MAX_DATAGRAM_BYTES);
    while (true) {
      const [data, client] = await socket.receive(array);
      await socket.send(data.slice(), client);
    }
  },
};

function say(address: Deno.Addr): void {
  console.log("port" in address ? address.port : 0);
}

const [service = "echo", ...transport] = Deno.args;
const datagramLoop = DATAGRAM_LOOPS[service];
if (datagramLoop !== undefined) {
  const socket = Deno.listenDatagram({ ...ADDRESS, transport: "udp" });
  say(socket.addr);
  await datagramLoop(socket);
} else {
  const listener = await listen(...transport);
  say(listener.addr);
  await serve(listener, SERVICES[service] ?? echo);
}
