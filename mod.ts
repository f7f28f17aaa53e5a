/**
 * Network servers from one class with one method: Python's
 * {@link https://docs.python.org/3/library/socketserver.html | `socketserver`}
 * for Deno, in one file and without dependencies.
 *
 * A whole server. Every client is served at the same time, and what one of
 * them does (throws, resets, stalls) is never felt by another:
 *
 * ```ts
 * import { StreamRequestHandler, TcpServer } from "@socketserver/socketserver";
 *
 * class Echo extends StreamRequestHandler {
 *   override async handle() {
 *     for await (const data of this.request) await this.request.send(data);
 *   }
 * }
 *
 * const server = new TcpServer({ hostname: "127.0.0.1", port: 0 }, Echo);
 * server.listen();
 * setTimeout(() => server.shutdown(), 10); // A real server runs until SIGTERM.
 * await server.serveForever();
 * ```
 *
 * `this.request` is a {@linkcode SocketStream}: it reads chunks, lines, exact
 * counts and length-prefixed frames, and writes everything or says why not. The
 * same class is what {@linkcode connect} gives a client, and what
 * {@linkcode socketPair} gives a test, in memory and with no permission.
 *
 * ```text
 * BaseServer                  lifecycle, hooks, shutdown
 * ├─ StreamServer             accepts connections, hands out SocketStreams
 * │  ├─ TcpServer             { hostname, port }
 * │  │  └─ TlsServer          { hostname, port, cert, key }
 * │  └─ UnixServer            { path }
 * └─ DatagramServer           receives datagrams, hands out Datagrams
 *    ├─ UdpServer             { hostname, port }
 *    └─ UnixDatagramServer    { path }
 *
 * WorkerPool                  a TcpServer or a TlsServer on every core
 *
 * BaseRequestHandler          setup() → handle() → finish()
 * ├─ StreamRequestHandler     this.request is a SocketStream
 * └─ DatagramRequestHandler   this.request is a Datagram
 * ```
 *
 * Take `TcpServer` or, encrypted, `TlsServer` for the network and `UnixServer` for
 * programs of the same machine. A server that may serve one client at a time is
 * `maxConnections: 1`. It is not an HTTP server: `Deno.serve` is.
 *
 * One connection goes through these calls, in this order:
 *
 * | call | of | the stream |
 * | --- | --- | --- |
 * | `getRequest()` | server | is made |
 * | `handleOpen()` | server | is open; nothing was read |
 * | `verifyRequest()` | server | is open; nothing was read |
 * | `processRequest()` | server | is open |
 * | `finishRequest()` | server | is open; makes the handler |
 * | `setup()`, `handle()` | handler | is open until `handle()` closes it |
 * | `finish()` | handler | is what `handle()` left; runs whenever `setup()` succeeded |
 * | `handleError()` | server | is what the handler left; runs only if something was thrown |
 *
 * Then the server sends what is still buffered, closes the stream and calls
 * `handleClose()`. A PROXY header, where `proxyProtocol` asks for one, comes before
 * all of them. A TLS handshake comes after `handleOpen()`; a client that fails in it
 * meets none of the others.
 *
 * Units are milliseconds and bytes. Everything is bounded: a line and a frame
 * by `limit`, buffered writes by `highWaterMark`. A promise of a stream's
 * own methods that a handler forgets to await never ends the process.
 *
 * @module
 */

// --- Errors -----------------------------------------------------------------

/**
 * The stream ended inside of what was asked for.
 *
 * Rejected by {@linkcode SocketStream.readExactly},
 * {@linkcode SocketStream.readUntil} and {@linkcode SocketStream.frames}. The
 * counterpart of Python's `asyncio.IncompleteReadError`.
 *
 * @example What arrived is not lost
 * ```ts
 * import { IncompleteReadError, socketPair } from "@socketserver/socketserver";
 * import { assertEquals } from "@std/assert";
 *
 * const [ours, theirs] = socketPair();
 * await theirs.send("abc");
 * theirs.close();
 * const error = await ours.readExactly(10).catch((error) => error);
 * assertEquals(error instanceof IncompleteReadError && error.partial.length, 3);
 * ours.close();
 * ```
 */
export class IncompleteReadError extends Error {
  /** The bytes that arrived before the end; they are the caller's. */
  readonly partial: Uint8Array<ArrayBuffer>;
  /** How many bytes were asked for; `null` when a delimiter was. */
  readonly expected: number | null;

  /**
   * Made by the stream.
   *
   * @param partial The bytes that arrived before the end.
   * @param expected How many bytes were asked for, or `null` for a delimiter.
   */
  constructor(partial: Uint8Array<ArrayBuffer>, expected: number | null) {
    super(
      expected === null
        ? `Cannot find the delimiter: the stream ended after ${partial.length} bytes`
        : `Cannot read ${expected} bytes: the stream ended after ${partial.length}`,
    );
    this.name = "IncompleteReadError";
    this.partial = partial;
    this.expected = expected;
  }
}

/**
 * A line, a delimited record or a frame is longer than its limit.
 *
 * The stream stays as it was: the bytes wait to be read, so the caller may answer
 * and close, or skip `consumed` of them with {@linkcode SocketStream.readExactly}.
 * What comes then is the rest of the same line or record, not a new one: whoever
 * goes on reads that away, too. The counterpart of Python's
 * `asyncio.LimitOverrunError`.
 *
 * @example A line over the limit
 * ```ts
 * import { LimitOverrunError, socketPair } from "@socketserver/socketserver";
 * import { assertEquals } from "@std/assert";
 *
 * const [ours, theirs] = socketPair({ limit: 4 });
 * await theirs.send("far too long\n");
 * const error = await ours.readLine().catch((error) => error);
 * assertEquals(error instanceof LimitOverrunError && error.limit, 4);
 * ours.close();
 * theirs.close();
 * ```
 */
export class LimitOverrunError extends Error {
  /** The limit that was passed, in bytes. */
  readonly limit: number;
  /** Bytes that can be read away and that hold no delimiter. */
  readonly consumed: number;

  /**
   * Made by the stream.
   *
   * @param message What was too long.
   * @param limit The limit, in bytes.
   * @param consumed Bytes that can be skipped.
   */
  constructor(message: string, limit: number, consumed: number) {
    super(message);
    this.name = "LimitOverrunError";
    this.limit = limit;
    this.consumed = consumed;
  }
}

/** The runtime's own classes that a failed dial or bind may be an instance of. */
const NETWORK_ERRORS = [
  Deno.errors.AddrInUse,
  Deno.errors.AddrNotAvailable,
  Deno.errors.BadResource,
  Deno.errors.ConnectionAborted,
  Deno.errors.ConnectionRefused,
  Deno.errors.ConnectionReset,
  Deno.errors.InvalidData,
  Deno.errors.NetworkUnreachable,
  Deno.errors.NotCapable,
  Deno.errors.NotFound,
  Deno.errors.PermissionDenied,
  Deno.errors.TimedOut,
  RangeError,
  TypeError,
  URIError,
];

/** The same class and `code` as `error`, so that callers can tell it apart, under a message of ours. */
function restate(error: unknown, message: string): Error {
  const code = errorCode(error);
  // The runtime asks a new connection for its peer, which a reset has taken away by then.
  const isReset = code === "ENOTCONN";
  const Kind = isReset ? Deno.errors.ConnectionReset : NETWORK_ERRORS.find((Kind) => error instanceof Kind) ?? Error;
  const restated = new Kind(message, { cause: error });
  return code === "" ? restated : Object.assign(restated, { code });
}

/** Linux's numbers of the errors to which Deno 2.9.6 gives no `code`. */
const CODES_BY_NUMBER = new Map([
  ["23", "ENFILE"],
  ["64", "ENONET"],
  ["71", "EPROTO"],
  ["92", "ENOPROTOOPT"],
  ["100", "ENETDOWN"],
  ["107", "ENOTCONN"],
  ["112", "EHOSTDOWN"],
]);

/** `error.code`, which the runtime gives to most errors of the operating system; the rest have a number in their message. "" where there is none. */
function errorCode(error: unknown): string {
  if (!(error instanceof Error)) return "";
  if ("code" in error) return String(error.code);
  const [, number = ""] = /\(os error (\d+)\)$/.exec(error.message) ?? [];
  return CODES_BY_NUMBER.get(number) ?? "";
}

/**
 * What a terminal or a reader of logs acts on instead of seeing it: controls (C0,
 * C1), what cannot be seen or turns the direction of writing, line ends, and halves
 * of characters.
 */
const UNPRINTABLE = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu;

/** Those that have an escape of their own. */
const SHORT_ESCAPES = new Map([["\n", "\\n"], ["\r", "\\r"], ["\t", "\\t"]]);

/**
 * `text` as one line that is safe to print: what a client has sent or named may
 * hold line ends that forge a line of a log, and sequences that a terminal obeys.
 * Control characters, and characters that are not seen, are written as `\n`, `\x1b`
 * or `\u202e`; the rest, backslashes included, stays.
 *
 * All messages and logs of this file are made with it.
 *
 * @param text The text.
 * @returns The same without control characters.
 *
 * @example
 * ```ts
 * import { printable } from "@socketserver/socketserver";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(printable("\x1b[2Jhello\n"), String.raw`\x1b[2Jhello\n`);
 * ```
 */
export function printable(text: string): string {
  return text.replace(UNPRINTABLE, (character) => SHORT_ESCAPES.get(character) ?? escapeOf(character));
}

function escapeOf(character: string): string {
  const code = character.codePointAt(0) ?? 0;
  const digits = code.toString(16);
  if (code <= 0xff) return `\\x${digits.padStart(2, "0")}`;
  return code <= 0xffff ? `\\u${digits.padStart(4, "0")}` : `\\u{${digits}}`;
}

/** `error.message`, or whatever else was thrown, as printable text; never throws. */
function messageOf(error: unknown): string {
  try {
    return printable(error instanceof Error ? error.message : String(error));
  } catch {
    return "what was thrown cannot be printed"; // Its own code has thrown.
  }
}

/** Exhaustions that follow each other within this time are one: a descriptor that comes free is taken at once. */
const OVERLOAD_EPISODE_MS = 5_000;

/** When the process was last known to be out of descriptors or memory. */
let exhaustedAt = -Infinity;

/** Prints an error with its stack, for which the runtime opens files: without any to open it panics. Never throws. */
function printError(what: string, error: unknown): void {
  const format = what.replaceAll("%", "%%"); // A client may be bound to a path that looks like a format.
  try {
    const isExhausted = performance.now() - exhaustedAt <= OVERLOAD_EPISODE_MS;
    console.error(format, isExhausted ? messageOf(error) : printableError(error));
  } catch {
    console.error(format, messageOf(error)); // Its own code has thrown.
  }
}

/** What to print of `error`: itself, or, if it has what is not printable or looks like a line of a log, its text. */
function printableError(error: unknown): unknown {
  if (typeof error === "string") return printable(error);
  const text = Deno.inspect(error);
  const quoted = error instanceof Error ? text.replace(error.message, () => printable(error.message)) : text;
  const [first = "", ...rest] = quoted.split("\n").map(printable);
  const shown = [first, ...rest.map((line) => CONTINUES.test(line) ? line : `    ${line}`)].join("\n");
  return shown === text ? error : shown;
}

/** A line that cannot be taken for another message: of a stack, or inside or at the end of an object. */
const CONTINUES = /^( |[}\])]+$|$)/;

/**
 * Rejects, and can be forgotten: a promise that nobody awaits must not end the
 * process, as the same error meets the next call on the stream.
 */
function rejection(error: unknown): Promise<never> {
  return forgettable(Promise.reject(error));
}

/** Marks `promise` as handled; whoever awaits it sees its rejection all the same. */
function forgettable<T>(promise: Promise<T>): Promise<T> {
  promise.catch(ignore);
  return promise;
}

/** For outcomes that are reported elsewhere. */
function ignore(): void {}

// --- Options ----------------------------------------------------------------

/** What a {@linkcode SocketStream} is told when it is made. */
export interface StreamOptions {
  /**
   * Milliseconds that one read or one write may wait; above 0, `Infinity` for
   * ever. A read that waits longer rejects with `Deno.errors.TimedOut` and loses
   * nothing: the bytes answer the next read. A write that waits longer rejects
   * likewise, and closes the stream, as nobody can tell how much was sent. It is
   * never early, and late by a sixteenth or 10 ms at most, whichever is more.
   *
   * Of a peer that reads slowly the kernel tells nothing until a third of its own
   * buffer is free, which may be a megabyte: 30 seconds end a large answer to one
   * that reads 30 kB a second.
   *
   * @default {Infinity}
   */
  timeout?: number;
  /**
   * Milliseconds without a byte in either direction after which the stream is
   * closed; above 0, `Infinity` for never. What waits then rejects with
   * `Deno.errors.TimedOut`.
   *
   * @default {Infinity}
   */
  idleTimeout?: number;
  /**
   * Milliseconds after which the stream is closed, however busy it is; above 0,
   * `Infinity` for never. What waits then rejects with `Deno.errors.TimedOut`. Of a
   * server's connection it counts from the accept, a TLS handshake included, and
   * {@linkcode ServerStats.timedOut} counts it once its handler is done.
   *
   * @default {Infinity}
   */
  maxLifetime?: number;
  /**
   * Bytes that a line, a delimited record or a frame may have, its delimiter or
   * length prefix not counted; `Infinity` for no limit. A longer one rejects with
   * {@linkcode LimitOverrunError}.
   *
   * @default {65_536}
   */
  limit?: number;
  /**
   * Bytes that {@linkcode SocketStream.write} buffers at most before it waits for
   * the peer to take them; 0 for none, `Infinity` for no limit.
   *
   * @default {65_536}
   */
  highWaterMark?: number;
}

/** What a {@linkcode StreamServer} is told when it is made, besides its address. */
export interface ServerOptions extends StreamOptions {
  /**
   * Connections that are served at the same time, 1 or more; `Infinity` for no
   * limit. Clients beyond it wait in the kernel's backlog until one leaves. With
   * 1 the server is Python's `TCPServer`: one client after the other.
   *
   * A connection takes one descriptor, an encrypted one too. The default is seven
   * eighths of the descriptors that the process may have, less 32 for the runtime:
   * 868 of 1,024. Say it yourself where handlers open files or connections of their
   * own, or a program has several servers. `listen()` finds it out and asks for no
   * permission: on Linux, and in a program that has all of them (`-A`), as the
   * runtime shows `/proc/self/limits` to no other. {@linkcode StreamServer.maxConnections}
   * tells what was found.
   *
   * @default What the process's descriptors allow; `Infinity` where they cannot be known.
   */
  maxConnections?: number;
  /**
   * Connections that one host may have at the same time, 1 or more; `Infinity` for
   * no limit. One more is closed at once, before a handshake; of the hooks only
   * `handleRefuse()` is told, and {@linkcode ServerStats.refused} counts it. {@linkcode hostOf} says what
   * one host is. Clients of a Unix socket have none, so it does not apply to them.
   * Behind a proxy it counts the clients that the PROXY headers name, and not those
   * whom they do not name, nor the proxy.
   *
   * @default {Infinity}
   */
  maxConnectionsPerHost?: number;
  /**
   * Whose PROXY headers are believed: a proxy such as HAProxy, nginx or a cloud's
   * load balancer begins each connection that it relays with one, which tells the
   * client's address. It is read before TLS and before any hook, under
   * `handshakeTimeout`. Then `remoteAddress`, `clientAddress`, `maxConnectionsPerHost`
   * and all that is printed are about the client, and `request.proxy` is the header.
   *
   * A proxy's connection that begins with something else is closed, counted in
   * {@linkcode ServerStats.handshakeFailures}, and `handleError()` is told; one that
   * is closed before it has said anything, as some health checks are, is counted in
   * {@linkcode ServerStats.lost}. No other hook is told of either.
   *
   * @default No header is read, from nobody.
   */
  proxyProtocol?: ProxyProtocolOptions;
  /**
   * Milliseconds that a client has for what comes before its first byte to a
   * handler, the PROXY header and the TLS handshake together; above 0, `Infinity`
   * for ever. A client that takes longer is cut off and counted in
   * {@linkcode ServerStats.handshakeFailures}; in a TLS handshake, `handleOpen()` and
   * `handleClose()` are told of it and no other hook, and in a header none. Without
   * either of them it does nothing.
   *
   * @default {5_000}
   */
  handshakeTimeout?: number;
  /**
   * Milliseconds that {@linkcode BaseServer.shutdown} lets handlers finish before
   * it cuts them off; 0 cuts at once, `Infinity` waits for ever.
   *
   * @default {10_000}
   */
  grace?: number;
  /**
   * Whether small writes are sent at once (`TCP_NODELAY`). Without it an answer
   * that is written in two parts waits some 40 ms for the peer's acknowledgement.
   * Unix sockets have no such delay.
   *
   * @default {true}
   */
  noDelay?: boolean;
}

/** What a {@linkcode DatagramServer} is told when it is made, besides its address. */
export interface DatagramServerOptions {
  /**
   * Datagrams that are served at the same time, 1 or more; `Infinity` for no
   * limit. Those that come while as many are served are dropped, and counted in
   * {@linkcode ServerStats.dropped}.
   *
   * @default {1_000}
   */
  maxConcurrent?: number;
  /**
   * Milliseconds that {@linkcode BaseServer.shutdown} lets handlers finish before
   * it gives them up; 0 gives them up at once, `Infinity` waits for ever.
   *
   * @default {10_000}
   */
  grace?: number;
}

/** How {@linkcode SocketStream.frames} and {@linkcode SocketStream.writeFrame} mark a record's length. */
export interface FrameOptions {
  /**
   * Bytes of the length prefix.
   *
   * @default {4}
   */
  lengthBytes?: 1 | 2 | 4;
  /**
   * Whether the prefix's least significant byte comes first. Network protocols
   * send the most significant one first.
   *
   * @default {false}
   */
  littleEndian?: boolean;
}

/** Options of {@linkcode connect}, besides the address. */
export interface DialOptions extends StreamOptions {
  /**
   * Milliseconds that each try may take, and then that each read or write of the
   * stream may wait (as in Python's `socket.create_connection`); above 0,
   * `Infinity` for ever.
   *
   * @default {Infinity}
   */
  timeout?: number;
  /**
   * How often a failed try is repeated; `Infinity` for ever. The wait before the
   * next try is 100 ms and doubles up to 5 s; a random part of up to half is
   * taken off, so that many clients do not come back at the same moment.
   *
   * @default {0}
   */
  retries?: number;
  /**
   * Whether the connection is encrypted with TLS, and whom to trust. The handshake
   * is a part of the try, under the same `timeout`.
   *
   * @default {false}
   */
  tls?: boolean | TlsClientSettings;
  /**
   * A header of the PROXY protocol that is sent before anything else, before TLS too:
   * whose connection this program relays, to a server that believes it. Such a server
   * says nothing before it.
   *
   * @default None is sent.
   */
  proxyHeader?: ProxyHeaderOptions;
  /** Ends the tries and the waits between them; the promise rejects with its reason. */
  signal?: AbortSignal;
  /**
   * Whether small writes are sent at once (`TCP_NODELAY`).
   *
   * @default {true}
   */
  noDelay?: boolean;
}

/** Where {@linkcode connect} goes, and how. */
export type ConnectOptions =
  & DialOptions
  & ({
    /**
     * The host's name or address.
     *
     * @default {"127.0.0.1"}
     */
    hostname?: string;
    /** The TCP port. */
    port: number;
  } | {
    /** The path of the Unix socket. */
    path: string;
  });

const STREAM_DEFAULTS: Required<StreamOptions> = {
  timeout: Infinity,
  idleTimeout: Infinity,
  maxLifetime: Infinity,
  limit: 65_536,
  highWaterMark: 65_536,
};

/** Without `maxConnections`, `listen()` finds one. */
type ServerSettings = Omit<Required<ServerOptions>, "maxConnections" | "proxyProtocol"> & {
  maxConnections: number | undefined;
  proxyProtocol: ProxyProtocolOptions | undefined;
};

const SERVER_DEFAULTS: ServerSettings = {
  ...STREAM_DEFAULTS,
  maxConnections: undefined,
  maxConnectionsPerHost: Infinity,
  proxyProtocol: undefined,
  // Long enough for a slow line, short enough that peers which stall hold few descriptors. PROXY 2 asks for 3 seconds
  // at least, in which a lost segment is sent again.
  handshakeTimeout: 5_000,
  grace: 10_000,
  noDelay: true,
};

const DATAGRAM_SERVER_DEFAULTS: Required<DatagramServerOptions> = {
  maxConcurrent: 1_000,
  grace: 10_000,
};

const DIAL_DEFAULTS: Omit<Required<DialOptions>, "signal" | "tls" | "proxyHeader"> = {
  ...STREAM_DEFAULTS,
  retries: 0,
  noDelay: true,
};

const FRAME_DEFAULTS: Required<FrameOptions> = {
  lengthBytes: 4,
  littleEndian: false,
};

/** What the number of each option may be. */
const NUMBER_RULES: Record<string, "above 0" | "0 or more" | "whole, 1 or more" | "whole, 0 or more"> = {
  timeout: "above 0",
  idleTimeout: "above 0",
  maxLifetime: "above 0",
  limit: "whole, 1 or more",
  highWaterMark: "0 or more",
  maxConnections: "whole, 1 or more",
  maxConnectionsPerHost: "whole, 1 or more",
  maxConcurrent: "whole, 1 or more",
  grace: "0 or more",
  handshakeTimeout: "above 0",
  workers: "whole, 1 or more",
  retries: "whole, 0 or more",
  tcpBacklog: "whole, 1 or more",
  mode: "whole, 0 or more",
};

/** Fills `options` up with `defaults`; throws for a name that is misspelt and for a number out of its range. */
function resolveOptions<T extends object>(defaults: T, options: Partial<T>): T {
  checkOptions(options);
  const given = Object.entries(options).filter(([, value]) => value !== undefined);
  for (const [name, value] of given) {
    if (!Object.hasOwn(defaults, name)) {
      throw new TypeError(`Unknown option "${name}": the options are ${Object.keys(defaults).join(", ")}`);
    }
    if (Object.hasOwn(NUMBER_RULES, name)) checkNumber(name, value);
  }
  return { ...defaults, ...Object.fromEntries(given) };
}

function checkOptions(options: unknown): void {
  if (typeof options === "object" && options !== null) return;
  throw new TypeError(`Options must be an object such as { timeout: 5_000 }: they are ${Deno.inspect(options)}`);
}

/** What {@linkcode resolveStreamOptions} has returned: a server gives the same options to each of its streams. */
const resolvedStreamOptions = new WeakSet<StreamOptions>();

function resolveStreamOptions(options: StreamOptions): Required<StreamOptions> {
  if (isResolved(options)) return options;
  const resolved = resolveOptions(STREAM_DEFAULTS, options);
  resolvedStreamOptions.add(resolved);
  return resolved;
}

function isResolved(options: StreamOptions): options is Required<StreamOptions> {
  return resolvedStreamOptions.has(options);
}

function checkNumber(name: string, value: unknown): void {
  const rule = NUMBER_RULES[name] ?? "0 or more";
  if (typeof value !== "number") {
    throw new TypeError(`Option "${name}" must be a number: it is ${Deno.inspect(value)}`);
  }
  const whole = !rule.startsWith("whole") || Number.isInteger(value) || value === Infinity;
  const minimum = rule.endsWith("1 or more") ? 1 : rule === "above 0" ? Number.MIN_VALUE : 0;
  if (!(whole && value >= minimum)) {
    throw new RangeError(`Option "${name}" must be ${rule}, or Infinity for no limit: it is ${value}`);
  }
}

function checkText(name: string, value: unknown): void {
  if (typeof value !== "string") throw new TypeError(`Option "${name}" must be a string: it is ${Deno.inspect(value)}`);
}

function checkPort(port: unknown): void {
  if (!(typeof port === "number" && Number.isInteger(port) && port >= 0 && port <= 65_535)) {
    throw new RangeError(`Port must be a whole number from 0 to 65535: it is ${Deno.inspect(port)}`);
  }
}

/** Python's servers take a pair, and its handlers may be functions. */
function checkServerArguments(address: unknown, Handler: unknown): void {
  if (typeof address !== "object" || address === null || Array.isArray(address)) {
    throw new TypeError(
      `Address must be an object such as { hostname: "127.0.0.1", port: 8009 }: it is ${Deno.inspect(address)}`,
    );
  }
  if (typeof Handler !== "function" || typeof Handler.prototype?.handle !== "function") {
    throw new TypeError(`Handler must be a class with a method handle(): it is ${Deno.inspect(Handler)}`);
  }
}

function checkHostname(hostname: unknown): void {
  checkText("hostname", hostname);
  if (hostname === "") {
    throw new TypeError(`Hostname must not be empty: "127.0.0.1" is this machine, "0.0.0.0" all its IPv4 interfaces`);
  }
}

// --- Addresses --------------------------------------------------------------

/**
 * An address as people write it: `127.0.0.1:8009`, `[::1]:8009`,
 * `/run/app.sock`. An IPv4 client of an IPv6 socket (`::ffff:127.0.0.1`) is
 * written as the IPv4 address that it is. Clients choose the names of their Unix
 * sockets, so control characters are escaped as {@linkcode printable} does it.
 *
 * @param address The address.
 * @returns The text.
 *
 * @example
 * ```ts
 * import { formatAddress } from "@socketserver/socketserver";
 * import { assertEquals } from "@std/assert";
 *
 * const address = { transport: "tcp", hostname: "::1", port: 8009 } as const;
 * assertEquals(formatAddress(address), "[::1]:8009");
 * ```
 */
export function formatAddress(address: Deno.Addr): string {
  switch (address.transport) {
    case "tcp":
    case "udp":
      return printable(`${bracketed(address.hostname)}:${address.port}`);
    case "unix":
    case "unixpacket":
      // A client that is bound to no path has none, whatever the type says.
      return address.path ? printable(address.path.replace(/^\0/, "@")) : "(unnamed Unix socket)";
    default:
      return Deno.inspect(address);
  }
}

function bracketed(hostname: string): string {
  const host = hostname.replace(/^\[|\]$/g, "").replace(/^::ffff:(\d+\.\d+\.\d+\.\d+)$/i, "$1");
  return host.includes(":") ? `[${host}]` : host;
}

/** One spelling for each address: `127.1` and `[0:0:0:0:0:0:0:1]` have others. */
function canonicalHost(hostname: string): string {
  const host = bracketed(hostname);
  return URL.canParse(`http://${host}`) ? new URL(`http://${host}`).hostname : host;
}

/** The network that one IPv6 customer is given: to count addresses in it would count nobody. */
const IPV6_NETWORK_BYTES = 8;

/**
 * What counts as one host for {@linkcode ServerOptions.maxConnectionsPerHost}: an
 * IPv4 address, also where it comes as `::ffff:192.0.2.1`, and the first 64 bits of
 * an IPv6 address, as whoever has one address there has all of them.
 *
 * @param address The address of a client.
 * @returns The host; `undefined` for a client without one, as that of a Unix socket is.
 *
 * @example
 * ```ts
 * import { hostOf } from "@socketserver/socketserver";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(hostOf({ transport: "tcp", hostname: "2001:db8::1:2:3:4", port: 50_000 }), "2001:db8::/64");
 * ```
 */
export function hostOf(address: Deno.Addr): string | undefined {
  if (!("hostname" in address)) return undefined;
  const bytes = ipBytes(withoutZone(address.hostname));
  if (bytes === undefined) return canonicalHost(address.hostname);
  const unmapped = withoutMapping(bytes);
  if (unmapped.length === 4) return ipText(unmapped);
  return `${ipText(joinBytes(bytes.subarray(0, IPV6_NETWORK_BYTES), new Uint8Array(16 - IPV6_NETWORK_BYTES)))}/${
    IPV6_NETWORK_BYTES * 8
  }`;
}

/** The first bytes of an IPv4 address that is written as one of IPv6; RFC 4291, 2.5.5.2. */
const MAPPED_PREFIX = new Uint8Array([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);

/** The IPv4 address that `bytes` is in truth, if it is one. */
function withoutMapping(bytes: Uint8Array): Uint8Array {
  const isMapped = bytes.length === 16 && MAPPED_PREFIX.every((byte, index) => byte === bytes[index]);
  return isMapped ? bytes.subarray(MAPPED_PREFIX.length) : bytes;
}

/** `hostname` without what is behind `%`, which is our own interface. */
function withoutZone(hostname: string): string {
  return hostname.replace(/%.*$/, "");
}

/** The 4 or 16 bytes of an IP address that is written as inet_pton(3) reads it; `undefined` if it is none. */
function ipBytes(text: string): Uint8Array | undefined {
  return text.includes(":") ? ipv6Bytes(text) : ipv4Bytes(text);
}

function ipv4Bytes(text: string): Uint8Array | undefined {
  const parts = text.split(".");
  // A leading zero would be octal to some.
  const areBytes = parts.every((part) => /^(0|[1-9]\d{0,2})$/.test(part) && Number(part) <= 0xff);
  return parts.length === 4 && areBytes ? Uint8Array.from(parts, Number) : undefined;
}

function ipv6Bytes(text: string): Uint8Array | undefined {
  const [left = [], right, ...more] = inGroups(text).split("::").map((half) => half === "" ? [] : half.split(":"));
  const zeros = 8 - left.length - (right?.length ?? 0);
  if (more.length > 0 || (right === undefined ? zeros !== 0 : zeros < 1)) return undefined;
  const groups = [...left, ...Array<string>(zeros).fill("0"), ...right ?? []];
  if (!groups.every((group) => /^[\da-f]{1,4}$/i.test(group))) return undefined;
  return Uint8Array.from(groups.flatMap(bytesOfGroup));
}

/** An IPv6 address whose end is written as one of IPv4, without that. */
function inGroups(text: string): string {
  const at = text.lastIndexOf(":") + 1;
  const bytes = ipv4Bytes(text.slice(at));
  if (bytes === undefined) return text;
  return `${text.slice(0, at)}${numberAt(bytes, 0).toString(16)}:${numberAt(bytes, 2).toString(16)}`;
}

function bytesOfGroup(group: string): [number, number] {
  const value = parseInt(group, 16);
  return [value >> 8, value & 0xff];
}

/** An IP address as the runtime writes it. */
function ipText(bytes: Uint8Array): string {
  const unmapped = withoutMapping(bytes);
  return unmapped === bytes ? ipDigits(bytes) : `::ffff:${ipDigits(unmapped)}`;
}

/** An IP address in its canonical form, IPv6 without dots. */
function ipDigits(bytes: Uint8Array): string {
  if (bytes.length === 4) return bytes.join(".");
  const groups = Array.from({ length: 8 }, (_, index) => numberAt(bytes, index * 2).toString(16));
  return canonicalHost(groups.join(":")).slice(1, -1);
}

/** The least permissions that opening `address` takes. */
function permissionFlags(address: Deno.Addr): string {
  // Answers go to the clients' own ports and paths.
  if (address.transport === "udp") return `--allow-net=${bracketed(address.hostname)}`;
  if ("path" in address) {
    const path = printable(address.transport === "unixpacket" ? folderOf(address.path) : address.path);
    if (address.transport === "unixpacket") return `--allow-read=${path} --allow-write=${path} --allow-net`;
    return `--allow-read=${path} --allow-write=${path} --allow-net=unix:${path}`;
  }
  return `--allow-net=${formatAddress(address).replace(/:0$/, "")}`;
}

function folderOf(path: string): string {
  const end = path.lastIndexOf("/");
  return end < 0 ? "." : path.slice(0, end + 1);
}

/** Why opening `address` failed and what to do, for a person; what the system said where there is nothing to add. */
function explain(error: unknown, address: Deno.Addr): string {
  if (error instanceof Deno.errors.NotCapable) {
    return `permission is missing; run again with ${permissionFlags(address)}`;
  }
  switch (errorCode(error)) {
    case "EADDRINUSE":
      if ("path" in address && fileAt(address.path)?.isSocket === false) {
        return "there is a file that is no socket; choose another path";
      }
      return "the address is in use; stop the program that has it or choose another";
    case "EADDRNOTAVAIL":
      return "this machine has no such address; choose one of its own";
    case "EACCES":
      return "the system does not permit it to this user; choose another address (ports below 1024 are reserved)";
    case "ECONNREFUSED":
      return "nobody listens there; start the server or check the address";
    case "ENOENT":
      return "no such file; start the server or check the path";
    case "ECONNRESET":
    case "ENOTCONN":
      return "the server reset the connection; it may be about to end, so try again";
    default:
      return messageOf(error).startsWith("failed to lookup address")
        ? "the name cannot be resolved; check its spelling"
        : messageOf(error);
  }
}

// --- PROXY protocol ---------------------------------------------------------

/** One type-length-value vector of a PROXY header of version 2. */
export interface ProxyTlv {
  /** What it is, from 0 to 255; 0xe0 to 0xef are for applications. */
  readonly type: number;
  /** Its bytes, 65,532 at most. */
  readonly value: Uint8Array;
}

/** What a proxy says about the TLS connection between its client and itself; PROXY 2.2.6. */
export interface ProxyTls {
  /** Whether the client has connected with TLS. */
  readonly isTls: boolean;
  /** Whether the client has shown a certificate in this connection. */
  readonly hasCertificate: boolean;
  /** Whether the client has shown a certificate in this connection, or in an earlier one whose TLS session it goes on with. */
  readonly sessionHasCertificate: boolean;
  /** Whether the client has shown a certificate that the proxy has verified. */
  readonly isVerified: boolean;
  /** The version, such as `"TLSv1.3"`. */
  readonly protocol: string | undefined;
  /** The common name of the client's certificate. Trust it only with `isVerified`. */
  readonly commonName: string | undefined;
  /** The cipher suite, such as `"ECDHE-RSA-AES128-GCM-SHA256"`. */
  readonly cipher: string | undefined;
  /** How the proxy's own certificate is signed, such as `"SHA256"`. */
  readonly signatureAlgorithm: string | undefined;
  /** The key of the proxy's own certificate, such as `"RSA2048"`. */
  readonly keyAlgorithm: string | undefined;
  /** The vectors that have no field here. */
  readonly tlvs: readonly ProxyTlv[];
}

/**
 * What a proxy says about the connection that it relays; `stream.proxy`. Text is
 * UTF-8; what is none becomes U+FFFD. Of a vector that comes twice the first one
 * counts.
 */
export interface ProxyHeader {
  /** The version of the format: 1 is a line of text, 2 is binary. */
  readonly version: 1 | 2;
  /** `"PROXY"` for a relayed connection, `"LOCAL"` for one of the proxy's own, such as a health check. */
  readonly command: "PROXY" | "LOCAL";
  /** The client's address; `undefined` if it is not known, and with `"LOCAL"`. */
  readonly source: Deno.Addr | undefined;
  /** The address that the client has connected to; `undefined` where `source` is. */
  readonly destination: Deno.Addr | undefined;
  /** The protocol that the client and the proxy have agreed on by ALPN. */
  readonly alpnProtocol: string | undefined;
  /** The host that the client has asked for, such as by TLS's SNI. */
  readonly authority: string | undefined;
  /** The proxy's name for the connection, of 128 bytes at most. */
  readonly uniqueId: Uint8Array | undefined;
  /** The network namespace that the client has come through. */
  readonly networkNamespace: string | undefined;
  /** The TLS connection between the client and the proxy, if the proxy tells of it. */
  readonly tls: ProxyTls | undefined;
  /** Whether it has a checksum (CRC32c), which was right. */
  readonly hasChecksum: boolean;
  /** The vectors that have no field here, such as a cloud's own. */
  readonly tlvs: readonly ProxyTlv[];
}

/**
 * A header that is to be sent: what of a {@linkcode ProxyHeader} is known. One that
 * was received can be sent on as it is. `version` is 2 and `command` `"PROXY"` by
 * default; without addresses the client is reported as unknown.
 */
export type ProxyHeaderOptions = Partial<Omit<ProxyHeader, "tls">> & {
  /** The TLS connection of the client. */
  readonly tls?: Partial<ProxyTls> | undefined;
};

/** Whose PROXY headers a server believes; {@linkcode ServerOptions.proxyProtocol}. */
export interface ProxyProtocolOptions {
  /**
   * The proxies: addresses such as `"192.0.2.1"` and `"2001:db8::1"`, ranges such as
   * `"10.0.0.0/8"` and `"2001:db8::/32"`, and `"unix"` for whoever connects to the
   * socket of a {@linkcode UnixServer}, whose clients have no address. A proxy that
   * has come as `::ffff:192.0.2.1` is `192.0.2.1`, so that `"::/0"` is all of IPv6 only.
   * All of them have to send a header, and each can name any client that it likes.
   */
  readonly from: readonly string[];
  /**
   * What becomes of others: `"refuse"` closes them at once and counts them in
   * {@linkcode ServerStats.refused}; `"direct"` serves them as they are. A header of
   * theirs is not looked at, but is the first that the handler reads.
   *
   * @default {"refuse"}
   */
  readonly others?: "refuse" | "direct";
}

/** PROXY 2.1: "If the CRLF sequence is not found in the first 107 characters, the receiver should declare the line invalid". */
const MAX_PROXY_LINE_BYTES = 107;

/**
 * Eight times the 536 bytes into which clause 2 says that each header fits: room for
 * long names and a cloud's own vectors, and little to be held for a length that a peer made up.
 */
const MAX_PROXY_HEADER_BYTES = 4_096;

/** PROXY 2.2: the first 12 bytes of version 2. */
const PROXY_SIGNATURE = new Uint8Array([0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a]);

/** The signature, version and command, family and transport, and the length of what follows. */
const PROXY_FIXED_BYTES = 16;

/** How a line of version 1 can begin. */
const PROXY_LINE_STARTS = ["PROXY TCP4 ", "PROXY TCP6 ", "PROXY UNKNOWN ", "PROXY UNKNOWN\r\n"];

/** PROXY 2.2: the bytes of each family's addresses and ports; the family is the index. */
const PROXY_ADDRESS_BYTES = [0, 12, 36, 216];

/** The families of addresses that have an index there. */
const PROXY_FAMILY = { unspecified: 0, ipv4: 1, ipv6: 2, unix: 3 };

/** PROXY 2.2: the protocols over them. */
const PROXY_TRANSPORT = { unspecified: 0, stream: 1, datagram: 2 };

/** PROXY 2.2: "The addresses are exactly 108 bytes each". */
const PROXY_PATH_BYTES = 108;

/** PROXY 2.2.5. */
const MAX_UNIQUE_ID_BYTES = 128;

/** PROXY 2.2: the registered types. */
const PROXY_TYPE = {
  alpnProtocol: 0x01,
  authority: 0x02,
  checksum: 0x03,
  padding: 0x04,
  uniqueId: 0x05,
  tls: 0x20,
  networkNamespace: 0x30,
};

/** PROXY 2.2: the registered types inside of the vector that tells of TLS. */
const PROXY_TLS_TYPE = { protocol: 0x21, commonName: 0x22, cipher: 0x23, signatureAlgorithm: 0x24, keyAlgorithm: 0x25 };

/** PROXY 2.2.6: the bits of `client`. */
const PROXY_TLS_FLAG = { isTls: 1, hasCertificate: 2, sessionHasCertificate: 4 };

/** `client` and `verify`. */
const PROXY_TLS_FIXED_BYTES = 5;

/** Bytes of a wrong header that are quoted. */
const QUOTED_BYTES = 40;

/** A header that says nothing. */
const NO_PROXY_HEADER: ProxyHeader = {
  version: 2,
  command: "PROXY",
  source: undefined,
  destination: undefined,
  alpnProtocol: undefined,
  authority: undefined,
  uniqueId: undefined,
  networkNamespace: undefined,
  tls: undefined,
  hasChecksum: false,
  tlvs: [],
};

const NO_PROXY_TLS: ProxyTls = {
  isTls: false,
  hasCertificate: false,
  sessionHasCertificate: false,
  isVerified: false,
  protocol: undefined,
  commonName: undefined,
  cipher: undefined,
  signatureAlgorithm: undefined,
  keyAlgorithm: undefined,
  tlvs: [],
};

/**
 * Parses a header of the
 * {@link https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt | PROXY protocol},
 * of version 1 or 2. No I/O. Call it again with more bytes until it is whole.
 *
 * It is as strict as the text is: addresses and ports of version 1 have one spelling
 * (IPv6 as inet_pton(3) reads it), the vectors fill their room exactly, and a
 * checksum has to be right. A header of version 2 has 4,096 bytes at most. What
 * comes with `LOCAL` is discarded; families and transports that are "unspecified"
 * say nothing of addresses.
 *
 * @param bytes The first bytes of a connection; what is behind the header is not looked at.
 * @returns The header and its length in bytes; `undefined` if more bytes are needed.
 * @throws {Deno.errors.InvalidData} If these bytes cannot begin a header, as soon as
 * that is known; the message names the clause.
 *
 * @example
 * ```ts
 * import { parseProxyHeader } from "@socketserver/socketserver";
 * import { assertEquals } from "@std/assert";
 *
 * const bytes = new TextEncoder().encode("PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\nGET /");
 * const parsed = parseProxyHeader(bytes);
 * assertEquals(parsed?.header.source, { transport: "tcp", hostname: "192.168.0.1", port: 56324 });
 * assertEquals(parsed?.length, 47);
 * assertEquals(parseProxyHeader(bytes.subarray(0, 46)), undefined);
 * ```
 */
export function parseProxyHeader(bytes: Uint8Array): { header: ProxyHeader; length: number } | undefined {
  return bytes[0] === PROXY_SIGNATURE[0] ? parseBinaryHeader(bytes) : parseTextHeader(bytes);
}

function wrongHeader(what: string, clause: string): Error {
  return new Deno.errors.InvalidData(`Cannot read the PROXY header: ${what} (PROXY ${clause})`);
}

/** The first of `bytes`, to be shown. */
function quoted(bytes: Uint8Array): string {
  const text = printable(String.fromCharCode(...bytes.subarray(0, QUOTED_BYTES)));
  return `"${text}"${bytes.length > QUOTED_BYTES ? "..." : ""}`;
}

function hexadecimal(byte: number): string {
  return `0x${byte.toString(16).padStart(2, "0")}`;
}

function parseTextHeader(bytes: Uint8Array): { header: ProxyHeader; length: number } | undefined {
  const text = String.fromCharCode(...bytes.subarray(0, MAX_PROXY_LINE_BYTES));
  if (!PROXY_LINE_STARTS.some((start) => start.startsWith(text.slice(0, start.length)))) {
    throw wrongHeader(`a connection begins with one, and this one with ${quoted(bytes)}`, "2.2");
  }
  const end = text.search(/[\r\n]/);
  const ending = end < 0 ? "" : text.slice(end, end + 2);
  if (ending === "\r\n") return { header: parseLine(text.slice(0, end)), length: end + 2 };
  if (ending !== "" && ending !== "\r") {
    throw wrongHeader(`its line ends with a single CR or LF: ${quoted(bytes.subarray(0, end + 2))}`, "2.1");
  }
  if (text.length < MAX_PROXY_LINE_BYTES) return undefined;
  throw wrongHeader(`its line has more than ${MAX_PROXY_LINE_BYTES} bytes: ${quoted(bytes)}`, "2.1");
}

/** Parses a line of version 1 that is whole, without its end. */
function parseLine(line: string): ProxyHeader {
  const [, protocol = "", ...fields] = line.split(" ");
  if (protocol === "UNKNOWN") return { ...NO_PROXY_HEADER, version: 1 };
  const [source, destination, sourcePort, destinationPort, ...more] = fields;
  if (destinationPort === undefined || more.length > 0) {
    throw wrongHeader(`two addresses and two ports follow with single spaces, not "${printable(line)}"`, "2.1");
  }
  const addressOf = (host = "", port = "") => parseLineAddress(protocol, host, port);
  return {
    ...NO_PROXY_HEADER,
    version: 1,
    source: addressOf(source, sourcePort),
    destination: addressOf(destination, destinationPort),
  };
}

function parseLineAddress(protocol: string, host: string, port: string): Deno.NetAddr {
  const [kind, parse] = protocol === "TCP4" ? ["IPv4", ipv4Bytes] as const : ["IPv6", ipv6Bytes] as const;
  const bytes = parse(host);
  if (bytes === undefined) throw wrongHeader(`"${printable(host)}" is no ${kind} address`, "2.1");
  if (!/^(0|[1-9]\d{0,4})$/.test(port) || Number(port) > 65_535) {
    throw wrongHeader(`"${printable(port)}" is no port, a number from 0 to 65535 without leading zeros`, "2.1");
  }
  return { transport: "tcp", hostname: ipText(bytes), port: Number(port) };
}

function parseBinaryHeader(bytes: Uint8Array): { header: ProxyHeader; length: number } | undefined {
  if (!bytes.subarray(0, PROXY_SIGNATURE.length).every((byte, index) => byte === PROXY_SIGNATURE[index])) {
    throw wrongHeader(`the signature of version 2 begins like ${quoted(bytes)}, and goes on otherwise`, "2.2");
  }
  // Bytes that have not come yet are taken for good ones.
  const [versionAndCommand = 0x20, familyAndTransport = 0] = bytes.subarray(PROXY_SIGNATURE.length);
  const command = parseCommand(versionAndCommand);
  const [family, transport] = [familyAndTransport >> 4, familyAndTransport & 0x0f];
  if (command === "PROXY") checkFamily(family, transport);
  if (bytes.length < PROXY_FIXED_BYTES) return undefined;
  const length = PROXY_FIXED_BYTES + numberAt(bytes, PROXY_FIXED_BYTES - 2);
  if (length > MAX_PROXY_HEADER_BYTES) {
    throw wrongHeader(`it announces ${length} bytes, and the most that are read are ${MAX_PROXY_HEADER_BYTES}`, "2.2");
  }
  const addressBytes = PROXY_ADDRESS_BYTES[family] ?? 0;
  const saysNothing = family === PROXY_FAMILY.unspecified || transport === PROXY_TRANSPORT.unspecified;
  if (command === "PROXY" && !saysNothing && length < PROXY_FIXED_BYTES + addressBytes) {
    throw wrongHeader(`it announces ${length} bytes, too few for addresses of family ${family}`, "2.2");
  }
  if (bytes.length < length) return undefined;
  // What it announces is to be discarded, whatever it is.
  if (command === "LOCAL") return { header: { ...NO_PROXY_HEADER, command }, length };
  const whole = bytes.subarray(0, length);
  const tlvs = tlvsIn(whole.subarray(PROXY_FIXED_BYTES + addressBytes));
  if (tlvs === undefined && !saysNothing) {
    throw wrongHeader("its type-length-value vectors do not end where it ends", "2.2");
  }
  // "Unspecified" addresses may have any length, so what is no vectors is taken for such.
  const hasChecksum = checkChecksum(whole, tlvs ?? []);
  const addresses = saysNothing ? {} : parseAddresses(whole, family, transport);
  return { header: { ...NO_PROXY_HEADER, ...addresses, ...parseTlvs(tlvs ?? []), hasChecksum }, length };
}

function parseCommand(versionAndCommand: number): "PROXY" | "LOCAL" {
  if (versionAndCommand >> 4 !== 2) {
    throw wrongHeader(`its version is ${versionAndCommand >> 4}, and 2 is the only one in this format`, "2.2");
  }
  switch (versionAndCommand & 0x0f) {
    case 0:
      return "LOCAL";
    case 1:
      return "PROXY";
    default:
      throw wrongHeader(`its command is ${versionAndCommand & 0x0f}, and only 0 and 1 are assigned`, "2.2");
  }
}

function checkFamily(family: number, transport: number): void {
  if (family <= PROXY_FAMILY.unix && transport <= PROXY_TRANSPORT.datagram) return;
  throw wrongHeader(`its family and transport are ${hexadecimal(family << 4 | transport)}, which is none`, "2.2");
}

/** The big-endian number of two bytes at `at`. */
function numberAt(bytes: Uint8Array, at: number): number {
  return (bytes[at] ?? 0) << 8 | (bytes[at + 1] ?? 0);
}

function parseAddresses(
  header: Uint8Array,
  family: number,
  transport: number,
): Pick<ProxyHeader, "source" | "destination"> {
  const block = header.subarray(PROXY_FIXED_BYTES);
  const isStream = transport === PROXY_TRANSPORT.stream;
  if (family === PROXY_FAMILY.unix) {
    const addressAt = (at: number): Deno.UnixAddr => ({
      transport: isStream ? "unix" : "unixpacket",
      path: parsePath(block.subarray(at, at + PROXY_PATH_BYTES)),
    });
    return { source: addressAt(0), destination: addressAt(PROXY_PATH_BYTES) };
  }
  const size = family === PROXY_FAMILY.ipv4 ? 4 : 16;
  const addressAt = (index: number): Deno.NetAddr => ({
    transport: isStream ? "tcp" : "udp",
    hostname: ipText(block.subarray(index * size, (index + 1) * size)),
    port: numberAt(block, size * 2 + index * 2),
  });
  return { source: addressAt(0), destination: addressAt(1) };
}

/** The path of a Unix socket; a name without a file begins with `"\0"`, and a client may have neither. */
function parsePath(bytes: Uint8Array): string {
  const text = decoder.decode(bytes);
  const end = text.indexOf("\0", 1);
  return (end < 0 ? text : text.slice(0, end)).replace(/^\0$/, "");
}

/** The vectors that fill `bytes`; `undefined` if they do not. */
function tlvsIn(bytes: Uint8Array): ProxyTlv[] | undefined {
  const tlvs: ProxyTlv[] = [];
  for (let at = 0; at < bytes.length;) {
    const end = at + 3 + numberAt(bytes, at + 1);
    if (at + 3 > bytes.length || end > bytes.length) return undefined;
    tlvs.push({ type: bytes[at] ?? 0, value: bytes.subarray(at + 3, end) });
    at = end;
  }
  return tlvs;
}

/** Whether there is a checksum; throws if it is wrong. */
function checkChecksum(header: Uint8Array, tlvs: ProxyTlv[]): boolean {
  const [checksum, second] = tlvs.filter(({ type }) => type === PROXY_TYPE.checksum);
  if (checksum === undefined) return false;
  const { value } = checksum;
  if (value.length !== 4 || second !== undefined) {
    throw wrongHeader("a checksum has 4 bytes, and a header has one at most", "2.2.3");
  }
  const copy = header.slice();
  const at = value.byteOffset - header.byteOffset;
  copy.fill(0, at, at + 4);
  const [wanted, found] = [crc32c(copy), new DataView(header.buffer, value.byteOffset, 4).getUint32(0)];
  if (wanted === found) return true;
  throw wrongHeader(`its checksum is ${found.toString(16)}, and that of its bytes ${wanted.toString(16)}`, "2.2.3");
}

function parseTlvs(tlvs: ProxyTlv[]): Partial<ProxyHeader> {
  const types = Object.values(PROXY_TYPE);
  const uniqueId = valueOf(tlvs, PROXY_TYPE.uniqueId);
  if (uniqueId !== undefined && uniqueId.length > MAX_UNIQUE_ID_BYTES) {
    throw wrongHeader(`its unique id has ${uniqueId.length} bytes, and 128 are the most`, "2.2.5");
  }
  const tls = valueOf(tlvs, PROXY_TYPE.tls);
  return {
    alpnProtocol: textOf(tlvs, PROXY_TYPE.alpnProtocol),
    authority: textOf(tlvs, PROXY_TYPE.authority),
    uniqueId: uniqueId?.slice(),
    networkNamespace: textOf(tlvs, PROXY_TYPE.networkNamespace),
    tls: tls === undefined ? undefined : parseProxyTls(tls),
    tlvs: copiesOf(tlvs.filter(({ type }) => !types.includes(type))),
  };
}

function parseProxyTls(value: Uint8Array): ProxyTls {
  const tlvs = value.length < PROXY_TLS_FIXED_BYTES ? undefined : tlvsIn(value.subarray(PROXY_TLS_FIXED_BYTES));
  if (tlvs === undefined) throw wrongHeader("the vectors that tell of TLS do not end where they should", "2.2.6");
  const [client = 0, ...verify] = value.subarray(0, PROXY_TLS_FIXED_BYTES);
  const has = (flag: number) => (client & flag) !== 0;
  const [hasCertificate, sessionHasCertificate] = [
    has(PROXY_TLS_FLAG.hasCertificate),
    has(PROXY_TLS_FLAG.sessionHasCertificate),
  ];
  const types = Object.values(PROXY_TLS_TYPE);
  return {
    isTls: has(PROXY_TLS_FLAG.isTls),
    hasCertificate,
    sessionHasCertificate,
    // HAProxy says 0, for "verified", of clients that have shown none, too.
    isVerified: (hasCertificate || sessionHasCertificate) && verify.every((byte) => byte === 0),
    protocol: textOf(tlvs, PROXY_TLS_TYPE.protocol),
    commonName: textOf(tlvs, PROXY_TLS_TYPE.commonName),
    cipher: textOf(tlvs, PROXY_TLS_TYPE.cipher),
    signatureAlgorithm: textOf(tlvs, PROXY_TLS_TYPE.signatureAlgorithm),
    keyAlgorithm: textOf(tlvs, PROXY_TLS_TYPE.keyAlgorithm),
    tlvs: copiesOf(tlvs.filter(({ type }) => !types.includes(type))),
  };
}

function valueOf(tlvs: ProxyTlv[], wanted: number): Uint8Array | undefined {
  return tlvs.find(({ type }) => type === wanted)?.value;
}

function textOf(tlvs: ProxyTlv[], wanted: number): string | undefined {
  const value = valueOf(tlvs, wanted);
  return value && decoder.decode(value);
}

/** They outlive the buffer that they came in. */
function copiesOf(tlvs: ProxyTlv[]): ProxyTlv[] {
  return tlvs.map(({ type, value }) => ({ type, value: value.slice() }));
}

/**
 * Encodes a header of the PROXY protocol, as {@linkcode connect} sends one with the
 * option `proxyHeader`. No I/O.
 *
 * @param options What it says. `source` and `destination` come together, and are of
 * the same kind; if one is of IPv4 and the other of IPv6, both are sent as IPv6.
 * @returns The bytes.
 * @throws {TypeError} If the options contradict each other, such as addresses with
 * `"LOCAL"` or vectors in version 1; or if one does not exist.
 * @throws {RangeError} If something is too long for its place.
 *
 * @example
 * ```ts
 * import { encodeProxyHeader } from "@socketserver/socketserver";
 * import { assertEquals } from "@std/assert";
 *
 * const source = { transport: "tcp", hostname: "2001:db8::1", port: 50_000 } as const;
 * const destination = { transport: "tcp", hostname: "2001:db8::2", port: 443 } as const;
 * const bytes = encodeProxyHeader({ version: 1, source, destination });
 * assertEquals(new TextDecoder().decode(bytes), "PROXY TCP6 2001:db8::1 2001:db8::2 50000 443\r\n");
 * ```
 */
export function encodeProxyHeader(options: ProxyHeaderOptions): Uint8Array {
  const { tls, ...others } = options;
  const header = {
    ...resolveOptions(NO_PROXY_HEADER, others),
    tls: tls === undefined ? undefined : resolveOptions(NO_PROXY_TLS, tls),
  };
  const { version, command, source, destination } = header;
  if (version !== 1 && version !== 2) {
    throw new RangeError(`Option "version" must be 1 or 2: it is ${Deno.inspect(version)}`);
  }
  if (command !== "PROXY" && command !== "LOCAL") {
    throw new TypeError(`Option "command" must be "PROXY" or "LOCAL": it is ${Deno.inspect(command)}`);
  }
  if ((source === undefined) !== (destination === undefined)) {
    throw new TypeError("source and destination must be given together: a PROXY header has both or none");
  }
  if (command === "LOCAL" && source !== undefined) {
    throw new TypeError('A header with the command "LOCAL" has no addresses: leave source and destination out');
  }
  return version === 1 ? encodeLine(header) : encodeBinaryHeader(header);
}

function encodeLine(header: ProxyHeader): Uint8Array {
  if (header.command === "LOCAL" || header.hasChecksum || encodeTlvs(header).length > 0) {
    throw new TypeError("A PROXY header of version 1 has two addresses and nothing else: take version 2");
  }
  const addresses = encodeAddresses(header);
  if (addresses.transport === PROXY_TRANSPORT.unspecified) return encoder.encode("PROXY UNKNOWN\r\n");
  const { family, transport, block } = addresses;
  if (family === PROXY_FAMILY.unix || transport !== PROXY_TRANSPORT.stream) {
    throw new TypeError("A PROXY header of version 1 has addresses of TCP: take version 2");
  }
  const size = family === PROXY_FAMILY.ipv4 ? 4 : 16;
  const hosts = [0, size].map((at) => ipDigits(block.subarray(at, at + size)));
  const ports = [0, 2].map((at) => numberAt(block, size * 2 + at));
  return encoder.encode(`PROXY TCP${size === 4 ? 4 : 6} ${[...hosts, ...ports].join(" ")}\r\n`);
}

function encodeBinaryHeader(header: ProxyHeader): Uint8Array {
  const { family, transport, block } = encodeAddresses(header);
  const checksum = header.hasChecksum ? encodeTlv(PROXY_TYPE.checksum, new Uint8Array(4)) : NO_BYTES;
  const rest = joinBytes(block, joinBytes(encodeTlvs(header), checksum));
  if (rest.length > 0xffff) {
    throw new RangeError(`A PROXY header has 65551 bytes at most: this has ${16 + rest.length}`);
  }
  const command = header.command === "LOCAL" ? 0 : 1;
  const fixed = [0x20 | command, family << 4 | transport, rest.length >> 8, rest.length & 0xff];
  const bytes = joinBytes(joinBytes(PROXY_SIGNATURE, new Uint8Array(fixed)), rest);
  // It is the last one, and all 0 until now.
  if (header.hasChecksum) new DataView(bytes.buffer).setUint32(bytes.length - 4, crc32c(bytes));
  return bytes;
}

function encodeAddresses(
  { source, destination }: ProxyHeader,
): { family: number; transport: number; block: Uint8Array } {
  if (source === undefined || destination === undefined) {
    return { family: PROXY_FAMILY.unspecified, transport: PROXY_TRANSPORT.unspecified, block: NO_BYTES };
  }
  if ("path" in source && "path" in destination && source.transport === destination.transport) {
    const transport = source.transport === "unix" ? PROXY_TRANSPORT.stream : PROXY_TRANSPORT.datagram;
    const block = joinBytes(encodePath(source.path), encodePath(destination.path));
    return { family: PROXY_FAMILY.unix, transport, block };
  }
  if (!("hostname" in source && "hostname" in destination && source.transport === destination.transport)) {
    const kinds = `${source.transport} and ${destination.transport}`;
    throw new TypeError(`source and destination must be of one kind, TCP, UDP or Unix: they are ${kinds}`);
  }
  checkPort(source.port);
  checkPort(destination.port);
  const transport = source.transport === "tcp" ? PROXY_TRANSPORT.stream : PROXY_TRANSPORT.datagram;
  const [from, to] = ofOneFamily(hostBytes(source.hostname), hostBytes(destination.hostname));
  const ports = [source.port >> 8, source.port & 0xff, destination.port >> 8, destination.port & 0xff];
  const block = joinBytes(joinBytes(from, to), new Uint8Array(ports));
  return { family: from.length === 4 ? PROXY_FAMILY.ipv4 : PROXY_FAMILY.ipv6, transport, block };
}

function encodePath(path: string): Uint8Array {
  const bytes = encoder.encode(path);
  if (bytes.length > PROXY_PATH_BYTES) {
    throw new RangeError(`The path of an address has 108 bytes at most in a PROXY header: this has ${bytes.length}`);
  }
  return joinBytes(bytes, new Uint8Array(PROXY_PATH_BYTES - bytes.length));
}

function hostBytes(hostname: string): Uint8Array {
  const bytes = ipBytes(withoutZone(hostname));
  if (bytes !== undefined) return bytes;
  throw new TypeError(`A PROXY header has IP addresses and no names: "${printable(hostname)}" is none`);
}

/** Both as IPv4, or both as IPv6. */
function ofOneFamily(one: Uint8Array, other: Uint8Array): [Uint8Array, Uint8Array] {
  if (one.length === other.length) return [one, other];
  const [mapped, wide] = [one, other].map((bytes) => bytes.length === 4 ? joinBytes(MAPPED_PREFIX, bytes) : bytes);
  return [mapped ?? one, wide ?? other];
}

function encodeTlvs({ alpnProtocol, authority, uniqueId, networkNamespace, tls, tlvs }: ProxyHeader): Uint8Array {
  if (uniqueId !== undefined && uniqueId.length > MAX_UNIQUE_ID_BYTES) {
    throw new RangeError(`Option "uniqueId" has 128 bytes at most: it has ${uniqueId.length}`);
  }
  return joinTlvs([
    [PROXY_TYPE.alpnProtocol, alpnProtocol],
    [PROXY_TYPE.authority, authority],
    [PROXY_TYPE.uniqueId, uniqueId],
    [PROXY_TYPE.networkNamespace, networkNamespace],
    [PROXY_TYPE.tls, tls && encodeProxyTls(tls)],
    ...ownTlvs(tlvs, Object.values(PROXY_TYPE)),
  ]);
}

function encodeProxyTls({ isVerified, tlvs, ...tls }: ProxyTls): Uint8Array {
  let client = 0;
  if (tls.isTls) client |= PROXY_TLS_FLAG.isTls;
  if (tls.hasCertificate) client |= PROXY_TLS_FLAG.hasCertificate;
  if (tls.sessionHasCertificate) client |= PROXY_TLS_FLAG.sessionHasCertificate;
  const vectors = joinTlvs([
    [PROXY_TLS_TYPE.protocol, tls.protocol],
    [PROXY_TLS_TYPE.commonName, tls.commonName],
    [PROXY_TLS_TYPE.cipher, tls.cipher],
    [PROXY_TLS_TYPE.signatureAlgorithm, tls.signatureAlgorithm],
    [PROXY_TLS_TYPE.keyAlgorithm, tls.keyAlgorithm],
    ...ownTlvs(tlvs, Object.values(PROXY_TLS_TYPE)),
  ]);
  return joinBytes(new Uint8Array([client, 0, 0, 0, isVerified ? 0 : 1]), vectors);
}

/** The caller's own vectors; throws for one that is another option's. */
function ownTlvs(tlvs: readonly ProxyTlv[], taken: number[]): [number, Uint8Array][] {
  return tlvs.map(({ type, value }) => {
    if (taken.includes(type)) {
      throw new TypeError(`A vector of type ${hexadecimal(type)} has a field of its own: it is none of "tlvs"`);
    }
    if (!(Number.isInteger(type) && type >= 0 && type <= 0xff)) {
      throw new RangeError(`The type of a vector must be a whole number from 0 to 255: it is ${Deno.inspect(type)}`);
    }
    return [type, value];
  });
}

function joinTlvs(tlvs: [number, Uint8Array | string | undefined][]): Uint8Array {
  return tlvs.reduce<Uint8Array>((bytes, [type, value]) => {
    return value === undefined ? bytes : joinBytes(bytes, encodeTlv(type, bytesOf(value)));
  }, NO_BYTES);
}

function encodeTlv(type: number, value: Uint8Array): Uint8Array {
  if (value.length > 0xffff) throw new RangeError(`A vector has 65535 bytes at most: this has ${value.length}`);
  return joinBytes(new Uint8Array([type, value.length >> 8, value.length & 0xff]), value);
}

/** The polynomial of CRC32c with its bits in the other order; RFC 4960, Appendix B. */
const CRC32C_POLYNOMIAL = 0x82f63b78;

/** What each byte makes of the checksum, made at the first use. */
let crc32cTable: Uint32Array | undefined;

function crc32c(bytes: Uint8Array): number {
  const table = crc32cTable ??= Uint32Array.from({ length: 256 }, (_, byte) => {
    let value = byte;
    for (let bit = 0; bit < 8; bit++) value = value & 1 ? value >>> 1 ^ CRC32C_POLYNOMIAL : value >>> 1;
    return value;
  });
  let checksum = 0xffff_ffff;
  for (const byte of bytes) checksum = checksum >>> 8 ^ (table[(checksum ^ byte) & 0xff] ?? 0);
  return ~checksum >>> 0;
}

/** What `from` may hold beside addresses: the peers of a Unix socket. */
const UNIX_PEERS = "unix";

/** Whose headers are believed. */
class TrustedProxies {
  readonly refusesOthers: boolean;
  readonly #ranges: AddressRange[] = [];
  readonly #hasUnixPeers: boolean;

  constructor(options: ProxyProtocolOptions) {
    const { from, others } = resolveOptions<Required<ProxyProtocolOptions>>({ from: [], others: "refuse" }, options);
    if (!Array.isArray(from) || from.length === 0) {
      throw new TypeError('Option "proxyProtocol.from" must list the proxies, such as ["10.0.0.0/8"]');
    }
    if (others !== "refuse" && others !== "direct") {
      throw new TypeError(
        `Option "proxyProtocol.others" must be "refuse" or "direct": it is ${Deno.inspect(others)}`,
      );
    }
    for (const entry of from) if (entry !== UNIX_PEERS) this.#ranges.push(parseRange(entry));
    this.#hasUnixPeers = from.includes(UNIX_PEERS);
    this.refusesOthers = others === "refuse";
  }

  has(address: Deno.Addr): boolean {
    if ("path" in address) return this.#hasUnixPeers;
    const bytes = "hostname" in address ? ipBytes(withoutZone(address.hostname)) : undefined;
    if (bytes === undefined) return false;
    const unmapped = withoutMapping(bytes);
    return this.#ranges.some((range) => isInRange(unmapped, range));
  }
}

/** The addresses that begin with the first `bits` of `bytes`. */
interface AddressRange {
  readonly bytes: Uint8Array;
  readonly bits: number;
}

function parseRange(entry: unknown): AddressRange {
  const [text = "", length, ...more] = typeof entry === "string" ? entry.split("/") : [];
  const bytes = ipBytes(text);
  const bits = length === undefined ? Infinity : /^(0|[1-9]\d{0,2})$/.test(length) ? Number(length) : NaN;
  const most = (bytes?.length ?? 0) * 8;
  if (bytes === undefined || more.length > 0 || Number.isNaN(bits) || (bits !== Infinity && bits > most)) {
    const examples = 'such as "192.0.2.1", "10.0.0.0/8", "2001:db8::/32" or "unix"';
    throw new TypeError(`Option "proxyProtocol.from" lists addresses and ranges, ${examples}: it has ${shown(entry)}`);
  }
  const kept = Math.min(bits, most);
  const first = bytes.map((byte, index) => byte & maskOfByte(kept, index));
  if (first.some((byte, index) => byte !== bytes[index])) {
    const range = `${ipText(first)}/${kept}`;
    throw new TypeError(
      `Option "proxyProtocol.from" has "${text}/${length}", which is an address inside of ${range}: name one of the two`,
    );
  }
  const unmapped = kept >= MAPPED_PREFIX.length * 8 ? withoutMapping(bytes) : bytes;
  return { bytes: unmapped, bits: kept - (bytes.length - unmapped.length) * 8 };
}

function shown(entry: unknown): string {
  return typeof entry === "string" ? `"${printable(entry)}"` : Deno.inspect(entry);
}

/** The bits of the byte at `index` that are among the first `bits`. */
function maskOfByte(bits: number, index: number): number {
  const inByte = Math.min(Math.max(bits - index * 8, 0), 8);
  return 0xff << 8 - inByte & 0xff;
}

function isInRange(address: Uint8Array, { bytes, bits }: AddressRange): boolean {
  if (address.length !== bytes.length) return false;
  return address.every((byte, index) => (byte & maskOfByte(bits, index)) === bytes[index]);
}

// --- Deadlines --------------------------------------------------------------

/** The longest wait that a timer can be set to: 2^31 - 1 ms, some 25 days. */
const MAX_TIMER_MS = 2_147_483_647;

/** How often a deadline is looked at in its time. It is late by two of these parts at most, or by two of the least times between two looks. */
const LOOKS_PER_DEADLINE = 32;

/** The least time between two looks. */
const MIN_LOOK_MS = 5;

/** The most of its time that a process may spend on looking; a look at 10,000 streams takes some 0.3 ms. */
const MAX_LOOKING = 0.05;

/** What was not looked at since it began. */
const UNSEEN = -1;

/**
 * One timer for the deadlines of all streams. A timer for each read costs a fifth
 * of the throughput, and a look at the clock 1.5 % (79 ns). So nothing is noted
 * when a wait begins: the first look after that starts its time.
 */
class DeadlineTimer<Watched> {
  readonly #lookAt: (watched: Watched, now: number) => number;
  readonly #watched = new Set<Watched>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #looksAt = Infinity;

  /**
   * `lookAt` ends what has taken too long by `now`, in the time of
   * `performance.now()`. It returns the shortest time that is left to be kept, in
   * milliseconds; with `Infinity` it is called no more.
   */
  constructor(lookAt: (watched: Watched, now: number) => number) {
    this.#lookAt = lookAt;
  }

  /** Looks at `watched` from now on, often enough for a time of `ms`. */
  watch(watched: Watched, ms: number): void {
    this.#watched.add(watched);
    this.#lookIn(ms / LOOKS_PER_DEADLINE);
  }

  unwatch(watched: Watched): void {
    this.#watched.delete(watched);
    if (this.#watched.size === 0) this.#rest();
  }

  #lookIn(ms: number): void {
    const wait = Math.min(Math.max(Math.ceil(ms), MIN_LOOK_MS), MAX_TIMER_MS);
    const time = performance.now() + wait;
    if (time >= this.#looksAt) return;
    clearTimeout(this.#timer);
    this.#looksAt = time;
    this.#timer = setTimeout(() => this.#look(), wait);
  }

  #look(): void {
    this.#looksAt = Infinity;
    const now = performance.now();
    let shortest = Infinity;
    for (const watched of this.#watched) {
      const time = this.#lookAt(watched, now);
      if (time === Infinity) this.#watched.delete(watched);
      shortest = Math.min(shortest, time);
    }
    const spent = performance.now() - now;
    if (shortest < Infinity) this.#lookIn(Math.max(shortest / LOOKS_PER_DEADLINE, spent / MAX_LOOKING));
  }

  #rest(): void {
    clearTimeout(this.#timer);
    this.#looksAt = Infinity;
  }
}

/** Resolves after `ms`, or as soon as `signal` aborts. */
function delay(ms: number, signal?: AbortSignal): Promise<void> {
  if (signal?.aborted) return Promise.resolve();
  return new Promise((resolve) => {
    function done() {
      clearTimeout(timer);
      signal?.removeEventListener("abort", done);
      resolve();
    }
    const timer = setTimeout(done, Math.min(ms, MAX_TIMER_MS));
    signal?.addEventListener("abort", done);
  });
}

/** Since when a count stands still, as far as looks can tell: never earlier than it does. */
class Standstill {
  #seenAt = UNSEEN;
  #count = 0;

  /** For how many milliseconds `count` was seen unchanged; 0 if it `mayRest`. */
  lasts(now: number, count: number, mayRest = false): number {
    if (this.#seenAt === UNSEEN || count !== this.#count) this.#seenAt = now;
    this.#count = count;
    if (mayRest) this.forget();
    return mayRest ? 0 : now - this.#seenAt;
  }

  /** Time counts from the next look on. */
  forget(): void {
    this.#seenAt = UNSEEN;
  }
}

// --- Read buffer ------------------------------------------------------------

/** What an idle connection costs: 10,000 of them hold 5 MB of buffers. */
const READ_BUFFER_MIN_BYTES = 512;

/**
 * What a connection that goes on talking gets. A chunk with memory of its own costs 230 ns to make, a part of a
 * buffer 28; and this is the most that a small chunk can keep alive.
 */
const READ_BUFFER_BUSY_BYTES = 2_048;

/** Larger reads gain nothing over loopback; 64 KiB for every connection would be 640 MB at 10,000. */
const READ_BUFFER_MAX_BYTES = 65_536;

/** Reads that leave most of the buffer empty before it is made smaller. */
const SMALL_READS_BEFORE_SHRINKING = 16;

/** A part of a buffer larger than a busy one's keeps all of it alive: not more than this many times its own size. */
const MAX_RETENTION = 64;

/** Less room than this at the end of a buffer is not worth a read. */
const MIN_ROOM_BYTES = 64;

/**
 * Lines are decoded together, up to so many bytes: for each by itself the decoder's call would cost four times the
 * rest. V8 lets a line that is kept keep the text that it is cut from.
 */
const TEXT_BYTES = 1_024;

const NO_BYTES: Uint8Array<ArrayBuffer> = new Uint8Array(0);

/**
 * The bytes that arrived and that nobody has read yet. No I/O.
 *
 * Chunks are handed out as parts of the buffer: bytes before `#ours` are their
 * callers', and are never written again.
 */
class ReadBuffer {
  #bytes = NO_BYTES;
  #ours = 0;
  #start = 0;
  #end = 0;
  #wanted = READ_BUFFER_MIN_BYTES;
  #lastCount = 0;
  #smallReads = 0;
  /** Whole lines that are decoded already, one character for each byte; empty if there are others than ASCII. */
  #text = "";
  #textStart = 0;
  #textEnd = 0;

  get length(): number {
    return this.#end - this.#start;
  }

  /** Where the next bytes go; valid until {@linkcode ReadBuffer.commit}, and never empty. */
  room(): Uint8Array<ArrayBuffer> {
    this.#text = "";
    this.#textEnd = 0; // Bytes may move.
    if (this.length === 0) this.#makeRoomWhenEmpty();
    else if (this.#end === this.#bytes.length) this.#makeRoomBehind();
    return this.#end === 0 ? this.#bytes : this.#bytes.subarray(this.#end);
  }

  #makeRoomWhenEmpty(): void {
    this.#start = this.#end = this.#ours;
    if (this.#ours > 0 && this.#bytes.length - this.#ours < Math.max(this.#lastCount, MIN_ROOM_BYTES)) {
      // It was handed out to its end.
      this.#wanted = Math.max(this.#wanted, READ_BUFFER_BUSY_BYTES);
      this.#replace(this.#wanted);
    } else if (this.#bytes.length > this.#wanted || (this.#ours === 0 && this.#bytes.length < this.#wanted)) {
      this.#replace(this.#wanted);
    }
  }

  #makeRoomBehind(): void {
    const { length } = this;
    if (length <= this.#bytes.length - this.#ours - length) {
      this.#bytes.copyWithin(this.#ours, this.#start, this.#end);
      this.#start = this.#ours;
      this.#end = this.#ours + length;
    } else {
      // Doubling keeps the memory within twice of what the peer really sent,
      // whatever length it announced.
      this.#replace(Math.max(length * 2, this.#wanted));
    }
  }

  #replace(size: number): void {
    const bytes = new Uint8Array(size);
    // A handler may have transferred the buffer of a chunk to a worker; then there is none to copy from.
    if (this.length > 0) bytes.set(this.#bytes.subarray(this.#start, this.#end));
    this.#end -= this.#start;
    this.#start = this.#ours = 0;
    this.#bytes = bytes;
  }

  /** Takes in `count` bytes that were put into the room. */
  commit(count: number): void {
    this.#end += count;
    this.#lastCount = count;
    const { length } = this.#bytes;
    if (this.#end === length && count > length >> 1) this.#grow();
    else if (count > length >> 3 || length <= READ_BUFFER_BUSY_BYTES) this.#smallReads = 0;
    else if (++this.#smallReads === SMALL_READS_BEFORE_SHRINKING) this.#shrink();
  }

  #grow(): void {
    this.#smallReads = 0;
    this.#wanted = Math.min(this.#wanted * 4, READ_BUFFER_MAX_BYTES);
  }

  #shrink(): void {
    this.#smallReads = 0;
    this.#wanted = Math.max(this.#wanted >> 2, READ_BUFFER_BUSY_BYTES);
  }

  /** Takes in bytes that were read into another place. */
  append(bytes: Uint8Array): void {
    for (let from = 0; from < bytes.length;) {
      const room = this.room();
      const part = bytes.subarray(from, from + room.length);
      room.set(part);
      this.commit(part.length);
      from += part.length;
    }
  }

  /** The first `count` bytes, which are then the caller's. */
  take(count: number): Uint8Array<ArrayBuffer> {
    const from = this.#start;
    this.#start += count;
    const { length } = this.#bytes;
    if (length > READ_BUFFER_BUSY_BYTES && count * MAX_RETENTION < length) return this.#bytes.slice(from, this.#start);
    this.#ours = this.#start;
    return this.#bytes.subarray(from, this.#start);
  }

  /** Moves bytes into `into` and returns how many. */
  takeInto(into: Uint8Array): number {
    const count = Math.min(into.length, this.length);
    into.set(this.#bytes.subarray(this.#start, this.#start + count));
    this.#start += count;
    return count;
  }

  /** The first `count` bytes as text, of which the last `dropped` are left out. */
  takeText(count: number, dropped: number): string {
    const from = this.#start;
    this.#start += count;
    return decoder.decode(this.#bytes.subarray(from, this.#start - dropped));
  }

  /** The next line without its end, if it is among those that were decoded and not longer than `limit` bytes. */
  takeDecodedLine(limit: number): string | undefined {
    const text = this.#text;
    if (this.#start >= this.#textEnd || text === "") return undefined;
    const from = this.#start - this.#textStart;
    const to = text.indexOf("\n", from);
    const end = to > from && text.charCodeAt(to - 1) === CARRIAGE_RETURN ? to - 1 : to;
    if (to < 0 || end - from > limit) return undefined;
    this.#start = this.#textStart + to + 1;
    return text.slice(from, end);
  }

  /** Decodes the lines of which the first one ends at `index`, if they are ASCII and short. */
  decodeLines(index: number): void {
    if (this.#start < this.#textEnd || index >= TEXT_BYTES) return;
    const window = this.#bytes.subarray(this.#start, Math.min(this.#start + TEXT_BYTES, this.#end));
    const count = window.lastIndexOf(LINE_FEED_BYTE) + 1;
    const text = decoder.decode(window.subarray(0, count));
    this.#textStart = this.#start;
    this.#textEnd = this.#start + count;
    // Otherwise it could not be told how many bytes a line has.
    this.#text = text.length === count ? text : "";
  }

  /** The byte at `index` of what is buffered. */
  at(index: number): number {
    return this.#bytes[this.#start + index] ?? 0;
  }

  /** Where `delimiter` begins, at `from` or behind it; -1 if it is not there. */
  indexOf(delimiter: Uint8Array, from: number): number {
    const first = delimiter[0] ?? 0;
    // Without its end the search would run through what earlier reads left behind.
    const window = this.#bytes.subarray(this.#start, this.#end);
    const last = window.length - delimiter.length;
    for (let at = window.indexOf(first, from); at >= 0 && at <= last; at = window.indexOf(first, at + 1)) {
      if (holdsAt(window, at, delimiter)) return at;
    }
    return -1;
  }

  /** The big- or little-endian number in the first `bytes` bytes. */
  peekNumber({ lengthBytes, littleEndian }: Required<FrameOptions>): number {
    let value = 0;
    for (let index = 0; index < lengthBytes; index++) {
      value = value * 256 + this.at(littleEndian ? lengthBytes - 1 - index : index);
    }
    return value;
  }

  /** The first bytes, `count` at most; valid until {@linkcode ReadBuffer.room}. */
  peek(count: number): Uint8Array<ArrayBuffer> {
    return this.#bytes.subarray(this.#start, Math.min(this.#start + count, this.#end));
  }

  /** Reads `count` bytes away. */
  skip(count: number): void {
    this.#start += count;
  }
}

/** A plain loop: a client that sends nothing but the first byte of a delimiter has every one of them looked at. */
function holdsAt(bytes: Uint8Array, at: number, part: Uint8Array): boolean {
  for (let index = 1; index < part.length; index++) if (bytes[at + index] !== part[index]) return false;
  return true;
}

const LINE_FEED_BYTE = 0x0a;
const LINE_FEED = new Uint8Array([LINE_FEED_BYTE]);
const CARRIAGE_RETURN = 0x0d;

/** Lines are UTF-8. A byte order mark is the caller's to see, and what is no UTF-8 becomes U+FFFD. */
const decoder = new TextDecoder("utf-8", { ignoreBOM: true });

// --- Write queue ------------------------------------------------------------

/** The part of a `Deno.Conn` that a {@linkcode SocketStream} needs; what a fake connection of a test implements. */
export interface StreamConn {
  /** The address of this end. */
  readonly localAddr: Deno.Addr;
  /** The address of the peer. */
  readonly remoteAddr: Deno.Addr;
  /** Reads into `into`; resolves to the count of bytes, or to `null` at the end. */
  read(into: Uint8Array): Promise<number | null>;
  /** Writes a part of `data`; resolves to the count of bytes. */
  write(data: Uint8Array): Promise<number>;
  /** Ends the outgoing side. */
  closeWrite(): Promise<void>;
  /** Ends both sides; what waits rejects. */
  close(): void;
}

/** Small writes are gathered in blocks of this size. */
const BLOCK_BYTES = 16_384;

/**
 * Text is gathered as text and encoded as one, up to so many characters: to encode each line by itself costs four times
 * as much. A block has room for what they can become.
 */
const TEXT_CHARACTERS = 4_096;

/** Blocks that are kept for the next write instead of being made anew: 1 MiB at most. */
const MAX_SPARE_BLOCKS = 64;

/** Blocks in use are those of this turn's writes, so all streams can share a few. */
const spareBlocks: Uint8Array<ArrayBuffer>[] = [];

const encoder = new TextEncoder();

/** The most bytes that one unit of a string becomes. */
const MAX_UTF8_BYTES = 3;

const DONE: Promise<void> = Promise.resolve();

function bytesOf(data: Uint8Array | string): Uint8Array {
  return typeof data === "string" ? encoder.encode(data) : data;
}

/** Plain JavaScript has no types: what is neither would be sent as something else, or as nothing. */
function isData(data: unknown): data is Uint8Array | string {
  return typeof data === "string" || data instanceof Uint8Array;
}

function dataError(call: string, data: unknown): TypeError {
  return new TypeError(`Cannot ${call}: data must be a Uint8Array or a string, it is ${kindOf(data)}`);
}

function kindOf(value: unknown): string {
  return typeof value === "object" && value !== null ? `a ${value.constructor?.name ?? "bare"} object` : String(value);
}

/** The stream whose connection an error came from, to tell a vanished peer from a handler's own trouble. */
const originOf = new WeakMap<Error, object>();

function noteOrigin(error: unknown, stream: object): unknown {
  if (error instanceof Error) originOf.set(error, stream);
  return error;
}

/** One thing to do on the connection, in its turn. */
interface WriteJob {
  readonly bytes: Uint8Array;
  /** Whether `write()` took the bytes, which count as buffered. */
  readonly wasGathered?: boolean;
  /** A block of `spareBlocks` that `bytes` lie in. */
  readonly block?: Uint8Array<ArrayBuffer>;
  readonly endsStream?: boolean;
  settled?: PromiseWithResolvers<void>;
}

/**
 * What waits to be sent: one job at a time is under way, so that nothing
 * interleaves. Small writes gather in a block behind the last job.
 */
class WriteQueue {
  #conn: StreamConn;
  readonly #highWaterMark: number;
  readonly #owner: object;
  readonly #jobs: WriteJob[] = [];
  #offset = 0;
  /** What `send()` writes without a job, as nothing was before it. */
  #directBytes: Uint8Array = NO_BYTES;
  #directSend: Promise<void> | undefined;
  #block: Uint8Array<ArrayBuffer> | undefined;
  #blockLength = 0;
  /** Text that was written after what the block holds. */
  #text = "";
  #busy = false;
  #failure: unknown;
  #failed = false;
  #ending: Promise<void> | undefined;
  #flushScheduled = false;
  /** Nothing new may be written, as the connection is about to be another. */
  #held = false;
  /** Bytes that `write()` took and that are not sent yet. */
  #buffered = 0;
  bytesWritten = 0;

  /** The connection's errors are noted as those of `owner`. */
  constructor(conn: StreamConn, highWaterMark: number, owner: object) {
    this.#conn = conn;
    this.#highWaterMark = highWaterMark;
    this.#owner = owner;
  }

  /** Whether there is nothing that still has to leave. */
  get idle(): boolean {
    return !this.#busy && !this.#hasGathered && this.#jobs.length === 0;
  }

  /** Bytes that wait; of those that are under way it is not known yet how many have left. */
  get waiting(): number {
    this.#encodeText();
    let bytes = this.#directBytes.length + this.#blockLength - this.#offset;
    for (const job of this.#jobs) bytes += job.bytes.length;
    return bytes;
  }

  /** Gathers `data`; resolves at once unless too much is waiting already. */
  write(data: Uint8Array | string): Promise<void> {
    if (this.#refuses) return this.#refuse("write()");
    if (typeof data === "string" && data.length <= TEXT_CHARACTERS) return this.#writeText(data);
    return this.#writeBytes(bytesOf(data));
  }

  #writeText(text: string): Promise<void> {
    if (this.#text.length + text.length > TEXT_CHARACTERS) this.#encodeText();
    const most = this.#buffered + (this.#text.length + text.length) * MAX_UTF8_BYTES;
    if (most > this.#highWaterMark) return this.#writeBytes(encoder.encode(text)); // It has to be counted.
    this.#text += text;
    if (!this.#busy) this.#flushSoon();
    return DONE;
  }

  #writeBytes(bytes: Uint8Array): Promise<void> {
    this.#encodeText();
    if (this.#buffered + bytes.length > this.#highWaterMark) return this.#enqueue({ bytes });
    this.#gather(bytes);
    if (!this.#busy) this.#flushSoon();
    return DONE;
  }

  /** Sends `data` after all that came before; resolves once the kernel has it. */
  send(data: Uint8Array | string): Promise<void> {
    if (this.#refuses) return this.#refuse("send()");
    const bytes = bytesOf(data);
    if (!this.idle || bytes.length === 0) return this.#enqueue({ bytes });
    this.#busy = true;
    this.#directBytes = bytes;
    return this.#directSend = this.#writeNow(bytes).then(this.#onSent, this.#onSendFailed);
  }

  flush(): Promise<void> {
    if (this.#failed) return rejection(this.#failure);
    if (this.idle) return DONE;
    const last = this.#jobs.at(-1);
    // Many flushes in a row are one.
    if (last?.bytes.length === 0 && last.settled !== undefined && !this.#hasGathered) return last.settled.promise;
    return this.#enqueue({ bytes: NO_BYTES });
  }

  closeWrite(): Promise<void> {
    if (this.#failed) return rejection(this.#failure);
    if (this.#held) return this.#refuse("closeWrite()");
    return this.#ending ??= this.#enqueue({ bytes: NO_BYTES, endsStream: true });
  }

  /** Sends what waits and takes nothing new until {@linkcode WriteQueue.goOn}. */
  hold(): Promise<void> {
    if (this.#refuses) return this.#refuse("startTls()");
    this.#held = true;
    return this.flush();
  }

  /** Writes to `conn` from now on. */
  goOn(conn: StreamConn): void {
    this.#conn = conn;
    this.#held = false;
  }

  /** Sends what was gathered, unless it will go out by itself. */
  flushGathered(): void {
    if (this.#busy || this.idle) return;
    this.#seal();
    this.#start();
  }

  /** Gives up on everything that waits; later calls reject with `error` too. */
  fail(error: unknown): void {
    if (this.#failed) return;
    this.#failed = true;
    this.#failure = error;
    this.#block = undefined;
    this.#blockLength = 0;
    this.#text = "";
    this.#busy = false;
    this.#offset = 0;
    this.#directBytes = NO_BYTES;
    if (this.#directSend !== undefined) forgettable(this.#directSend);
    for (const { settled } of this.#jobs.splice(0)) {
      if (settled === undefined) continue;
      forgettable(settled.promise);
      settled.reject(error);
    }
  }

  get #refuses(): boolean {
    return this.#failed || this.#ending !== undefined || this.#held;
  }

  #refuse(call: string): Promise<never> {
    if (this.#failed) return rejection(this.#failure);
    if (this.#held) return rejection(new Deno.errors.Busy(`Cannot ${call}: startTls() is under way`));
    return rejection(new Deno.errors.BrokenPipe(`Cannot ${call}: closeWrite() has ended this side of the stream`));
  }

  #enqueue(job: WriteJob): Promise<void> {
    job.settled = Promise.withResolvers();
    this.#seal();
    this.#jobs.push(job);
    if (!this.#busy) this.#start();
    return job.settled.promise;
  }

  #gather(bytes: Uint8Array): void {
    this.#buffered += bytes.length;
    for (let from = 0; from < bytes.length;) {
      this.#block ??= spareBlocks.pop() ?? new Uint8Array(BLOCK_BYTES);
      const part = bytes.subarray(from, from + BLOCK_BYTES - this.#blockLength);
      this.#block.set(part, this.#blockLength);
      this.#blockLength += part.length;
      from += part.length;
      if (this.#blockLength === BLOCK_BYTES) this.#sealBlock();
    }
  }

  get #hasGathered(): boolean {
    return this.#blockLength > 0 || this.#text !== "";
  }

  /** Puts the text that was gathered behind the bytes that were. */
  #encodeText(): void {
    const text = this.#text;
    if (text === "") return;
    this.#text = "";
    if (this.#blockLength + text.length * MAX_UTF8_BYTES > BLOCK_BYTES) this.#sealBlock();
    this.#block ??= spareBlocks.pop() ?? new Uint8Array(BLOCK_BYTES);
    const { written } = encoder.encodeInto(text, this.#block.subarray(this.#blockLength));
    this.#blockLength += written;
    this.#buffered += written;
    if (this.#blockLength === BLOCK_BYTES) this.#sealBlock();
  }

  /** Makes a job of what was gathered. */
  #seal(): void {
    this.#encodeText();
    this.#sealBlock();
  }

  #sealBlock(): void {
    const block = this.#block;
    if (block === undefined || this.#blockLength === 0) return;
    const bytes = block.subarray(0, this.#blockLength);
    this.#blockLength = 0;
    if (this.#busy && bytes.length < BLOCK_BYTES / 4) {
      // It has to wait, perhaps for long, and must not keep a whole block for so little.
      this.#jobs.push({ bytes: bytes.slice(), wasGathered: true });
    } else {
      this.#jobs.push({ bytes, wasGathered: true, block });
      this.#block = undefined;
    }
  }

  /** Sends what was gathered when this turn of the event loop is over, in case that nothing else does. */
  #flushSoon(): void {
    if (this.#flushScheduled) return;
    this.#flushScheduled = true;
    if (unflushed.push(this) === 1) setImmediate(flushAll);
  }

  flushAtTurnEnd(): void {
    this.#flushScheduled = false;
    this.flushGathered();
  }

  #start(): void {
    this.#busy = true;
    this.#next();
  }

  #next(): void {
    let job = this.#jobs[0];
    while (job !== undefined && job.bytes.length === 0 && !job.endsStream) {
      this.#settle();
      job = this.#jobs[0];
    }
    if (job === undefined) this.#rest();
    else if (job.endsStream) this.#conn.closeWrite().then(() => this.#endJob(), (error) => this.#failWriting(error));
    else this.#write(job.bytes);
  }

  /** Nothing is left but, perhaps, what was gathered meanwhile. */
  #rest(): void {
    if (this.#hasGathered) {
      this.#seal();
      this.#next();
    } else {
      this.#busy = false;
    }
  }

  /** The first job is done. */
  #settle(): void {
    const job = this.#jobs.shift();
    this.#offset = 0;
    if (job?.wasGathered) this.#buffered -= job.bytes.length;
    if (job?.block !== undefined && spareBlocks.length < MAX_SPARE_BLOCKS) spareBlocks.push(job.block);
    job?.settled?.resolve();
  }

  /** All of it, nearly always: then there was no job, and the caller's promise is the one that brought the count. */
  readonly #onSent = (count: number): Promise<void> | void => {
    if (this.#failed) throw this.#failure; // fail() was here first.
    const bytes = this.#directBytes;
    this.#directBytes = NO_BYTES;
    this.bytesWritten += count;
    if (count < bytes.length) {
      const settled = Promise.withResolvers<void>();
      this.#jobs.unshift({ bytes: bytes.subarray(count), settled });
      this.#next();
      return settled.promise;
    }
    this.#next();
  };

  readonly #onSendFailed = (error: unknown): never => {
    if (!this.#failed) this.#failWriting(error);
    throw this.#failure;
  };

  #write(bytes: Uint8Array): void {
    this.#writeNow(bytes).then((count) => this.#noteWritten(count), (error) => this.#failWriting(error));
  }

  #writeNow(bytes: Uint8Array): Promise<number> {
    try {
      return this.#conn.write(bytes);
    } catch (error) {
      return Promise.reject(error); // A connection of the caller's own has thrown.
    }
  }

  #noteWritten(count: number): void {
    if (this.#failed) return; // fail() was here first.
    this.bytesWritten += count;
    this.#offset += count;
    const bytes = this.#jobs[0]?.bytes ?? NO_BYTES;
    if (this.#offset < bytes.length) this.#write(bytes.subarray(this.#offset));
    else this.#endJob();
  }

  #endJob(): void {
    if (this.#failed) return; // fail() was here first.
    this.#settle();
    this.#next();
  }

  #failWriting(error: unknown): void {
    noteOrigin(error, this.#owner);
    this.fail(error);
  }
}

/** Queues with gathered bytes that are to leave at the end of this turn. */
let unflushed: WriteQueue[] = [];

function flushAll(): void {
  const queues = unflushed;
  unflushed = [];
  for (const queue of queues) {
    try {
      queue.flushAtTurnEnd();
    } catch (error) {
      queue.fail(error); // A connection of the caller's own that throws must not hold the others up.
    }
  }
}

// --- Fair turns -------------------------------------------------------------

/** Operations that the runtime completes in one turn of its event loop (tokio's budget); so many connections are served in order. */
const RUNTIME_BUDGET = 128;

/** Queued streams that go on in one turn. From 96 on order is lost again; with 8 a turn costs more than it brings. */
const READS_PER_TURN = 32;

/** How many more go on than were served, as some of those that went on may have nothing to read. */
const EXTRA_READS = 8;

/** Milliseconds after which the queue moves on although nobody was served. */
const STALL_MS = 1;

/**
 * Lets busy streams read in turn.
 *
 * The runtime completes 128 operations in a turn and wakes the others that are
 * ready in reverse order, so that a connection which reads again at once overtakes
 * those that wait: of 1,000 busy ones some are answered once in four seconds and
 * others two thousand times. Therefore, once a turn has been full, who wants to
 * read again queues up here. As many go on as were served, as if each passed its
 * place on; so never more are ready than the budget has room for, and accepting
 * and datagrams have their turn as well.
 *
 * Whose first bytes are still to come, or who has waited in the kernel all the
 * time, does not queue. With fewer streams than the budget nobody does.
 */
class Turnstile<Taker> {
  readonly #takeTurn: (taker: Taker) => void;
  readonly #waiting: Taker[] = [];
  /** Where the queue begins in `#waiting`. */
  #first = 0;
  /** Reads that were completed in this turn. */
  #completed = 0;
  #streams = 0;
  /** Whether the queue has moved since it was last looked at. */
  #hasMoved = false;
  #isWatched = false;

  /** `takeTurn` lets go on who was not admitted at once. */
  constructor(takeTurn: (taker: Taker) => void) {
    this.#takeTurn = takeTurn;
  }

  enter(): void {
    this.#streams++;
  }

  leave(): void {
    this.#streams--;
  }

  /** Whether `taker` may read at once; otherwise it is told when it is its turn. */
  admits(taker: Taker): boolean {
    const isSmallCrowd = this.#streams < RUNTIME_BUDGET;
    if (isSmallCrowd || (this.#completed < RUNTIME_BUDGET && this.#waiting.length === 0)) return true;
    this.#waiting.push(taker);
    if (!this.#isWatched) this.#moveOn();
    return false;
  }

  /** A read was completed. */
  noteRead(): void {
    if (this.#streams < RUNTIME_BUDGET) return;
    if (this.#completed++ === 0) setImmediate(this.#endTurn);
  }

  readonly #endTurn = (): void => {
    const count = Math.min(this.#completed + EXTRA_READS, READS_PER_TURN);
    this.#completed = 0;
    this.#hasMoved = true;
    if (this.#waiting.length > 0) this.#letGo(count);
  };

  /** Runs while somebody waits, in case that all who went on have nothing to read. */
  readonly #moveOn = (): void => {
    if (this.#isWatched && !this.#hasMoved) this.#letGo(READS_PER_TURN);
    this.#hasMoved = false;
    this.#isWatched = this.#waiting.length > 0;
    if (this.#isWatched) setTimeout(this.#moveOn, STALL_MS);
  };

  #letGo(count: number): void {
    const going = this.#waiting.slice(this.#first, this.#first + count);
    this.#first += going.length;
    if (this.#first === this.#waiting.length) {
      this.#waiting.length = this.#first = 0;
    } else if (this.#first > this.#waiting.length >> 1) {
      this.#waiting.splice(0, this.#first);
      this.#first = 0;
    }
    for (const taker of going) this.#takeTurn(taker);
  }
}

// --- Streams ----------------------------------------------------------------

/** What a try to answer a read returns when more bytes are needed. */
const MORE = Symbol("more bytes are needed");

/** What a stream waits for on behalf of its one reader. */
interface Waiting {
  /** As callers write it, for messages. */
  readonly call: string;
  /** Milliseconds that it may wait, which bytes that drip in do not prolong. */
  readonly timeout: number;
  /** When its deadline was first looked at. */
  seenAt: number;
  /** The caller's own array, empty where the read has none. */
  readonly into: Uint8Array;
  /** Whether the read begins a new message, so that a draining server may end it. */
  readonly startsMessage: boolean;
  /** Answers the read if it can be answered by now. */
  advance(): boolean;
  reject(error: unknown): void;
}

/** A search that goes on where it stopped, so that a line that comes byte by byte is not searched over and over. */
interface Search {
  /** How much of what has arrived holds no delimiter. */
  searched: number;
}

/**
 * One way to read a stream, which waits for one answer at a time. It is used
 * again and again: what is made anew for each message is paid for in the time of
 * each message, and twice where large ones fill the caches.
 */
class Reader<T> implements Waiting, Search {
  readonly call: string;
  readonly #take: (reader: Reader<T>) => T | typeof MORE;
  #answer: Promise<T> | undefined;
  #resolve: (answer: T) => void = ignore;
  #reject: (error: unknown) => void = ignore;
  startsMessage = true;
  into: Uint8Array = NO_BYTES;
  /** The most bytes that the caller wants. */
  maxBytes = Infinity;
  searched = 0;
  timeout = Infinity;
  seenAt = UNSEEN;

  /** `take` answers from what has arrived, or asks for more. */
  constructor(call: string, take: (reader: Reader<T>) => T | typeof MORE) {
    this.call = call;
    this.#take = take;
  }

  take(): T | typeof MORE {
    this.searched = 0;
    const answer = this.#take(this);
    if (answer !== MORE) this.into = NO_BYTES;
    return answer;
  }

  wait(timeout: number): Promise<T> {
    this.timeout = timeout;
    this.seenAt = UNSEEN;
    return this.#answer = new Promise((resolve, reject) => {
      this.#resolve = resolve;
      this.#reject = reject;
    });
  }

  advance(): boolean {
    const answer = this.#take(this);
    if (answer === MORE) return false;
    this.#resolve(answer);
    this.#forget();
    return true;
  }

  reject(error: unknown): void {
    if (this.#answer !== undefined) forgettable(this.#answer);
    this.#reject(error);
    this.#forget();
  }

  /** What was read may be large, and is the caller's alone. */
  #forget(): void {
    this.into = NO_BYTES;
    this.#answer = undefined;
    this.#resolve = this.#reject = ignore;
  }
}

/** Milliseconds that a closed stream tries to send what `write()` had buffered before it drops the connection. */
const CLOSE_LINGER_MS = 1_000;

/** What a server may do to a stream and nobody else. */
interface StreamControl {
  /**
   * From now on a read that would wait for a new message reads the end of the
   * stream; if the client waits for an answer, only with `isLate`.
   */
  endBetweenMessages(stream: SocketStream, isLate: boolean): void;
  /** How many reads the streams of this module have completed. */
  completedReads(): number;
  /** Closes at once and drops what is buffered; `error` is what the stream's calls reject with. */
  cut(stream: SocketStream, error: Error): void;
  /** Ends what has taken too long by `now`; returns the shortest time that is left to be kept, in milliseconds. */
  look(stream: SocketStream, now: number): number;
  /** Whether closing has nothing to wait for. */
  isSettled(stream: SocketStream): boolean;
  /** Reads, as it is the stream's turn. */
  takeTurn(stream: SocketStream): void;
  /**
   * Reads a PROXY header, for `timeout` milliseconds at most, before anything else is read; resolves to `null` if
   * the stream ends without a byte.
   */
  readProxyHeader(stream: SocketStream, timeout: number): Promise<ProxyHeader | null>;
  /** Does a handshake that was prepared once for many streams, for `timeout` milliseconds at most. */
  startTls(stream: SocketStream, handshake: Handshake, timeout: number): Promise<void>;
  /** What it waits for, as {@linkcode OpenConnection.waitsFor} says it. */
  waitsFor(stream: SocketStream): string;
  /** Why it is closed, if it is. */
  failureOf(stream: SocketStream): unknown;
}
let control: StreamControl;

let completedReads = 0;

const deadlines = new DeadlineTimer<SocketStream>((stream, now) => control.look(stream, now));

const turnstile = new Turnstile<SocketStream>((stream) => control.takeTurn(stream));

/**
 * One buffered, two-way stream of bytes over a connection. A handler gets it as
 * `this.request`, a client from {@linkcode connect}, a test from
 * {@linkcode socketPair}.
 *
 * One read waits at a time: a second one rejects with `Deno.errors.Busy`, naming
 * both. Writes may overlap; each goes out whole, in the order of the calls. The
 * end of the peer's side does not end ours.
 *
 * Read: `recv`, `read`, `readExactly`, `readUntil`, `readLine`, `lines`, `frames`,
 * `for await`. Write: `write`, `flush`, `send`, `writeFrame`, `closeWrite`.
 * Look: `localAddress`, `remoteAddress`, `bytesRead`, `bytesWritten`, `tls`, `proxy`,
 * `proxyAddress`. Turn: `startTls`.
 *
 * Any call rejects with the connection's own error (`Deno.errors.ConnectionReset`,
 * `Deno.errors.BrokenPipe`) when the peer is gone, with `Deno.errors.TimedOut` when
 * a deadline passed, and with `Deno.errors.BadResource` after `close()`.
 *
 * @example
 * ```ts
 * import { socketPair } from "@socketserver/socketserver";
 * import { assertEquals } from "@std/assert";
 *
 * const [ours, theirs] = socketPair();
 * await theirs.send("one\r\ntwo");
 * await theirs.closeWrite();
 * assertEquals(await ours.readLine(), "one");
 * assertEquals(await ours.readLine(), "two");
 * assertEquals(await ours.readLine(), null);
 * ours.close();
 * theirs.close();
 * ```
 */
export class SocketStream implements AsyncIterable<Uint8Array<ArrayBuffer>>, Disposable, AsyncDisposable {
  static {
    control = {
      endBetweenMessages: (stream, isLate) => stream.#endBetweenMessages(isLate),
      completedReads: () => completedReads,
      cut: (stream, error) => stream.#cut(error),
      look: (stream, now) => stream.#look(now),
      isSettled: (stream) => stream.#output.idle && stream.#lingering === undefined,
      takeTurn: (stream) => stream.#takeTurn(),
      readProxyHeader: (stream, timeout) => stream.#readProxyHeader(timeout),
      startTls: (stream, handshake, timeout) => stream.#startTls(handshake, timeout, stream.#returnInput()),
      waitsFor: (stream) => stream.#reader?.call ?? (stream.#output.idle ? "handler" : "send()"),
      failureOf: (stream) => stream.#readFailure,
    };
  }

  #conn: StreamConn;
  readonly #limit: number;
  readonly #idleTimeout: number;
  readonly #maxLifetime: number;
  readonly #openedAt = performance.now();
  readonly #input = new ReadBuffer();
  readonly #output: WriteQueue;
  #timeout: number;
  #reader: Waiting | undefined;
  #chunkReader: Reader<Uint8Array<ArrayBuffer> | null> | undefined;
  #countReader: Reader<number | null> | undefined;
  #lineReader: Reader<string | null> | undefined;
  /** Whether a `conn.read()` is under way; it cannot be cancelled, so it may outlive its reader. */
  #filling = false;
  /** The array of a caller that is being filled, and the count of bytes put into it. */
  #direct: Uint8Array = NO_BYTES;
  #directCount = 0;
  /** No more bytes will come. */
  #ended = false;
  /** Why reading cannot go on. */
  #readFailure: unknown;
  #readFailed = false;
  #closed = false;
  /** What `close()` still sends. */
  #lingering: Promise<void> | undefined;
  /** Bytes were read since the last write, so the peer waits for an answer. */
  #unanswered = false;
  /** The server drains: waiting for a new message reads the end; when it is late, also if an answer is due. */
  #draining: "no" | "soon" | "late" = "no";
  #bytesRead = 0;
  /** Whether a read or write that begins has a deadline that nobody looks at often enough yet. */
  #needsWatch: boolean;
  /** What the proxy has said of the client, where one has. */
  #proxy: ProxyHeader | undefined;
  readonly #rest = new Standstill();
  readonly #stalledWrite = new Standstill();
  #readable: ReadableStream<Uint8Array<ArrayBuffer>> | undefined;
  #writable: WritableStream<Uint8Array> | undefined;

  /**
   * Takes `conn` over: read, write and close it only through the stream.
   *
   * @param conn An open connection, such as `Deno.connect` gives.
   * @param options Deadlines and limits.
   * @throws {RangeError} If an option is out of its range.
   * @throws {TypeError} If an option does not exist.
   *
   * @example
   * ```ts
   * import { SocketStream } from "@socketserver/socketserver";
   *
   * using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
   * const conn = await Deno.connect({ port: listener.addr.port });
   * await using stream = new SocketStream(conn, { timeout: 5_000 });
   * ```
   */
  constructor(conn: StreamConn, options: StreamOptions = {}) {
    const { timeout, idleTimeout, maxLifetime, limit, highWaterMark } = resolveStreamOptions(options);
    this.#conn = conn;
    this.#timeout = timeout;
    this.#idleTimeout = idleTimeout;
    this.#maxLifetime = maxLifetime;
    this.#limit = limit;
    this.#output = new WriteQueue(conn, highWaterMark, this);
    turnstile.enter();
    const always = Math.min(idleTimeout, maxLifetime);
    this.#watchFor(always);
    this.#needsWatch = timeout < always;
  }

  /** The address of this end; behind a proxy the one that the client has connected to, if the proxy has told. */
  get localAddress(): Deno.Addr {
    return this.#proxy?.destination ?? this.#conn.localAddr;
  }

  /** The address of the peer; behind a proxy the client's, if the proxy has told. */
  get remoteAddress(): Deno.Addr {
    return this.#proxy?.source ?? this.#conn.remoteAddr;
  }

  /** What a trusted proxy has said of this connection, with {@linkcode ServerOptions.proxyProtocol}; `undefined` if there was none. */
  get proxy(): ProxyHeader | undefined {
    return this.#proxy;
  }

  /** The address of the proxy that has sent `proxy`. */
  get proxyAddress(): Deno.Addr | undefined {
    return this.#proxy && this.#conn.remoteAddr;
  }

  /** Bytes that arrived so far, those that wait to be read included; a PROXY header is not among them. */
  get bytesRead(): number {
    return this.#bytesRead;
  }

  /** Bytes that were handed to the kernel so far. */
  get bytesWritten(): number {
    return this.#output.bytesWritten;
  }

  /**
   * Bytes that were written and wait until the peer takes what is before them;
   * asyncio's `get_write_buffer_size()`. A write that is awaited keeps it near
   * `highWaterMark`; where nobody awaits, as in a chat room, it tells who does not read.
   *
   * @example
   * ```ts
   * import { socketPair } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * const [deaf, stream] = socketPair();
   * for (let i = 0; i < 10; i++) stream.write(new Uint8Array(50_000)).catch(() => {});
   * assertEquals(stream.bytesBuffered > 65_536, true);
   * stream.close();
   * deaf.close();
   * ```
   */
  get bytesBuffered(): number {
    return this.#output.waiting;
  }

  /** What the TLS handshake has agreed on, and who the peer is; `undefined` on a plain stream. */
  get tls(): TlsSession | undefined {
    return this.#conn instanceof TlsConn ? this.#conn.session : undefined;
  }

  /** Milliseconds that one read or write may wait; above 0, `Infinity` for ever. A change counts from the next call on, and for a write that is under way from now on. */
  get timeout(): number {
    return this.#timeout;
  }
  set timeout(ms: number) {
    checkNumber("timeout", ms);
    this.#timeout = ms;
    this.#stalledWrite.forget();
    this.#needsWatch = true;
    if (!this.#output.idle) this.#watchFor(ms);
  }

  /**
   * Reads what has arrived, or waits until something does.
   *
   * @param maxBytes The most bytes to read, 1 or more. Default `Infinity`: all
   * that has arrived.
   * @returns Resolves to one byte or more, which are the caller's to keep, and to
   * `null` at the end of the stream. To transfer their buffer to a worker, take a
   * `slice()`: the buffer may hold later bytes too.
   * @throws {RangeError} If `maxBytes` is out of its range.
   * @throws {Deno.errors.Busy} If another read waits.
   * @throws {Deno.errors.TimedOut} If nothing came within `timeout`.
   *
   * @example
   * ```ts
   * import { socketPair } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * const [ours, theirs] = socketPair();
   * await theirs.send(new Uint8Array([1, 2, 3]));
   * assertEquals(await ours.recv(2), new Uint8Array([1, 2]));
   * assertEquals(await ours.recv(), new Uint8Array([3]));
   * ours.close();
   * theirs.close();
   * ```
   */
  recv(maxBytes: number = Infinity): Promise<Uint8Array<ArrayBuffer> | null> {
    if (!(maxBytes >= 1 && (Number.isInteger(maxBytes) || maxBytes === Infinity))) {
      return rejection(new RangeError(`Cannot recv(${maxBytes}): ask for a whole number of 1 or more, or Infinity`));
    }
    const reader = this.#chunkReader ??= new Reader("recv()", ({ maxBytes }) => this.#takeChunk(maxBytes));
    if (this.#reader === undefined) reader.maxBytes = maxBytes;
    return this.#read(reader);
  }

  /**
   * Reads into an array of the caller, as `Deno.Conn.read` does: nothing is
   * allocated, and without a `timeout` nothing is copied. Leave `into` alone until the promise settles; if it
   * settles with the end because the server shuts down, until the handler is done.
   *
   * @param into Where the bytes go; not empty.
   * @returns Resolves to the count of bytes, and to `null` at the end of the stream.
   * @throws {RangeError} If `into` is empty.
   * @throws {Deno.errors.Busy} If another read waits.
   * @throws {Deno.errors.TimedOut} If nothing came within `timeout`.
   *
   * @example
   * ```ts
   * import { socketPair } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * const [ours, theirs] = socketPair();
   * await theirs.send("abc");
   * assertEquals(await ours.read(new Uint8Array(16)), 3);
   * ours.close();
   * theirs.close();
   * ```
   */
  read(into: Uint8Array): Promise<number | null> {
    if (into.length === 0) {
      return rejection(new RangeError("Cannot read() into an empty array: a loop over it would spin"));
    }
    const reader = this.#countReader ??= new Reader("read()", ({ into }) => this.#takeInto(into));
    if (this.#reader === undefined) reader.into = into;
    return this.#read(reader);
  }

  /**
   * Reads exactly `bytes` bytes.
   *
   * @param bytes How many, a whole number of 0 or more. Memory grows with what
   * arrives, not with what is asked for.
   * @returns Resolves to the bytes, which are the caller's.
   * @throws {IncompleteReadError} If the stream ends before; it has what came.
   * @throws {RangeError} If `bytes` is out of its range.
   * @throws {Deno.errors.Busy} If another read waits.
   * @throws {Deno.errors.TimedOut} If nothing came within `timeout`.
   *
   * @example
   * ```ts
   * import { socketPair } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * const [ours, theirs] = socketPair();
   * await theirs.send("abcdef");
   * assertEquals((await ours.readExactly(4)).length, 4);
   * ours.close();
   * theirs.close();
   * ```
   */
  readExactly(bytes: number): Promise<Uint8Array<ArrayBuffer>> {
    if (!(Number.isSafeInteger(bytes) && bytes >= 0)) {
      return rejection(new RangeError(`Cannot readExactly(${bytes}): ask for a whole number of 0 or more`));
    }
    const reader = new Reader("readExactly()", () => this.#takeExactly(bytes));
    // A body that is read behind its header is the middle of a message.
    reader.startsMessage = !this.#unanswered;
    return this.#read(reader);
  }

  /**
   * Reads up to and with `delimiter`.
   *
   * @param delimiter What ends a record: bytes, or text as UTF-8; not empty.
   * @returns Resolves to the record, its delimiter included, and to `null` if the
   * stream ends between two records.
   * @throws {IncompleteReadError} If the stream ends inside a record; it has what came.
   * @throws {LimitOverrunError} If `limit` bytes hold no delimiter.
   * @throws {RangeError} If `delimiter` is empty.
   * @throws {Deno.errors.Busy} If another read waits.
   * @throws {Deno.errors.TimedOut} If nothing came within `timeout`.
   *
   * @example
   * ```ts
   * import { socketPair } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * const [ours, theirs] = socketPair();
   * await theirs.send("a;b;");
   * assertEquals(new TextDecoder().decode(await ours.readUntil(";") ?? undefined), "a;");
   * ours.close();
   * theirs.close();
   * ```
   */
  readUntil(delimiter: Uint8Array | string): Promise<Uint8Array<ArrayBuffer> | null> {
    const bytes = typeof delimiter === "string" ? encoder.encode(delimiter) : delimiter.slice();
    if (bytes.length === 0) return rejection(new RangeError("Cannot readUntil() an empty delimiter"));
    return this.#read(new Reader("readUntil()", (reader) => this.#takeUntil(bytes, reader)));
  }

  /**
   * Reads a line of UTF-8 text.
   *
   * @returns Resolves to the line without its `"\n"` or `"\r\n"`, and to `null` at
   * the end of the stream. A last line that has no end is a line. One that is kept
   * may keep up to 1 KiB of what came with it.
   * @throws {LimitOverrunError} If the line is longer than `limit` bytes.
   * @throws {Deno.errors.Busy} If another read waits.
   * @throws {Deno.errors.TimedOut} If nothing came within `timeout`.
   *
   * @example
   * ```ts
   * import { socketPair } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * const [ours, theirs] = socketPair();
   * await theirs.send("hello\r\n");
   * assertEquals(await ours.readLine(), "hello");
   * ours.close();
   * theirs.close();
   * ```
   */
  readLine(): Promise<string | null> {
    const line = this.#reader === undefined ? this.#takeDecodedLine() : undefined;
    if (line !== undefined) return Promise.resolve(line);
    return this.#read(this.#lineReader ??= new Reader("readLine()", (reader) => this.#takeLine(reader)));
  }

  /**
   * Iterates over the lines of the stream, as {@linkcode SocketStream.readLine}
   * reads them. Leaving the loop early leaves the stream open.
   *
   * @returns The iterator; it throws what `readLine` rejects with.
   *
   * @example
   * ```ts
   * import { socketPair } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * const [ours, theirs] = socketPair();
   * await theirs.send("one\ntwo\n");
   * theirs.close();
   * assertEquals(await Array.fromAsync(ours.lines()), ["one", "two"]);
   * ours.close();
   * ```
   */
  lines(): AsyncIterableIterator<string> {
    return this.#iterate("lines()", (reader) => this.#takeLine(reader), () => this.#takeDecodedLine());
  }

  /**
   * Iterates over records that each have their length in front, as
   * {@linkcode SocketStream.writeFrame} sends them. Leaving the loop early leaves
   * the stream open.
   *
   * @param options How the length is written. Default: 4 bytes, big-endian.
   * @returns The iterator. It throws {@linkcode LimitOverrunError} for a record of
   * more than `limit` bytes, {@linkcode IncompleteReadError} if the stream ends
   * inside a record, and what `recv` rejects with.
   * @throws {TypeError} If an option does not exist.
   * @throws {RangeError} If `lengthBytes` is not 1, 2 or 4.
   *
   * @example
   * ```ts
   * import { socketPair } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * const [ours, theirs] = socketPair();
   * await theirs.writeFrame("hello");
   * await theirs.writeFrame("");
   * await theirs.closeWrite();
   * const frames = await Array.fromAsync(ours.frames());
   * assertEquals(frames.map((frame) => frame.length), [5, 0]);
   * ours.close();
   * theirs.close();
   * ```
   */
  frames(options: FrameOptions = {}): AsyncIterableIterator<Uint8Array<ArrayBuffer>> {
    const format = resolveFrameOptions(options);
    return this.#iterate("frames()", () => this.#takeFrame(format));
  }

  /** Iterates over chunks, as {@linkcode SocketStream.recv} reads them. Leaving the loop early leaves the stream open. */
  [Symbol.asyncIterator](): AsyncIterableIterator<Uint8Array<ArrayBuffer>> {
    return this.#iterate("for await", () => this.#takeChunk(Infinity));
  }

  /**
   * Buffers `data` to be sent. It leaves by itself: when the handler waits for
   * input, or else at the end of this turn of the event loop. Many small writes
   * become few large ones. Leave the bytes alone until the promise settles.
   *
   * Text is put together before it is encoded, so a character that two writes have
   * cut in two arrives whole, if they leave together.
   *
   * A failure shows at the next call; a promise that nobody awaits does no harm,
   * but then nothing holds a writer back that is faster than its peer.
   *
   * @param data Bytes, or text that is sent as UTF-8.
   * @returns Resolves at once, or, if more than `highWaterMark` bytes wait, once
   * `data` was handed to the kernel.
   * @throws {TypeError} If `data` is neither.
   * @throws {Deno.errors.BrokenPipe} If the peer is gone or `closeWrite()` was called.
   * @throws {Deno.errors.TimedOut} If the peer took nothing within `timeout`.
   *
   * @example
   * ```ts
   * import { socketPair } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * const [ours, theirs] = socketPair();
   * await ours.write("HTTP/1.0 200 OK\r\n");
   * await ours.write("\r\n");
   * assertEquals(await theirs.readLine(), "HTTP/1.0 200 OK");
   * ours.close();
   * theirs.close();
   * ```
   */
  write(data: Uint8Array | string): Promise<void> {
    if (this.#closed) return rejection(this.#failure);
    if (!isData(data)) return rejection(dataError("write()", data));
    this.#unanswered = false;
    this.#keepTimeout();
    return this.#output.write(data);
  }

  /**
   * Sends what `write()` has buffered.
   *
   * @returns Resolves once the kernel has all of it.
   * @throws {Deno.errors.BrokenPipe} If the peer is gone.
   * @throws {Deno.errors.TimedOut} If the peer took nothing within `timeout`.
   *
   * @example
   * ```ts
   * import { socketPair } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * const [ours, theirs] = socketPair();
   * ours.write("abc");
   * await ours.flush();
   * assertEquals(ours.bytesWritten, 3);
   * ours.close();
   * theirs.close();
   * ```
   */
  flush(): Promise<void> {
    if (this.#closed) return rejection(this.#failure);
    if (!this.#output.idle) this.#keepTimeout();
    return this.#output.flush();
  }

  /**
   * Sends all of `data`, after all that was written before. Leave the bytes alone
   * until the promise settles.
   *
   * @param data Bytes, or text that is sent as UTF-8.
   * @returns Resolves once the kernel has all of it.
   * @throws {TypeError} If `data` is neither.
   * @throws {Deno.errors.BrokenPipe} If the peer is gone or `closeWrite()` was called.
   * @throws {Deno.errors.TimedOut} If the peer took nothing within `timeout`.
   *
   * @example
   * ```ts
   * import { socketPair } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * const [ours, theirs] = socketPair();
   * await ours.send("hello\n");
   * assertEquals(await theirs.readLine(), "hello");
   * ours.close();
   * theirs.close();
   * ```
   */
  send(data: Uint8Array | string): Promise<void> {
    if (this.#closed) return rejection(this.#failure);
    if (!isData(data)) return rejection(dataError("send()", data));
    this.#unanswered = false;
    this.#keepTimeout();
    return this.#output.send(data);
  }

  /**
   * Buffers `payload` with its length in front, as {@linkcode SocketStream.frames}
   * reads it.
   *
   * @param payload Bytes, or text that is sent as UTF-8.
   * @param options How the length is written. Default: 4 bytes, big-endian.
   * @returns Settles as {@linkcode SocketStream.write} does.
   * @throws {RangeError} If the prefix cannot hold the payload's length.
   *
   * @example
   * ```ts
   * import { socketPair } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * const [ours, theirs] = socketPair();
   * await ours.writeFrame("hi", { lengthBytes: 2, littleEndian: true });
   * assertEquals(await theirs.readExactly(4), new Uint8Array([2, 0, 104, 105]));
   * ours.close();
   * theirs.close();
   * ```
   */
  writeFrame(payload: Uint8Array | string, options: FrameOptions = {}): Promise<void> {
    let format: Required<FrameOptions>;
    try {
      format = resolveFrameOptions(options);
    } catch (error) {
      return rejection(error);
    }
    if (!isData(payload)) return rejection(dataError("writeFrame()", payload));
    const bytes = bytesOf(payload);
    if (bytes.length >= 256 ** format.lengthBytes) {
      return rejection(
        new RangeError(`Cannot write a frame of ${bytes.length} bytes with a length of ${format.lengthBytes} bytes`),
      );
    }
    // Both are queued in this turn, so nothing comes between them.
    const prefix = this.write(encodeFrameLength(bytes.length, format));
    const body = this.write(bytes);
    return prefix === DONE ? body : forgettable(prefix.then(() => body));
  }

  /**
   * Ends our side: the peer reads the end of the stream once it has read what was
   * sent. Reading goes on.
   *
   * @returns Resolves once all that was written, and the end, are with the kernel.
   * A second call resolves too.
   * @throws {Deno.errors.BrokenPipe} If the peer is gone.
   * @throws {Deno.errors.TimedOut} If the peer took nothing within `timeout`.
   *
   * @example
   * ```ts
   * import { socketPair } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * const [ours, theirs] = socketPair();
   * await ours.closeWrite();
   * assertEquals(await theirs.recv(), null);
   * await theirs.send("still here");
   * assertEquals((await ours.recv())?.length, 10);
   * ours.close();
   * theirs.close();
   * ```
   */
  closeWrite(): Promise<void> {
    if (this.#closed) return rejection(this.#failure);
    this.#keepTimeout();
    return this.#output.closeWrite();
  }

  /**
   * Closes both sides. What waits, and each later call, rejects with
   * `Deno.errors.BadResource`. Bytes that are still on their way are sent if the
   * peer takes them within a second, for which a `read(into)` that waits has to
   * wait too; `await using`, or `flush()` before it, waits for them. A second call
   * does nothing.
   */
  close(): void {
    if (this.#closed) return;
    if (this.#output.idle) return this.#cut();
    this.#shut();
    const timer = setTimeout(() => this.#cut(), CLOSE_LINGER_MS);
    this.#lingering = this.#output.flush().catch(ignore).finally(() => {
      clearTimeout(timer);
      this.#cut();
    });
  }

  /** Closes both sides, as {@linkcode SocketStream.close} does. */
  [Symbol.dispose](): void {
    this.close();
  }

  /** Sends what is buffered, then closes both sides. Never rejects. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (!this.#closed) await this.flush().catch(ignore);
    this.close();
    await this.#lingering;
  }

  /**
   * Goes on with TLS over the same connection (STARTTLS), in the middle of a
   * conversation: both sides have to agree on that moment in plain text before.
   *
   * What was written before is sent first. Nothing may have been received that is
   * not read yet: it came in plain text, so that anybody could have put it there to
   * be taken for what the peer says under the protection of TLS.
   *
   * @param options Which side this is (`role`), its certificate or whom it trusts,
   * and `handshakeTimeout`.
   * @returns Resolves when the handshake is over; `stream.tls` says what it has
   * agreed on. If it fails, the stream is closed.
   * @throws {Deno.errors.Busy} If another read waits, or received bytes are unread;
   * the stream is as it was.
   * @throws {Deno.errors.InvalidData} If the peer speaks no TLS, or its certificate
   * is not valid; or if a certificate or key of `options` is none.
   * @throws {Deno.errors.TimedOut} If it took longer than `handshakeTimeout`.
   * @throws {TypeError} If the stream has TLS already, or an option does not exist.
   *
   * @example Both sides
   * ```ts
   * import { SocketStream } from "@socketserver/socketserver";
   *
   * async function serve(stream: SocketStream, cert: string, key: string) {
   *   if (await stream.readLine() !== "STARTTLS") return;
   *   await stream.write("GO AHEAD\n");
   *   await stream.startTls({ role: "server", cert, key });
   * }
   *
   * async function use(stream: SocketStream) {
   *   await stream.send("STARTTLS\n");
   *   await stream.readLine();
   *   await stream.startTls({ role: "client", serverName: "example.org" });
   * }
   * ```
   */
  async startTls(options: StartTlsOptions): Promise<void> {
    const handshake = prepareHandshake(options);
    await this.#startTls(handshake, handshake.timeout, this.#conn);
  }

  async #startTls(handshake: Handshake, timeout: number, conn: StreamConn): Promise<void> {
    this.#checkReadyForTls();
    const interruption = new AbortController();
    // It is a read like any other: a second one is refused, and it has its deadline.
    this.#reader = {
      call: "startTls()",
      advance: () => false,
      into: NO_BYTES,
      timeout,
      seenAt: UNSEEN,
      startsMessage: false,
      reject: (error) => {
        interruption.abort(error);
        this.#cut(error);
      },
    };
    this.#watchFor(timeout);
    try {
      await this.#output.hold();
      this.#adopt(await handshake.run(conn, interruption.signal));
    } catch (error) {
      this.#reader = undefined;
      this.#cut(error);
      throw error;
    }
  }

  #checkReadyForTls(): void {
    if (this.#readFailed) throw this.#failure;
    if (this.#conn instanceof TlsConn) throw new TypeError("Cannot startTls(): the stream has TLS already");
    if (this.#ended) throw new Deno.errors.BrokenPipe("Cannot startTls(): the peer has ended its side of the stream");
    if (this.#reader !== undefined || this.#filling) {
      throw new Deno.errors.Busy(
        `Cannot startTls(): ${this.#reader?.call ?? "an earlier read"} waits on the same stream`,
      );
    }
    if (this.#input.length > 0) {
      throw new Deno.errors.Busy(
        `Cannot startTls(): ${this.#input.length} bytes that came in plain text are unread; read them, or close`,
      );
    }
  }

  #adopt(conn: TlsConn): void {
    this.#reader = undefined;
    this.#conn = conn;
    this.#output.goOn(conn);
    if (this.#closed) closeQuietly(conn); // It was closed in the same moment.
  }

  #readProxyHeader(timeout: number): Promise<ProxyHeader | null> {
    const reader = new Reader("PROXY header", () => this.#takeProxyHeader());
    reader.startsMessage = false; // It comes before the first one.
    const answer = reader.wait(timeout);
    this.#reader = reader;
    this.#watchFor(timeout);
    if (this.#readFailed) this.#rejectReader();
    else this.#advance();
    return answer;
  }

  #takeProxyHeader(): ProxyHeader | null | typeof MORE {
    const { length } = this.#input;
    const parsed = parseProxyHeader(this.#input.peek(MAX_PROXY_HEADER_BYTES));
    if (parsed !== undefined) {
      this.#input.skip(parsed.length);
      this.#bytesRead -= parsed.length; // They are not the client's.
      return this.#proxy = parsed.header;
    }
    if (!this.#ended) return MORE;
    if (length === 0) return null;
    throw wrongHeader(`the connection has ended after ${length} bytes of it`, "2");
  }

  /**
   * The connection, with what came behind a PROXY header and nobody has read yet as its first bytes: the header came
   * before TLS, and these are the first ones of TLS.
   */
  #returnInput(): StreamConn {
    const { length } = this.#input;
    if (this.#proxy === undefined || length === 0) return this.#conn;
    this.#bytesRead -= length;
    return new RefilledConn(this.#conn, this.#input.take(length));
  }

  /** The incoming side as a web stream, made at the first use. Cancelling it closes both sides; reading its end does not. */
  get readable(): ReadableStream<Uint8Array<ArrayBuffer>> {
    return this.#readable ??= new ReadableStream<Uint8Array<ArrayBuffer>>({
      pull: async (controller) => {
        const chunk = await this.recv();
        if (chunk === null) controller.close();
        else controller.enqueue(chunk);
      },
      cancel: () => this.close(),
    }, { highWaterMark: 0 });
  }

  /** The outgoing side as a web stream, made at the first use. Closing it is `closeWrite()`; aborting it closes both sides. */
  get writable(): WritableStream<Uint8Array> {
    return this.#writable ??= new WritableStream<Uint8Array>({
      write: (chunk) => this.send(chunk),
      close: () => this.closeWrite(),
      abort: () => this.close(),
    });
  }

  /** The one place where reads wait. */
  #read<T>(reader: Reader<T>): Promise<T> {
    if (this.#closed) return rejection(this.#failure);
    if (this.#reader !== undefined) {
      return rejection(new Deno.errors.Busy(`Cannot ${reader.call}: ${this.#reader.call} waits on the same stream`));
    }
    try {
      const answer = reader.take();
      if (answer !== MORE) return Promise.resolve(answer);
    } catch (error) {
      return rejection(noteOrigin(error, this));
    }
    if (this.#readFailed) return rejection(this.#failure);
    if (this.#draining !== "no" && this.#endsBetweenMessages(reader.startsMessage)) this.#ended = true;
    return this.#wait(reader);
  }

  #wait<T>(reader: Reader<T>): Promise<T> {
    const answer = reader.wait(this.#timeout);
    this.#reader = reader;
    // What was gathered must be out before the handler waits for the answer to it.
    this.#output.flushGathered();
    this.#keepTimeout();
    if (this.#ended) this.#advance();
    else if (!this.#filling) this.#fill();
    return answer;
  }

  /** `takeReady` answers at once where that is known to be possible. */
  #iterate<T>(
    call: string,
    take: (search: Search) => T | null | typeof MORE,
    takeReady: () => T | undefined = () => undefined,
  ): AsyncIterableIterator<T> {
    let isOver = false;
    const reader = new Reader<IteratorResult<T, undefined>>(call, (reader) => {
      const value = take(reader);
      return value === MORE ? MORE : value === null ? { done: true, value: undefined } : { done: false, value };
    });
    return {
      next: () => {
        if (isOver) return Promise.resolve({ done: true, value: undefined });
        const value = this.#reader === undefined ? takeReady() : undefined;
        return value === undefined ? this.#read(reader) : Promise.resolve({ done: false, value });
      },
      return: () => {
        isOver = true;
        return Promise.resolve({ done: true, value: undefined });
      },
      [Symbol.asyncIterator]() {
        return this;
      },
    };
  }

  #fill(): void {
    this.#filling = true;
    this.#direct = NO_BYTES;
    // Who has just come is nobody's rival yet.
    if (this.#bytesRead === 0 || turnstile.admits(this)) this.#readNow();
  }

  #takeTurn(): void {
    // Its reader may have given up while it was waiting.
    this.#filling = this.#reader !== undefined && !this.#closed;
    if (this.#filling) this.#readNow();
  }

  #readNow(): void {
    // A read with a deadline may leave before its bytes come, which then must
    // not land in an array that its caller uses for something else.
    if (this.#reader?.timeout === Infinity) this.#direct = this.#reader.into;
    try {
      const room = this.#direct.length > 0 ? this.#direct : this.#input.room();
      this.#conn.read(room).then(this.#onRead, this.#onReadFailure);
    } catch (error) {
      this.#onReadFailure(error); // A connection of the caller's own that throws must not hold up the queue.
    }
  }

  readonly #onRead = (count: number | null): void => {
    this.#filling = false;
    if (this.#closed) return;
    if (count === null) this.#ended = true;
    else this.#receive(count);
    this.#advance();
  };

  readonly #onReadFailure = (error: unknown): void => {
    this.#filling = false;
    if (this.#closed) return;
    this.#failReading(error);
  };

  #receive(count: number): void {
    completedReads++;
    turnstile.noteRead();
    this.#bytesRead += count;
    const direct = this.#direct;
    this.#direct = NO_BYTES;
    if (direct.length === 0) this.#input.commit(count);
    else if (this.#reader?.into === direct) this.#directCount = count;
    else this.#input.append(direct.subarray(0, count)); // Its reader is gone.
  }

  /** Lets the reader look at what is there by now. */
  #advance(): void {
    const reader = this.#reader;
    if (reader === undefined) return;
    let answered = false;
    try {
      answered = reader.advance();
    } catch (error) {
      this.#reader = undefined;
      return reader.reject(noteOrigin(error, this));
    }
    if (answered) this.#reader = undefined;
    else this.#fill();
  }

  /** Why reading cannot go on. An error costs as much as a message to make, so it is made when somebody asks why the stream was closed. */
  get #failure(): unknown {
    return this.#readFailure ??= noteOrigin(new Deno.errors.BadResource("The stream is closed"), this);
  }

  /** Without an `error`, the stream was closed. */
  #failReading(error?: unknown): void {
    this.#readFailed = true;
    this.#readFailure = noteOrigin(error, this);
    // A caller's array is written to until the connection is gone.
    if (!this.#filling || this.#direct.length === 0) this.#rejectReader();
  }

  #rejectReader(): void {
    const reader = this.#reader;
    this.#reader = undefined;
    reader?.reject(this.#failure);
  }

  #takeChunk(maxBytes: number): Uint8Array<ArrayBuffer> | null | typeof MORE {
    const { length } = this.#input;
    if (length === 0) return this.#ended ? null : MORE;
    this.#unanswered = true;
    return this.#input.take(Math.min(length, maxBytes));
  }

  #takeInto(into: Uint8Array): number | null | typeof MORE {
    const count = this.#directCount > 0 ? this.#directCount : this.#input.takeInto(into);
    this.#directCount = 0;
    if (count === 0) return this.#ended ? null : MORE;
    this.#unanswered = true;
    return count;
  }

  #takeExactly(count: number): Uint8Array<ArrayBuffer> | typeof MORE {
    const { length } = this.#input;
    if (length < count) {
      if (!this.#ended) return MORE;
      throw new IncompleteReadError(this.#input.take(length), count);
    }
    if (count > 0) this.#unanswered = true;
    return this.#input.take(count);
  }

  #takeUntil(delimiter: Uint8Array, search: Search): Uint8Array<ArrayBuffer> | null | typeof MORE {
    const at = this.#find(delimiter, search);
    if (at >= 0) {
      this.#unanswered = true;
      return this.#input.take(at + delimiter.length);
    }
    if (!this.#ended) return MORE;
    const { length } = this.#input;
    if (length === 0) return null;
    throw new IncompleteReadError(this.#input.take(length), null);
  }

  #takeDecodedLine(): string | undefined {
    if (this.#closed) return undefined;
    const line = this.#input.takeDecodedLine(this.#limit);
    if (line !== undefined) this.#unanswered = true;
    return line;
  }

  #takeLine(search: Search): string | null | typeof MORE {
    const at = this.#find(LINE_FEED, search);
    if (at >= 0) {
      this.#input.decodeLines(at);
      const line = this.#takeDecodedLine();
      if (line !== undefined) return line;
      this.#unanswered = true;
      return this.#input.takeText(at + 1, 1 + this.#returnsBefore(at, LINE_FEED));
    }
    if (!this.#ended) return MORE;
    const { length } = this.#input;
    return length === 0 ? null : this.#input.takeText(length, 0);
  }

  /** Where the delimiter begins, or -1; throws when that is farther than the limit. */
  #find(delimiter: Uint8Array, search: Search): number {
    const at = this.#input.indexOf(delimiter, search.searched);
    // A delimiter may be cut in two by the end of what has arrived.
    search.searched = Math.max(0, this.#input.length - delimiter.length + 1);
    const before = at < 0 ? search.searched : at;
    // At the end of the stream no "\n" will make a last "\r" a part of the line's end.
    const content = at < 0 && this.#ended ? before : before - this.#returnsBefore(before, delimiter);
    if (content > this.#limit) {
      const what = delimiter === LINE_FEED ? "line" : "record";
      const message = `Cannot find the end of the ${what} within the limit of ${this.#limit} bytes (option "limit")`;
      throw new LimitOverrunError(message, this.#limit, before);
    }
    return at;
  }

  /** 1 if a line's content ends with the `\r` of its `\r\n`, which is no part of it. */
  #returnsBefore(index: number, delimiter: Uint8Array): number {
    return delimiter === LINE_FEED && index > 0 && this.#input.at(index - 1) === CARRIAGE_RETURN ? 1 : 0;
  }

  #takeFrame(format: Required<FrameOptions>): Uint8Array<ArrayBuffer> | null | typeof MORE {
    const { lengthBytes } = format;
    const { length } = this.#input;
    const expected = lengthBytes + (length < lengthBytes ? 0 : this.#input.peekNumber(format));
    if (expected - lengthBytes > this.#limit) {
      throw new LimitOverrunError(
        `Cannot read a frame of ${expected - lengthBytes} bytes: the limit is ${this.#limit} (option "limit")`,
        this.#limit,
        lengthBytes,
      );
    }
    if (length < lengthBytes || length < expected) {
      if (!this.#ended) return MORE;
      if (length === 0) return null;
      throw new IncompleteReadError(this.#input.take(length), expected);
    }
    this.#unanswered = true;
    this.#input.skip(lengthBytes);
    return this.#input.take(expected - lengthBytes);
  }

  #endBetweenMessages(isLate: boolean): void {
    this.#draining = isLate ? "late" : "soon";
    if (this.#reader !== undefined && this.#endsBetweenMessages(this.#reader.startsMessage)) {
      this.#ended = true;
      this.#advance();
    }
  }

  /** Whether a read that has to wait ends here, because the server drains and no message has begun. */
  #endsBetweenMessages(startsMessage: boolean): boolean {
    if (this.#draining === "no" || !startsMessage || this.#input.length > 0) return false;
    return this.#draining === "late" || !this.#unanswered;
  }

  #cut(error?: unknown): void {
    this.#shut(error);
    this.#rejectReader();
    if (!this.#output.idle) this.#output.fail(noteOrigin(error ?? this.#failure, this));
    closeQuietly(this.#conn);
  }

  /** The stream takes no more calls; what waits to be sent may still leave. */
  #shut(error?: unknown): void {
    if (this.#closed) return;
    this.#closed = true;
    turnstile.leave();
    deadlines.unwatch(this);
    this.#failReading(error);
  }

  /** To be called when a read or write begins, which may have to wait. */
  #keepTimeout(): void {
    if (this.#needsWatch) this.#watchFor(this.#timeout);
  }

  #watchFor(ms: number): void {
    if (this.#closed || ms === Infinity) return;
    this.#needsWatch = ms > this.#timeout;
    deadlines.watch(this, ms);
  }

  #look(now: number): number {
    this.#endLateLife(now);
    this.#endLateRest(now);
    this.#endLateWrite(now);
    this.#endLateRead(now);
    const time = this.#closed ? Infinity : this.#shortestTime();
    this.#needsWatch = time > this.#timeout;
    return time;
  }

  #shortestTime(): number {
    const always = Math.min(this.#idleTimeout, this.#maxLifetime);
    return Math.min(always, this.#output.idle ? Infinity : this.#timeout, this.#reader?.timeout ?? Infinity);
  }

  #endLateLife(now: number): void {
    if (now - this.#openedAt < this.#maxLifetime) return;
    this.#cut(new Deno.errors.TimedOut(`The stream was open for the maxLifetime of ${this.#maxLifetime} ms`));
  }

  #endLateRest(now: number): void {
    if (this.#rest.lasts(now, this.#bytesRead + this.bytesWritten) < this.#idleTimeout) return;
    this.#cut(new Deno.errors.TimedOut(`No byte came or went for the idleTimeout of ${this.#idleTimeout} ms`));
  }

  #endLateWrite(now: number): void {
    const { bytesWritten, idle } = this.#output;
    if (this.#stalledWrite.lasts(now, bytesWritten, idle) < this.#timeout) return;
    const peer = formatAddress(this.remoteAddress);
    const message = `${peer} took no byte for the timeout of ${this.#timeout} ms, so the stream was closed`;
    this.#cut(new Deno.errors.TimedOut(message));
  }

  #endLateRead(now: number): void {
    const reader = this.#reader;
    if (reader === undefined) return;
    if (reader.seenAt === UNSEEN) reader.seenAt = now;
    if (now - reader.seenAt < reader.timeout) return;
    this.#reader = undefined;
    const message = `${reader.call} waited for the timeout of ${reader.timeout} ms`;
    reader.reject(noteOrigin(new Deno.errors.TimedOut(message), this));
  }
}

/** A connection whose first bytes were read already. */
class RefilledConn implements StreamConn {
  readonly #conn: StreamConn;
  #first: Uint8Array;

  constructor(conn: StreamConn, first: Uint8Array) {
    this.#conn = conn;
    this.#first = first;
  }

  get localAddr(): Deno.Addr {
    return this.#conn.localAddr;
  }

  get remoteAddr(): Deno.Addr {
    return this.#conn.remoteAddr;
  }

  read(into: Uint8Array): Promise<number | null> {
    if (this.#first.length === 0) return this.#conn.read(into);
    const part = this.#first.subarray(0, into.length);
    into.set(part);
    this.#first = this.#first.subarray(part.length);
    return Promise.resolve(part.length);
  }

  write(data: Uint8Array): Promise<number> {
    return this.#conn.write(data);
  }

  closeWrite(): Promise<void> {
    return this.#conn.closeWrite();
  }

  close(): void {
    this.#conn.close();
  }
}

function resolveFrameOptions(options: FrameOptions): Required<FrameOptions> {
  const format = resolveOptions(FRAME_DEFAULTS, options);
  if (![1, 2, 4].includes(format.lengthBytes)) {
    throw new RangeError(`Option "lengthBytes" must be 1, 2 or 4: it is ${format.lengthBytes}`);
  }
  return format;
}

function encodeFrameLength(length: number, { lengthBytes, littleEndian }: Required<FrameOptions>): Uint8Array {
  const bytes = new Uint8Array(4);
  new DataView(bytes.buffer).setUint32(0, length, littleEndian);
  return littleEndian ? bytes.subarray(0, lengthBytes) : bytes.subarray(4 - lengthBytes);
}

function closeQuietly(closable: { close(): void }): void {
  try {
    closable.close();
  } catch {
    // It was closed already, which is what we want.
  }
}

// --- Socket pairs -----------------------------------------------------------

/** Bytes that one direction of a {@linkcode socketPair} holds before a write waits. */
const PIPE_BYTES = 65_536;

/** A read or a write that waits for the other side of a pipe. */
interface PipeWaiter {
  readonly bytes: Uint8Array;
  readonly settled: PromiseWithResolvers<number | null>;
}

/** One direction of a pair: bounded, like a socket's buffers in the kernel. */
class Pipe {
  readonly #held = new Uint8Array(PIPE_BYTES);
  #start = 0;
  #length = 0;
  #ended = false;
  #broken = false;
  #reader: PipeWaiter | undefined;
  #writer: PipeWaiter | undefined;

  read(into: Uint8Array): Promise<number | null> {
    if (this.#length > 0) {
      const count = this.#moveOut(into);
      this.#letWriterGoOn();
      return Promise.resolve(count);
    }
    if (this.#ended) return Promise.resolve(null);
    this.#reader = { bytes: into, settled: Promise.withResolvers() };
    return this.#reader.settled.promise;
  }

  write(data: Uint8Array): Promise<number | null> {
    if (this.#broken || this.#ended) return Promise.reject(brokenPipe());
    if (this.#length < PIPE_BYTES) {
      const count = this.#moveIn(data);
      this.#letReaderGoOn();
      return Promise.resolve(count);
    }
    this.#writer = { bytes: data, settled: Promise.withResolvers() };
    return this.#writer.settled.promise;
  }

  /** No more is written; what is held can still be read. */
  end(): void {
    this.#ended = true;
    this.#letReaderGoOn();
  }

  /** No more is read. */
  break(): void {
    this.#broken = true;
    this.#length = 0;
    this.#settle("writer", brokenPipe());
  }

  /** Ends the wait of a side that was closed by its owner. */
  interrupt(side: "reader" | "writer"): void {
    this.#settle(side, Object.assign(new Deno.errors.Interrupted("operation canceled"), { code: "EINTR" }));
  }

  #letReaderGoOn(): void {
    const reader = this.#reader;
    if (reader === undefined) return;
    if (this.#length > 0) this.#settle("reader", this.#moveOut(reader.bytes));
    else if (this.#ended) this.#settle("reader", null);
  }

  #letWriterGoOn(): void {
    const writer = this.#writer;
    if (writer !== undefined) this.#settle("writer", this.#moveIn(writer.bytes));
  }

  #settle(side: "reader" | "writer", outcome: number | null | Error): void {
    const waiter = side === "reader" ? this.#reader : this.#writer;
    if (side === "reader") this.#reader = undefined;
    else this.#writer = undefined;
    if (outcome instanceof Error) waiter?.settled.reject(outcome);
    else waiter?.settled.resolve(outcome);
  }

  #moveIn(data: Uint8Array): number {
    const count = Math.min(data.length, PIPE_BYTES - this.#length);
    const at = (this.#start + this.#length) % PIPE_BYTES;
    const before = Math.min(count, PIPE_BYTES - at);
    this.#held.set(data.subarray(0, before), at);
    this.#held.set(data.subarray(before, count));
    this.#length += count;
    return count;
  }

  #moveOut(into: Uint8Array): number {
    const count = Math.min(into.length, this.#length);
    const before = Math.min(count, PIPE_BYTES - this.#start);
    into.set(this.#held.subarray(this.#start, this.#start + before));
    into.set(this.#held.subarray(0, count - before), before);
    this.#start = (this.#start + count) % PIPE_BYTES;
    this.#length -= count;
    return count;
  }
}

function brokenPipe(): Error {
  return Object.assign(new Deno.errors.BrokenPipe("Broken pipe"), { code: "EPIPE" });
}

/** One end of a pair. It fails as a `Deno.Conn` does, so that handlers meet in a test what they meet in production. */
class PairConn implements StreamConn {
  readonly localAddr: Deno.Addr = { transport: "unix", path: "" };
  readonly remoteAddr: Deno.Addr = { transport: "unix", path: "" };
  readonly #incoming: Pipe;
  readonly #outgoing: Pipe;
  #closed = false;

  constructor(incoming: Pipe, outgoing: Pipe) {
    this.#incoming = incoming;
    this.#outgoing = outgoing;
  }

  async read(into: Uint8Array): Promise<number | null> {
    this.#checkOpen();
    return await this.#incoming.read(into);
  }

  async write(data: Uint8Array): Promise<number> {
    this.#checkOpen();
    return await this.#outgoing.write(data) ?? 0;
  }

  // deno-lint-ignore require-await -- A closed connection rejects; it does not throw.
  async closeWrite(): Promise<void> {
    this.#checkOpen();
    this.#outgoing.end();
  }

  close(): void {
    this.#checkOpen();
    this.#closed = true;
    this.#incoming.interrupt("reader");
    this.#outgoing.interrupt("writer");
    this.#incoming.break();
    this.#outgoing.end();
  }

  #checkOpen(): void {
    if (this.#closed) throw new Deno.errors.BadResource("Bad resource ID");
  }
}

/**
 * Two streams in memory, each the other's peer, with a socket's back-pressure and
 * half-close: a handler is tested with no network and no permission. Python's
 * `socket.socketpair()`.
 *
 * @param options Deadlines and limits of both streams.
 * @returns The two ends.
 * @throws {RangeError} If an option is out of its range.
 * @throws {TypeError} If an option does not exist.
 *
 * @example Testing a handler
 * ```ts
 * import { socketPair, StreamRequestHandler, TcpServer } from "@socketserver/socketserver";
 * import { assertEquals } from "@std/assert";
 *
 * class Shout extends StreamRequestHandler {
 *   override async handle() {
 *     for await (const line of this.request.lines()) await this.request.send(line.toUpperCase() + "\n");
 *   }
 * }
 *
 * const [client, request] = socketPair();
 * await client.send("hello\n");
 * await client.closeWrite();
 * const server = new TcpServer({ port: 0 }, Shout);
 * await server.finishRequest(request, request.remoteAddress);
 * assertEquals(await client.readLine(), "HELLO");
 * client.close();
 * request.close();
 * ```
 */
export function socketPair(options: StreamOptions = {}): [SocketStream, SocketStream] {
  const there = new Pipe();
  const back = new Pipe();
  return [
    new SocketStream(new PairConn(back, there), options),
    new SocketStream(new PairConn(there, back), options),
  ];
}

// --- TLS --------------------------------------------------------------------

/** A certificate and its private key. */
export interface TlsCertificate {
  /** The certificate, and behind it those between it and the authority's, in PEM form. */
  cert: string;
  /** The certificate's private key, in PEM form and not encrypted. */
  key: string;
}

/** What the server's side of TLS is told. */
export interface TlsServerSettings extends TlsCertificate {
  /**
   * The authorities of client certificates, in PEM form. With it a client that has
   * no valid certificate of theirs is turned away before a handler exists.
   *
   * @default No certificate is asked for.
   */
  clientCa?: string | string[];
  /**
   * The protocols that are offered by ALPN, the best one first. A client that asks
   * for others only is turned away; one that does not ask is served.
   *
   * @default {[]}
   */
  alpnProtocols?: string[];
}

/** What the client's side of TLS is told. The server's certificate is always checked. */
export interface TlsClientSettings {
  /**
   * The authorities to trust, in PEM form, in place of those that the runtime trusts.
   *
   * @default Those that the runtime trusts.
   */
  caCerts?: string[];
  /**
   * The name, or the IP address, that the server's certificate must have.
   *
   * @default The `hostname` of `connect()`.
   */
  serverName?: string;
  /**
   * The protocols that are asked for by ALPN, the best one first.
   *
   * @default {[]}
   */
  alpnProtocols?: string[];
  /** This client's own certificate, in PEM form, for a server that asks for one; needs `key`. */
  cert?: string;
  /** The private key of `cert`, in PEM form and not encrypted. */
  key?: string;
}

/** What {@linkcode SocketStream.startTls} is told: which side this is, and that side's settings. */
export type StartTlsOptions =
  & {
    /**
     * Milliseconds that the handshake may take; above 0, `Infinity` for ever. Then
     * it rejects with `Deno.errors.TimedOut`, and the stream is closed.
     *
     * @default {5_000}
     */
    handshakeTimeout?: number;
  }
  & (
    | {
      /** This side has the certificate. */
      role: "server";
    } & TlsServerSettings
    | {
      /** This side checks the certificate. */
      role: "client";
      /** The name, or the IP address, that the server's certificate must have. */
      serverName: string;
    } & TlsClientSettings
  );

/** A certificate of the peer that was verified. */
export interface PeerCertificate {
  /** The name that it was made out to: its common name, "" if it has not exactly one. */
  readonly commonName: string;
  /** Its further names, such as `DNS:example.org, IP Address:192.0.2.1`; "" if there are none. */
  readonly altNames: string;
  /** All parts of the name that it was made out to, one a line. */
  readonly subject: string;
  /** All parts of its authority's name, one a line. */
  readonly issuer: string;
  /** Its number at its authority, in hexadecimal. */
  readonly serialNumber: string;
  /** The SHA-256 hash of the certificate, in hexadecimal with colons. */
  readonly fingerprint256: string;
  /** When it begins to be valid. */
  readonly validFrom: Date;
  /** When it ends to be valid. */
  readonly validTo: Date;
  /** The certificate itself, in DER form. */
  readonly raw: Uint8Array;
}

/** What a handshake has agreed on; `stream.tls`. */
export interface TlsSession {
  /** The version, such as `"TLSv1.3"`. */
  readonly protocol: string;
  /** The cipher suite, such as `"TLS_AES_256_GCM_SHA384"`. */
  readonly cipher: string;
  /** What was agreed on by ALPN; `undefined` if one side has not asked. */
  readonly alpnProtocol: string | undefined;
  /** The name that the client has asked for (SNI); `undefined` if it has not, or asked for an IP address. */
  readonly serverName: string | undefined;
  /** The peer's certificate. Never one that was not verified: a server has one only with `clientCa`. */
  readonly peerCertificate: PeerCertificate | undefined;
  /**
   * Whether the incoming side has ended without the peer saying so (TLS's
   * close_notify). Many honest programs leave that way, so it reads as the end of
   * the stream and can still be answered; but where the end is the end of the data,
   * somebody may have cut them short.
   */
  readonly truncated: boolean;
}

/** Bytes that are encrypted at once, so that a stalled peer is noticed in the middle of a large write. */
const TLS_WRITE_BYTES = 65_536;

/** Authorities between a certificate and one that is trusted; real ones have three at most. */
const MAX_CHAIN_LENGTH = 8;

/** The purpose "may be a TLS client" of a certificate; RFC 5280, 4.2.1.12. */
const CLIENT_PURPOSE = "1.3.6.1.5.5.7.3.2";

/** The purpose "may be a TLS server" of a certificate. */
const SERVER_PURPOSE = "1.3.6.1.5.5.7.3.1";

type TlsSocket = import("node:tls").TLSSocket;
type Certificate = import("node:crypto").X509Certificate;

/**
 * The modules of the runtime that TLS takes. They are loaded at the first use,
 * which takes some 30 ms, and not at the import; and without a promise, so that
 * `listen()` stays as simple as a plain server's.
 */
const runtime = {
  get tls() {
    return process.getBuiltinModule("node:tls");
  },
  get crypto() {
    return process.getBuiltinModule("node:crypto");
  },
  get net() {
    return process.getBuiltinModule("node:net");
  },
  get stream() {
    return process.getBuiltinModule("node:stream");
  },
};

/** Throws unless `cert` and `key` can be used together. */
function checkCertificate({ cert, key }: TlsCertificate): void {
  const { X509Certificate, createPrivateKey } = runtime.crypto;
  const certificate = attempt(
    () => new X509Certificate(cert),
    "cert holds no certificate in PEM form; give it the text of the certificate's file",
  );
  const privateKey = attempt(
    () => createPrivateKey(key),
    "key holds no private key in PEM form, or an encrypted one; give it the text of the key's file",
  );
  if (!certificate.checkPrivateKey(privateKey)) {
    throw new Deno.errors.InvalidData("key is not the key of cert; give the two that were made together");
  }
}

/** Who may vouch for a peer. */
interface Authorities {
  /** Their certificates in PEM form. */
  readonly texts: string[];
  readonly certificates: Certificate[];
}

/** The authorities of the option `name`; throws if one of `texts` holds none. */
function readAuthorities(name: string, texts: string[]): Authorities {
  const message = `${name} must hold certificates in PEM form; give it the text of the authority's certificate file`;
  // An empty list would trust nobody, but `node:tls` takes it for no list at all.
  if (texts.length === 0) throw new Deno.errors.InvalidData(message);
  const certificates = attempt(() => texts.map(certificatesIn), message);
  if (certificates.some((found) => found.length === 0)) throw new Deno.errors.InvalidData(message);
  return { texts, certificates: certificates.flat() };
}

function attempt<T>(action: () => T, message: string): T {
  try {
    return action();
  } catch (error) {
    throw new Deno.errors.InvalidData(message, { cause: error });
  }
}

/** All certificates of a text in PEM form. */
function certificatesIn(text: string): Certificate[] {
  const { X509Certificate } = runtime.crypto;
  const blocks = text.match(/-----BEGIN [A-Z0-9 ]*CERTIFICATE-----[^-]*-----END [A-Z0-9 ]*CERTIFICATE-----/g) ?? [];
  return blocks.map((block) => new X509Certificate(block));
}

/** The certificates that the peer has shown, its own first. */
function chainOf(socket: TlsSocket): Certificate[] {
  const { X509Certificate } = runtime.crypto;
  const chain: Certificate[] = [];
  let link: import("node:tls").DetailedPeerCertificate | undefined = socket.getPeerCertificate(true);
  while (link?.raw !== undefined && chain.length <= MAX_CHAIN_LENGTH) {
    chain.push(new X509Certificate(link.raw));
    link = link.issuerCertificate === link ? undefined : link.issuerCertificate;
  }
  return chain;
}

/**
 * Whether one of `authorities` has vouched for the first of `chain`, for
 * `purpose`. The runtime's `node:tls` (2.9.6) checks this too, but not always:
 * where a certificate is of version 1, or its encoding is odd, it compares names
 * and no signatures, so that anybody can make one; and a client that resumes a
 * session is not asked again, even where that session is another server's, or had
 * a certificate that was turned away.
 */
function isVouchedFor(chain: Certificate[], { certificates }: Authorities, purpose: string): boolean {
  let current: Certificate | undefined = chain[0];
  // An own purpose forbids all others. The runtime's type has no `undefined`.
  const purposes: string[] | undefined = current?.keyUsage;
  if (purposes !== undefined && !purposes.includes(purpose)) return false;
  for (let links = 0; current !== undefined && links < MAX_CHAIN_LENGTH; links++) {
    if (!isInForce(current)) return false;
    const { fingerprint256 } = current;
    if (certificates.some((authority) => authority.fingerprint256 === fingerprint256)) return true;
    const issued: Certificate = current;
    if (certificates.some((authority) => hasIssued(authority, issued))) return true;
    current = chain.find((link) => link.ca && hasIssued(link, issued));
  }
  return false;
}

function isInForce(certificate: Certificate): boolean {
  const now = Date.now();
  return isVersion3(certificate.raw) && Date.parse(certificate.validFrom) <= now &&
    now <= Date.parse(certificate.validTo);
}

function hasIssued(issuer: Certificate, certificate: Certificate): boolean {
  return issuer !== certificate && certificate.checkIssued(issuer) && certificate.verify(issuer.publicKey);
}

/** Whether a certificate in DER form says that it is not of version 1; RFC 5280, 4.1. */
function isVersion3(der: Uint8Array): boolean {
  const body = contentStart(der, 0);
  return der[contentStart(der, body)] === 0xa0;
}

/** Where the content of the element at `at` begins: behind its tag and its length. */
function contentStart(der: Uint8Array, at: number): number {
  const length = der[at + 1] ?? 0;
  return at + 2 + (length & 0x80 ? length & 0x7f : 0);
}

function describeCertificate(socket: TlsSocket, certificate: Certificate): PeerCertificate {
  const commonName: unknown = socket.getPeerCertificate().subject?.CN;
  return {
    commonName: typeof commonName === "string" ? commonName : "",
    altNames: certificate.subjectAltName ?? "",
    subject: certificate.subject,
    issuer: certificate.issuer,
    serialNumber: certificate.serialNumber,
    fingerprint256: certificate.fingerprint256,
    validFrom: new Date(certificate.validFrom),
    validTo: new Date(certificate.validTo),
    raw: new Uint8Array(certificate.raw),
  };
}

/** Why a handshake failed and what to do, for a person. */
function explainTls(error: unknown): string {
  switch (errorCode(error)) {
    case "ERR_TLS_CERT_ALTNAME_INVALID":
      return `the server's certificate is for another name; set serverName to one that it has (${messageOf(error)})`;
    case "CERT_HAS_EXPIRED":
      return "the server's certificate has expired; it needs a new one";
    case "CERT_NOT_YET_VALID":
      return "the server's certificate is not valid yet; check this machine's clock";
    case "DEPTH_ZERO_SELF_SIGNED_CERT":
    case "SELF_SIGNED_CERT_IN_CHAIN":
    case "UNABLE_TO_GET_ISSUER_CERT":
    case "UNABLE_TO_GET_ISSUER_CERT_LOCALLY":
    case "UNABLE_TO_VERIFY_LEAF_SIGNATURE":
      return "nobody who is trusted has vouched for the server's certificate; name its authority in caCerts";
    case "ERR_SSL_WRONG_VERSION_NUMBER":
      return "the peer does not speak TLS there; check the port";
    default:
      return `the TLS handshake failed (${messageOf(error)})`;
  }
}

/** Who is told what happens to a {@linkcode Transport}. */
interface TransportOwner {
  /** No more comes from the peer. */
  transportEnded(): void;
  transportFailed(error: unknown): void;
}

/**
 * What `node:tls` reads and writes its records through: our own connection, in
 * the shape of a stream of `node:stream`. Of that it has only the shape: the
 * stream's own buffers would cost a third of the throughput, and would lose the
 * alert that tells a peer why its handshake failed.
 */
function defineTransport() {
  return class Transport extends runtime.stream.Duplex {
    readonly #conn: StreamConn;
    readonly #owner: TransportOwner;
    readonly #input = new ReadBuffer();
    #room = NO_BYTES;
    /** Bytes of the room that came while the stream was paused. */
    #held = 0;
    #flowing = false;
    #wanted = true;
    #reading = false;
    #writing = 0;
    #idled = Promise.withResolvers<void>();

    constructor(conn: StreamConn, owner: TransportOwner) {
      super();
      this.#conn = conn;
      this.#owner = owner;
    }

    /**
     * Whether more is to be read. A pause of the TLS socket does not get here, but
     * makes the runtime keep all that comes, however much it is.
     */
    set wanted(isWanted: boolean) {
      this.#wanted = isWanted;
      this.#readOn();
    }

    /** Whether all that was written has left. */
    get isIdle(): boolean {
      return this.#writing === 0;
    }

    /** Resolves when all that was written has left, or cannot leave. */
    async idle(): Promise<void> {
      if (!this.isIdle) await this.#idled.promise;
    }

    override pause(): this {
      this.#flowing = false;
      return this;
    }

    override resume(): this {
      this.#flowing = true;
      if (this.#held > 0) this.#deliver(this.#held);
      this.#readOn();
      return this;
    }

    override write(bytes: Uint8Array, ...rest: unknown[]): boolean {
      const written = rest.at(-1);
      const done = (error?: unknown) => {
        this.#writing--;
        if (error !== undefined) this.#owner.transportFailed(error);
        if (typeof written === "function") written(error);
        if (!this.isIdle) return;
        this.#idled.resolve();
        this.#idled = Promise.withResolvers();
      };
      this.#writing++;
      this.#send(bytes, done);
      return true;
    }

    /** Tells `node:tls` that it is over; the connection is its owner's to close. */
    override destroy(): this {
      this.#flowing = false;
      this.emit("close");
      return this;
    }

    #send(bytes: Uint8Array, done: (error?: unknown) => void): void {
      this.#conn.write(bytes).then((count) => {
        if (count < bytes.length) this.#send(bytes.subarray(count), done);
        else done();
      }, done);
    }

    #readOn(): void {
      if (this.#reading || !this.#flowing || !this.#wanted) return;
      this.#reading = true;
      this.#room = this.#input.room();
      this.#conn.read(this.#room).then(this.#onRead, this.#onFailure);
    }

    readonly #onRead = (count: number | null): void => {
      if (count === null) return this.#owner.transportEnded(); // Nothing is read any more.
      this.#reading = false;
      if (this.#flowing) this.#deliver(count);
      else this.#held = count;
      this.#readOn();
    };

    readonly #onFailure = (error: unknown): void => this.#owner.transportFailed(error);

    /** Hands out what came; who takes it copies it at once, so the room can be used again. */
    #deliver(count: number): void {
      this.#held = 0;
      this.#input.commit(count);
      this.#input.skip(count);
      this.emit("data", this.#room.subarray(0, count));
    }
  };
}

let Transport: ReturnType<typeof defineTransport> | undefined;

function openTransport(conn: StreamConn, owner: TransportOwner): InstanceType<ReturnType<typeof defineTransport>> {
  Transport ??= defineTransport();
  return new Transport(conn, owner);
}

/** A connection with TLS over it. It fails as a plain one does, and closing it frees the descriptor whatever the peer does. */
class TlsConn implements StreamConn, TransportOwner {
  readonly localAddr: Deno.Addr;
  readonly remoteAddr: Deno.Addr;
  readonly #conn: StreamConn;
  readonly #transport: InstanceType<ReturnType<typeof defineTransport>>;
  /** Settled when the handshake is over. */
  readonly #secured = Promise.withResolvers<TlsSocket>();
  #socket: TlsSocket | undefined;
  #session: TlsSession | undefined;
  /** What was decrypted and nobody has read yet. */
  #received = NO_BYTES;
  #reader: { readonly into: Uint8Array; readonly settled: PromiseWithResolvers<number | null> } | undefined;
  #writer: PromiseWithResolvers<number> | undefined;
  /** The peer has said that nothing more comes. */
  #ended = false;
  /** The connection has ended, whether or not the peer has said so. */
  #transportEnded = false;
  #truncated = false;
  #failure: unknown;
  #failed = false;
  #closed = false;

  private constructor(conn: StreamConn) {
    this.localAddr = conn.localAddr;
    this.remoteAddr = conn.remoteAddr;
    this.#conn = conn;
    this.#transport = openTransport(conn, this);
    forgettable(this.#secured.promise);
  }

  /** Does the server's side of a handshake over `conn`, which is closed if it fails or `signal` aborts. */
  static async accept(conn: StreamConn, settings: ServerHandshake, signal: AbortSignal): Promise<TlsConn> {
    const tls = new TlsConn(conn);
    await tls.#shakeHands(signal, () => tls.#beginAsServer(settings), settings.authorities, CLIENT_PURPOSE);
    return tls;
  }

  /** Does the client's side of a handshake over `conn`, which is closed if it fails or `signal` aborts. */
  static async connect(conn: StreamConn, settings: ClientHandshake, signal: AbortSignal): Promise<TlsConn> {
    const tls = new TlsConn(conn);
    await tls.#shakeHands(signal, () => tls.#beginAsClient(settings), settings.authorities, SERVER_PURPOSE);
    return tls;
  }

  /** What the handshake has agreed on. */
  get session(): TlsSession | undefined {
    return this.#session;
  }

  read(into: Uint8Array): Promise<number | null> {
    if (this.#received.length > 0) return Promise.resolve(this.#takeInto(into));
    if (this.#failed) return rejection(this.#failure);
    if (this.#ended || this.#truncated) return Promise.resolve(null);
    const settled = Promise.withResolvers<number | null>();
    this.#reader = { into, settled };
    if (this.#transportEnded) this.#judgeEnd();
    else this.#transport.wanted = true;
    return settled.promise;
  }

  write(data: Uint8Array): Promise<number> {
    if (this.#failed) return rejection(this.#failure);
    const part = data.subarray(0, TLS_WRITE_BYTES);
    const settled = this.#writer = Promise.withResolvers<number>();
    this.#socket?.write(part, (error) => {
      if (error) settled.reject(error);
      else settled.resolve(part.length);
    });
    return settled.promise;
  }

  /** Says that nothing more comes from this side; the connection stays open for what the peer still sends. */
  async closeWrite(): Promise<void> {
    if (this.#failed) throw this.#failure;
    await this.#end();
    if (this.#failed) throw this.#failure;
  }

  close(): void {
    if (this.#closed) throw new Deno.errors.BadResource("Bad resource ID");
    this.#closed = true;
    // A peer that takes nothing cannot be told either.
    const canTell = this.#session !== undefined && !this.#failed && this.#transport.isIdle;
    this.#fail(Object.assign(new Deno.errors.Interrupted("operation canceled"), { code: "EINTR" }));
    if (!canTell) return this.#drop();
    this.#socket?.end();
    setImmediate(() => this.#drop());
  }

  transportEnded(): void {
    this.#transportEnded = true;
    if (this.#session === undefined) {
      this.#fail(new Deno.errors.ConnectionReset("the peer has left during the TLS handshake"));
    } else if (this.#reader !== undefined) {
      this.#judgeEnd();
    }
  }

  transportFailed(error: unknown): void {
    this.#fail(error);
  }

  async #shakeHands(
    signal: AbortSignal,
    begin: () => void,
    authorities: Authorities | undefined,
    purpose: string,
  ): Promise<void> {
    const giveUp = () => this.#fail(signal.reason);
    signal.addEventListener("abort", giveUp);
    try {
      signal.throwIfAborted();
      begin();
      this.#adopt(await this.#secured.promise, authorities, purpose);
    } catch (error) {
      this.#fail(error);
      this.#closed = true;
      await turn(); // The alert that tells the peer what went wrong is on its way.
      this.#drop();
      throw error;
    } finally {
      signal.removeEventListener("abort", giveUp);
    }
  }

  #beginAsServer({ cert, key, authorities, alpnProtocols }: ServerHandshake): void {
    // Nothing but the server's events tells which handshake is over, so each has a server of its own, which takes 0.2 ms.
    const server = runtime.tls.createServer({
      cert,
      key,
      ...(authorities === undefined ? {} : { ca: authorities.texts, requestCert: true, rejectUnauthorized: true }),
      ...(alpnProtocols.length === 0 ? {} : { ALPNProtocols: alpnProtocols }),
      // `signal` ends it. A timer of the runtime's own would keep the 13 KB of a handshake that failed until it fires.
      handshakeTimeout: -1,
    });
    server.on("secureConnection", (socket) => this.#take(socket));
    server.on("tlsClientError", (error) => this.#fail(tlsError(error)));
    server.emit("connection", this.#transport);
  }

  #beginAsClient({ authorities, serverName, alpnProtocols, cert, key }: ClientHandshake): void {
    const socket = runtime.tls.connect({
      socket: this.#transport,
      host: serverName,
      ...(runtime.net.isIP(serverName) > 0 ? {} : { servername: serverName }),
      ...(authorities === undefined ? {} : { ca: authorities.texts }),
      ...(cert === "" ? {} : { cert, key }),
      ...(alpnProtocols.length === 0 ? {} : { ALPNProtocols: alpnProtocols }),
      rejectUnauthorized: true, // An environment variable could say otherwise.
    });
    socket.on("error", (error) => this.#fail(tlsError(error)));
    socket.on("secureConnect", () => this.#take(socket));
  }

  /** The handshake is over; from now on what comes is kept for the reader. */
  #take(socket: TlsSocket): void {
    this.#socket = socket;
    this.#transport.wanted = false;
    socket.on("error", (error) => this.#fail(tlsError(error)));
    socket.on("data", (bytes: Uint8Array<ArrayBuffer>) => this.#receive(bytes));
    socket.on("end", () => this.#noteEnd());
    this.#secured.resolve(socket);
  }

  #adopt(socket: TlsSocket, authorities: Authorities | undefined, purpose: string): void {
    if (this.#failed) throw this.#failure;
    const asksForCertificate = authorities !== undefined || purpose === SERVER_PURPOSE;
    const chain = asksForCertificate ? chainOf(socket) : [];
    const [certificate] = chain;
    if (asksForCertificate && !(socket.authorized && certificate !== undefined)) {
      throw new Deno.errors.InvalidData("the peer has shown no valid certificate");
    }
    if (authorities !== undefined && !isVouchedFor(chain, authorities, purpose)) {
      throw new Deno.errors.InvalidData("no trusted authority has vouched for the peer's certificate");
    }
    this.#session = this.#describe(socket, certificate);
  }

  #describe(socket: TlsSocket, certificate: Certificate | undefined): TlsSession {
    const isTruncated = () => this.#truncated;
    const serverName = "servername" in socket ? socket.servername : undefined;
    return {
      protocol: socket.getProtocol() ?? "",
      cipher: socket.getCipher().name,
      alpnProtocol: socket.alpnProtocol || undefined,
      serverName: typeof serverName === "string" && serverName !== "" ? serverName : undefined,
      peerCertificate: certificate === undefined ? undefined : describeCertificate(socket, certificate),
      get truncated() {
        return isTruncated();
      },
    };
  }

  #receive(bytes: Uint8Array<ArrayBuffer>): void {
    this.#received = this.#received.length === 0 ? bytes : joinBytes(this.#received, bytes);
    this.#transport.wanted = false;
    const reader = this.#reader;
    this.#reader = undefined;
    reader?.settled.resolve(this.#takeInto(reader.into));
  }

  #takeInto(into: Uint8Array): number {
    const part = this.#received.subarray(0, into.length);
    into.set(part);
    this.#received = this.#received.subarray(part.length);
    return part.length;
  }

  #noteEnd(): void {
    this.#ended = true;
    this.#settleEnd();
  }

  #settleEnd(): void {
    const reader = this.#reader;
    this.#reader = undefined;
    reader?.settled.resolve(null);
  }

  /** The connection is over; unless the peer has said so too, which shows in a moment, its end is not one. */
  async #judgeEnd(): Promise<void> {
    await turn();
    await turn();
    if (this.#reader === undefined || this.#failed || this.#socket?.readableLength !== 0) return;
    this.#truncated = true;
    this.#settleEnd();
  }

  async #end(): Promise<void> {
    const { promise, resolve } = Promise.withResolvers<void>();
    this.#socket?.end(resolve);
    await promise;
    await turn(); // By now it is encrypted and handed to the transport.
    await this.#transport.idle();
  }

  #fail(error: unknown): void {
    if (this.#failed) return;
    this.#failed = true;
    this.#failure = error;
    this.#secured.reject(error);
    this.#reader?.settled.reject(error);
    this.#reader = undefined;
    const writer = this.#writer;
    if (writer === undefined) return;
    forgettable(writer.promise);
    writer.reject(error);
  }

  #drop(): void {
    this.#socket?.destroy();
    this.#transport.destroy();
    closeQuietly(this.#conn);
  }
}

function tlsError(error: Error): Error {
  return Object.assign(new Deno.errors.InvalidData(explainTls(error), { cause: error }), { code: errorCode(error) });
}

/** What a server's handshake takes, checked. */
interface ServerHandshake extends TlsCertificate {
  readonly authorities: Authorities | undefined;
  readonly alpnProtocols: string[];
}

/** What a client's handshake takes, checked; `cert` is "" if it has none. */
interface ClientHandshake extends TlsCertificate {
  readonly authorities: Authorities | undefined;
  readonly alpnProtocols: string[];
  readonly serverName: string;
}

/** A handshake that can begin. */
interface Handshake {
  readonly timeout: number;
  run(conn: StreamConn, signal: AbortSignal): Promise<TlsConn>;
}

const SERVER_SETTINGS: Required<TlsServerSettings> = { cert: "", key: "", clientCa: [], alpnProtocols: [] };

const CLIENT_SETTINGS: Required<TlsClientSettings> = {
  caCerts: [],
  serverName: "",
  alpnProtocols: [],
  cert: "",
  key: "",
};

/** Checks all options before anything is sent. */
function prepareHandshake(options: StartTlsOptions): Handshake {
  const { handshakeTimeout = SERVER_DEFAULTS.handshakeTimeout } = options;
  checkNumber("handshakeTimeout", handshakeTimeout);
  if (options.role === "server") {
    const { role: _, handshakeTimeout: __, ...settings } = options;
    return serverHandshake(settings, handshakeTimeout);
  }
  const { role: _, handshakeTimeout: __, ...settings } = options;
  return clientHandshake(settings, handshakeTimeout);
}

function serverHandshake(settings: TlsServerSettings, timeout: number): Handshake {
  const { cert, key, clientCa, alpnProtocols } = resolveOptions(SERVER_SETTINGS, settings);
  checkCertificate({ cert, key });
  const authorities = settings.clientCa === undefined ? undefined : readAuthorities("clientCa", [clientCa].flat());
  const checked = { cert, key, authorities, alpnProtocols };
  return { timeout, run: (conn, signal) => TlsConn.accept(conn, checked, signal) };
}

function clientHandshake(settings: TlsClientSettings, timeout: number): Handshake {
  const { caCerts, serverName, alpnProtocols, cert, key } = resolveOptions(CLIENT_SETTINGS, settings);
  if (serverName === "") throw new TypeError("serverName must not be empty: name whom the certificate must be for");
  if (cert !== "" || key !== "") checkCertificate({ cert, key });
  const authorities = settings.caCerts === undefined ? undefined : readAuthorities("caCerts", caCerts);
  const checked = { authorities, serverName, alpnProtocols, cert, key };
  return { timeout, run: (conn, signal) => TlsConn.connect(conn, checked, signal) };
}

function joinBytes(first: Uint8Array, second: Uint8Array): Uint8Array<ArrayBuffer> {
  const bytes = new Uint8Array(first.length + second.length);
  bytes.set(first);
  bytes.set(second, first.length);
  return bytes;
}

/** Resolves when this turn of the event loop is over. */
function turn(): Promise<void> {
  return new Promise((resolve) => void setImmediate(resolve));
}

// --- Connecting -------------------------------------------------------------

/** The wait before the second try; short enough not to be noticed when a server restarts. */
const RETRY_MIN_MS = 100;

/** The longest wait between two tries; short enough to be back soon after a long outage. */
const RETRY_MAX_MS = 5_000;

/**
 * Opens a connection to a server.
 *
 * @param options Where to: `{ hostname, port }` or `{ path }`; and how:
 * `timeout`, `retries`, `signal`, `tls`, `proxyHeader`, and the stream's own options.
 * @returns Resolves to the open stream, which is the caller's to close.
 * @throws {Deno.errors.ConnectionRefused} If nobody listens there. This error and
 * the next two say what was dialled, why it failed and after how many tries; they
 * have the last failure as `cause`.
 * @throws {Deno.errors.TimedOut} If the last try took longer than `timeout`.
 * @throws {Deno.errors.NotCapable} If a permission is missing; this is not tried again.
 * @throws {RangeError} If an option is out of its range.
 * @throws {TypeError} If an option does not exist.
 *
 * @example
 * ```ts
 * import { connect, StreamRequestHandler, TcpServer } from "@socketserver/socketserver";
 * import { assertEquals } from "@std/assert";
 *
 * class Greeter extends StreamRequestHandler {
 *   override handle() {
 *     return this.request.send("hello\n");
 *   }
 * }
 *
 * await using server = new TcpServer({ port: 0 }, Greeter);
 * const { port } = server.listen();
 * server.serveForever();
 * await using stream = await connect({ port, timeout: 5_000 });
 * assertEquals(await stream.readLine(), "hello");
 * ```
 */
export async function connect(options: ConnectOptions): Promise<SocketStream> {
  const { address, signal, preamble, dial } = resolveConnectOptions(options);
  const { retries, noDelay: _, ...streamOptions } = dial;
  for (let tries = 1;; tries++) {
    signal?.throwIfAborted();
    try {
      return new SocketStream(await dialOnce(address, dial, preamble, signal), streamOptions);
    } catch (error) {
      signal?.throwIfAborted();
      if (tries > retries || !isWorthRetrying(error)) throw dialError(error, address, tries);
    }
    await delay(retryDelay(tries), signal);
  }
}

type DialSettings = typeof DIAL_DEFAULTS;

/** What comes before the first byte of the caller's. */
interface Preamble {
  /** Empty where there is none. */
  readonly proxyHeader: Uint8Array;
  readonly handshake: Handshake | undefined;
}

function resolveConnectOptions(options: ConnectOptions): {
  address: Deno.NetAddr | Deno.UnixAddr;
  signal: AbortSignal | undefined;
  preamble: Preamble;
  dial: DialSettings;
} {
  if ("path" in options) {
    const { path, signal, tls, proxyHeader, ...others } = options;
    const dial = resolveOptions(DIAL_DEFAULTS, others);
    const preamble = resolvePreamble({ tls, proxyHeader }, "", dial);
    return { address: { transport: "unix", path }, signal, preamble, dial };
  }
  const { hostname = "127.0.0.1", port, signal, tls, proxyHeader, ...others } = options;
  checkHostname(hostname);
  checkPort(port);
  const dial = resolveOptions(DIAL_DEFAULTS, others);
  const preamble = resolvePreamble({ tls, proxyHeader }, hostname, dial);
  return { address: { transport: "tcp", hostname, port }, signal, preamble, dial };
}

function resolvePreamble(
  { tls = false, proxyHeader }: {
    tls: boolean | TlsClientSettings | undefined;
    proxyHeader: ProxyHeaderOptions | undefined;
  },
  serverName: string,
  { timeout }: DialSettings,
): Preamble {
  return {
    proxyHeader: proxyHeader === undefined ? NO_BYTES : encodeProxyHeader(proxyHeader),
    handshake: tls === false ? undefined : clientHandshake({ serverName, ...(tls === true ? {} : tls) }, timeout),
  };
}

/** One try, which ends at `timeout` whatever the system does meanwhile. */
async function dialOnce(
  address: Deno.NetAddr | Deno.UnixAddr,
  { timeout, noDelay }: DialSettings,
  preamble: Preamble,
  signal: AbortSignal | undefined,
): Promise<StreamConn> {
  const ended = new AbortController();
  const { promise: gaveUp, reject } = Promise.withResolvers<never>();
  const timer = timeout === Infinity ? undefined : setTimeout(
    () => giveUp(new Deno.errors.TimedOut(`no answer within ${timeout} ms`)),
    Math.min(timeout, MAX_TIMER_MS),
  );
  const onAbort = () => giveUp(signal?.reason);
  function giveUp(error: unknown) {
    reject(error);
    ended.abort(error);
  }
  signal?.addEventListener("abort", onAbort);
  const dialing = open(address, noDelay, preamble, ended.signal);
  try {
    return await Promise.race([dialing, gaveUp]);
  } catch (error) {
    // It may still succeed: a Unix socket's dial takes no signal.
    dialing.then(closeQuietly, ignore);
    throw error;
  } finally {
    clearTimeout(timer);
    signal?.removeEventListener("abort", onAbort);
  }
}

async function open(
  address: Deno.NetAddr | Deno.UnixAddr,
  noDelay: boolean,
  { proxyHeader, handshake }: Preamble,
  signal: AbortSignal,
): Promise<StreamConn> {
  const conn = await openPlain(address, noDelay, signal);
  if (proxyHeader.length > 0) await writeAllOrClose(conn, proxyHeader);
  return await handshake?.run(conn, signal) ?? conn;
}

async function writeAllOrClose(conn: Deno.Conn, bytes: Uint8Array): Promise<void> {
  try {
    for (let rest = bytes; rest.length > 0;) rest = rest.subarray(await conn.write(rest));
  } catch (error) {
    closeQuietly(conn);
    throw error;
  }
}

async function openPlain(
  address: Deno.NetAddr | Deno.UnixAddr,
  noDelay: boolean,
  signal: AbortSignal,
): Promise<Deno.Conn> {
  if ("path" in address) return await Deno.connect({ transport: "unix", path: address.path });
  const conn = await Deno.connect({ hostname: address.hostname, port: address.port, signal });
  if (noDelay) disableNagle(conn);
  return conn;
}

function disableNagle(conn: Deno.Conn): void {
  try {
    if ("setNoDelay" in conn && typeof conn.setNoDelay === "function") conn.setNoDelay(true);
  } catch {
    // The peer has gone already; the first read will say so.
  }
}

/** Whether another try may turn out better: not after a missing permission or an address that cannot be. */
function isWorthRetrying(error: unknown): boolean {
  return !(error instanceof Deno.errors.NotCapable || error instanceof TypeError || error instanceof RangeError ||
    error instanceof URIError || error instanceof Deno.errors.InvalidData);
}

function dialError(error: unknown, address: Deno.Addr, tries: number): Error {
  const times = tries === 1 ? "" : ` after ${tries} tries`;
  return restate(error, `Cannot connect to ${formatAddress(address)}${times}: ${explain(error, address)}`);
}

function retryDelay(tries: number): number {
  const full = Math.min(RETRY_MIN_MS * 2 ** (tries - 1), RETRY_MAX_MS);
  return full * (1 - Math.random() / 2);
}

// --- Handlers ---------------------------------------------------------------

/** The signals of the handlers that have asked for one. */
const handlerSignals = new WeakMap<object, AbortController>();

/** Those of them that follow each server's signal. A listener for each would stay as long as the server. */
const followers = new WeakMap<AbortSignal, Set<AbortController>>();

/** The handler's own signal, that follows its server's until {@linkcode stopFollowing}. */
function signalOf(handler: object, serverSignal: AbortSignal): AbortSignal {
  const known = handlerSignals.get(handler);
  if (known !== undefined) return known.signal;
  if (serverSignal.aborted) return serverSignal;
  const controller = new AbortController();
  handlerSignals.set(handler, controller);
  followersOf(serverSignal).add(controller);
  return controller.signal;
}

function followersOf(serverSignal: AbortSignal): Set<AbortController> {
  const known = followers.get(serverSignal);
  if (known !== undefined) return known;
  const controllers = new Set<AbortController>();
  followers.set(serverSignal, controllers);
  serverSignal.addEventListener("abort", () => {
    for (const controller of controllers) controller.abort(serverSignal.reason);
  });
  return controllers;
}

/** To be called when the handler is done. */
function stopFollowing(handler: HandlerCalls): void {
  const controller = handlerSignals.get(handler);
  if (controller !== undefined) followers.get(handler.server.signal)?.delete(controller);
}

/**
 * What a user writes: one object for each request. Override `handle()`, and
 * `setup()` and `finish()` where there is something to prepare or to put away.
 *
 * Override: `setup`, `handle`, `finish`. Read: `request`, `clientAddress`,
 * `server`, `signal`.
 *
 * @typeParam Request What the handler serves, such as a {@linkcode SocketStream}.
 * @typeParam Server The server that made the handler.
 */
export abstract class BaseRequestHandler<Request, Server extends { readonly signal: AbortSignal }> {
  /** What is served. */
  readonly request: Request;
  /** Who sent it. */
  readonly clientAddress: Deno.Addr;
  /** The server that made this handler. A subclass with a server of its own says `declare readonly server: MyServer`. */
  readonly server: Server;

  /**
   * Called by {@linkcode BaseServer.finishRequest}.
   *
   * @param request What is served.
   * @param clientAddress Who sent it.
   * @param server The server that made this handler.
   */
  constructor(request: Request, clientAddress: Deno.Addr, server: Server) {
    this.request = request;
    this.clientAddress = clientAddress;
    this.server = server;
  }

  /** Aborts when the server begins to shut down: the handler should come to an end. It is this handler's own, so listeners end with it. */
  get signal(): AbortSignal {
    return signalOf(this, this.server.signal);
  }

  /** Runs before `handle()`. If it throws, neither `handle()` nor `finish()` runs. */
  setup(): void | Promise<void> {}

  /** Serves the request; when it returns or throws, the request is over. */
  abstract handle(): void | Promise<void>;

  /** Runs after `handle()`, also when that threw. The stream is as `handle()` left it. */
  finish(): void | Promise<void> {}
}

/**
 * A handler of connections: `this.request` is a {@linkcode SocketStream}.
 *
 * @example
 * ```ts
 * import { StreamRequestHandler } from "@socketserver/socketserver";
 *
 * class Upper extends StreamRequestHandler {
 *   override async handle() {
 *     for await (const line of this.request.lines()) {
 *       await this.request.write(line.toUpperCase() + "\n");
 *     }
 *   }
 * }
 * ```
 */
export abstract class StreamRequestHandler extends BaseRequestHandler<SocketStream, StreamServer> {}

/**
 * A handler of datagrams: `this.request` is a {@linkcode Datagram}.
 *
 * @example
 * ```ts
 * import { DatagramRequestHandler } from "@socketserver/socketserver";
 *
 * class Echo extends DatagramRequestHandler {
 *   override async handle() {
 *     await this.request.reply(this.request.data);
 *   }
 * }
 * ```
 */
export abstract class DatagramRequestHandler extends BaseRequestHandler<Datagram, DatagramServer> {}

/** The class of the handlers of a {@linkcode DatagramServer}. */
export interface DatagramRequestHandlerClass {
  /** Makes the handler of one datagram. */
  new (
    request: Datagram,
    clientAddress: Deno.Addr,
    server: DatagramServer,
  ): BaseRequestHandler<Datagram, DatagramServer>;
}

type HandlerCalls = Pick<StreamRequestHandler, "setup" | "handle" | "finish"> & {
  readonly server: { readonly signal: AbortSignal };
};

/** Runs a handler's calls. What returns no promise is not waited for. */
function runHandler(handler: HandlerCalls): Promise<void> {
  try {
    const preparing = handler.setup();
    if (preparing === undefined) return runPrepared(handler);
    return Promise.resolve(preparing).then(() => runPrepared(handler), (error) => failUnprepared(handler, error));
  } catch (error) {
    return failUnprepared(handler, error);
  }
}

function failUnprepared(handler: HandlerCalls, error: unknown): Promise<never> {
  stopFollowing(handler);
  return Promise.reject(error);
}

function runPrepared(handler: HandlerCalls): Promise<void> {
  try {
    return Promise.resolve(handler.handle()).then(() => finish(handler), (error) => failAndFinish(handler, error));
  } catch (error) {
    return failAndFinish(handler, error);
  }
}

function finish(handler: HandlerCalls): void | Promise<void> {
  let finishing: void | Promise<void> = undefined;
  try {
    finishing = handler.finish();
  } finally {
    if (finishing === undefined) stopFollowing(handler);
  }
  if (finishing !== undefined) return Promise.resolve(finishing).finally(() => stopFollowing(handler));
}

async function failAndFinish(handler: HandlerCalls, error: unknown): Promise<never> {
  try {
    await finish(handler);
  } catch (second) {
    throw new SuppressedError(second, error, "Both handle() and finish() have thrown");
  }
  throw error;
}

/** The class of the handlers of a {@linkcode StreamServer}. */
export interface StreamRequestHandlerClass {
  /** Makes the handler of one connection. */
  new (
    request: SocketStream,
    clientAddress: Deno.Addr,
    server: StreamServer,
  ): BaseRequestHandler<SocketStream, StreamServer>;
}

// --- Accept failures --------------------------------------------------------

/**
 * What an error of `accept()` means: `"closed"` the listener was closed, `"peer"`
 * one client left before it was accepted, `"overload"` the system is out of
 * descriptors or memory for now, `"fatal"` anything else.
 */
export type AcceptFailure = "closed" | "peer" | "overload" | "fatal";

/** accept(2): errors of the one connection that was to be accepted. */
const PEER_CODES = new Set([
  "ECONNABORTED",
  "ECONNREFUSED", // A datagram that was sent before met nobody.
  "ECONNRESET",
  "EHOSTDOWN",
  "EHOSTUNREACH",
  "EINTR",
  "ENETDOWN",
  "ENETUNREACH",
  "ENONET",
  "ENOPROTOOPT",
  "ENOTCONN", // The runtime asks for the peer's address after accept(2); by then it may be gone.
  "ENOTSUP",
  "EPERM", // A firewall rule forbade this one.
  "EPROTO",
  "ETIMEDOUT",
]);

/** accept(2): limits that other connections will make room under. */
const OVERLOAD_CODES = new Set(["EMFILE", "ENFILE", "ENOBUFS", "ENOMEM"]);

/**
 * Tells what an error of `Deno.Listener.accept` means. It looks at the `code`, or
 * at the number in the message, and not at the class: `EMFILE` is a plain `Error`.
 * It never touches `stack`, which opens a file.
 *
 * @param error What `accept()` rejected with.
 * @returns What it means.
 *
 * @example
 * ```ts
 * import { acceptFailure } from "@socketserver/socketserver";
 * import { assertEquals } from "@std/assert";
 *
 * assertEquals(acceptFailure(new Deno.errors.BadResource("Listener has been closed")), "closed");
 * ```
 */
export function acceptFailure(error: unknown): AcceptFailure {
  const code = errorCode(error);
  if (PEER_CODES.has(code)) return "peer";
  if (OVERLOAD_CODES.has(code)) return "overload";
  if (error instanceof Deno.errors.BadResource || error instanceof Deno.errors.Interrupted) return "closed";
  // A Unix client that is bound to a path that is no UTF-8.
  if (error instanceof Deno.errors.InvalidData) return "peer";
  return "fatal";
}

/** The first wait when descriptors run out. */
const OVERLOAD_WAIT_MIN_MS = 5;

/** Long enough for descriptors to come free, short enough for a client to bear. */
const OVERLOAD_WAIT_MAX_MS = 1_000;

// --- Servers ----------------------------------------------------------------

/** Milliseconds that clients which have spoken before may go on after {@linkcode BaseServer.shutdown}: what already reached us is read in this time. */
const DRAIN_SETTLE_MS = 50;

/** Milliseconds that a client which was just accepted has to say its first word when the server drains. */
const DRAIN_FIRST_WORD_MS = 500;

/** More reads than these between two looks, and what is ready may not have had its turn: the runtime completes 128 a turn. */
const BUSY_READS = 64;

/** Looks at a backlog that must all find it quiet; a busy event loop may come late to one of them. */
const BACKLOG_LOOKS = 5;

/** The time between two of these looks. */
const BACKLOG_LOOK_MS = 10;

/** More than this cannot have waited when the server was told to stop, but for a backlog that was made larger. */
const BACKLOG_LIMIT = 4_096;

/** Milliseconds of waiting after which what still comes has come too late, such as under a steady load. */
const BACKLOG_PATIENCE_MS = 500;

/** Milliseconds that handlers which were cut off have to run their `finish()`. */
const UNWIND_MS = 200;

/** Milliseconds that a client may take no byte of what a handler has left to be sent, if no `timeout` says otherwise. */
const CLOSE_STALL_MS = 30_000;

/** How often `serviceActions()` runs: Python's poll interval. */
const SERVICE_INTERVAL_MS = 500;

/** What a server has done so far. All are counts since it was made, except `active`. */
export interface ServerStats {
  /** Requests that were taken in. */
  readonly accepted: number;
  /** Requests that are being served now. */
  readonly active: number;
  /** Requests that `verifyRequest()` turned away. */
  readonly rejected: number;
  /** Requests whose peer vanished: reset, broken pipe, or the end inside of a message. */
  readonly aborted: number;
  /** Requests that ended by a deadline. */
  readonly timedOut: number;
  /** Errors that were thrown by handlers or hooks, besides those. */
  readonly errors: number;
  /**
   * Clients that left before they were accepted, proxies that left without a byte, and datagrams that could not be
   * received.
   */
  readonly lost: number;
  /**
   * Connections that were closed at once: their host had `maxConnectionsPerHost` already, or they came from elsewhere
   * than the proxies of `proxyProtocol`.
   */
  readonly refused: number;
  /**
   * Clients whose TLS handshake failed or took too long, or that have no certificate where one is asked for, and
   * proxies whose PROXY header was wrong or took too long.
   */
  readonly handshakeFailures: number;
  /** Datagrams that came while as many were served as may be. */
  readonly dropped: number;
  /** Times that the system ran out of descriptors or memory. */
  readonly overloads: number;
  /** Bytes that were received. */
  readonly bytesRead: number;
  /** Bytes that were sent. */
  readonly bytesWritten: number;
}

/**
 * Why a connection is over: `"finished"` its handler is done, `"aborted"` the client
 * has vanished, `"timedOut"` a deadline has passed, `"error"` a handler or a hook has
 * thrown, `"rejected"` `verifyRequest()` has turned it away, `"handshakeFailed"` it
 * met no hook, `"cut"` the server was closed or its `grace` was over.
 */
export type CloseReason = "finished" | "aborted" | "timedOut" | "error" | "rejected" | "handshakeFailed" | "cut";

/** How a connection went; what {@linkcode StreamServer.handleClose} is told. */
export interface ConnectionReport {
  /** Why it is over. */
  readonly reason: CloseReason;
  /** Milliseconds from its opening to its end. */
  readonly duration: number;
  /** Bytes that were received. */
  readonly bytesRead: number;
  /** Bytes that were sent. */
  readonly bytesWritten: number;
}

/** A connection that is being served; one of {@linkcode StreamServer.openConnections}. */
export interface OpenConnection {
  /** Whose it is. */
  readonly clientAddress: Deno.Addr;
  /** Milliseconds since it was accepted. */
  readonly age: number;
  /** Bytes that were received. */
  readonly bytesRead: number;
  /** Bytes that were sent. */
  readonly bytesWritten: number;
  /**
   * What it waits for: a call that reads, such as `"readLine()"` or `"for await"`;
   * `"send()"` while the client has not taken all that was written; `"PROXY header"`
   * while its proxy has not said whose it is; `"startTls()"` in a handshake; else
   * `"handler"`, for something that is not the client's.
   */
  readonly waitsFor: string;
}

/** How a shutdown went. */
export interface ShutdownReport {
  /** Requests that were under way and came to their own end. */
  readonly finished: number;
  /** The clients of those that did not, and were cut off. */
  readonly cut: readonly Deno.Addr[];
  /** Milliseconds from the call to its end. */
  readonly duration: number;
}

/** `"closed"`: all connections are ended or cut off. `"ended"`: nobody waits for handlers any more. */
type Phase = "new" | "listening" | "draining" | "closed" | "ended";

/** One request that is being served. */
interface Exchange<Request> {
  readonly request: Request;
  /** The proxy's, until it has said whose request it relays. */
  clientAddress: Deno.Addr;
  /** Where it is among those that are active. */
  index: number;
  /** When it came, in the time of `performance.now()`; a datagram's is 0 but in a shutdown. */
  readonly since: number;
  /** Why it is over, if it is over now. */
  reason: CloseReason;
  /** Its handler called shutdown(), which therefore does not wait for it. */
  awaitsShutdown: boolean;
  /** Its header or its handshake is under way. */
  isPreparing: boolean;
  isCut: boolean;
}

/** Finds out in which exchange a call is made. Made when a server starts. */
interface ExchangeContext {
  run(exchange: Exchange<unknown>, serve: () => Promise<void>): Promise<void>;
  getStore(): Exchange<unknown> | undefined;
}

/**
 * What waits in the kernel when a server stops. It cannot be asked how much that
 * is: there is no more when receiving has to wait.
 */
class Backlog {
  readonly #emptied = Promise.withResolvers<void>();
  #isClosing = false;
  #isWaiting = false;
  #waitingSince = 0;
  /** What may still be received; what exceeds it has come too late. */
  #left = BACKLOG_LIMIT;
  /** Milliseconds that may still be spent on waiting. */
  #patience = BACKLOG_PATIENCE_MS;
  #timer: ReturnType<typeof setTimeout> | undefined;

  /** Resolves when there is nothing more to receive; to be called when the server stops. */
  emptied(): Promise<void> {
    this.#isClosing = true;
    if (this.#isWaiting) this.#startLooking();
    return this.#emptied.promise;
  }

  #startLooking(): void {
    this.#waitingSince = performance.now();
    this.#look();
  }

  /** Something is received from the kernel, if it has anything. */
  startWaiting(): void {
    this.#isWaiting = true;
    if (!this.#isClosing) return;
    if (this.#left-- > 0) this.#startLooking();
    else this.end();
  }

  /** It has come. */
  stopWaiting(): void {
    this.#isWaiting = false;
    if (!this.#isClosing) return;
    clearTimeout(this.#timer);
    this.#patience -= performance.now() - this.#waitingSince;
  }

  /** Nothing will be received any more. */
  end(): void {
    this.#emptied.resolve();
  }

  #look(looks = BACKLOG_LOOKS): void {
    const spent = performance.now() - this.#waitingSince;
    if (looks === 0 || spent > this.#patience) return this.end();
    const reads = control.completedReads();
    this.#timer = setTimeout(() => {
      // Where streams are busy, accepting may not have had its turn.
      const isBusy = control.completedReads() - reads > BUSY_READS;
      this.#look(isBusy ? looks : looks - 1);
    }, BACKLOG_LOOK_MS);
  }
}

/**
 * What all servers have in common: their lifecycle, their hooks and their end.
 * Nothing is opened and no hook is called before `listen()`, `serveForever()` or
 * `handleRequest()`.
 *
 * Call: `listen`, `serveForever`, `handleRequest`, `shutdown`, `close`. Read:
 * `address`, `signal`, `stats`. Override: `verifyRequest`, `processRequest`,
 * `finishRequest`, `handleError`, `handleTimeout`, `serviceActions`,
 * `handleOverload`.
 *
 * @typeParam Request What is served, such as a {@linkcode SocketStream}.
 * @typeParam Address The kind of address that the server has.
 */
export abstract class BaseServer<Request, Address extends Deno.Addr = Deno.Addr> implements AsyncDisposable {
  readonly #grace: number;
  readonly #controller = new AbortController();
  readonly #stopping = new AbortController();
  /** In no order: each exchange knows its index. For datagrams a map costs a tenth of their rate. */
  readonly #active: Exchange<Request>[] = [];
  readonly #cutOff: Deno.Addr[] = [];
  readonly #counts = {
    accepted: 0,
    rejected: 0,
    aborted: 0,
    timedOut: 0,
    errors: 0,
    lost: 0,
    refused: 0,
    handshakeFailures: 0,
    dropped: 0,
    overloads: 0,
    /** Since the shutdown began. */
    finished: 0,
    bytesRead: 0,
    bytesWritten: 0,
  };
  /** Settled when nothing of the server is left. */
  readonly #ended = Promise.withResolvers<void>();
  #phase: Phase = "new";
  #address: Address | undefined;
  #serving = false;
  /** The request that a `handleRequest()` waited for in vain. */
  #next: { readonly promise: Promise<Request | undefined>; hasArrived: boolean } | undefined;
  #servingNext: Promise<void> | undefined;
  #handlingOne = false;
  #draining: Promise<ShutdownReport> | undefined;
  #change: PromiseWithResolvers<void> | undefined;
  #context: ExchangeContext | undefined;
  /** The exchange whose handler runs right now, where there is no context. */
  #caller: Exchange<unknown> | undefined;
  /** What handleError() is being told of: it is given no more than the error and the address. */
  readonly #reported = new Map<unknown, { readonly isOfClient: boolean; readonly isPrinted: boolean }>();
  readonly #backlog = new Backlog();
  #awaitingShutdown = 0;
  #overloadedAt = -Infinity;
  #overloadWait = 0;

  /**
   * Keeps the options; nothing is opened and no hook is called.
   *
   * @param grace Milliseconds that `shutdown()` waits for handlers.
   */
  protected constructor(grace: number) {
    this.#grace = grace;
  }

  /**
   * Binds the address and lets clients connect; they are served once
   * `serveForever()` or `handleRequest()` runs. Those call it by themselves. A
   * second call returns the same address.
   *
   * @returns The bound address, with the real port where port 0 was asked for.
   * @throws {Deno.errors.AddrInUse} If another program has the address.
   * @throws {Deno.errors.NotCapable} If a permission is missing.
   * @throws {TypeError} If the server is closed.
   */
  abstract listen(): Address | Promise<Address>;

  /**
   * Whether a call of `shutdown()` is known to come from a handler after that has
   * waited for something, too, and it is known when a request came. It costs a
   * fifth of a datagram's time.
   */
  protected abstract get keepsContext(): boolean;
  /** Hands `serve` each request as it comes, for a while or until the server stops listening; rejects with what cannot be waited out. */
  protected abstract serveRequests(serve: (request: Request) => void): Promise<void>;
  /** The next request; `undefined` when the server stops listening. */
  protected abstract acceptRequest(): Promise<Request | undefined>;
  /** Stops listening. With `backlog`, what waits in the kernel is given out before. Resolves when the address is free; never rejects. */
  protected abstract stopListening(backlog: boolean): Promise<void>;
  /** Who sent `request`. */
  protected abstract clientAddressOf(request: Request): Deno.Addr;
  /** How many bytes `request` has moved. */
  protected abstract trafficOf(request: Request): { readonly bytesRead: number; readonly bytesWritten: number };
  /** Ends `request` if its client has nothing under way; one that has not spoken yet, or waits for an answer, only with `isLate`. */
  protected abstract endRequest(request: Request, isLate: boolean): void;
  /** Ends `request` in good order: what is buffered is sent; it rejects if that could not be. */
  protected abstract closeRequest(request: Request): Promise<void> | undefined;
  /** Ends `request` now; what its handler waits for rejects with `error`. */
  protected abstract cutRequest(request: Request, error: Error): void;

  /** Readies `request` before anything else is done with it, if there is something to ready; resolves to `false` if it cannot be served. Never rejects. */
  protected prepareRequest(_request: Request): Promise<boolean> | undefined {
    return undefined;
  }

  /** Is told that `request` was taken in; nothing was done with it yet. */
  protected noteBegun(_request: Request, _clientAddress: Deno.Addr): void {}
  /** Is told that `request`, which came at `since`, is closed. */
  protected noteEnded(_request: Request, _clientAddress: Deno.Addr, _reason: CloseReason, _since: number): void {}
  /** Whether a deadline has ended `request`, which its handler may have kept to itself. */
  protected hasTimedOut(_request: Request): boolean {
    return false;
  }

  /** The bound address. Throws `TypeError` before `listen()`. */
  get address(): Address {
    if (this.#address === undefined) {
      throw new TypeError("Cannot tell the address: the server does not listen yet, call listen()");
    }
    return this.#address;
  }

  /** Aborts when the server begins to shut down, after the backlog was served. A handler has its own, as `this.signal`. */
  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  /** What the server has done so far. */
  get stats(): ServerStats {
    const { finished: _, bytesRead, bytesWritten, ...counts } = this.#counts;
    const traffic = { bytesRead, bytesWritten };
    for (const { request } of this.#active) this.#addTraffic(traffic, request);
    return { ...counts, ...traffic, active: this.#active.length };
  }

  /**
   * Serves until {@linkcode BaseServer.shutdown} or {@linkcode BaseServer.close}.
   *
   * @param options With a `signal`, its abort is a call of `shutdown()`.
   * @returns Resolves once the shutdown is over and no handler runs any more, but
   * for those that were cut off and do not end for 200 ms; at once if the server
   * is closed already. Rejects with what `listen()` throws,
   * after which it may be called again, and with an error of accepting that cannot
   * be waited out, after which the server is closed.
   * @throws {Deno.errors.Busy} If it serves already.
   *
   * @example
   * ```ts
   * import { StreamRequestHandler, TcpServer } from "@socketserver/socketserver";
   *
   * class Goodbye extends StreamRequestHandler {
   *   override handle() {
   *     return this.request.send("goodbye\n");
   *   }
   * }
   *
   * const server = new TcpServer({ port: 0 }, Goodbye);
   * await server.serveForever({ signal: AbortSignal.timeout(10) });
   * ```
   */
  async serveForever(options: { signal?: AbortSignal } = {}): Promise<void> {
    if (this.#isClosing) return await this.#ended.promise;
    if (this.#serving || this.#handlingOne) {
      throw new Deno.errors.Busy("Cannot serveForever(): the server is serving already");
    }
    this.#serving = true;
    const { signal } = options;
    const stop = () => void this.shutdown();
    const stopServices = this.#startServices();
    try {
      await this.#activate();
      signal?.addEventListener("abort", stop);
      if (signal?.aborted) stop();
      await this.#serveWaitingRequest();
      await this.serveRequests((request) => this.#serve(request));
      this.#backlog.end();
      // Someone else has closed the listener.
      if (!this.#isClosing) stop();
    } catch (error) {
      this.#backlog.end();
      // If listening failed, it may be tried again.
      if (this.#phase === "new") this.#serving = false;
      else this.close();
      throw error;
    } finally {
      stopServices();
      signal?.removeEventListener("abort", stop);
    }
    await this.#ended.promise;
  }

  /**
   * Serves one request, Python's `handle_request()`.
   *
   * @param options `timeout`: milliseconds to wait for it, above 0; default
   * `Infinity`.
   * @returns Resolves when the request was served, when `handleTimeout()` has run
   * because none came, or when the server was closed. Rejects as `serveForever` does.
   * @throws {Deno.errors.Busy} If the server serves already.
   * @throws {RangeError} If `timeout` is out of its range.
   *
   * @example
   * ```ts
   * import { StreamRequestHandler, TcpServer } from "@socketserver/socketserver";
   *
   * class Once extends StreamRequestHandler {
   *   override handle() {
   *     return this.request.send("only you\n");
   *   }
   * }
   *
   * await using server = new TcpServer({ port: 0 }, Once);
   * await server.handleRequest({ timeout: 10 }); // Nobody came.
   * ```
   */
  async handleRequest(options: { timeout?: number } = {}): Promise<void> {
    const { timeout = Infinity } = options;
    checkNumber("timeout", timeout);
    if (this.#isClosing) return;
    if (this.#serving || this.#handlingOne) {
      throw new Deno.errors.Busy("Cannot handleRequest(): the server is serving already");
    }
    this.#handlingOne = true;
    try {
      if (!await this.#hasArrived(timeout)) return this.handleTimeout();
      const request = await this.#takeArrived();
      if (request !== undefined) await this.#serve(request);
    } finally {
      this.#handlingOne = false;
    }
  }

  /**
   * Ends the server in good order:
   *
   * 1. It stops accepting; clients that wait in the kernel's backlog are still served.
   * 2. `signal` aborts.
   * 3. Handlers finish what they have begun. A read that would wait for a new
   *    message reads the end of the stream; clients that have just connected get
   *    half a second to say their first word.
   * 4. After `grace` the rest are cut off.
   *
   * It may be called before the start, again (it is the same shutdown, with the
   * `grace` of the first call; `close()` shortens it), and from inside a handler: that one is not waited for by the promise, but
   * `serveForever()` waits for it. (A handler of datagrams calls it before it
   * awaits anything else; see {@linkcode DatagramServer}.)
   *
   * @param options `grace`: milliseconds before the rest are cut off, instead of
   * the server's option; 0 cuts at once, `Infinity` waits for ever.
   * @returns Resolves to a report when it is over; the address is free by then.
   * Never rejects.
   * @throws {RangeError} If `grace` is out of its range.
   *
   * @example
   * ```ts
   * import { StreamRequestHandler, TcpServer } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * class Echo extends StreamRequestHandler {
   *   override async handle() {
   *     for await (const data of this.request) await this.request.send(data);
   *   }
   * }
   *
   * const server = new TcpServer({ port: 0 }, Echo);
   * server.serveForever();
   * const { cut } = await server.shutdown({ grace: 1_000 });
   * assertEquals(cut, []);
   * ```
   */
  shutdown(options: { grace?: number } = {}): Promise<ShutdownReport> {
    const { grace = this.#grace } = options;
    checkNumber("grace", grace);
    this.#draining ??= this.#drain(grace);
    const caller = this.#caller ?? this.#context?.getStore();
    // A handler that is over may have left a timer that calls.
    const isServed = caller !== undefined && this.#active[caller.index] === caller;
    if (isServed && !caller.awaitsShutdown) {
      caller.awaitsShutdown = true;
      this.#awaitingShutdown++;
      this.#wake();
    }
    return this.#draining;
  }

  /** Ends the server now: it stops accepting and cuts all clients off. `serveForever()` resolves soon after. A second call does nothing. */
  close(): void {
    if (this.#phase === "ended") return;
    if (!this.#isClosed) this.#enter("closed");
    const stopped = this.stopListening(false);
    for (const exchange of this.#active) this.#cut(exchange);
    this.#draining ??= this.#reportOf(performance.now(), stopped);
    this.#draining.then(() => this.#endWithin(UNWIND_MS));
  }

  /** Shuts the server down, as {@linkcode BaseServer.shutdown} does: Python's `with server:`. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.shutdown();
  }

  /**
   * Decides whether a request is served; it runs before a handler exists.
   * Override it to turn clients away: return `false` and the connection is closed.
   *
   * @param _request The request, of which nothing was read.
   * @param _clientAddress Who sent it.
   * @returns Whether to serve it. Default: `true`.
   */
  verifyRequest(_request: Request, _clientAddress: Deno.Addr): boolean | Promise<boolean> {
    return true;
  }

  /**
   * Serves a verified request, by default with
   * {@linkcode BaseServer.finishRequest}. Override it to put something around every
   * request: a lock, a measurement. The stream is closed when it settles.
   *
   * @param request The request.
   * @param clientAddress Who sent it.
   * @returns Settles when the request is over.
   */
  processRequest(request: Request, clientAddress: Deno.Addr): Promise<void> {
    return this.finishRequest(request, clientAddress);
  }

  /**
   * Makes the handler and runs its `setup()`, `handle()` and `finish()`.
   *
   * @param request The request.
   * @param clientAddress Who sent it.
   * @returns Settles when the handler is done; rejects with what it threw, and with
   * a `SuppressedError` of both if `finish()` threw after `handle()` had.
   */
  abstract finishRequest(request: Request, clientAddress: Deno.Addr): Promise<void>;

  /**
   * Is told what a handler or a hook threw; the connection is closed after it, and
   * nothing else is hurt. The default prints it with `console.error`, unless the
   * client has vanished or ran into a deadline, which {@linkcode BaseServer.stats}
   * counts. It prints the `stack` too, but not within 5 s of an exhaustion (see
   * `handleOverload`): the runtime opens a file for it, and panics if it cannot.
   *
   * @param error What was thrown.
   * @param clientAddress Whose request it was.
   */
  handleError(error: unknown, clientAddress: Deno.Addr): void | Promise<void> {
    const reported = this.#reported.get(error);
    // The stack tells where a handler went wrong, and nothing about a client that did.
    const detail = reported?.isOfClient ? messageOf(error) : error;
    if (reported?.isPrinted ?? true) printError(`Error while serving ${formatAddress(clientAddress)}:`, detail);
  }

  /** Is called when `handleRequest()` has waited for its `timeout`. The default does nothing. */
  handleTimeout(): void {}

  /** Is called every 500 ms while `serveForever()` accepts, if it is overridden: for chores. The default does nothing. */
  serviceActions(): void | Promise<void> {}

  /**
   * Is told, once for each time that it happens, that the system has run out of
   * descriptors or memory; it is over when nothing was short for 5 s. Clients wait
   * in the backlog meanwhile. The default prints one line with `console.error`.
   *
   * @param error What accepting rejected with; do not read its `stack`, which
   * opens a file.
   */
  handleOverload(error: unknown): void | Promise<void> {
    const where = this.#address === undefined ? "" : ` on ${formatAddress(this.#address)}`;
    const advice = errorCode(error) === "EMFILE" ? '; raise "ulimit -n" or lower maxConnections' : "";
    console.error(`Cannot accept connections${where} for now: ${messageOf(error)}${advice}`);
  }

  /** The requests that are being served, and when they came. Those that were cut off are over for their clients. */
  protected get openRequests(): {
    readonly request: Request;
    readonly clientAddress: Deno.Addr;
    readonly since: number;
  }[] {
    return this.#active.filter(({ isCut }) => !isCut);
  }

  /** Whether `shutdown()` or `close()` was called. */
  protected get isShuttingDown(): boolean {
    return this.#isClosing;
  }

  /** The bound address, `undefined` before `listen()`. */
  protected get boundAddress(): Address | undefined {
    return this.#address;
  }

  /** To be called by `listen()` with the address that it bound; `false` if the server was closed meanwhile. */
  protected noteListening(address: Address): boolean {
    if (this.#isClosing) return false;
    this.#address = address;
    this.#enter("listening");
    return true;
  }

  /** Counts something that happened outside of a request. */
  protected countIncident(what: "lost" | "refused" | "handshakeFailures" | "dropped" | "overloads"): undefined {
    this.#counts[what]++;
  }

  /** Whether `limit` requests are being served; those do not count whose handlers only wait for the shutdown. */
  protected isAtLimit(limit: number): boolean {
    return this.#active.length - this.#awaitingShutdown >= limit;
  }

  /** Resolves when fewer than `limit` requests are served, or the server is closed. */
  protected async belowLimit(limit: number): Promise<void> {
    while (this.isAtLimit(limit) && !this.#isClosed) await this.#changed();
  }

  /**
   * What is to be done about an error of accepting or receiving: no client's error
   * ends the server, and a shortage of descriptors or memory is waited out.
   * Resolves to `false` when there is nothing to accept from any more; rejects
   * with what cannot be waited out.
   */
  protected async rideOut(error: unknown): Promise<boolean> {
    this.#backlog.stopWaiting();
    switch (acceptFailure(error)) {
      case "closed":
        return false;
      case "peer":
        this.countIncident("lost");
        return true;
      case "overload":
        this.noteOverload(error);
        this.#overloadWait = Math.min(Math.max(this.#overloadWait * 2, OVERLOAD_WAIT_MIN_MS), OVERLOAD_WAIT_MAX_MS);
        await this.#waitOut(this.#overloadWait);
        return true;
      case "fatal":
        throw error;
    }
  }

  async #waitOut(ms: number): Promise<void> {
    if (!this.isShuttingDown) return await delay(ms, this.#stopping.signal);
    await this.receiving(delay(OVERLOAD_WAIT_MIN_MS));
    this.#backlog.stopWaiting();
  }

  /** Marks `received` as what comes from the kernel, if anything does. */
  protected receiving<T>(received: Promise<T>): Promise<T> {
    this.#backlog.startWaiting();
    return received;
  }

  /** It has come. */
  protected noteReceived(): void {
    this.#backlog.stopWaiting();
    this.#overloadWait = 0;
  }

  /** Resolves when the kernel has nothing more to give; to be called when the server stops. */
  protected emptyBacklog(): Promise<void> {
    return this.#backlog.emptied();
  }

  /** Counts and reports that the system is exhausted; never throws. */
  protected noteOverload(error: unknown): void {
    const now = performance.now();
    const isNew = now - this.#overloadedAt > OVERLOAD_EPISODE_MS;
    this.#overloadedAt = exhaustedAt = now;
    if (!isNew) return;
    this.countIncident("overloads");
    this.runHook("handleOverload", () => this.handleOverload(error));
  }

  /** Throws if the server was closed. */
  protected checkOpen(): void {
    if (this.#isClosing) throw new TypeError("Cannot listen: the server is closed, make a new one");
  }

  /** Reports an error that no handler is to blame for; never rejects. */
  protected async reportError(error: unknown, clientAddress: Deno.Addr): Promise<void> {
    this.#counts.errors++;
    await this.runHook("handleError", () => this.handleError(error, clientAddress));
  }

  /** Reports what a client has done wrong before it could be served, which is counted elsewhere; never rejects. */
  protected async reportMisuse(error: unknown, clientAddress: Deno.Addr): Promise<void> {
    this.#reported.set(error, { isOfClient: true, isPrinted: true });
    await this.runHook("handleError", () => this.handleError(error, clientAddress));
    this.#reported.delete(error);
  }

  async #reportExchange(error: unknown, exchange: Exchange<Request>): Promise<void> {
    const errors = error instanceof SuppressedError ? [error.suppressed, error.error] : [error];
    for (const error of errors) {
      const outcome = outcomeOf(error, exchange);
      if (outcome !== undefined) this.#counts[outcome]++;
      exchange.reason = outcome === "errors" ? "error" : outcome ?? "cut";
      this.#reported.set(error, { isOfClient: isOfClient(error, exchange), isPrinted: outcome === "errors" });
      await this.runHook("handleError", () => this.handleError(error, exchange.clientAddress));
      this.#reported.delete(error);
    }
  }

  /** Runs a hook whose own error has nobody else to go to; never rejects. */
  protected async runHook(name: string, hook: () => void | Promise<void>): Promise<void> {
    try {
      await hook();
    } catch (error) {
      this.#counts.errors++;
      printError(`Error in ${name}():`, error);
    }
  }

  get #isClosing(): boolean {
    return this.#phase !== "new" && this.#phase !== "listening";
  }

  /** Whether nothing is served any more. */
  get #isClosed(): boolean {
    return this.#phase === "closed" || this.#phase === "ended";
  }

  /** The one door to the phase. */
  #enter(phase: Phase): void {
    this.#phase = phase;
    if (!this.#isClosing) return;
    this.#stopping.abort();
    if (!this.#handlingOne) this.#serveWaitingRequest().catch(ignore); // It is closing anyway.
    if (!this.#isClosed) return;
    this.#abortSignal();
    this.#wake();
    if (phase === "ended") this.#ended.resolve();
  }

  #abortSignal(): void {
    this.#controller.abort(new DOMException("The server is shutting down", "AbortError"));
  }

  async #activate(): Promise<void> {
    prepareForExhaustion();
    if (this.keepsContext && this.#context === undefined) {
      // Taken from the runtime when the first server starts, so that importing this file loads nothing.
      const { AsyncLocalStorage } = await import("node:async_hooks");
      this.#context = new AsyncLocalStorage<Exchange<unknown>>();
    }
    try {
      if (!this.#isClosing) await this.listen();
    } catch (error) {
      if (!this.#isClosing) throw error; // Else it was closed while it began to listen.
    }
  }

  #startServices(): () => void {
    if (this.serviceActions === BaseServer.prototype.serviceActions) return ignore;
    let isRunning = false;
    const timer = setInterval(async () => {
      if (isRunning) return; // The last call takes longer than the interval.
      isRunning = true;
      await this.runHook("serviceActions", () => this.serviceActions());
      isRunning = false;
    }, SERVICE_INTERVAL_MS);
    return () => clearInterval(timer);
  }

  /** Whether a request, or the end of all requests, comes within `ms`. It is waited for on if it does not. */
  async #hasArrived(ms: number): Promise<boolean> {
    if (this.#next === undefined) {
      await this.#activate();
      const next = { promise: this.acceptRequest(), hasArrived: false };
      const arrive = () => {
        next.hasArrived = true;
        this.#wake();
      };
      next.promise.then(arrive, arrive);
      this.#next = next;
    }
    const next = this.#next;
    return await this.#holdsWithin(ms, () => next.hasArrived);
  }

  async #takeArrived(): Promise<Request | undefined> {
    const next = this.#next;
    this.#next = undefined;
    try {
      return await next?.promise;
    } catch (error) {
      this.close(); // Accepting is over.
      throw error;
    }
  }

  /** A `handleRequest()` that timed out has left a request to wait for: one accepts at a time. */
  #serveWaitingRequest(): Promise<void> {
    if (this.#next !== undefined) this.#servingNext = this.#serveNext();
    return this.#servingNext ?? DONE;
  }

  async #serveNext(): Promise<void> {
    try {
      const request = await this.#takeArrived();
      if (request !== undefined) this.#serve(request);
    } finally {
      this.#servingNext = undefined;
    }
  }

  #serve(request: Request): Promise<void> {
    const exchange = this.#track(request);
    this.noteBegun(request, exchange.clientAddress);
    if (this.#isClosed) this.#cut(exchange); // close() won the race.
    if (this.#context !== undefined) return this.#context.run(exchange, () => this.#serveExchange(exchange));
    this.#caller = exchange; // It never throws.
    const served = this.#serveExchange(exchange);
    this.#caller = undefined;
    return served;
  }

  /** Callbacks and no `async`: each asynchronous layer costs a datagram 3 % of its time. Never rejects. */
  #serveExchange(exchange: Exchange<Request>): Promise<void> {
    return this.#processExchange(exchange).then(
      () => this.#finishExchange(exchange),
      (error) => this.#failExchange(error, exchange),
    );
  }

  #processExchange(exchange: Exchange<Request>): Promise<void> {
    try {
      const preparing = this.prepareRequest(exchange.request);
      if (preparing !== undefined) return this.#processWhenReady(preparing, exchange);
      return this.#processPrepared(exchange);
    } catch (error) {
      return Promise.reject(error);
    }
  }

  async #processWhenReady(preparing: Promise<boolean>, exchange: Exchange<Request>): Promise<void> {
    exchange.isPreparing = true;
    const isReady = await preparing;
    exchange.isPreparing = false;
    this.#learnClient(exchange);
    if (isReady) await this.#processPrepared(exchange);
    else exchange.reason = "handshakeFailed";
  }

  /** A proxy may have told meanwhile whose request it relays. */
  #learnClient(exchange: Exchange<Request>): void {
    exchange.clientAddress = this.clientAddressOf(exchange.request);
  }

  #processPrepared(exchange: Exchange<Request>): Promise<void> {
    const { request, clientAddress, isCut } = exchange;
    if (isCut) return DONE; // By close(), before it could be served.
    const verified = this.verifyRequest(request, clientAddress);
    // Plain JavaScript may return something else than a promise.
    if (verified === true) return Promise.resolve(this.processRequest(request, clientAddress));
    return this.#processIfVerified(verified, exchange);
  }

  async #processIfVerified(verified: false | Promise<boolean>, exchange: Exchange<Request>): Promise<void> {
    const isVerified = await verified;
    if (exchange.isCut) return;
    if (isVerified) return await this.processRequest(exchange.request, exchange.clientAddress);
    this.#counts.rejected++;
    exchange.reason = "rejected";
  }

  #finishExchange(exchange: Exchange<Request>): void | Promise<void> {
    if (exchange.reason === "finished" && this.hasTimedOut(exchange.request)) {
      this.#counts.timedOut++;
      exchange.reason = "timedOut";
    }
    return this.#endExchange(exchange);
  }

  #endExchange(exchange: Exchange<Request>): void | Promise<void> {
    let closing: Promise<void> | undefined;
    try {
      closing = this.closeRequest(exchange.request);
    } catch {
      // Only an overridden stream or hook throws; the request is over all the same.
    }
    if (closing === undefined) return this.#untrack(exchange);
    const closed = Promise.resolve(closing).catch((error) => this.#noteUnsent(error, exchange));
    return closed.then(() => this.#untrack(exchange));
  }

  /** The handler is done, but the client did not take all that it has written. */
  #noteUnsent(error: unknown, exchange: Exchange<Request>): void {
    const outcome = outcomeOf(error, exchange);
    if (exchange.reason !== "finished" || outcome === undefined || outcome === "errors") return;
    this.#counts[outcome]++;
    exchange.reason = outcome;
  }

  async #failExchange(error: unknown, exchange: Exchange<Request>): Promise<void> {
    try {
      await this.#reportExchange(error, exchange);
    } catch {
      this.#counts.errors++; // What was thrown cannot even be looked at.
      exchange.reason = "error";
    }
    await this.#endExchange(exchange);
  }

  #track(request: Request): Exchange<Request> {
    const exchange = {
      request,
      clientAddress: this.clientAddressOf(request),
      index: this.#active.length,
      since: this.keepsContext || this.#isClosing ? performance.now() : 0,
      reason: "finished" as const,
      awaitsShutdown: false,
      isPreparing: false,
      isCut: false,
    };
    this.#counts.accepted++;
    this.#active.push(exchange);
    return exchange;
  }

  #untrack({ request, clientAddress, index, since, reason, isCut, awaitsShutdown }: Exchange<Request>): void {
    const last = this.#active.pop();
    if (last !== undefined && last.index !== index) {
      this.#active[index] = last;
      last.index = index;
    }
    if (awaitsShutdown) this.#awaitingShutdown--;
    if (this.#isClosing && !isCut) this.#counts.finished++;
    this.#addTraffic(this.#counts, request);
    if (!isCut) this.noteEnded(request, clientAddress, reason, since);
    this.#wake();
  }

  #addTraffic(sum: { bytesRead: number; bytesWritten: number }, request: Request): void {
    const { bytesRead, bytesWritten } = this.trafficOf(request);
    sum.bytesRead += bytesRead;
    sum.bytesWritten += bytesWritten;
  }

  /** Resolves when something has changed; there is a promise only if somebody waits. */
  #changed(): Promise<void> {
    this.#change ??= Promise.withResolvers();
    return this.#change.promise;
  }

  /** Wakes those who wait for something to change. */
  #wake(): void {
    this.#change?.resolve();
    this.#change = undefined;
  }

  async #drain(grace: number): Promise<ShutdownReport> {
    const begun = performance.now();
    const left = () => Math.max(0, begun + grace - performance.now());
    this.#enter("draining");
    const ending = this.#startEndingRequests(begun);
    if (!this.#serving) this.#backlog.end(); // Nobody would serve it.
    const stopped = this.stopListening(true);
    await settledWithin(stopped, Math.min(DRAIN_FIRST_WORD_MS, left()));
    this.#abortSignal();
    await settledWithin(stopped, left());
    await this.stopListening(false);
    if (!await this.#drainedWithin(left())) await this.#cutRest();
    if (!this.#isClosed) this.#enter("closed");
    this.#endWithin(left()).finally(() => clearInterval(ending));
    return this.#reportOf(begun);
  }

  /** Looks every 50 ms who waits for a new message, and ends them. */
  #startEndingRequests(begun: number): ReturnType<typeof setInterval> {
    const before = new Map<unknown, number>();
    for (const { request } of this.#active) before.set(request, this.trafficOf(request).bytesRead);
    let reads = control.completedReads();
    return setInterval(() => {
      const isBusy = control.completedReads() - reads > BUSY_READS;
      reads = control.completedReads();
      const now = performance.now();
      for (const exchange of this.#active) {
        const { request, since } = exchange;
        const isLate = now - Math.max(since, begun) >= DRAIN_FIRST_WORD_MS;
        // What it has sent before may still wait for its turn to be read.
        const isUnread = isBusy && before.get(request) === this.trafficOf(request).bytesRead;
        if (exchange.isPreparing) {
          if (isLate) this.#cut(exchange);
        } else if (isLate || !isUnread) this.endRequest(request, isLate);
      }
    }, DRAIN_SETTLE_MS);
  }

  async #cutRest(): Promise<void> {
    for (const exchange of this.#active) if (!exchange.awaitsShutdown) this.#cut(exchange);
    await this.#drainedWithin(UNWIND_MS);
  }

  /** Whether, within `ms`, all requests are over, but for those whose handlers wait for the shutdown themselves. */
  #drainedWithin(ms: number): Promise<boolean> {
    return this.#holdsWithin(
      ms,
      () => this.#isClosed || this.#active.every((exchange) => exchange.awaitsShutdown),
    );
  }

  /** Waits for handlers that called `shutdown()` themselves, cuts them after `ms`, and lets `serveForever()` go. */
  async #endWithin(ms: number): Promise<void> {
    const isOver = () => this.#phase === "ended" || this.#active.every((exchange) => exchange.isCut);
    if (!await this.#holdsWithin(ms, isOver)) { for (const exchange of this.#active) this.#cut(exchange); }
    await this.#holdsWithin(UNWIND_MS, () => this.#phase === "ended" || this.#active.length === 0);
    if (this.#phase !== "ended") this.#enter("ended");
  }

  /** Resolves to `true` as soon as `condition` holds, which changes when requests leave; to `false` after `ms`. */
  async #holdsWithin(ms: number, condition: () => boolean): Promise<boolean> {
    const expired = new AbortController();
    const timer = ms === Infinity ? undefined : setTimeout(() => {
      expired.abort();
      this.#wake();
    }, Math.min(ms, MAX_TIMER_MS));
    while (!condition() && !expired.signal.aborted) await this.#changed();
    clearTimeout(timer);
    return condition();
  }

  #cut(exchange: Exchange<Request>): void {
    if (exchange.isCut) return;
    exchange.isCut = true;
    this.#learnClient(exchange);
    const { request, clientAddress, since } = exchange;
    this.#cutOff.push(clientAddress);
    this.cutRequest(request, new Deno.errors.BadResource("The server has closed the connection"));
    // Its handler may never end.
    this.noteEnded(request, clientAddress, "cut", since);
  }

  async #reportOf(begun: number, stopped?: Promise<void>): Promise<ShutdownReport> {
    await stopped;
    return { finished: this.#counts.finished, cut: [...this.#cutOff], duration: performance.now() - begun };
  }
}

/**
 * Makes the runtime (2.9.6) open now what it would open later, when there may be
 * no descriptor left, on which it panics: the source map of this module, for the
 * first `stack` that is read, and its own listener of signals, which it would
 * start in the process's first 500 ms.
 */
function prepareForExhaustion(): void {
  if (isPrepared) return;
  isPrepared = true;
  void new TypeError("unused").stack;
  try {
    Deno.addSignalListener("SIGINT", ignore);
    Deno.removeSignalListener("SIGINT", ignore);
  } catch {
    // A worker has no signals.
  }
}

let isPrepared = false;

/** Whether the error comes from the client's own stream. Another stream's trouble, such as another client's, is the handler's own. */
function isOfClient(error: unknown, { request }: Exchange<unknown>): boolean {
  return error instanceof Error && originOf.get(error) === request;
}

/** How a request with this error is counted; `undefined` if the server itself has cut it off. */
function outcomeOf(error: unknown, exchange: Exchange<unknown>): "aborted" | "timedOut" | "errors" | undefined {
  if (!isOfClient(error, exchange) || error instanceof LimitOverrunError) return "errors";
  if (error instanceof Deno.errors.TimedOut) return "timedOut";
  // A stream that was closed by its own handler is no use to it any more.
  if (error instanceof Deno.errors.BadResource) return exchange.isCut ? undefined : "errors";
  return "aborted";
}

/** What `promise` resolves to, or `undefined` after `ms`. */
async function settledWithin<T>(promise: Promise<T>, ms: number): Promise<T | undefined> {
  if (ms === Infinity) return await promise;
  const settled = new AbortController();
  try {
    return await Promise.race([promise, delay(ms, settled.signal).then(() => undefined)]);
  } finally {
    settled.abort();
  }
}

/** What a server shares with those of other threads; see {@linkcode WorkerPool}. */
interface Sharing {
  readonly threads: number;
  /** What they all ask to listen on; the first has to find the port out. */
  address?: { readonly hostname: string; readonly port: number };
}

const sharings = new WeakMap<object, Sharing>();

/** Who waits for a server in another thread asks how long it may take. */
let graceOf: (server: StreamServer) => number;

/** Descriptors that the start of a thread takes: 6 were counted in Deno 2.9.6 before it serves, 9 after. */
const WORKER_DESCRIPTORS = 12;

/** Descriptors of the runtime itself: Deno 2.9.6 has 21 to 23 and opens a few more now and then. */
const RUNTIME_DESCRIPTORS = 32;

/** The part of the others that is for connections; the rest is the program's, for its files and its own dials. */
const CONNECTIONS_SHARE = 7 / 8;

/** How many connections a server can serve in a process with these `limits`, the text of /proc/self/limits. */
function affordableConnections(limits: string, sharing: Sharing | undefined): number {
  // The runtime has raised the soft limit, which is the first, to the hard one.
  const [, descriptors] = /^Max open files +(\d+)/m.exec(limits) ?? [];
  if (descriptors === undefined) return Infinity;
  const { threads } = sharing ?? { threads: 1 };
  const taken = RUNTIME_DESCRIPTORS + (sharing === undefined ? 0 : threads * WORKER_DESCRIPTORS);
  return Math.max(1, Math.floor((Number(descriptors) - taken) * CONNECTIONS_SHARE / threads));
}

/** The limits of this process, "" where they cannot be known; never asks for a permission. */
function processLimits(): string {
  const path = "/proc/self/limits";
  try {
    if (Deno.permissions.querySync({ name: "read", path }).state !== "granted") return "";
    return Deno.readTextFileSync(path);
  } catch {
    // The runtime shows it to programs with all permissions only, and other systems have none.
    return "";
  }
}

async function flushAndClose(stream: SocketStream): Promise<void> {
  try {
    await stream.flush();
  } catch (error) {
    if (!(error instanceof Deno.errors.BadResource)) throw error; // Else its handler has closed it.
  } finally {
    await stream[Symbol.asyncDispose]();
  }
}

/** How many connections each host has. */
class HostCounts {
  readonly #limit: number;
  readonly #counts = new Map<string, number>();

  constructor(limit: number) {
    this.#limit = limit;
  }

  /** Counts one more, which has to {@linkcode HostCounts.leave}; `false` if the host has as many as it may. */
  enter(host: string): boolean {
    const count = this.#counts.get(host) ?? 0;
    if (count >= this.#limit) return false;
    this.#counts.set(host, count + 1);
    return true;
  }

  leave(host: string): void {
    const left = (this.#counts.get(host) ?? 1) - 1;
    if (left > 0) this.#counts.set(host, left);
    else this.#counts.delete(host);
  }
}

/**
 * A server of connections: it accepts them, makes a {@linkcode SocketStream} of
 * each and hands it to a handler of its own. What it adds to
 * {@linkcode BaseServer}:
 *
 * Call: `connections`. Override: `getRequest`, `handleOpen`, `handleClose`,
 * `handleRefuse`. Read: `maxConnections`, `openConnections`.
 *
 * @typeParam Address The kind of address that the server has.
 */
export abstract class StreamServer<Address extends Deno.Addr = Deno.Addr> extends BaseServer<SocketStream, Address> {
  static {
    graceOf = (server) => server.#options.grace;
  }

  readonly #Handler: StreamRequestHandlerClass;
  readonly #options: ServerSettings;
  readonly #streamOptions: StreamOptions;
  #maxConnections: number;
  readonly #hosts: HostCounts;
  /** The hosts of the requests that are counted there. */
  readonly #hostOf = new WeakMap<SocketStream, string>();
  readonly #proxies: TrustedProxies | undefined;
  /** Those whose proxy has not said yet whose they are; no hook was told of them. */
  readonly #awaitingHeader = new WeakSet<SocketStream>();
  #listener: Deno.Listener | undefined;
  #accepting: Promise<Deno.Conn> | undefined;
  /** The stream that `getRequest()` has made last. */
  #made: SocketStream | undefined;

  /**
   * Keeps the options; nothing is opened and no hook is called.
   *
   * @param Handler The class whose objects serve the connections.
   * @param options Limits and deadlines.
   */
  protected constructor(Handler: StreamRequestHandlerClass, options: ServerOptions) {
    const resolved = resolveOptions(SERVER_DEFAULTS, options);
    super(resolved.grace);
    const { timeout, idleTimeout, maxLifetime, limit, highWaterMark } = resolved;
    this.#Handler = Handler;
    this.#options = resolved;
    this.#streamOptions = resolveStreamOptions({ timeout, idleTimeout, maxLifetime, limit, highWaterMark });
    this.#maxConnections = resolved.maxConnections ?? Infinity;
    this.#hosts = new HostCounts(resolved.maxConnectionsPerHost);
    this.#proxies = resolved.proxyProtocol === undefined ? undefined : new TrustedProxies(resolved.proxyProtocol);
  }

  /** The most connections that are served at the same time: the option, or what `listen()` has found in its place. */
  get maxConnections(): number {
    return this.#maxConnections;
  }

  /**
   * The connections that are being served, the oldest one first.
   *
   * @example Who waits for what
   * ```ts
   * import { formatAddress, StreamRequestHandler, TcpServer } from "@socketserver/socketserver";
   *
   * class Reporting extends TcpServer {
   *   override serviceActions() {
   *     for (const { clientAddress, age, waitsFor } of this.openConnections) {
   *       if (age > 60_000) console.log(`${formatAddress(clientAddress)} waits for ${waitsFor}`);
   *     }
   *   }
   * }
   * ```
   */
  get openConnections(): OpenConnection[] {
    const now = performance.now();
    const connections = this.openRequests.map(({ request, since }) => ({
      clientAddress: request.remoteAddress,
      age: now - since,
      bytesRead: request.bytesRead,
      bytesWritten: request.bytesWritten,
      waitsFor: control.waitsFor(request),
    }));
    return connections.sort((one, other) => other.age - one.age);
  }

  /**
   * The connections as they come: one iteration that no client's error and no
   * shortage of descriptors ends. `serveForever()` runs over it; a program that
   * wants the bare connections may do so itself, after `listen()`.
   *
   * @returns The iterator. It ends when the server stops listening, and throws what
   * {@linkcode acceptFailure} calls fatal.
   *
   * @example
   * ```ts
   * import { StreamRequestHandler, TcpServer } from "@socketserver/socketserver";
   *
   * class Unused extends StreamRequestHandler {
   *   override handle() {}
   * }
   *
   * await using server = new TcpServer({ port: 0 }, Unused);
   * const { port } = server.listen();
   * const client = await Deno.connect({ port });
   * for await (const conn of server.connections()) {
   *   conn.close();
   *   break;
   * }
   * client.close();
   * ```
   */
  async *connections(): AsyncGenerator<Deno.Conn, void> {
    while (true) {
      let conn: Deno.Conn;
      try {
        conn = await this.#acceptNext();
      } catch (error) {
        if (await this.rideOut(error)) continue;
        return;
      }
      this.noteReceived();
      yield conn;
    }
  }

  /**
   * Makes the request of an accepted connection. Override it to put something
   * around every stream.
   *
   * @param conn The connection.
   * @returns Its stream, which owns it.
   */
  getRequest(conn: Deno.Conn): SocketStream {
    if (this.#options.noDelay) disableNagle(conn);
    return this.#made = new SocketStream(conn, this.#streamOptions);
  }

  /**
   * Is told of each connection that is taken in, before its TLS handshake and before
   * `verifyRequest()`, but behind the PROXY header where there is one, so that the
   * address is the client's; {@linkcode StreamServer.handleClose} is told of its end,
   * whatever that is. A connection without the header that it needs is not one.
   * Nothing waits for what it returns, and what it throws is printed and counted in
   * `stats.errors`. The default does nothing.
   *
   * @param _request The stream; read nothing from it.
   * @param _clientAddress Whose it is.
   */
  handleOpen(_request: SocketStream, _clientAddress: Deno.Addr): void | Promise<void> {}

  /**
   * Is told of each connection that is closed. The handler is done by then, but for
   * one that was cut off. Nothing waits for what it returns, and what it throws is
   * printed and counted in `stats.errors`. The default does nothing.
   *
   * @param _report How it went: why it is over, how long it took, how many bytes.
   * @param _clientAddress Whose it was.
   *
   * @example An access log
   * ```ts
   * import { type ConnectionReport, formatAddress, TcpServer } from "@socketserver/socketserver";
   *
   * class Logging extends TcpServer {
   *   override handleClose({ reason, duration, bytesRead, bytesWritten }: ConnectionReport, clientAddress: Deno.Addr) {
   *     console.log(formatAddress(clientAddress), reason, `${Math.round(duration)} ms`, bytesRead, bytesWritten);
   *   }
   * }
   * ```
   */
  handleClose(_report: ConnectionReport, _clientAddress: Deno.Addr): void | Promise<void> {}

  /**
   * Is told of each connection that is closed at once, as its host has
   * `maxConnectionsPerHost` already, or as it comes from no proxy where
   * `proxyProtocol` serves no others; no other hook is told of it. Nothing waits for
   * what it returns, and what it throws is printed and counted in `stats.errors`. The
   * default does nothing; `stats.refused` counts them.
   *
   * @param _clientAddress Whose it was.
   */
  handleRefuse(_clientAddress: Deno.Addr): void | Promise<void> {}

  /** Makes the handler and runs its `setup()`, `handle()` and `finish()`. */
  override finishRequest(request: SocketStream, clientAddress: Deno.Addr): Promise<void> {
    return runHandler(new this.#Handler(request, clientAddress, this));
  }

  /** To be called by `listen()`: takes over the listener that it opened. */
  protected adopt(listener: Deno.Listener, address: Address): Address {
    if (!this.noteListening(address)) {
      closeQuietly(listener);
      this.checkOpen();
    }
    if (this.#options.maxConnections === undefined) {
      this.#maxConnections = affordableConnections(processLimits(), sharings.get(this));
    }
    this.#listener = listener;
    return address;
  }

  /** Serves the connections as they come. */
  protected override async serveRequests(serve: (request: SocketStream) => void): Promise<void> {
    for await (const conn of this.connections()) {
      const request = await this.#tryToGetRequest(conn);
      if (request !== undefined) serve(request);
    }
  }

  /** The next connection. */
  protected override async acceptRequest(): Promise<SocketStream | undefined> {
    for await (const conn of this.connections()) {
      const request = await this.#tryToGetRequest(conn);
      if (request !== undefined) return request;
    }
    return undefined;
  }

  /** The request of `conn`, unless its host has too many already. Only an overridden `getRequest()` throws. */
  async #tryToGetRequest(conn: Deno.Conn): Promise<SocketStream | undefined> {
    const isProxy = this.#proxies?.has(conn.remoteAddr) === true;
    // A proxy's clients are counted when they are known, and the proxy never.
    const host = isProxy ? undefined : this.#limitedHostOf(conn.remoteAddr);
    const isUnwanted = !isProxy && this.#proxies?.refusesOthers === true;
    if (isUnwanted || (host !== undefined && !this.#hosts.enter(host))) {
      closeQuietly(conn);
      return this.#noteRefused(conn.remoteAddr);
    }
    try {
      const request: unknown = await this.getRequest(conn);
      if (!(request instanceof SocketStream)) {
        throw new TypeError(`getRequest() must return a SocketStream: it has returned ${kindOf(request)}`);
      }
      if (host !== undefined) this.#hostOf.set(request, host);
      if (isProxy) this.#awaitingHeader.add(request);
      return request;
    } catch (error) {
      if (host !== undefined) this.#hosts.leave(host);
      this.#made?.close(); // A hook may have thrown with it in its hands.
      closeQuietly(conn);
      void this.reportError(error, conn.remoteAddr); // Nobody else waits for this client.
      return undefined;
    } finally {
      this.#made = undefined;
    }
  }

  #noteRefused(clientAddress: Deno.Addr | undefined): undefined {
    this.countIncident("refused");
    if (clientAddress !== undefined) this.runHook("handleRefuse", () => this.handleRefuse(clientAddress));
  }

  /** The host of `address`, if hosts are counted and it has one. */
  #limitedHostOf(address: Deno.Addr): string | undefined {
    return this.#options.maxConnectionsPerHost === Infinity ? undefined : hostOf(address);
  }

  /** Milliseconds that the PROXY header and the TLS handshake may take together. */
  protected get handshakeTimeout(): number {
    return this.#options.handshakeTimeout;
  }

  /** Reads the PROXY header, where one is due. */
  protected override prepareRequest(request: SocketStream): Promise<boolean> | undefined {
    return this.#awaitingHeader.has(request) ? this.#learnClient(request) : undefined;
  }

  /** Whether the proxy has said whose connection it is, and that client may have one more. */
  async #learnClient(request: SocketStream): Promise<boolean> {
    const header = await this.#readProxyHeader(request);
    // It may have been cut off in the same moment.
    if (header === undefined || !this.#awaitingHeader.has(request)) return false;
    const host = header.source && this.#limitedHostOf(header.source);
    if (host !== undefined) {
      if (!this.#hosts.enter(host)) {
        this.#noteRefused(header.source);
        return false;
      }
      this.#hostOf.set(request, host);
    }
    this.#awaitingHeader.delete(request);
    this.#tellOpen(request);
    return true;
  }

  /** The header; `undefined` if there is none, which is counted. */
  async #readProxyHeader(request: SocketStream): Promise<ProxyHeader | undefined> {
    const proxy = request.remoteAddress;
    try {
      const header = await control.readProxyHeader(request, this.handshakeTimeout);
      return header ?? this.countIncident("lost"); // A health check connects and leaves.
    } catch (error) {
      if (error instanceof Deno.errors.BadResource) return undefined; // The server has cut it off.
      const isLate = error instanceof Deno.errors.TimedOut;
      if (!isLate && request.bytesRead === 0) return this.countIncident("lost"); // Another check leaves with a reset.
      this.countIncident("handshakeFailures");
      if (!isLate) void this.reportMisuse(error, proxy); // It has its place no longer than that.
      return undefined;
    }
  }

  /** Tells the hook, unless it is not known yet whose connection it is. */
  protected override noteBegun(request: SocketStream, _clientAddress: Deno.Addr): void {
    if (!this.#awaitingHeader.has(request)) this.#tellOpen(request);
  }

  #tellOpen(request: SocketStream): void {
    this.runHook("handleOpen", () => this.handleOpen(request, request.remoteAddress));
  }

  /** Lets the client's host have another connection, and tells the hook. */
  protected override noteEnded(
    request: SocketStream,
    clientAddress: Deno.Addr,
    reason: CloseReason,
    since: number,
  ): void {
    const host = this.#hostOf.get(request);
    if (host !== undefined) this.#hosts.leave(host);
    if (this.#awaitingHeader.delete(request)) return; // It was nobody's.
    const { bytesRead, bytesWritten } = request;
    const report = { reason, duration: performance.now() - since, bytesRead, bytesWritten };
    this.runHook("handleClose", () => this.handleClose(report, clientAddress));
  }

  /** A stream that was closed by a deadline says so. */
  protected override hasTimedOut(request: SocketStream): boolean {
    return control.failureOf(request) instanceof Deno.errors.TimedOut;
  }

  /** Stops listening. */
  protected override async stopListening(backlog: boolean): Promise<void> {
    if (this.#listener === undefined) return;
    if (backlog) await this.emptyBacklog();
    const listener = this.#listener;
    this.#listener = undefined;
    if (listener !== undefined) await this.closeListener(listener);
  }

  /** Closes the listener; its address is free when this resolves. */
  protected async closeListener(listener: Deno.Listener): Promise<void> {
    closeQuietly(listener);
    // The address stays bound until the pending accept() has been rejected.
    await this.#accepting?.catch(ignore);
  }

  /** Connections live long enough to afford it. */
  protected override get keepsContext(): boolean {
    return true;
  }

  /** The stream's peer. */
  protected override clientAddressOf(request: SocketStream): Deno.Addr {
    return request.remoteAddress;
  }

  /** The stream's own counts. */
  protected override trafficOf(request: SocketStream): SocketStream {
    return request;
  }

  /** Ends a stream that waits for a new message. */
  protected override endRequest(request: SocketStream, isLate: boolean): void {
    if (isLate || request.bytesRead > 0) control.endBetweenMessages(request, isLate);
  }

  /** Sends what is buffered and closes the stream; rejects if not all could be sent. */
  protected override closeRequest(request: SocketStream): Promise<void> | undefined {
    if (control.isSettled(request)) return void request.close();
    if (request.timeout === Infinity) request.timeout = CLOSE_STALL_MS;
    return flushAndClose(request);
  }

  /** Closes the stream now. */
  protected override cutRequest(request: SocketStream, error: Error): void {
    control.cut(request, error);
  }

  async #acceptNext(): Promise<Deno.Conn> {
    await this.belowLimit(this.#maxConnections);
    if (this.#listener === undefined) throw new Deno.errors.BadResource("Listener has been closed");
    this.#accepting = this.receiving(this.#listener.accept());
    return await this.#accepting;
  }
}

// --- TCP, TLS and Unix servers ----------------------------------------------

/**
 * Connections that may wait in the kernel to be accepted; the kernel takes the
 * smaller of it and net.core.somaxconn. In a burst over the backlog clients wait
 * for a second and more: with the runtime's 511, 1,488 of 2,000 did; with 4,096 none.
 */
const MAX_BACKLOG = 4_096;

/** listen(2) takes an `int`; of a larger number the runtime makes one that may be 0. */
const LONGEST_BACKLOG = 2_147_483_647;

/** Where a {@linkcode TcpServer} listens. */
export interface TcpServerAddress {
  /**
   * The address of an interface, or a name that resolves to one. `"0.0.0.0"` is
   * all IPv4 interfaces, `"::"` all of IPv6 and (on Linux) IPv4.
   *
   * @default {"127.0.0.1"}
   */
  hostname?: string;
  /** The port, from 1 to 65535; 0 takes a free one. */
  port: number;
  /**
   * Connections that may wait in the kernel to be accepted, from 1 to 2,147,483,647.
   *
   * @default {4_096}
   */
  tcpBacklog?: number;
  /**
   * Whether several processes may listen on the port at the same time
   * (`SO_REUSEPORT`), among which the kernel spreads the connections. Linux only,
   * and with `--unstable-net`; without that flag `listen()` throws `TypeError`.
   *
   * @default {false}
   */
  reusePort?: boolean;
}

/**
 * A TCP server. It is Python's `ThreadingTCPServer`, and with `maxConnections: 1`
 * its `TCPServer`. `SO_REUSEADDR` is always set, so that a restart finds its port.
 *
 * @example
 * ```ts
 * import { connect, StreamRequestHandler, TcpServer } from "@socketserver/socketserver";
 * import { assertEquals } from "@std/assert";
 *
 * class Upper extends StreamRequestHandler {
 *   override async handle() {
 *     for await (const line of this.request.lines()) await this.request.write(line.toUpperCase() + "\n");
 *   }
 * }
 *
 * await using server = new TcpServer({ port: 0 }, Upper, { idleTimeout: 60_000 });
 * const { port } = server.listen();
 * server.serveForever();
 * await using client = await connect({ port });
 * await client.send("hello\n");
 * assertEquals(await client.readLine(), "HELLO");
 * ```
 */
export class TcpServer extends StreamServer<Deno.NetAddr> {
  readonly #wanted: Required<TcpServerAddress>;

  /**
   * Makes a server; nothing is opened yet.
   *
   * @param address Where to listen.
   * @param Handler The class whose objects serve the connections.
   * @param options Limits and deadlines.
   * @throws {RangeError} If a number is out of its range.
   * @throws {TypeError} If an option does not exist.
   */
  constructor(address: TcpServerAddress, Handler: StreamRequestHandlerClass, options: ServerOptions = {}) {
    checkServerArguments(address, Handler);
    super(Handler, options);
    if (options.proxyProtocol?.from.every((proxy) => proxy === UNIX_PEERS)) {
      throw new TypeError(`The clients here have addresses: "proxyProtocol.from" must list more than "${UNIX_PEERS}"`);
    }
    const defaults = { hostname: "127.0.0.1", port: 0, tcpBacklog: MAX_BACKLOG, reusePort: false };
    this.#wanted = resolveOptions(defaults, address);
    checkHostname(this.#wanted.hostname);
    checkPort(address.port);
    if (this.#wanted.tcpBacklog > LONGEST_BACKLOG) {
      throw new RangeError(`Option "tcpBacklog" must be ${LONGEST_BACKLOG} or less: it is ${this.#wanted.tcpBacklog}`);
    }
  }

  /** Binds the port and lets clients connect; see {@linkcode BaseServer.listen}. */
  override listen(): Deno.NetAddr {
    this.checkOpen();
    if (this.boundAddress !== undefined) return this.boundAddress;
    const wanted = { transport: "tcp", ...this.#wanted } as const;
    // Without the flag the runtime prints a line and ends the process, which nobody can catch.
    if (wanted.reusePort && !hasDatagrams(Deno)) {
      throw new TypeError("Cannot listen with reusePort: Deno has it behind a flag; run again with --unstable-net");
    }
    const sharing = sharings.get(this);
    if (wanted.reusePort && sharing !== undefined) {
      throw new TypeError("Cannot listen with reusePort: the threads of a pool share their port without it");
    }
    const open = () => sharing === undefined ? Deno.listen(wanted) : openShared({ ...wanted, ...sharing.address });
    const listener = tryTo("listen on", wanted, open);
    // Who may listen on a name may not do so on its address.
    if (sharing !== undefined) sharing.address ??= wanted.port === 0 ? listener.addr : wanted;
    return this.adopt(listener, listener.addr);
  }
}

/** How often a free port is chosen that somebody else takes before it is shared. */
const SHARED_PORT_TRIES = 16;

/**
 * Opens a port that the threads of this process share, with one queue of clients: what one does not accept,
 * another does. `loadBalanced` is not documented and needs no flag; it is how `deno serve --parallel` shares its port.
 */
function openShared(address: { hostname: string; port: number }, tries = SHARED_PORT_TRIES): Deno.TcpListener {
  if (address.port !== 0) {
    const shared = { ...address, transport: "tcp", loadBalanced: true } as const;
    return Deno.listen(shared);
  }
  // Threads share what they ask for by the same name, and port 0 is another's as well.
  const { hostname, port } = freeAddress(address);
  try {
    return openShared({ ...address, hostname, port });
  } catch (error) {
    if (tries > 1 && error instanceof Deno.errors.AddrInUse) return openShared(address, tries - 1);
    throw error;
  }
}

/** An address whose port nobody has. */
function freeAddress(address: { hostname: string; port: number }): Deno.NetAddr {
  const listener = Deno.listen({ ...address, transport: "tcp" });
  listener.close();
  return listener.addr;
}

/** Where a {@linkcode TlsServer} listens, and its certificate. */
export interface TlsServerAddress extends TcpServerAddress, TlsServerSettings {}

/** What a {@linkcode TlsServer} is told when it is made, besides its address. */
export type TlsServerOptions = ServerOptions;

/**
 * A TCP server whose streams are encrypted. `this.request.tls` says what the
 * handshake has agreed on and, with `clientCa`, who the client is.
 *
 * The handshake is done before `verifyRequest()` and before a handler exists. A
 * client that stalls in it, sends something else or leaves costs only itself: it
 * counts as one of `maxConnections` until `handshakeTimeout`, is counted in
 * {@linkcode ServerStats.handshakeFailures}, and nothing is printed.
 *
 * What it adds to {@linkcode TcpServer}: Call: `setCertificate`.
 *
 * @example
 * ```ts
 * import { StreamRequestHandler, TlsServer } from "@socketserver/socketserver";
 *
 * class Greeter extends StreamRequestHandler {
 *   override handle() {
 *     const name = this.request.tls?.peerCertificate?.commonName;
 *     return this.request.send(`hello ${name}\n`);
 *   }
 * }
 *
 * async function serve(folder: string) {
 *   const cert = await Deno.readTextFile(`${folder}/cert.pem`);
 *   const key = await Deno.readTextFile(`${folder}/key.pem`);
 *   const clientCa = await Deno.readTextFile(`${folder}/ca.pem`);
 *   await new TlsServer({ port: 8443, cert, key, clientCa }, Greeter).serveForever();
 * }
 * ```
 */
export class TlsServer extends TcpServer {
  readonly #settings: TlsServerSettings;
  #handshake: Handshake | undefined;

  /**
   * Makes a server; nothing is opened yet.
   *
   * @param address Where to listen, with what certificate, and whose certificates
   * clients must have.
   * @param Handler The class whose objects serve the connections.
   * @param options Limits and deadlines.
   * @throws {RangeError} If a number is out of its range.
   * @throws {TypeError} If an option does not exist.
   */
  constructor(address: TlsServerAddress, Handler: StreamRequestHandlerClass, options: TlsServerOptions = {}) {
    checkServerArguments(address, Handler);
    const { cert, key, clientCa, alpnProtocols, ...tcp } = address;
    super(tcp, Handler, options);
    this.#settings = {
      cert,
      key,
      ...(clientCa === undefined ? {} : { clientCa }),
      ...(alpnProtocols === undefined ? {} : { alpnProtocols }),
    };
  }

  /**
   * Binds the port and lets clients connect; see {@linkcode BaseServer.listen}.
   *
   * @returns The bound address.
   * @throws {Deno.errors.InvalidData} If a certificate or the key is none, or the
   * two do not belong together.
   */
  override listen(): Deno.NetAddr {
    this.#handshake ??= this.#prepare(this.#settings);
    return super.listen();
  }

  /**
   * Gives the server a new certificate. Later connections get it; those that are
   * open, or in the middle of their handshake, go on with the old one.
   *
   * @param certificate The certificate and its key.
   * @throws {Deno.errors.InvalidData} If one of them is none, or they do not belong
   * together; the old one stays.
   */
  setCertificate(certificate: TlsCertificate): void {
    const { cert, key } = certificate;
    this.#handshake = this.#prepare({ ...this.#settings, cert, key });
  }

  /** Reads the PROXY header, where one is due, and does the handshake in the time that is left. */
  protected override async prepareRequest(request: SocketStream): Promise<boolean> {
    if (this.#handshake === undefined) return false; // It does not listen.
    const begun = performance.now();
    const preparing = super.prepareRequest(request);
    if (preparing !== undefined && !await preparing) return false;
    const left = Math.max(this.handshakeTimeout - (performance.now() - begun), 1);
    try {
      await control.startTls(request, this.#handshake, left);
      return true;
    } catch (error) {
      // It is the client's own trouble, and anybody on the network can be one; but for a cut, which is the server's.
      if (!(error instanceof Deno.errors.BadResource)) this.countIncident("handshakeFailures");
      return false;
    }
  }

  #prepare(settings: TlsServerSettings): Handshake {
    return serverHandshake(settings, this.handshakeTimeout);
  }
}

/** Where a {@linkcode UnixServer} listens. */
export interface UnixServerAddress {
  /** The path of the socket file, of 107 bytes at most. A path that begins with `"\0"` is a name without a file (Linux). */
  path: string;
  /**
   * The permissions of the socket file, from 0 to `0o777`, such as `0o660`: who may
   * write to it may connect. Between its making and the change it has those that the umask gives.
   *
   * @default What the umask leaves of 0o777.
   */
  mode?: number;
}

/**
 * A server for programs of the same machine: Python's
 * `ThreadingUnixStreamServer`.
 *
 * A socket file that a dead server has left is replaced; one that is answered, or
 * any other file, is `Deno.errors.AddrInUse`. The file is removed when the server
 * stops. If it is another's by then, it stays, as long as the program may write to
 * the folder; else it goes, too, and a sentence says so.
 *
 * It needs `--allow-read` and `--allow-write` of the path, and
 * `--allow-net=unix:PATH`.
 *
 * @example
 * ```ts
 * import { connect, StreamRequestHandler, UnixServer } from "@socketserver/socketserver";
 * import { assertEquals } from "@std/assert";
 *
 * class Hello extends StreamRequestHandler {
 *   override handle() {
 *     return this.request.send("hello\n");
 *   }
 * }
 *
 * const path = `${await Deno.makeTempDir()}/hello.sock`;
 * await using server = new UnixServer({ path, mode: 0o600 }, Hello);
 * await server.listen();
 * server.serveForever();
 * await using client = await connect({ path });
 * assertEquals(await client.readLine(), "hello");
 * ```
 */
export class UnixServer extends StreamServer<Deno.UnixAddr> {
  readonly #file: SocketFile;
  #binding: Promise<Deno.UnixAddr> | undefined;

  /**
   * Makes a server; nothing is opened yet.
   *
   * @param address Where to listen.
   * @param Handler The class whose objects serve the connections.
   * @param options Limits and deadlines.
   * @throws {RangeError} If a number is out of its range.
   * @throws {TypeError} If an option does not exist, or the path is empty.
   */
  constructor(address: UnixServerAddress, Handler: StreamRequestHandlerClass, options: ServerOptions = {}) {
    checkServerArguments(address, Handler);
    super(Handler, options);
    if (options.proxyProtocol !== undefined && !options.proxyProtocol.from.includes(UNIX_PEERS)) {
      throw new TypeError(`The peers of a Unix socket have no address: "proxyProtocol.from" must list "${UNIX_PEERS}"`);
    }
    this.#file = new SocketFile(address);
  }

  /** Makes the socket file and lets clients connect; see {@linkcode BaseServer.listen}. It resolves, as asking whether another server is alive takes a dial. */
  override listen(): Promise<Deno.UnixAddr> {
    return this.#binding ??= this.#bind();
  }

  async #bind(): Promise<Deno.UnixAddr> {
    const address = { transport: "unix", path: this.#file.path } as const;
    try {
      this.checkOpen();
      const listener = await this.#file.bind(() => Deno.listen(address));
      return this.adopt(listener, address);
    } catch (error) {
      this.#binding = undefined;
      throw listenError(error, address);
    }
  }

  /** Closes the listener and removes its file, but no other that has come into its place. */
  protected override async closeListener(listener: Deno.Listener): Promise<void> {
    await this.#file.unbind(() => super.closeListener(listener));
  }
}

/** All that the permissions of a file can grant. */
const MAX_MODE = 0o777;

/** The paths whose servers are closing, and when they are closed. The runtime removes a file late, and would take a successor's for it. */
const unbinding = new Map<string, Promise<void>>();

/** The file of a Unix socket. A name that begins with `"\0"` has none. */
class SocketFile {
  readonly path: string;
  readonly #mode: number | undefined;
  /** The file that was made, to know it again. */
  #made: Deno.FileInfo | undefined;

  constructor(address: UnixServerAddress) {
    const defaults: { path: string; mode: number | undefined } = { path: "", mode: undefined };
    const { path, mode } = resolveOptions(defaults, address);
    checkText("path", path);
    if (path === "") throw new TypeError("Path must not be empty: name the socket file");
    if (mode !== undefined && mode > MAX_MODE) {
      const octal = mode === Infinity ? "Infinity" : `0o${mode.toString(8)}`;
      throw new RangeError(`Option "mode" must be from 0 to 0o777, such as 0o660: it is ${octal}`);
    }
    this.path = path;
    this.#mode = mode;
  }

  /** Runs `open`, which makes the file, in the place of one that nobody answers on. */
  async bind<Socket extends { close(): void }>(open: () => Socket): Promise<Socket> {
    await unbinding.get(this.path);
    if (fileAt(this.path)?.isSocket) await this.#removeIfStale();
    return this.#make(open);
  }

  /** Runs `open` again, in the place of our own file. */
  rebind<Socket extends { close(): void }>(open: () => Socket): Socket {
    if (isSameFile(fileAt(this.path), this.#made)) Deno.removeSync(this.path);
    return this.#make(open);
  }

  #make<Socket extends { close(): void }>(open: () => Socket): Socket {
    const socket = open();
    if (this.path.startsWith("\0")) return socket;
    try {
      if (this.#mode !== undefined) Deno.chmodSync(this.path, this.#mode);
      this.#made = Deno.lstatSync(this.path);
    } catch (error) {
      closeQuietly(socket);
      throw error;
    }
    return socket;
  }

  async #removeIfStale(): Promise<void> {
    const found = fileAt(this.path);
    try {
      const conn = await Deno.connect({ transport: "unix", path: this.path });
      conn.close();
    } catch (error) {
      // Anything else than this is an answer of some kind, or will meet the bind too. Meanwhile another may have replaced it.
      const isStale = error instanceof Deno.errors.ConnectionRefused;
      if (isStale && isSameFile(fileAt(this.path), found)) Deno.removeSync(this.path);
    }
  }

  /** Runs `close`, and leaves no file behind; another's, that has come into its place, stays. Never throws. */
  unbind(close: () => void | Promise<void>): Promise<void> {
    const closed = this.#unbind(close).finally(() => unbinding.delete(this.path));
    unbinding.set(this.path, closed);
    return closed;
  }

  async #unbind(close: () => void | Promise<void>): Promise<void> {
    // The runtime removes whatever has the socket's path, so another's file gets
    // a second name for that moment.
    const aside = this.#othersHavePath ? `${this.path}.${crypto.randomUUID()}` : undefined;
    const isKept = aside !== undefined && this.#tidyUp(() => linkQuietly(this.path, aside));
    await close();
    if (isKept) this.#tidyUp(() => restoreLink(aside, this.path));
    else if (isSameFile(fileAt(this.path), this.#made)) this.#tidyUp(() => Deno.removeSync(this.path));
  }

  get #othersHavePath(): boolean {
    const present = this.#made === undefined ? undefined : fileAt(this.path);
    return present !== undefined && !isSameFile(present, this.#made);
  }

  /** Whether it could be done. */
  #tidyUp(action: () => void): boolean {
    try {
      action();
      return true;
    } catch (error) {
      console.error(`Cannot tidy up the socket file ${this.path}: ${messageOf(error)}`);
      return false;
    }
  }
}

function tryTo<Socket>(what: string, address: Deno.Addr, open: () => Socket): Socket {
  try {
    return open();
  } catch (error) {
    throw openingError(what, address, error);
  }
}

/** What a failed bind rejects with; a TypeError says by itself what was asked wrongly. */
function listenError(error: unknown, address: Deno.Addr): Error {
  if (errorCode(error) === "ENOENT") {
    return restate(error, `Cannot listen on ${formatAddress(address)}: its folder does not exist; make it first`);
  }
  return openingError("listen on", address, error);
}

function openingError(what: string, address: Deno.Addr, error: unknown): Error {
  if (error instanceof TypeError) return error;
  return restate(error, `Cannot ${what} ${formatAddress(address)}: ${explain(error, address)}`);
}

function fileAt(path: string): Deno.FileInfo | undefined {
  try {
    return Deno.lstatSync(path);
  } catch {
    // It is not there, or we may not know: the bind will say so.
    return undefined;
  }
}

/** Gives the file at `path` a second name, but asks nobody on a terminal whether it may: the program ends, perhaps unwatched. */
function linkQuietly(path: string, aside: string): void {
  for (const name of ["read", "write"] as const) {
    if (Deno.permissions.querySync({ name, path: aside }).state === "granted") continue;
    throw new Deno.errors.NotCapable(
      `it is another server's by now, and takes --allow-${name} of its folder to keep`,
    );
  }
  Deno.linkSync(path, aside);
}

/** Gives a file its `path` back, and takes its other name away. */
function restoreLink(aside: string, path: string): void {
  Deno.renameSync(aside, path);
  if (fileAt(aside) !== undefined) Deno.removeSync(aside); // Both names were there: rename(2) does nothing then.
}

/** The number of a file that is gone may be a new one's, but that is born later. */
function isSameFile(file: Deno.FileInfo | undefined, other: Deno.FileInfo | undefined): boolean {
  return file !== undefined && other !== undefined && file.ino === other.ino && file.dev === other.dev &&
    file.birthtime?.getTime() === other.birthtime?.getTime();
}

// --- Workers ----------------------------------------------------------------

/** Milliseconds that a thread has to load its module and to begin to serve. */
const WORKER_START_MS = 60_000;

/** Milliseconds to wait before a worker that crashed is replaced for the first time; twice as long each next time. */
const CRASH_WAIT_MIN_MS = 100;

/** The longest that such a wait becomes. */
const CRASH_WAIT_MAX_MS = 10_000;

/** A worker that has served for this long has nothing to do with the crash before it. */
const CRASH_FORGOTTEN_MS = 30_000;

/** Milliseconds after `grace` in which a worker that does not hang has told its report. */
const HANG_MS = 5_000;

/** How often a worker tells its counts, if they have changed. */
const STATS_INTERVAL_MS = 250;

/** Makes the server of one thread of a {@linkcode WorkerPool}; the main thread has the number 0, its workers 1 and up. */
export type MakeServer = (number: number) => TcpServer | Promise<TcpServer>;

/** What a {@linkcode WorkerPool} is told when it is made. */
export interface WorkerPoolOptions {
  /**
   * Threads that serve, 1 or more. More of them than processors gain nothing.
   *
   * @default {navigator.hardwareConcurrency}
   */
  workers?: number;
}

/** A worker that has ended without being asked to; what {@linkcode WorkerPool.handleCrash} is told. */
export interface WorkerCrash {
  /** The worker's number. */
  readonly number: number;
  /** What it did not catch. Its `stack` is the worker's own; its class may be lost. */
  readonly error: Error;
  /** The clients that it served when it was last heard of, up to 250 ms before: they are cut off. */
  readonly lost: number;
  /** Milliseconds until another takes its place; `undefined` if none does, as the pool shuts down. */
  readonly delay: number | undefined;
}

/** How the shutdown of a {@linkcode WorkerPool} went. */
export interface PoolShutdownReport extends ShutdownReport {
  /**
   * The numbers of the workers that gave no report, as they compute without end. How many of their clients
   * were cut off is not known, and they keep the port and a processor until they come to an end of it, or the
   * process does: the runtime (2.9.6) cannot stop them.
   */
  readonly hung: readonly number[];
}

/** What the main thread tells a worker, by a channel that only they have. */
type PoolCommand =
  | { readonly command: "serve"; readonly sharing: Sharing }
  | { readonly command: "shutdown"; readonly grace: number | undefined }
  | { readonly command: "close" };

/** What a worker tells the main thread. */
type WorkerNews =
  | { readonly news: "serving" | "stopping" | "left" }
  | { readonly news: "stats"; readonly stats: ServerStats }
  | { readonly news: "ended"; readonly stats: ServerStats; readonly report: ShutdownReport }
  | { readonly news: "failed"; readonly failure: Failure };

/** An error on its way to another thread, whatever it was that was thrown. */
interface Failure {
  readonly name: string;
  readonly message: string;
  readonly stack: string | undefined;
}

function failureOf(error: unknown): Failure {
  const message = messageOf(error);
  // Reading it opens a file; see printError().
  const isExhausted = performance.now() - exhaustedAt <= OVERLOAD_EPISODE_MS;
  if (!(error instanceof Error)) return { name: "Error", message, stack: undefined };
  return { name: error.name, message, stack: isExhausted ? undefined : error.stack };
}

function errorOf({ name, message, stack }: Failure): Error {
  const Kind = NETWORK_ERRORS.find((Kind) => Kind.name === name) ?? Error;
  return Object.assign(new Kind(message), { stack: stack ?? `${name}: ${message}` });
}

/** What a worker has to itself and the main thread does not know. */
interface WorkerScope extends EventTarget {
  readonly name: string;
  postMessage(message: Greeting, transfer: MessagePort[]): void;
  close(): void;
}

/** The first word of a worker. Its module may send others of its own, which are not for us. */
interface Greeting {
  readonly pool: string;
  readonly port: MessagePort;
}

function isGreeting(message: unknown, pool: string): message is Greeting {
  return typeof message === "object" && message !== null && "pool" in message && message.pool === pool &&
    "port" in message && message.port instanceof MessagePort;
}

/** What the threads of pools are called, by which they know what they are; the runtime's own messages name it. */
const WORKER_NAME = /^worker (\d+) of (.*)$/s;

/** The scope of this thread, if it is a worker of a pool. */
function workerScope(scope: object = globalThis): WorkerScope | undefined {
  return isWorkerScope(scope) && WORKER_NAME.test(scope.name) ? scope : undefined;
}

function isWorkerScope(scope: object): scope is WorkerScope {
  return "postMessage" in scope && "name" in scope && typeof scope.name === "string";
}

/** The pool of each module that is not over. */
const poolOf = new Map<string, WorkerPool>();

/**
 * A server on every core: threads of the same module, which share one port and one
 * queue of clients. It is Python's `ForkingMixIn`.
 *
 * The module makes the pool, and runs once in the main thread and once in each
 * worker: there `serveForever()` makes the worker's own server with `makeServer` and
 * serves until the main thread says otherwise. What else stands at the top of the
 * module runs in each, too; `isWorker` tells them apart, as signals can only be
 * listened to in the main thread. What comes after `serveForever()` runs in the main
 * thread only: in a worker it rejects with an `AbortError`, for which nobody has to
 * wait and which nobody has to catch.
 *
 * A worker that crashes (an error that nobody catches, `self.close()`) takes its own
 * connections with it. Another takes its place after 100 ms, twice as long each next
 * time up to 10 s; no client is turned away meanwhile. (Memory that runs out ends the
 * whole process.) Nothing is shared but the port: each worker has its own variables,
 * its own limits (`maxConnections`, `maxConnectionsPerHost`), and
 * `this.server.stats` of a handler are its worker's.
 * A `maxConnections` that is not given is divided among the workers.
 *
 * Workers load their module from its file: it needs `--allow-read` of that, and of
 * the local files that it imports. For `deno compile`, name the module:
 * `--include=server.ts`.
 *
 * Call: `listen`, `serveForever`, `shutdown`, `close`. Read: `address`, `stats`,
 * `activeWorkers`, `isWorker`. Override: `handleCrash`.
 *
 * @example
 * ```ts ignore
 * import { StreamRequestHandler, TcpServer, WorkerPool } from "@socketserver/socketserver";
 * import { createHash } from "node:crypto";
 *
 * class Hash extends StreamRequestHandler {
 *   override async handle() {
 *     for await (const frame of this.request.frames()) {
 *       this.request.write(createHash("sha256").update(frame).digest("hex") + "\n");
 *     }
 *   }
 * }
 *
 * const pool = new WorkerPool(import.meta.url, () => new TcpServer({ port: 8009 }, Hash));
 * if (!pool.isWorker) Deno.addSignalListener("SIGTERM", () => pool.shutdown());
 * await pool.serveForever();
 * ```
 */
export class WorkerPool implements AsyncDisposable {
  readonly #module: string;
  readonly #makeServer: MakeServer;
  readonly #size: number;
  readonly #sharing: Sharing;
  /** This thread's part, if it is a worker. */
  readonly #member: PoolMember | undefined;
  readonly #threads = new Set<WorkerThread>();
  /** What those have done that are over. */
  #past: ServerStats = sumOf([]);
  readonly #stopping = new AbortController();
  readonly #ended = Promise.withResolvers<void>();
  /** Settled when nobody waits for workers that hang any more. */
  readonly #patience = Promise.withResolvers<void>();
  readonly #reports: ShutdownReport[] = [];
  /** Holds the port, for those that come while no worker is there; it never accepts. */
  #holder: TcpServer | undefined;
  #listening: Promise<Deno.NetAddr> | undefined;
  #serving: Promise<void>[] | undefined;
  #draining: Promise<PoolShutdownReport> | undefined;
  #patienceTimer: ReturnType<typeof setTimeout> | undefined;

  /**
   * Makes a pool; nothing is started yet.
   *
   * @param module The module that makes this pool: `import.meta.url`.
   * @param makeServer Makes the server of a thread, a {@linkcode TcpServer} or
   * {@linkcode TlsServer}, which share ports; others cannot. The main thread calls it
   * first, with 0, to check what it makes and to hold its port: that one serves nobody.
   * @param options How many threads.
   * @throws {RangeError} If `workers` is not a whole number, 1 or more.
   * @throws {TypeError} If an option does not exist.
   */
  constructor(module: string | URL, makeServer: MakeServer, options: WorkerPoolOptions = {}) {
    const { workers } = resolveOptions({ workers: navigator.hardwareConcurrency }, options);
    if (workers === Infinity) throw new RangeError(`Option "workers" must be whole, 1 or more: it is ${workers}`);
    if (!URL.canParse(module)) {
      throw new TypeError(`Module must be a URL such as import.meta.url: it is ${Deno.inspect(module)}`);
    }
    if (typeof makeServer !== "function") {
      throw new TypeError(`makeServer must be a function that makes a server: it is ${Deno.inspect(makeServer)}`);
    }
    this.#module = String(module);
    this.#makeServer = makeServer;
    this.#size = workers;
    this.#sharing = { threads: workers };
    const scope = workerScope();
    if (scope !== undefined) this.#member = new PoolMember(scope, this.#module, makeServer);
  }

  /** Whether this thread is a worker of a pool, and not the main one. */
  get isWorker(): boolean {
    return this.#member !== undefined;
  }

  /** The bound address. Throws `TypeError` before `listen()`. */
  get address(): Deno.NetAddr {
    const server = this.#member?.server ?? this.#holder;
    if (server === undefined) {
      throw new TypeError("Cannot tell the address: the pool does not listen yet, call listen()");
    }
    return server.address;
  }

  /** How many workers serve now. In a worker it is 1. */
  get activeWorkers(): number {
    return this.#member === undefined ? this.#thoseServing.length : 1;
  }

  /**
   * What all workers have done so far, those that have crashed included. Each tells
   * it every 250 ms; one that computes tells it late, and what one did just before
   * it crashed is not known. After `shutdown()` the rest is exact. In a worker, it
   * is what that one has done.
   */
  get stats(): ServerStats {
    if (this.#member !== undefined) return this.#member.server?.stats ?? sumOf([]);
    return sumOf([this.#past, ...[...this.#threads].map(({ stats }) => stats)]);
  }

  /**
   * Binds the port and lets clients connect; they are served once `serveForever()`
   * has started the workers. A second call returns the same address.
   *
   * @returns Resolves to the bound address, with the real port where port 0 was asked
   * for. Rejects with what `makeServer` and {@linkcode BaseServer.listen} throw.
   * @throws {Deno.errors.NotCapable} If a permission is missing: for the port, or to read the module.
   * @throws {TypeError} If the pool is closed, `makeServer` makes no server of TCP or
   * TLS, or the module has another pool already.
   */
  async listen(): Promise<Deno.NetAddr> {
    if (this.#member !== undefined) return await this.#member.listen();
    this.#checkOpen();
    if (this.#listening === undefined) {
      this.#listening = this.#bind();
      this.#listening.catch(() => this.#listening = undefined); // It may be tried again.
    }
    return await this.#listening;
  }

  /**
   * Starts the workers and serves until {@linkcode WorkerPool.shutdown} or
   * {@linkcode WorkerPool.close}.
   *
   * @param options With a `signal`, its abort is a call of `shutdown()`.
   * @returns Resolves once the shutdown is over; at once if the pool is closed already.
   * In a worker it never does, as the thread ends. Rejects with what `listen()`
   * throws, and with the error of a worker that fails before all have begun to serve;
   * the pool is closed then.
   * @throws {Deno.errors.Busy} If it serves already.
   */
  async serveForever(options: { signal?: AbortSignal } = {}): Promise<void> {
    if (this.#member !== undefined) return await this.#member.serveForever(options);
    if (this.#isClosing) return await this.#ended.promise;
    if (this.#serving !== undefined) throw new Deno.errors.Busy("Cannot serveForever(): the pool is serving already");
    this.#serving = [];
    const { signal } = options;
    const stop = () => void this.shutdown();
    try {
      await this.#activate();
      signal?.addEventListener("abort", stop);
      if (signal?.aborted) stop();
      if (!this.#isClosing) await this.#startAll();
      await this.#ended.promise;
    } catch (error) {
      this.close();
      await this.#ended.promise;
      throw error;
    } finally {
      signal?.removeEventListener("abort", stop);
    }
  }

  /**
   * Ends all workers in good order and at the same time, each as
   * {@linkcode BaseServer.shutdown} does: clients that wait in the kernel's backlog are
   * served, handlers finish what they have begun, and after `grace` the rest are cut
   * off. A worker that still computes 5 s after that is given up.
   *
   * It may be called before the start and again: it is the same shutdown. A call of
   * `this.server.shutdown()` in a handler, and any other end of a worker's server,
   * is a call of this.
   *
   * @param options `grace`: milliseconds before the rest are cut off, instead of the
   * option of the workers' servers; 0 cuts at once, `Infinity` waits for ever, even for
   * a worker that hangs.
   * @returns Resolves to the workers' reports added up when it is over; the address is
   * free by then, unless a worker hangs. Never rejects.
   * @throws {RangeError} If `grace` is out of its range.
   */
  shutdown(options: { grace?: number } = {}): Promise<PoolShutdownReport> {
    const { grace } = options;
    if (grace !== undefined) checkNumber("grace", grace);
    if (this.#member !== undefined) return this.#member.shutdown(grace);
    return this.#draining ??= this.#drain(grace);
  }

  /** Ends all workers now and cuts all clients off. `serveForever()` resolves soon after. A second call does nothing. */
  close(): void {
    if (this.#member !== undefined) return this.#member.close();
    this.#draining ??= this.#drain(0);
    for (const thread of this.#threads) thread.close();
    this.#loseIn(HANG_MS);
  }

  /** Shuts the pool down, as {@linkcode WorkerPool.shutdown} does. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.shutdown();
  }

  /**
   * Is told, in the main thread, that a worker has crashed. The default prints it with
   * `console.error`, with the `stack` of what the worker did not catch.
   *
   * @param crash Which worker, why, and what becomes of it.
   *
   * @example
   * ```ts ignore
   * class Watched extends WorkerPool {
   *   override handleCrash(crash: WorkerCrash) {
   *     super.handleCrash(crash);
   *     if (crash.delay === 10_000) this.shutdown(); // It crashes again and again.
   *   }
   * }
   * ```
   */
  handleCrash({ number, error, lost, delay }: WorkerCrash): void {
    const clients = lost === 0 ? "" : `, and cuts off some ${lost} of its clients`;
    const next = delay === undefined ? "" : `; another takes its place in ${delay} ms`;
    printError(`Worker ${number} has crashed${clients}${next}:`, error);
  }

  get #isClosing(): boolean {
    return this.#draining !== undefined;
  }

  get #thoseServing(): WorkerThread[] {
    return [...this.#threads].filter(({ isServing }) => isServing);
  }

  /** Listens. What `listen()` throws as the pool was closed meanwhile is no error. */
  async #activate(): Promise<void> {
    prepareForExhaustion();
    try {
      await this.listen();
    } catch (error) {
      if (!this.#isClosing) throw error;
    }
  }

  async #bind(): Promise<Deno.NetAddr> {
    try {
      this.#checkOpen();
      checkReadable(this.#module);
      this.#claimModule();
      const server = await makeSharing(this.#makeServer, 0, this.#sharing);
      this.#checkOpen();
      const address = await server.listen();
      this.#holder = server;
      if (this.#isClosing) server.close();
      this.#checkOpen();
      return address;
    } catch (error) {
      this.#releaseModule();
      throw error;
    }
  }

  /** In a worker of the module, there is no telling which pool it is a worker of. */
  #claimModule(): void {
    const owner = poolOf.get(this.#module);
    if (owner !== undefined && owner !== this) {
      throw new TypeError(`Cannot start a second pool of ${this.#module}: give each pool a module of its own`);
    }
    poolOf.set(this.#module, this);
  }

  #releaseModule(): void {
    if (poolOf.get(this.#module) === this) poolOf.delete(this.#module);
  }

  #checkOpen(): void {
    if (this.#isClosing) throw new TypeError("Cannot listen: the pool is closed, make a new one");
  }

  /** Resolves when all workers serve. Rejects if one fails. */
  async #startAll(): Promise<void> {
    if (!this.#hasDescriptors(this.#size)) {
      throw new TypeError(
        `Cannot start ${this.#size} workers: there are too few descriptors; raise "ulimit -n" or ask for fewer workers`,
      );
    }
    const numbers = Array.from({ length: this.#size }, (_, index) => index + 1);
    const threads = numbers.map((number) => this.#start(number));
    const keeping = threads.map((thread) => this.#keep(thread));
    this.#serving?.push(...keeping);
    await Promise.all(threads.map(({ serving }) => serving));
  }

  #start(number: number): WorkerThread {
    const thread = new WorkerThread(this.#module, number, this.#sharing, () => this.shutdown());
    this.#threads.add(thread);
    return thread;
  }

  /** Replaces a worker that crashes, and the one in its place; resolves when its place is empty for good. Never rejects. */
  async #keep(first: WorkerThread): Promise<void> {
    let wait = 0;
    for (
      let thread: WorkerThread | undefined = first;
      thread !== undefined;
      thread = await this.#replace(first.number)
    ) {
      const ending = await thread.ended;
      this.#threads.delete(thread);
      this.#past = sumOf([this.#past, { ...thread.stats, active: 0 }]);
      if (ending.report !== undefined) this.#reports.push(ending.report);
      // One that never served has failed its start.
      if (ending.error === undefined || !first.hasServed) return;
      const isNewTrouble = wait === 0 || thread.age >= CRASH_FORGOTTEN_MS;
      wait = isNewTrouble ? CRASH_WAIT_MIN_MS : Math.min(wait * 2, CRASH_WAIT_MAX_MS);
      await this.#noteCrash(thread, ending.error, wait);
      if (this.#isClosing) return;
      await delay(wait, this.#stopping.signal);
    }
  }

  async #noteCrash({ number, stats }: WorkerThread, error: Error, wait: number): Promise<void> {
    const crash = { number, error, lost: stats.active, delay: this.#isClosing ? undefined : wait };
    try {
      await this.handleCrash(crash);
    } catch (error) {
      printError("Error in handleCrash():", error);
    }
  }

  /** A new thread, as soon as there are descriptors for one; `undefined` if the pool shuts down. */
  async #replace(number: number): Promise<WorkerThread | undefined> {
    while (!this.#isClosing) {
      if (this.#hasDescriptors(1)) return this.#start(number);
      exhaustedAt = performance.now();
      await delay(OVERLOAD_WAIT_MAX_MS, this.#stopping.signal);
    }
    return undefined;
  }

  /** Whether threads can be started: the runtime panics where one finds no descriptors. */
  #hasDescriptors(threads: number): boolean {
    const opened: Deno.Listener[] = [];
    try {
      // The pool's own port, which it may certainly open.
      const { hostname, port } = this.#sharing.address ?? this.address;
      while (opened.length < threads * WORKER_DESCRIPTORS) opened.push(openShared({ hostname, port }));
      return true;
    } catch (error) {
      if (acceptFailure(error) === "overload") return false;
      throw error;
    } finally {
      opened.forEach(closeQuietly);
    }
  }

  async #drain(grace: number | undefined): Promise<PoolShutdownReport> {
    const begun = performance.now();
    this.#stopping.abort();
    const ownGrace = this.#holder === undefined ? 0 : graceOf(this.#holder);
    const threads = [...this.#threads];
    for (const thread of threads) thread.shutdown(grace);
    this.#loseIn((grace ?? ownGrace) + HANG_MS);
    // What waits in the backlog is the workers' to serve, once they have the port open, too.
    const sharing = threads.map(({ serving, ended }) => Promise.race([serving.catch(ignore), ended]));
    await Promise.race([Promise.all(sharing), this.#patience.promise]);
    this.#holder?.close();
    await Promise.race([this.#allEnded(), this.#patience.promise]);
    clearTimeout(this.#patienceTimer);
    const hung = [...this.#threads].map(({ number }) => number);
    for (const thread of this.#threads) thread.giveUp();
    await Promise.all(this.#serving ?? []);
    await this.#holder?.shutdown(); // Its port is free.
    this.#releaseModule();
    this.#ended.resolve();
    return {
      finished: this.#reports.reduce((sum, { finished }) => sum + finished, 0),
      cut: this.#reports.flatMap(({ cut }) => cut),
      duration: performance.now() - begun,
      hung,
    };
  }

  async #allEnded(): Promise<void> {
    // The workers may be about to be started.
    await this.#listening?.catch(ignore);
    await Promise.all(this.#serving ?? []);
  }

  /** Gives up workers that hang, `ms` from now. */
  #loseIn(ms: number): void {
    clearTimeout(this.#patienceTimer);
    if (ms !== Infinity) this.#patienceTimer = setTimeout(this.#patience.resolve, Math.min(ms, MAX_TIMER_MS));
  }
}

/** How the thread of a worker has ended: with a report, by an error, or, with neither, nobody knows. */
interface WorkerEnding {
  readonly report?: ShutdownReport;
  readonly error?: Error;
}

/** How long a worker that is over may take to say that its module is at its end. */
const WORKER_LEAVE_MS = 200;

/** A worker as the main thread sees it, from its start to its end. */
class WorkerThread {
  readonly number: number;
  readonly #worker: Worker;
  readonly #serving = Promise.withResolvers<void>();
  readonly #ended = Promise.withResolvers<WorkerEnding>();
  /** Settled when its module is at its end, or nobody cares. */
  readonly #left = Promise.withResolvers<void>();
  readonly #startTimer: ReturnType<typeof setTimeout>;
  readonly #noteStopping: () => void;
  #port: MessagePort | undefined;
  #servingSince: number | undefined;
  #isOver = false;
  #stats = sumOf([]);

  constructor(module: string, number: number, sharing: Sharing, noteStopping: () => void) {
    this.number = number;
    this.#noteStopping = noteStopping;
    this.#serving.promise.catch(ignore); // Who replaces a worker waits for its end only.
    const name = `worker ${number} of ${module}`;
    this.#worker = new Worker(module, { type: "module", name });
    this.#worker.addEventListener("message", ({ data }: MessageEvent<unknown>) => {
      if (isGreeting(data, name)) this.#greet(data.port, sharing);
    });
    this.#worker.addEventListener("error", (event) => {
      event.preventDefault();
      this.#fail(loadError(event.message, module));
    });
    const late = `it has not begun to serve within ${WORKER_START_MS} ms; its module must make the pool and serve`;
    this.#startTimer = setTimeout(() => this.#fail(new Deno.errors.TimedOut(late)), WORKER_START_MS);
  }

  /** Resolves when it begins to serve; rejects with one sentence if it ends before. */
  get serving(): Promise<void> {
    return this.#serving.promise;
  }

  /** Resolves when it is over; never rejects. */
  get ended(): Promise<WorkerEnding> {
    return this.#ended.promise;
  }

  /** What its server has done, as far as it has told. */
  get stats(): ServerStats {
    return this.#stats;
  }

  get hasServed(): boolean {
    return this.#servingSince !== undefined;
  }

  get isServing(): boolean {
    return this.hasServed && !this.#isOver;
  }

  /** Milliseconds since it began to serve. */
  get age(): number {
    return this.#servingSince === undefined ? 0 : performance.now() - this.#servingSince;
  }

  shutdown(grace: number | undefined): void {
    this.#endBy({ command: "shutdown", grace });
  }

  close(): void {
    this.#endBy({ command: "close" });
  }

  /** Waits no more for it. The runtime ends it when it does not compute any more. */
  giveUp(): void {
    this.#left.resolve();
    void this.#end({});
  }

  #endBy(command: PoolCommand): void {
    if (this.#port === undefined) this.giveUp(); // It loads its module, and has met no client.
    else this.#port.postMessage(command);
  }

  #greet(port: MessagePort, sharing: Sharing): void {
    if (this.#isOver || this.#port !== undefined) return port.close();
    this.#port = port;
    port.onmessage = ({ data }: MessageEvent<WorkerNews>) => this.#hear(data);
    const command: PoolCommand = { command: "serve", sharing };
    port.postMessage(command);
  }

  #hear(news: WorkerNews): void {
    if (news.news === "left") return this.#left.resolve();
    if (this.#isOver) return;
    switch (news.news) {
      case "serving":
        clearTimeout(this.#startTimer);
        this.#servingSince = performance.now();
        return this.#serving.resolve();
      case "stats":
        this.#stats = news.stats;
        return;
      case "stopping":
        return this.#noteStopping();
      case "ended":
        this.#stats = news.stats;
        return void this.#end({ report: news.report });
      case "failed":
        return this.#fail(errorOf(news.failure));
    }
  }

  #fail(error: Error): void {
    this.#serving.reject(restate(error, `Cannot start worker ${this.number}: ${error.message}`));
    void this.#end({ error });
  }

  async #end(ending: WorkerEnding): Promise<void> {
    if (this.#isOver) return;
    this.#isOver = true;
    clearTimeout(this.#startTimer);
    this.#serving.resolve(); // If it still starts, it is not its own fault.
    await settledWithin(this.#left.promise, WORKER_LEAVE_MS);
    this.#port?.close();
    this.#worker.terminate();
    this.#ended.resolve(ending);
  }
}

/** What `serveForever()` rejects with in a worker, which nobody has to catch. */
const WORKER_IS_OVER = new DOMException("The worker is over", "AbortError");

/** How many pools this thread is a worker of. */
let members = 0;

/** A worker as it sees itself: its server, and what the main thread wants of it. */
class PoolMember {
  readonly #scope: WorkerScope;
  readonly #number: number;
  readonly #makeServer: MakeServer;
  readonly #channel = new MessageChannel();
  readonly #sharing = Promise.withResolvers<Sharing>();
  readonly #over = Promise.withResolvers<never>();
  #server: TcpServer | undefined;
  #listening: Promise<Deno.NetAddr> | undefined;
  /** How the server is to be ended, if it is. */
  #stop: ((server: TcpServer) => void) | undefined;
  #isServing = false;
  #toldStats = "";

  constructor(scope: WorkerScope, module: string, makeServer: MakeServer) {
    if (members++ > 0) {
      throw new TypeError(`Cannot make a second pool of ${module}: give each pool a module of its own`);
    }
    const [, number, own] = WORKER_NAME.exec(scope.name) ?? [];
    if (own !== module) {
      throw new TypeError(`Cannot make a pool of ${module} in a worker of ${own}: make it in the main thread only`);
    }
    this.#scope = scope;
    this.#number = Number(number);
    this.#makeServer = makeServer;
  }

  get server(): TcpServer | undefined {
    return this.#server;
  }

  listen(): Promise<Deno.NetAddr> {
    return this.#listening ??= this.#bind();
  }

  /** Serves, tells how it went, and rejects, so that the module comes to its end. */
  async serveForever(options: { signal?: AbortSignal }): Promise<never> {
    if (this.#isServing) throw new Deno.errors.Busy("Cannot serveForever(): the pool is serving already");
    this.#isServing = true;
    this.#watchForCrash();
    try {
      await this.listen();
      if (this.#server !== undefined) await this.#serve(this.#server, options);
    } catch (error) {
      this.#tell({ news: "failed", failure: failureOf(error) });
    }
    return await this.#over.promise;
  }

  /** The runtime keeps 2 descriptors and 1.6 MB of a thread that it ends while its module still awaits. */
  #leave(): void {
    forgettable(this.#over.promise);
    this.#over.reject(WORKER_IS_OVER);
    setTimeout(() => this.#tell({ news: "left" }));
  }

  async shutdown(grace: number | undefined): Promise<PoolShutdownReport> {
    this.#endBy((server) => void server.shutdown(grace === undefined ? {} : { grace }));
    const report = await this.#server?.shutdown();
    return { ...report ?? { finished: 0, cut: [], duration: 0 }, hung: [] };
  }

  close(): void {
    this.#endBy((server) => server.close());
  }

  #endBy(stop: (server: TcpServer) => void): void {
    this.#stop = stop;
    if (this.#server !== undefined) stop(this.#server);
  }

  async #bind(): Promise<Deno.NetAddr> {
    const { port1, port2 } = this.#channel;
    port1.onmessage = ({ data }: MessageEvent<PoolCommand>) => this.#obey(data);
    this.#scope.postMessage({ pool: this.#scope.name, port: port2 }, [port2]);
    const sharing = await this.#sharing.promise;
    this.#server = await makeSharing(this.#makeServer, this.#number, sharing);
    try {
      return await this.#server.listen();
    } catch (error) {
      // The main thread has the port open, so nobody else is there.
      if (error instanceof Deno.errors.AddrInUse) throw new TypeError("this runtime lets no two threads share a port");
      throw error;
    }
  }

  #obey(command: PoolCommand): void {
    switch (command.command) {
      case "serve":
        return this.#sharing.resolve(command.sharing);
      case "shutdown":
        return void this.shutdown(command.grace);
      case "close":
        return this.close();
    }
  }

  async #serve(server: TcpServer, options: { signal?: AbortSignal }): Promise<void> {
    server.signal.addEventListener("abort", () => this.#tell({ news: "stopping" }));
    this.#tell({ news: "serving" });
    const timer = setInterval(() => this.#tellStats(server.stats), STATS_INTERVAL_MS);
    const serving = server.serveForever(options);
    this.#stop?.(server); // Behind that, so that what waits in the backlog is served.
    try {
      await serving;
    } finally {
      clearInterval(timer);
    }
    this.#tell({ news: "ended", report: await server.shutdown(), stats: server.stats });
  }

  #tellStats(stats: ServerStats): void {
    const text = JSON.stringify(stats);
    if (text !== this.#toldStats) this.#tell({ news: "stats", stats });
    this.#toldStats = text;
  }

  #tell(news: WorkerNews): void {
    this.#channel.port1.postMessage(news);
    if (news.news === "ended" || news.news === "failed") this.#leave();
  }

  /** Tells the main thread what ends this one: it is not told by the runtime, or only with a stack, on which it panics where there are no descriptors. */
  #watchForCrash(): void {
    const crash = (error: unknown) => {
      if (this.#server !== undefined) this.#tellStats(this.#server.stats);
      this.#tell({ news: "failed", failure: failureOf(error) });
      this.#server?.close(); // Until the thread ends, another is to take those who come.
    };
    globalThis.addEventListener("error", (event) => {
      if (event.defaultPrevented) return; // The module deals with it.
      event.preventDefault();
      crash(event.error);
    });
    globalThis.addEventListener("unhandledrejection", (event) => {
      if (event.defaultPrevented) return;
      event.preventDefault();
      if (event.reason !== WORKER_IS_OVER) crash(event.reason);
    });
    globalThis.addEventListener("unload", () => crash("it has ended itself"));
    const close = this.#scope.close;
    this.#scope.close = () => {
      crash("it has called self.close()");
      close();
    };
  }
}

async function makeSharing(makeServer: MakeServer, number: number, sharing: Sharing): Promise<TcpServer> {
  const server: unknown = await makeServer(number);
  if (!(server instanceof TcpServer)) {
    const made = server instanceof BaseServer ? server.constructor.name : kindOf(server);
    throw new TypeError(
      `makeServer must make a TcpServer or a TlsServer, as threads share no others: it has made ${made}`,
    );
  }
  sharings.set(server, sharing);
  return server;
}

/** Workers load their module from its file. */
function checkReadable(module: string): void {
  const url = new URL(module);
  if (url.protocol !== "file:") return;
  if (Deno.permissions.requestSync({ name: "read", path: url }).state === "granted") return;
  const flag = `--allow-read=${fileOf(module)}`;
  throw new Deno.errors.NotCapable(`Cannot start workers: they may not load their module; run again with ${flag}`);
}

/** The path of a module's file, for a person; the URL of one that has none. */
function fileOf(module: string): string {
  const { protocol, pathname } = new URL(module);
  if (protocol !== "file:") return module;
  return printable(decodeURIComponent(pathname).replace(/^\/(?=[A-Za-z]:)/, ""));
}

/** Why a worker cannot load its module or has failed in it, of which the runtime gives a text only and prints the rest. */
function loadError(message: string, module: string): Error {
  const [, missing] = /Requires read access to "(.*?)"/.exec(message) ?? [];
  if (missing !== undefined) {
    const paths = [fileOf(module), printable(missing)].join();
    return new Deno.errors.NotCapable(`it may not load a module; run again with --allow-read=${paths}`);
  }
  const [line = ""] = message.replace(/^Uncaught (\(in promise\) )?/, "").split("\n");
  return new TypeError(printable(line));
}

/** What all of them have done. */
function sumOf(all: ServerStats[]): ServerStats {
  const total = (count: (stats: ServerStats) => number) => all.reduce((sum, stats) => sum + count(stats), 0);
  return {
    accepted: total(({ accepted }) => accepted),
    active: total(({ active }) => active),
    rejected: total(({ rejected }) => rejected),
    aborted: total(({ aborted }) => aborted),
    timedOut: total(({ timedOut }) => timedOut),
    errors: total(({ errors }) => errors),
    lost: total(({ lost }) => lost),
    refused: total(({ refused }) => refused),
    handshakeFailures: total(({ handshakeFailures }) => handshakeFailures),
    dropped: total(({ dropped }) => dropped),
    overloads: total(({ overloads }) => overloads),
    bytesRead: total(({ bytesRead }) => bytesRead),
    bytesWritten: total(({ bytesWritten }) => bytesWritten),
  };
}

// --- Datagram servers -------------------------------------------------------

/** A datagram has 65,507 bytes at most over IPv4 and 65,527 over IPv6, so that one that fills this was cut. */
const DATAGRAM_BUFFER_BYTES = 65_536;

/** Thousands of small datagrams share one allocation, without a copy; a datagram that is kept keeps its slab. */
const DATAGRAM_SLAB_BYTES = 4 * DATAGRAM_BUFFER_BYTES;

/** Milliseconds that a reply may wait for a Unix client whose queue is full. */
const REPLY_TIMEOUT_MS = 1_000;

/** The part of the runtime's datagram socket that a {@linkcode DatagramServer} needs. Its type, as `Deno.listenDatagram`, exists with `--unstable-net` only. */
export interface DatagramSocket {
  /** The bound address. */
  readonly addr: Deno.Addr;
  /** Receives into `into`; resolves to the part that was filled, and the sender. */
  receive(into: Uint8Array<ArrayBuffer>): Promise<[Uint8Array<ArrayBuffer>, Deno.Addr]>;
  /** Sends one datagram. */
  send(data: Uint8Array, to: Deno.Addr): Promise<number>;
  /** Closes the socket; what waits rejects. */
  close(): void;
}

type DatagramAddress =
  | { transport: "udp"; hostname: string; port: number }
  | { transport: "unixpacket"; path?: string };

function openDatagramSocket(address: DatagramAddress): DatagramSocket {
  const runtime: object = Deno;
  if (!hasDatagrams(runtime)) {
    throw new TypeError("Cannot open a datagram socket: Deno has them behind a flag; run again with --unstable-net");
  }
  return runtime.listenDatagram(address);
}

function hasDatagrams(runtime: object): runtime is { listenDatagram(address: DatagramAddress): DatagramSocket } {
  return "listenDatagram" in runtime && typeof runtime.listenDatagram === "function";
}

/** One datagram that has arrived, and the way back. */
export class Datagram {
  /**
   * The bytes, which are the handler's to keep. There may be none. They lie beside
   * other datagrams in one buffer: take a `slice()` to keep them for long, or to
   * transfer their buffer.
   */
  readonly data: Uint8Array<ArrayBuffer>;
  /** Who sent it. */
  readonly clientAddress: Deno.Addr;
  readonly #send: (data: Uint8Array, to: Deno.Addr) => Promise<unknown>;
  #bytesWritten = 0;

  /**
   * Made by the server; a test makes its own.
   *
   * @param data The bytes.
   * @param clientAddress Who sent it.
   * @param send What sends a reply.
   *
   * @example Testing a handler without a network
   * ```ts
   * import { Datagram, DatagramRequestHandler, UdpServer } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * class Twice extends DatagramRequestHandler {
   *   override async handle() {
   *     await this.request.reply(new Uint8Array([...this.request.data, ...this.request.data]));
   *   }
   * }
   *
   * const sent: Uint8Array[] = [];
   * const client = { transport: "udp", hostname: "127.0.0.1", port: 1 } as const;
   * const request = new Datagram(new Uint8Array([7]), client, (data) => Promise.resolve(sent.push(data)));
   * await new UdpServer({ port: 0 }, Twice).finishRequest(request, client);
   * assertEquals(sent, [new Uint8Array([7, 7])]);
   * ```
   */
  constructor(
    data: Uint8Array<ArrayBuffer>,
    clientAddress: Deno.Addr,
    send: (data: Uint8Array, to: Deno.Addr) => Promise<unknown>,
  ) {
    this.data = data;
    this.clientAddress = clientAddress;
    this.#send = send;
  }

  /** Bytes that have arrived. */
  get bytesRead(): number {
    return this.data.length;
  }

  /** Bytes that were sent back. */
  get bytesWritten(): number {
    return this.#bytesWritten;
  }

  /**
   * Sends a datagram back to the client. Whether it arrives, nobody tells.
   *
   * @param data Bytes, or text that is sent as UTF-8; 65,507 bytes at most.
   * @returns Resolves once the kernel has it.
   * @throws {Deno.errors.BadResource} If the server is closed.
   * @throws {Deno.errors.TimedOut} If a Unix client took nothing for a second.
   * @throws {Error} If the data is too long, or the client has no address.
   */
  reply(data: Uint8Array | string): Promise<void> {
    if (!isData(data)) return rejection(dataError("reply()", data));
    const bytes = bytesOf(data);
    const sent = this.#send(bytes, this.clientAddress).then(
      () => {
        this.#bytesWritten += bytes.length;
      },
      (error) => {
        const client = formatAddress(this.clientAddress);
        const reason = error instanceof Deno.errors.NotCapable ? explain(error, this.clientAddress) : messageOf(error);
        throw restate(error, `Cannot reply with ${bytes.length} bytes to ${client}: ${reason}`);
      },
    );
    return forgettable(sent);
  }
}

/**
 * A server of datagrams: each that arrives is a request of its own, with a
 * handler of its own, served side by side up to `maxConcurrent`. It needs
 * `--unstable-net`.
 *
 * A handler that calls `shutdown()` sends its reply first, as the shutdown closes
 * the socket, and does not await it: after that the server cannot know that it is
 * a handler who asks, and waits for it until `grace` is over.
 *
 * @typeParam Address The kind of address that the server has.
 */
export abstract class DatagramServer<Address extends Deno.Addr = Deno.Addr> extends BaseServer<Datagram, Address> {
  readonly #Handler: DatagramRequestHandlerClass;
  readonly #maxConcurrent: number;
  /** Datagrams lie behind each other in it; those before `#slabStart` are their handlers'. */
  #slab: Uint8Array<ArrayBuffer> = NO_BYTES;
  #slabStart = 0;
  /** What comes now has come after the shutdown had begun. */
  #isDrained = false;
  #socket: DatagramSocket | undefined;
  #receiving: Promise<[Uint8Array<ArrayBuffer>, Deno.Addr]> | undefined;
  readonly #send = (data: Uint8Array, to: Deno.Addr): Promise<number> => {
    return this.#socket?.send(data, to) ?? Promise.reject(new Deno.errors.BadResource("the server is closed"));
  };

  /**
   * Keeps the options; nothing is opened and no hook is called.
   *
   * @param Handler The class whose objects serve the datagrams.
   * @param options Limits.
   */
  protected constructor(Handler: DatagramRequestHandlerClass, options: DatagramServerOptions) {
    const { maxConcurrent, grace } = resolveOptions(DATAGRAM_SERVER_DEFAULTS, options);
    super(grace);
    this.#Handler = Handler;
    this.#maxConcurrent = maxConcurrent;
  }

  /** Makes the handler and runs its `setup()`, `handle()` and `finish()`. */
  override finishRequest(request: Datagram, clientAddress: Deno.Addr): Promise<void> {
    return runHandler(new this.#Handler(request, clientAddress, this));
  }

  /** To be called by `listen()`: takes over the socket that it opened. */
  protected adopt(socket: DatagramSocket, address: Address): Address {
    if (!this.noteListening(address)) {
      closeQuietly(socket);
      this.checkOpen();
    }
    this.#socket = socket;
    return address;
  }

  /** Serves the datagrams as they come. */
  protected override async serveRequests(serve: (request: Datagram) => void): Promise<void> {
    while (true) {
      let request: Datagram | undefined;
      try {
        request = this.#makeRequest(await this.#receive());
      } catch (error) {
        if (await this.rideOut(error)) continue;
        return;
      }
      if (request !== undefined) serve(request);
    }
  }

  /** The next datagram. */
  protected override async acceptRequest(): Promise<Datagram | undefined> {
    while (true) {
      try {
        const request = this.#makeRequest(await this.#receive());
        if (request !== undefined) return request;
      } catch (error) {
        if (!await this.rideOut(error)) return undefined;
      }
    }
  }

  #receive(): Promise<[Uint8Array<ArrayBuffer>, Deno.Addr]> {
    if (this.#socket === undefined) throw new Deno.errors.BadResource("The socket is closed");
    if (this.#slab.length - this.#slabStart < DATAGRAM_BUFFER_BYTES) {
      this.#slab = new Uint8Array(DATAGRAM_SLAB_BYTES);
      this.#slabStart = 0;
    }
    const room = this.#slab.subarray(this.#slabStart, this.#slabStart + DATAGRAM_BUFFER_BYTES);
    this.#receiving = this.receiving(this.#socket.receive(room));
    return this.#receiving;
  }

  #makeRequest([data, clientAddress]: [Uint8Array<ArrayBuffer>, Deno.Addr]): Datagram | undefined {
    this.noteReceived();
    // One that fills the buffer may have been cut.
    if (data.length === DATAGRAM_BUFFER_BYTES) return this.countIncident("lost");
    if (this.#isDrained || this.isAtLimit(this.#maxConcurrent)) return this.countIncident("dropped");
    this.#slabStart += data.length;
    return new Datagram(data, clientAddress, this.#send);
  }

  /** Stops receiving. Replies of handlers that still run are sent until the socket is closed, at the end. */
  protected override async stopListening(backlog: boolean): Promise<void> {
    if (this.#socket === undefined) return;
    if (backlog) {
      await this.emptyBacklog();
      this.#isDrained = true;
      await this.belowLimit(1); // Their replies go out by the same socket.
    }
    const socket = this.#socket;
    this.#socket = undefined;
    if (socket !== undefined) await this.closeSocket(socket);
  }

  /** Closes the socket; its address is free when this resolves. */
  protected async closeSocket(socket: DatagramSocket): Promise<void> {
    closeQuietly(socket);
    await this.#receiving?.catch(ignore);
  }

  /** Datagrams do not. */
  protected override get keepsContext(): boolean {
    return false;
  }

  /** The sender. */
  protected override clientAddressOf(request: Datagram): Deno.Addr {
    return request.clientAddress;
  }

  /** The datagram's own counts. */
  protected override trafficOf(request: Datagram): Datagram {
    return request;
  }

  /** A datagram has no second message to wait for. */
  protected override endRequest(_request: Datagram, _isLate: boolean): void {}

  /** A datagram has nothing to close. */
  protected override closeRequest(_request: Datagram): Promise<void> | undefined {
    return undefined;
  }

  /** A handler that waits for something else cannot be cut off; its reply will reject. */
  protected override cutRequest(_request: Datagram, _error: Error): void {}
}

/** Where a {@linkcode UdpServer} listens. */
export interface UdpServerAddress {
  /**
   * The address of an interface, or a name that resolves to one.
   *
   * @default {"127.0.0.1"}
   */
  hostname?: string;
  /** The port, from 1 to 65535; 0 takes a free one. */
  port: number;
}

/**
 * A UDP server: Python's `ThreadingUDPServer`, and with `maxConcurrent: 1` its
 * `UDPServer`, which however drops what comes while it is busy. It needs
 * `--unstable-net`.
 *
 * @example
 * ```ts
 * import { DatagramClient, DatagramRequestHandler, UdpServer } from "@socketserver/socketserver";
 * import { assertEquals } from "@std/assert";
 *
 * class Echo extends DatagramRequestHandler {
 *   override async handle() {
 *     await this.request.reply(this.request.data);
 *   }
 * }
 *
 * await using server = new UdpServer({ port: 0 }, Echo);
 * const { port } = server.listen();
 * server.serveForever();
 * using client = new DatagramClient({ port, timeout: 5_000 });
 * await client.send("hello");
 * assertEquals(new TextDecoder().decode(await client.recv()), "hello");
 * ```
 */
export class UdpServer extends DatagramServer<Deno.NetAddr> {
  readonly #wanted: Required<UdpServerAddress>;

  /**
   * Makes a server; nothing is opened yet.
   *
   * @param address Where to listen.
   * @param Handler The class whose objects serve the datagrams.
   * @param options Limits.
   * @throws {RangeError} If a number is out of its range.
   * @throws {TypeError} If an option does not exist.
   */
  constructor(address: UdpServerAddress, Handler: DatagramRequestHandlerClass, options: DatagramServerOptions = {}) {
    checkServerArguments(address, Handler);
    super(Handler, options);
    this.#wanted = resolveOptions({ hostname: "127.0.0.1", port: 0 }, address);
    checkHostname(this.#wanted.hostname);
    checkPort(address.port);
  }

  /** Binds the port; see {@linkcode BaseServer.listen}. */
  override listen(): Deno.NetAddr {
    this.checkOpen();
    if (this.boundAddress !== undefined) return this.boundAddress;
    const wanted = { transport: "udp", ...this.#wanted } as const;
    const socket = tryTo("listen on", wanted, () => openDatagramSocket(wanted));
    const { addr } = socket;
    return this.adopt(socket, addr.transport === "udp" ? addr : wanted);
  }
}

/**
 * A server of Unix datagrams: Python's `ThreadingUnixDatagramServer`. A client
 * that wants an answer binds its socket to a path of its own. A client that does
 * not read its answers is given up after a second; if it has connected its socket,
 * the server's has to be made anew for that, and other clients that have connected
 * theirs connect again. The socket file is
 * treated as {@linkcode UnixServer} treats its own. It needs `--unstable-net`,
 * `--allow-read` and `--allow-write` of its path and of its clients' paths.
 *
 * @example
 * ```ts
 * import { DatagramClient, DatagramRequestHandler, UnixDatagramServer } from "@socketserver/socketserver";
 * import { assertEquals } from "@std/assert";
 *
 * class Echo extends DatagramRequestHandler {
 *   override async handle() {
 *     await this.request.reply(this.request.data);
 *   }
 * }
 *
 * const folder = await Deno.makeTempDir();
 * await using server = new UnixDatagramServer({ path: `${folder}/server.sock` }, Echo);
 * await server.listen();
 * server.serveForever();
 * using client = new DatagramClient({ path: `${folder}/server.sock`, localPath: `${folder}/client.sock` });
 * await client.send("hello");
 * assertEquals(new TextDecoder().decode(await client.recv()), "hello");
 * ```
 */
export class UnixDatagramServer extends DatagramServer<Deno.UnixAddr> {
  readonly #file: SocketFile;
  #binding: Promise<Deno.UnixAddr> | undefined;

  /**
   * Makes a server; nothing is opened yet.
   *
   * @param address Where to listen.
   * @param Handler The class whose objects serve the datagrams.
   * @param options Limits.
   * @throws {RangeError} If a number is out of its range.
   * @throws {TypeError} If an option does not exist, or the path is empty.
   */
  constructor(address: UnixServerAddress, Handler: DatagramRequestHandlerClass, options: DatagramServerOptions = {}) {
    checkServerArguments(address, Handler);
    super(Handler, options);
    this.#file = new SocketFile(address);
  }

  /** Makes the socket file; see {@linkcode UnixServer.listen}. */
  override listen(): Promise<Deno.UnixAddr> {
    return this.#binding ??= this.#bind();
  }

  async #bind(): Promise<Deno.UnixAddr> {
    const address = { transport: "unixpacket", path: this.#file.path } as const;
    try {
      this.checkOpen();
      const open = () => openDatagramSocket(address);
      const socket = await this.#file.bind(open);
      return this.adopt(new UnixDatagramSocket(socket, address, () => this.#file.rebind(open)), address);
    } catch (error) {
      this.#binding = undefined;
      throw listenError(error, address);
    }
  }

  /** Closes the socket and removes its file. */
  protected override async closeSocket(socket: DatagramSocket): Promise<void> {
    await this.#file.unbind(() => super.closeSocket(socket));
  }
}

/**
 * A bound Unix datagram socket that can send while it receives, which the
 * runtime's cannot ("Socket already in use").
 *
 * A reply is sent by a second socket, so that a client that does not read holds
 * up nobody else. A client that has connected its socket takes datagrams from the
 * bound socket only: for it the pending receive is ended by a datagram to
 * ourselves, and the bound socket sends.
 */
class UnixDatagramSocket implements DatagramSocket {
  readonly addr: Deno.UnixAddr;
  readonly #reopen: () => DatagramSocket;
  /** What a datagram to ourselves says. */
  readonly #wakeUp: Uint8Array = encoder.encode(crypto.randomUUID());
  /** What the bound socket has to send before it receives again. */
  readonly #replies: BoundReply[] = [];
  #socket: DatagramSocket;
  #isReceiving = false;
  #isClosed = false;
  #isStuck = false;
  /** The last send to each client that one is under way to. */
  readonly #turns = new Map<string, Promise<void>>();
  /** The paths of clients that a send is stuck on. */
  readonly #deaf = new Set<string>();
  #sending: Promise<void> = DONE;

  constructor(socket: DatagramSocket, addr: Deno.UnixAddr, reopen: () => DatagramSocket) {
    this.#socket = socket;
    this.addr = addr;
    this.#reopen = reopen;
  }

  async receive(into: Uint8Array<ArrayBuffer>): Promise<[Uint8Array<ArrayBuffer>, Deno.Addr]> {
    while (true) {
      await this.#sendReplies();
      this.#replaceIfStuck();
      this.#isReceiving = true;
      try {
        const [data, from] = await this.#socket.receive(into);
        if (!this.#isWakeUp(data)) return [data, from];
      } finally {
        this.#isReceiving = false;
      }
    }
  }

  async send(data: Uint8Array, to: Deno.Addr): Promise<number> {
    if (!("path" in to) || !to.path) {
      throw new TypeError("the client has bound its socket to no path, so it cannot be answered");
    }
    try {
      return await this.#inTurn(to.path, () => sendFromNowhere(data, to));
    } catch (error) {
      if (errorCode(error) !== "EPERM") throw error;
      return await this.#sendFromHere(data, to);
    }
  }

  /** One after the other for each client, so that a client that does not read takes one descriptor and not many. */
  #inTurn(path: string, send: () => Promise<number>): Promise<number> {
    const before = this.#turns.get(path) ?? DONE;
    const sent = before.then(() => {
      if (this.#deaf.has(path)) throw new Deno.errors.TimedOut("the client takes nothing");
      return this.#inTime(send(), path);
    });
    const turn = sent.then(ignore, ignore).then(() => {
      if (this.#turns.get(path) === turn) this.#turns.delete(path);
    });
    this.#turns.set(path, turn);
    return sent;
  }

  /** A send to a client whose queue is full cannot be cancelled. */
  async #inTime(sent: Promise<number>, path: string): Promise<number> {
    const count = await settledWithin(sent, REPLY_TIMEOUT_MS);
    if (count !== undefined) return count;
    this.#deaf.add(path);
    forgettable(sent.finally(() => this.#deaf.delete(path)));
    throw new Deno.errors.TimedOut(`the client took nothing for ${REPLY_TIMEOUT_MS} ms`);
  }

  close(): void {
    this.#isClosed = true;
    for (const { settled } of this.#replies.splice(0)) {
      settled.reject(new Deno.errors.BadResource("the server is closed"));
    }
    this.#socket.close();
  }

  /** Only we know the identifier, so nobody else can send it. */
  #isWakeUp(data: Uint8Array): boolean {
    return data.length === this.#wakeUp.length && data.every((byte, index) => byte === this.#wakeUp[index]);
  }

  #sendFromHere(data: Uint8Array, to: Deno.UnixAddr): Promise<number> {
    const settled = Promise.withResolvers<number>();
    this.#replies.push({ data, to, settled });
    // If the datagram to ourselves cannot be sent, there are others in our queue, which do as well.
    if (this.#isReceiving) sendFromNowhere(this.#wakeUp, this.addr).catch(ignore);
    else this.#sendReplies();
    const timer = setTimeout(() => {
      settled.reject(new Deno.errors.TimedOut(`the server's own socket was busy for ${2 * REPLY_TIMEOUT_MS} ms`));
    }, 2 * REPLY_TIMEOUT_MS);
    return settled.promise.finally(() => clearTimeout(timer));
  }

  /** One after the other, as the runtime takes one at a time. */
  #sendReplies(): Promise<void> {
    if (this.#replies.length === 0) return this.#sending;
    const replies = this.#replies.splice(0);
    this.#sending = this.#sending.then(async () => {
      for (const reply of replies) await this.#sendReply(reply);
    });
    return this.#sending;
  }

  async #sendReply({ data, to, settled }: BoundReply): Promise<void> {
    if (this.#deaf.has(to.path)) return settled.reject(new Deno.errors.TimedOut("the client takes nothing"));
    try {
      this.#replaceIfStuck();
      settled.resolve(await this.#inTime(this.#socket.send(data, to), to.path));
    } catch (error) {
      settled.reject(error);
      this.#isStuck ||= this.#deaf.has(to.path);
    }
  }

  /** Nothing can be received while a send is stuck, for as long as its client likes. */
  #replaceIfStuck(): void {
    if (!this.#isStuck || this.#isClosed) return;
    closeQuietly(this.#socket);
    this.#socket = this.#reopen();
    this.#isStuck = false;
  }
}

/** A reply that the bound socket has to send. */
interface BoundReply {
  readonly data: Uint8Array;
  readonly to: Deno.UnixAddr;
  readonly settled: PromiseWithResolvers<number>;
}

/** Sends from a socket without a path, which is closed when the peer has taken it. */
async function sendFromNowhere(data: Uint8Array, to: Deno.Addr): Promise<number> {
  const socket = openDatagramSocket({ transport: "unixpacket" });
  try {
    return await socket.send(data, to);
  } finally {
    closeQuietly(socket);
  }
}

/** Where a {@linkcode DatagramClient} sends to. */
export type DatagramClientOptions =
  & {
    /**
     * Milliseconds that {@linkcode DatagramClient.recv} waits; above 0, `Infinity`
     * for ever.
     *
     * @default {Infinity}
     */
    timeout?: number;
  }
  & ({
    /**
     * The server's name or address.
     *
     * @default {"127.0.0.1"}
     */
    hostname?: string;
    /** The server's port. */
    port: number;
  } | {
    /** The path of the server's socket. */
    path: string;
    /** The path of the client's own socket, which is made, and removed at the end. */
    localPath: string;
  });

/**
 * The other end of a {@linkcode DatagramServer}: it sends to one server, and takes
 * what comes from there. It needs `--unstable-net`.
 *
 * @example
 * ```ts
 * import { DatagramClient } from "@socketserver/socketserver";
 *
 * using client = new DatagramClient({ port: 9 });
 * await client.send("nobody may be there, and nobody tells");
 * ```
 */
export class DatagramClient implements Disposable {
  readonly #socket: DatagramSocket;
  readonly #server: Deno.NetAddr | Deno.UnixAddr;
  readonly #localPath: string;
  /** The file that was made, to know it again. */
  #file: Deno.FileInfo | undefined;
  readonly #timeout: number;
  readonly #buffer = new Uint8Array(DATAGRAM_BUFFER_BYTES);
  /** A receive cannot be cancelled, so it may outlive the call that began it. */
  #receiving: Promise<[Uint8Array<ArrayBuffer>, Deno.Addr]> | undefined;
  #isWaiting = false;

  /**
   * Opens a socket.
   *
   * @param options Where to: `{ hostname, port }` or `{ path, localPath }`; and `timeout`.
   * @throws {RangeError} If a number is out of its range.
   * @throws {Deno.errors.NotCapable} If a permission is missing.
   * @throws {TypeError} If Deno runs without `--unstable-net`.
   */
  constructor(options: DatagramClientOptions) {
    const { timeout = Infinity, ...address } = options;
    checkNumber("timeout", timeout);
    this.#timeout = timeout;
    const { server, local } = resolveDatagramAddress(address);
    this.#server = server;
    this.#socket = tryTo("open a socket on", local, () => openDatagramSocket(local));
    this.#localPath = "path" in local ? local.path : "";
    this.#file = "path" in local ? fileAt(local.path) : undefined;
  }

  /**
   * Sends a datagram.
   *
   * @param data Bytes, or text that is sent as UTF-8; 65,507 bytes at most.
   * @returns Resolves once the kernel has it; whether it arrives, nobody tells.
   */
  async send(data: Uint8Array | string): Promise<void> {
    if (!isData(data)) throw dataError("send()", data);
    const bytes = bytesOf(data);
    try {
      await this.#socket.send(bytes, this.#server);
    } catch (error) {
      const server = formatAddress(this.#server);
      throw restate(error, `Cannot send ${bytes.length} bytes to ${server}: ${explain(error, this.#server)}`);
    }
  }

  /**
   * Receives the next datagram. One call waits at a time.
   *
   * @returns Resolves to its bytes, which are the caller's.
   * @throws {Deno.errors.Busy} If another call waits.
   * @throws {Deno.errors.TimedOut} If none came within `timeout`; one that comes
   * later answers the next call.
   */
  async recv(): Promise<Uint8Array<ArrayBuffer>> {
    if (this.#isWaiting) throw new Deno.errors.Busy("Cannot recv(): another recv() waits on the same socket");
    this.#isWaiting = true;
    try {
      return await this.#nextFromServer();
    } finally {
      this.#isWaiting = false;
    }
  }

  async #nextFromServer(): Promise<Uint8Array<ArrayBuffer>> {
    const expiresAt = performance.now() + this.#timeout;
    while (true) {
      const receiving = this.#receiving ??= this.#receive();
      const left = expiresAt - performance.now();
      // Strangers must not prolong the wait.
      const received = left > 0 ? await settledWithin(receiving, left) : undefined;
      if (received === undefined) {
        const server = formatAddress(this.#server);
        throw new Deno.errors.TimedOut(`No answer came from ${server} within ${this.#timeout} ms`);
      }
      this.#receiving = undefined;
      const [data, from] = received;
      if (this.#isServer(from)) return data.slice();
    }
  }

  async #receive(): Promise<[Uint8Array<ArrayBuffer>, Deno.Addr]> {
    try {
      return await this.#socket.receive(this.#buffer);
    } catch (error) {
      this.#receiving = undefined;
      throw error;
    }
  }

  /** Anybody can send to a datagram socket. A server whose number is not known is known by its port. */
  #isServer(from: Deno.Addr): boolean {
    const server = this.#server;
    // A Unix server may answer from a socket without a path.
    if ("path" in server) return !("path" in from && from.path) || from.path === server.path;
    if (!("hostname" in from) || from.port !== server.port) return false;
    const expected = canonicalHost(server.hostname);
    return !/^[\d.]+$|^\[/.test(expected) || /^(0\.0\.0\.0|\[::\])$/.test(expected) ||
      canonicalHost(from.hostname) === expected;
  }

  /** Closes the socket; what waits rejects. */
  close(): void {
    this.#receiving?.catch(ignore);
    closeQuietly(this.#socket);
    if (isSameFile(fileAt(this.#localPath), this.#file)) Deno.removeSync(this.#localPath);
    this.#file = undefined; // The next file may have the same number.
  }

  /** Closes the socket. */
  [Symbol.dispose](): void {
    this.close();
  }
}

/** Where a client sends to, and where from: the loopback interface for a server on it, else all. */
function resolveDatagramAddress(
  options: { hostname?: string; port: number } | { path: string; localPath: string },
): { server: Deno.NetAddr | Deno.UnixAddr; local: (Deno.NetAddr | Deno.UnixAddr) & DatagramAddress } {
  if ("path" in options) {
    const { path, localPath } = resolveOptions({ path: "", localPath: "" }, options);
    if (path === "" || localPath === "") {
      throw new TypeError("Paths must not be empty: name the server's and the client's");
    }
    return { server: { transport: "unixpacket", path }, local: { transport: "unixpacket", path: localPath } };
  }
  const { hostname, port } = resolveOptions({ hostname: "127.0.0.1", port: 0 }, options);
  checkHostname(hostname);
  checkPort(port);
  const isLocal = /^(localhost$|127\.)/.test(hostname);
  const local = isLocal ? "127.0.0.1" : hostname === "::1" ? "::1" : hostname.includes(":") ? "::" : "0.0.0.0";
  return { server: { transport: "udp", hostname, port }, local: { transport: "udp", hostname: local, port: 0 } };
}
