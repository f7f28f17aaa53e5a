import {
  connect,
  type ConnectionFilter,
  type ConnectTlsOptions,
  DatagramClient,
  DatagramRequestHandler,
  type DatagramServerOptions,
  type DialOptions,
  type FrameOptions,
  LimitOverrunError,
  type ServerOptions,
  socketPair,
  SocketStream,
  type StreamOptions,
  StreamRequestHandler,
  TcpServer,
  type TcpServerAddress,
  UdpServer,
} from "../mod.ts";
import { assert, assertEquals, assertMatch, assertRejects, assertThrows } from "../deps.ts";
import { bytesOf, concat, FakeConn, isPending } from "./fake_conn.ts";
import { networkTest, rejectionOf } from "./testing.ts";

class Idle extends StreamRequestHandler {
  override handle() {}
}

/** Everything that takes a stream's options, as a promise. */
const takers: Record<string, (options: StreamOptions) => Promise<unknown>> = {
  "new SocketStream()": (options) => attempt(() => new SocketStream(new FakeConn(), options).close()),
  "socketPair()": (options) => attempt(() => socketPair(options).forEach((stream) => stream.close())),
  "new TcpServer()": (options) => attempt(() => makeServer(options)),
  "connect()": (options) => connect({ port: 1, ...options }),
};

const outOfRange: [StreamOptions, string][] = [
  [{ timeout: 0 }, "timeout"],
  [{ timeout: -1 }, "timeout"],
  [{ timeout: NaN }, "timeout"],
  [{ timeout: -Infinity }, "timeout"],
  [{ idleTimeout: 0 }, "idleTimeout"],
  [{ idleTimeout: -1 }, "idleTimeout"],
  [{ idleTimeout: NaN }, "idleTimeout"],
  [{ maxLifetime: 0 }, "maxLifetime"],
  [{ maxLifetime: -1 }, "maxLifetime"],
  [{ maxLifetime: NaN }, "maxLifetime"],
  [{ limit: 0 }, "limit"],
  [{ limit: -1 }, "limit"],
  [{ limit: 1.5 }, "limit"],
  [{ limit: NaN }, "limit"],
  [{ highWaterMark: -1 }, "highWaterMark"],
  [{ highWaterMark: NaN }, "highWaterMark"],
];

for (const [taker, take] of Object.entries(takers)) {
  Deno.test(`${taker} refuses an option that is misspelt, and names it and the others`, async () => {
    const error = await rejectionOf(take(fromJson('{ "timeout": 5, "idleTimout": 5 }')));
    assert(error instanceof TypeError);
    assertMatch(error.message, /"idleTimout"/);
    assertMatch(error.message, /\bidleTimeout\b.*\blimit\b.*\bhighWaterMark\b/);
  });

  Deno.test(`${taker} refuses numbers that are out of their range, and names the option and the number`, async () => {
    for (const [options, name] of outOfRange) {
      const error = await rejectionOf(take(options));
      assert(error instanceof RangeError, error.message);
      assert(error.message.includes(`"${name}"`), error.message);
      assert(error.message.includes(`${Object.values(options)[0]}`), error.message);
    }
  });

  Deno.test(`${taker} refuses what is no number`, async () => {
    for (const json of ['{ "timeout": "5" }', '{ "limit": null }', '{ "highWaterMark": [1] }']) {
      await assertRejects(() => take(fromJson(json)), TypeError);
    }
  });

  Deno.test(`${taker} refuses a misspelt option that every object has`, async () => {
    const error = await rejectionOf(take(fromJson('{ "valueOf": 5 }')));
    assert(error instanceof TypeError);
    assertMatch(error.message, /"valueOf"/);
  });
}

Deno.test("an option that is undefined has its default", () => {
  const options: Record<string, undefined> = { timeout: undefined, limit: undefined };
  const stream = new SocketStream(new FakeConn(), options);
  assertEquals(stream.timeout, Infinity);
  stream.close();
});

Deno.test("options are read once: changing the object later changes nothing", async () => {
  const options: StreamOptions = { limit: 4, timeout: 60_000 };
  const stream = new SocketStream(new FakeConn().give("abcd\n").end(), options);
  options.limit = 1;
  options.timeout = 1;
  assertEquals(stream.timeout, 60_000);
  assertEquals(await stream.readLine(), "abcd");
  stream.close();
});

Deno.test("timeout, limit, idleTimeout and highWaterMark may be Infinity, the last one also 0 and a fraction", () => {
  const unbounded = { timeout: Infinity, idleTimeout: Infinity, limit: Infinity, highWaterMark: Infinity };
  for (const options of [unbounded, { highWaterMark: 0 }, { timeout: 0.5, idleTimeout: 0.5, highWaterMark: 0.5 }]) {
    new SocketStream(new FakeConn(), options).close();
  }
});

const serverOutOfRange: [ServerOptions, string][] = [
  [{ maxConnections: 0 }, "maxConnections"],
  [{ maxConnections: -1 }, "maxConnections"],
  [{ maxConnections: 1.5 }, "maxConnections"],
  [{ maxConnections: NaN }, "maxConnections"],
  [{ handshakeTimeout: 0 }, "handshakeTimeout"],
  [{ handshakeTimeout: NaN }, "handshakeTimeout"],
  [{ grace: -1 }, "grace"],
  [{ grace: NaN }, "grace"],
];

for (const [options, name] of serverOutOfRange) {
  Deno.test(`new TcpServer() refuses ${Deno.inspect(options)}`, async () => {
    const error = await rejectionOf(attempt(() => makeServer(options)));
    assert(error instanceof RangeError);
    assert(error.message.includes(`"${name}"`), error.message);
  });
}

Deno.test("new TcpServer() takes the bounds of its options", () => {
  for (const maxConnections of [1, Infinity]) makeServer({ maxConnections });
  for (const grace of [0, Infinity]) makeServer({ grace });
  for (const handshakeTimeout of [Number.MIN_VALUE, Infinity]) makeServer({ handshakeTimeout });
});

for (const json of ["5", "null", "[5]", "{}", '["perHost"]', "[null]"]) {
  Deno.test(`connect() and new TcpServer() refuse ${json} for their filters`, async () => {
    for (const take of [makeServer, (options: ServerOptions) => connect({ port: 1, ...options })]) {
      const error = await rejectionOf(attempt(() => take(fromJson(`{ "filters": ${json} }`))));
      assert(error instanceof TypeError);
      assertMatch(error.message, /^Option "filters" must be an array of functions: it is /);
    }
  });
}

Deno.test("connect() and new TcpServer() refuse filters with a hole, which would let everyone in", async () => {
  const filters: ConnectionFilter[] = [];
  filters[1] = () => null;
  for (const take of [makeServer, (options: ServerOptions) => connect({ port: 1, ...options })]) {
    const error = await rejectionOf(attempt(() => take({ filters })));
    assertMatch(error.message, /^Option "filters" must be an array of functions: it is \[ <1 empty item>, /);
  }
});

Deno.test("an option of an earlier edition is refused by name", () => {
  for (const option of ["maxConnectionsPerHost", "proxyProtocol"]) {
    assertThrows(() => makeServer(fromJson(`{ "${option}": 1 }`)), new RegExp(`Unknown option "${option}"`));
  }
});

/** Every option, undefined: this is checked by the compiler, as the project has exactOptionalPropertyTypes. */
const UNDEFINED_STREAM = {
  timeout: undefined,
  idleTimeout: undefined,
  maxLifetime: undefined,
  limit: undefined,
  highWaterMark: undefined,
} satisfies Required<Undefined<StreamOptions>> & StreamOptions;

const UNDEFINED_SERVER = {
  ...UNDEFINED_STREAM,
  maxConnections: undefined,
  filters: undefined,
  handshakeTimeout: undefined,
  grace: undefined,
  noDelay: undefined,
} satisfies Required<Undefined<ServerOptions>> & ServerOptions;

const UNDEFINED_DIAL = {
  ...UNDEFINED_STREAM,
  retries: undefined,
  tls: undefined,
  filters: undefined,
  signal: undefined,
  noDelay: undefined,
} satisfies Required<Undefined<DialOptions>> & DialOptions;

const UNDEFINED_ADDRESS = {
  hostname: undefined,
  tcpBacklog: undefined,
  reusePort: undefined,
  loadBalanced: undefined,
} satisfies Required<Undefined<Omit<TcpServerAddress, "port">>> & Omit<TcpServerAddress, "port">;

const UNDEFINED_TLS = { caCerts: undefined, serverName: undefined, alpnProtocols: undefined } satisfies
  & Required<Undefined<ConnectTlsOptions>>
  & ConnectTlsOptions;

const UNDEFINED_DATAGRAM = { maxConcurrent: undefined, grace: undefined } satisfies
  & Required<Undefined<DatagramServerOptions>>
  & DatagramServerOptions;

const UNDEFINED_FRAME = { lengthBytes: undefined, littleEndian: undefined } satisfies
  & Required<Undefined<FrameOptions>>
  & FrameOptions;

type Undefined<T> = { [Key in keyof T]: undefined };

networkTest("every option may be undefined, which is its default", async () => {
  await using server = new TcpServer({ ...UNDEFINED_ADDRESS, port: 0 }, Idle, UNDEFINED_SERVER);
  const { port } = server.listen();
  server.serveForever({ signal: undefined });
  await using stream = await connect({ ...UNDEFINED_DIAL, hostname: undefined, port });
  assertEquals(stream.timeout, Infinity);
  await stream.writeFrame("a", UNDEFINED_FRAME);
  await assertRejects(() => connect({ port, tls: UNDEFINED_TLS }));
  assertEquals(await Array.fromAsync(stream.frames(UNDEFINED_FRAME)), []);
  await assertRejects(() => stream.upgrade(() => null, { handshakeTimeout: undefined }), Deno.errors.BrokenPipe);
  await server.shutdown({ grace: undefined });
});

Deno.test("every option of datagrams and of handleRequest() may be undefined", async () => {
  class Quiet extends DatagramRequestHandler {
    override handle() {}
  }
  new UdpServer({ hostname: undefined, port: 0 }, Quiet, UNDEFINED_DATAGRAM).close();
  using _client = new DatagramClient({ hostname: undefined, port: 1, timeout: undefined });
  const server = makeServer({});
  server.close();
  await server.handleRequest({ timeout: undefined });
});

for (const retries of [-1, 1.5, NaN]) {
  Deno.test(`connect() refuses retries: ${retries}`, async () => {
    const error = await rejectionOf(connect({ port: 1, retries }));
    assert(error instanceof RangeError);
    assertMatch(error.message, /"retries"/);
  });
}

for (const port of [-1, 65_536, 1.5, NaN]) {
  Deno.test(`connect() and new TcpServer() refuse port ${port}`, async () => {
    await assertRejects(() => connect({ port }), RangeError);
    await assertRejects(() => attempt(() => new TcpServer({ port }, Idle)), RangeError);
  });
}

Deno.test("connect() and new TcpServer() refuse an empty hostname, which the system takes for all interfaces", async () => {
  await assertRejects(() => connect({ hostname: "", port: 1 }), TypeError);
  await assertRejects(() => attempt(() => new TcpServer({ hostname: "", port: 0 }, Idle)), TypeError);
});

for (const [method, use] of Object.entries({ frames: framesWith, writeFrame: writeFrameWith })) {
  Deno.test(`${method}() refuses a length prefix of other than 1, 2 or 4 bytes`, async () => {
    for (const lengthBytes of [0, 3, 8, -1, 1.5, '"4"']) {
      const error = await rejectionOf(use(fromJson(`{ "lengthBytes": ${lengthBytes} }`)));
      assert(error instanceof RangeError);
      assertMatch(error.message, /"lengthBytes" must be 1, 2 or 4/);
    }
  });

  Deno.test(`${method}() refuses an option that does not exist, and names it`, async () => {
    const error = await rejectionOf(use(fromJson('{ "bigEndian": true }')));
    assert(error instanceof TypeError);
    assertMatch(error.message, /"bigEndian".*\blengthBytes, littleEndian\b/);
  });
}

Deno.test("timeout and idleTimeout are Infinity by default: a read waits", async () => {
  const stream = new SocketStream(new FakeConn());
  assertEquals(stream.timeout, Infinity);
  assert(await isPending(stream.recv()));
  stream.close();
});

const LIMIT = 65_536;

Deno.test("limit is 65,536 bytes by default for lines", async () => {
  const conn = new FakeConn().give("a".repeat(LIMIT) + "\n").give("b".repeat(LIMIT + 1) + "\n").end();
  const stream = new SocketStream(conn);
  assertEquals((await stream.readLine())?.length, LIMIT);
  await assertOverrun(stream.readLine());
  stream.close();
});

Deno.test("limit is 65,536 bytes by default for delimited records", async () => {
  const conn = new FakeConn().give("a".repeat(LIMIT) + "--").give("b".repeat(LIMIT + 1) + "--").end();
  const stream = new SocketStream(conn);
  assertEquals((await stream.readUntil("--"))?.length, LIMIT + 2);
  await assertOverrun(stream.readUntil("--"));
  stream.close();
});

Deno.test("limit is 65,536 bytes by default for frames, which have 4 bytes of length, big-endian", async () => {
  const longest = concat([new Uint8Array([0, 1, 0, 0]), new Uint8Array(LIMIT)]);
  const stream = new SocketStream(new FakeConn().give(longest).give(new Uint8Array([0, 1, 0, 1])));
  const frames = stream.frames();
  const first = await frames.next();
  assertEquals(first.done ? undefined : first.value.length, LIMIT);
  await assertOverrun(frames.next());
  stream.close();
});

Deno.test("writeFrame() writes 4 bytes of length, big-endian, by default", async () => {
  const conn = new FakeConn();
  const stream = new SocketStream(conn);
  await stream.writeFrame("ab");
  await stream.flush();
  assertEquals(conn.written, concat([new Uint8Array([0, 0, 0, 2]), bytesOf("ab")]));
  stream.close();
});

Deno.test("highWaterMark is 65,536 bytes by default: the byte beyond them waits", async () => {
  const conn = new FakeConn().holdWrites();
  const stream = new SocketStream(conn);
  await stream.write(new Uint8Array(LIMIT));
  const beyond = stream.write("a");
  assert(await isPending(beyond));
  conn.releaseWrites();
  await beyond;
  assertEquals(conn.written.length, LIMIT + 1);
  stream.close();
});

/** Options of a program that is not checked by TypeScript. */
function fromJson<T extends object>(json: string): T {
  return JSON.parse(json);
}

function makeServer(options: ServerOptions): TcpServer {
  return new TcpServer({ hostname: "127.0.0.1", port: 0 }, Idle, options);
}

/** What `fn` throws, as a rejection. */
async function attempt(fn: () => unknown): Promise<unknown> {
  return await fn();
}

async function framesWith(options: FrameOptions): Promise<unknown> {
  return await attempt(() => new SocketStream(new FakeConn()).frames(options));
}

async function writeFrameWith(options: FrameOptions): Promise<unknown> {
  return await attempt(() => new SocketStream(new FakeConn()).writeFrame("a", options));
}

async function assertOverrun(read: Promise<unknown>): Promise<void> {
  const error = await rejectionOf(read);
  assert(error instanceof LimitOverrunError);
  assertEquals(error.limit, LIMIT);
}
