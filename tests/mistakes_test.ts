/**
 * The mistakes of a program that uses mod.ts, and the sentence that answers each:
 * what was wrong, and what to do. Those of the two scripts' users are in
 * scripts/errors_test.ts; the faults of peers and of the system are in the tests of
 * each section.
 */

import { assert, assertEquals } from "../deps.ts";
import {
  connect,
  DatagramRequestHandler,
  perHost,
  type ServerOptions,
  socketPair,
  type SocketStream,
  StreamServer,
  TcpServer,
  type TcpServerAddress,
  UdpServer,
  UnixServer,
} from "../mod.ts";
import { Echo, rejectionOf } from "./testing.ts";

/** Made from JSON, as plain JavaScript would: the types forbid it. */
function untyped<T>(json: string): T {
  return JSON.parse(json);
}

const withOptions = (options: ServerOptions) => () => new TcpServer({ port: 0 }, Echo, options);
const withAddress = (address: TcpServerAddress) => () => new TcpServer(address, Echo);

/** Does something with one end of a pair. */
function onStream(act: (stream: SocketStream, peer: SocketStream) => unknown): () => Promise<unknown> {
  return async () => {
    const [stream, peer] = socketPair({ limit: 8 });
    try {
      return await act(stream, peer);
    } finally {
      for (const end of [stream, peer]) end.close();
    }
  };
}

/** A server that opens nothing, whatever it is asked. */
function closed(): TcpServer {
  const server = new TcpServer({ port: 0 }, Echo);
  server.close();
  return server;
}

class Quiet extends DatagramRequestHandler {
  override handle() {}
}

type Kind = new (...args: never[]) => Error;

const MISTAKES: [string, () => unknown, Kind, string][] = [
  // Options
  [
    "a misspelt option",
    withOptions(untyped('{ "timout": 5 }')),
    TypeError,
    'Unknown option "timout": the options are timeout, idleTimeout, maxLifetime, limit, highWaterMark, maxConnections, ' +
    "filters, handshakeTimeout, grace, noDelay",
  ],
  [
    "no object of options",
    withOptions(untyped("5")),
    TypeError,
    "Options must be an object such as { timeout: 5_000 }: they are 5",
  ],
  [
    "a text for a number",
    withOptions(untyped('{ "timeout": "5" }')),
    TypeError,
    'Option "timeout" must be a number: it is "5"',
  ],
  [
    "a timeout of 0",
    withOptions({ timeout: 0 }),
    RangeError,
    'Option "timeout" must be above 0, or Infinity for no limit: it is 0',
  ],
  [
    "half a connection",
    withOptions({ maxConnections: 0.5 }),
    RangeError,
    'Option "maxConnections" must be whole, 1 or more, or Infinity for no limit: it is 0.5',
  ],
  [
    "a negative grace",
    withOptions({ grace: -1 }),
    RangeError,
    'Option "grace" must be 0 or more, or Infinity for no limit: it is -1',
  ],
  // Addresses and handlers
  [
    "Python's pair for an address",
    withAddress(untyped('["127.0.0.1", 8009]')),
    TypeError,
    'Address must be an object such as { hostname: "127.0.0.1", port: 8009 }: it is [ "127.0.0.1", 8009 ]',
  ],
  [
    "a port out of range",
    withAddress({ port: 65_536 }),
    RangeError,
    "Port must be a whole number from 0 to 65535: it is 65536",
  ],
  [
    "no hostname",
    withAddress({ port: 0, hostname: "" }),
    TypeError,
    'Hostname must not be empty: "127.0.0.1" is this machine, "0.0.0.0" all its IPv4 interfaces',
  ],
  [
    "a number for a hostname",
    withAddress(untyped('{ "port": 0, "hostname": 127 }')),
    TypeError,
    'Option "hostname" must be a string: it is 127',
  ],
  [
    "too long a backlog",
    withAddress({ port: 0, tcpBacklog: 2 ** 31 }),
    RangeError,
    'Option "tcpBacklog" must be 2147483647 or less: it is 2147483648',
  ],
  [
    "an object in place of a handler class",
    () => Reflect.construct(TcpServer, [{ port: 0 }, {}]),
    TypeError,
    "Handler must be a class with a method handle(): it is {}",
  ],
  [
    "a function in place of a handler class, in a kind of server of one's own",
    () =>
      Reflect.construct(
        class extends StreamServer {
          override listen = () => this.address;
        },
        [() => {}, {}],
      ),
    TypeError,
    "Handler must be a class with a method handle(): it is [Function (anonymous)]",
  ],
  [
    "no path",
    () => new UnixServer({ path: "" }, Echo),
    TypeError,
    'Path must be the name of the socket file: it is ""',
  ],
  [
    "a decimal mode",
    () => new UnixServer({ path: "/tmp/a.sock", mode: 660 }, Echo),
    RangeError,
    'Option "mode" must be from 0 to 0o777, such as 0o660: it is 0o1224',
  ],
  [
    "a filter that is no list",
    withOptions(untyped('{ "filters": 5 }')),
    TypeError,
    'Option "filters" must be an array of functions: it is 5',
  ],
  [
    "no connections of a host",
    () => perHost(0),
    RangeError,
    "perHost() takes a whole number of 1 or more, or Infinity: it was given 0",
  ],
  // Order
  [
    "the address of a server that does not listen",
    () => new TcpServer({ port: 0 }, Echo).address,
    TypeError,
    "Cannot tell the address: the server does not listen yet, call listen()",
  ],
  [
    "a server that listens again after its end",
    () => {
      const server = new TcpServer({ port: 0 }, Echo);
      server.close();
      return server.listen();
    },
    TypeError,
    "Cannot listen: the server is closed, make a new one",
  ],
  // Streams
  [
    "a number to write",
    onStream((stream) => Reflect.apply(stream.write, stream, [5])),
    TypeError,
    "Cannot write(): data must be a Uint8Array or a string, it is 5",
  ],
  [
    "an array to write",
    onStream((stream) => Reflect.apply(stream.write, stream, [[5]])),
    TypeError,
    "Cannot write(): data must be a Uint8Array or a string, it is of the class Array",
  ],
  [
    "no bytes to receive",
    onStream((stream) => stream.recv(0)),
    RangeError,
    "Cannot recv(0): ask for a whole number of 1 or more, or Infinity",
  ],
  [
    "an array without room",
    onStream((stream) => stream.read(new Uint8Array())),
    RangeError,
    "Cannot read() into an empty array: a loop over it would spin",
  ],
  [
    "half a byte",
    onStream((stream) => stream.readExactly(0.5)),
    RangeError,
    "Cannot readExactly(0.5): ask for a whole number of 0 or more",
  ],
  [
    "an empty delimiter",
    onStream((stream) => stream.readUntil("")),
    RangeError,
    "Cannot readUntil() an empty delimiter",
  ],
  [
    "a prefix of three bytes",
    onStream((stream) => stream.writeFrame("a", untyped('{ "lengthBytes": 3 }'))),
    RangeError,
    'Option "lengthBytes" must be 1, 2 or 4: it is 3',
  ],
  [
    "a frame that its prefix cannot count",
    onStream((stream) => stream.writeFrame(new Uint8Array(256), { lengthBytes: 1 })),
    RangeError,
    "Cannot write a frame of 256 bytes with a length of 1 bytes",
  ],
  [
    "a second read",
    onStream((stream) => {
      stream.readLine().catch(() => {});
      return stream.recv();
    }),
    Deno.errors.Busy,
    "Cannot recv(): readLine() waits on the same stream",
  ],
  [
    "a write behind the end",
    onStream(async (stream) => {
      await stream.closeWrite();
      await stream.send("more");
    }),
    Deno.errors.BrokenPipe,
    "Cannot send(): closeWrite() has ended this side of the stream",
  ],
  [
    "a read of a stream that is closed",
    onStream((stream) => {
      stream.close();
      return stream.recv();
    }),
    Deno.errors.BadResource,
    "The stream is closed",
  ],
  [
    "no bytes to look at",
    onStream((stream) => stream.peek(-1)),
    RangeError,
    "Cannot peek(-1): ask for a whole number of 0 or more",
  ],
  [
    "no delimiter",
    onStream((stream) => stream.readUntil([])),
    RangeError,
    "Cannot readUntil() an empty delimiter",
  ],
  [
    "an upgrade while bytes are unread",
    onStream(async (stream, peer) => {
      await peer.send("hello");
      await stream.recv(1);
      await stream.upgrade((conn) => conn);
    }),
    Deno.errors.Busy,
    "Cannot upgrade(): 4 received bytes are unread; read them, or close",
  ],
  [
    "an upgrade while a read waits",
    onStream((stream) => {
      stream.readLine();
      return stream.upgrade((conn) => conn);
    }),
    Deno.errors.Busy,
    "Cannot upgrade(): readLine() waits on the same stream",
  ],
  [
    "an upgrade with no time",
    onStream((stream) => stream.upgrade((conn) => conn, { handshakeTimeout: 0 })),
    RangeError,
    'Option "handshakeTimeout" must be above 0, or Infinity for no limit: it is 0',
  ],
  [
    "an upgrade with a misspelt option",
    onStream((stream) => stream.upgrade((conn) => conn, untyped('{ "handshakeTimout": 5 }'))),
    TypeError,
    'Unknown option "handshakeTimout": the options are handshakeTimeout',
  ],
  [
    "no array to read into",
    onStream((stream) => Reflect.apply(stream.read, stream, [undefined])),
    TypeError,
    "Cannot read() into undefined",
  ],
  [
    "an undefined delimiter",
    onStream((stream) => Reflect.apply(stream.readUntil, stream, [undefined])),
    TypeError,
    "Cannot readUntil(): data must be a Uint8Array or a string, it is undefined",
  ],
  [
    "a number among the delimiters",
    onStream((stream) => stream.readUntil(untyped("[5]"))),
    TypeError,
    "Cannot readUntil(): data must be a Uint8Array or a string, it is 5",
  ],
  // Calls of a server
  [
    "serveForever() with a misspelt option",
    () => closed().serveForever(untyped('{ "signall": 5 }')),
    TypeError,
    'Unknown option "signall": the options are signal',
  ],
  [
    "handleRequest() with a misspelt option",
    () => closed().handleRequest(untyped('{ "timout": 5 }')),
    TypeError,
    'Unknown option "timout": the options are timeout',
  ],
  [
    "shutdown() with a misspelt option",
    () => closed().shutdown(untyped('{ "grase": 5 }')),
    TypeError,
    'Unknown option "grase": the options are grace',
  ],
  // Clients
  [
    "a dial to nowhere",
    () => connect(untyped('{ "hostname": "localhost" }')),
    RangeError,
    "Port must be a whole number from 0 to 65535: it is undefined",
  ],
  [
    "no datagrams at once",
    () => new UdpServer({ port: 0 }, Quiet, { maxConcurrent: 0 }),
    RangeError,
    'Option "maxConcurrent" must be whole, 1 or more, or Infinity for no limit: it is 0',
  ],
];

for (const [what, make, Kind, sentence] of MISTAKES) {
  Deno.test(`a mistake: ${what}`, async () => {
    const error = await rejectionOf(Promise.try(make));
    assertEquals([error.constructor.name, error.message], [Kind.name, sentence]);
  });
}

for (const [call, argument] of [["read", undefined], ["readUntil", undefined], ["readUntil", []], ["readUntil", [5]]]) {
  Deno.test(`${call}(${Deno.inspect(argument)}) rejects, and throws nothing`, async () => {
    const [stream, peer] = socketPair();
    const refused: Promise<unknown> = Reflect.apply(Reflect.get(stream, `${call}`), stream, [argument]);
    const error = await rejectionOf(refused);
    assert(error instanceof TypeError || error instanceof RangeError);
    await peer.send("hello\n");
    assertEquals(await stream.readLine(), "hello");
    for (const end of [stream, peer]) end.close();
  });
}
