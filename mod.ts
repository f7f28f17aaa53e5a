/**
 * Python's {@link https://docs.python.org/3/library/socketserver.html | `socketserver`} for Deno: write a class with
 * one method, get a server that survives the internet. One file, no dependencies.
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
 * The server makes one handler for each connection and serves all of them at the same time. A handler that throws, and
 * a client that resets or stalls, ends its own connection only.
 *
 * `this.request` is a {@linkcode SocketStream}: it reads chunks, lines, exact counts and length-prefixed frames.
 * {@linkcode connect} gives a client the same class, and {@linkcode socketPair} gives it to a test, in memory and
 * without permissions.
 *
 * ```text
 * BaseServer                  lifecycle, hooks, shutdown
 * ├─ StreamServer             accepts connections, hands out SocketStreams
 * │  ├─ TcpServer             { hostname, port }
 * │  └─ UnixServer            { path }
 * └─ DatagramServer           receives datagrams, hands out Datagrams
 *    ├─ UdpServer             { hostname, port }
 *    └─ UnixDatagramServer    { path }
 *
 * BaseRequestHandler          setup() → handle() → finish()
 * ├─ StreamRequestHandler     this.request is a SocketStream
 * └─ DatagramRequestHandler   this.request is a Datagram
 * ```
 *
 * One connection goes through these calls, in this order:
 *
 * | call | of | the connection |
 * | --- | --- | --- |
 * | `filters` | options | is turned into the one to go on with, or refused |
 * | `getRequest()` | server | becomes a stream |
 * | `handleOpen()`, `verifyRequest()` | server | is open; nothing was read |
 * | `processRequest()`, `finishRequest()` | server | is open; the handler is made |
 * | `setup()`, `handle()` | handler | is open until `handle()` closes it |
 * | `finish()` | handler | is as `handle()` left it; runs whenever `setup()` succeeded |
 * | `handleError()` | server | is as the handler left it; runs only after an error |
 * | `handleClose()` | server | is closed |
 *
 * The samples' `@socketserver/socketserver` is this file: in your project write `./mod.ts`. The `options` of servers and
 * streams may be left out. Units are milliseconds and bytes. `limit` bounds a line, a record and a frame,
 * `highWaterMark` the writes of a caller that awaits them. A forgotten promise of a stream's method never ends the
 * process.
 *
 * @module
 */

// --- Errors -----------------------------------------------------------------

/**
 * The stream ended inside of what `readExactly`, `readUntil` or `frames` asked for; asyncio's `IncompleteReadError`.
 */
export class IncompleteReadError extends Error {
  /** The bytes that arrived before the end; they are the caller's. */
  readonly partial: Uint8Array<ArrayBuffer>;
  /** The count that was asked for; `null` for a delimiter. */
  readonly expected: number | null;

  /** Made by the stream. */
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
 * A line, a delimited record or a frame is longer than the limit; asyncio's `LimitOverrunError`.
 *
 * No byte is lost. The caller may answer and close, or skip `consumed` bytes with {@linkcode SocketStream.readExactly}:
 * the rest of the line follows, or the content of the frame.
 */
export class LimitOverrunError extends Error {
  /** The limit, in bytes. */
  readonly limit: number;
  /** Bytes that may be skipped: they hold no delimiter, or are the length of a frame. */
  readonly consumed: number;

  /** Made by the stream. */
  constructor(message: string, limit: number, consumed: number) {
    super(message);
    this.name = "LimitOverrunError";
    this.limit = limit;
    this.consumed = consumed;
  }
}

/** The runtime's classes of errors. A message and a cause make one; a program's own class may ask for something else. */
const RUNTIME_CLASSES = [Error, TypeError, RangeError, URIError, ...Object.values<unknown>(Deno.errors)];

/** The same class and `code` as `error`, under another message; a class of the program's own stays as it is. */
function restate(error: unknown, message: string): Error {
  const code = errorCode(error);
  if (error instanceof Error && !RUNTIME_CLASSES.includes(error.constructor)) return error;
  // ENOTCONN: the peer had reset a new connection before the runtime asked for its address.
  const Kind = code === "ENOTCONN" ? Deno.errors.ConnectionReset : error instanceof Error ? error.constructor : Error;
  const restated: Error = Reflect.construct(Kind, [message, { cause: error }]);
  return code === "" ? restated : Object.assign(restated, { code });
}

/** Controls (C0, C1), invisible and direction-changing characters, line ends, lone surrogates. */
const UNPRINTABLE = /[\p{Cc}\p{Cf}\p{Zl}\p{Zp}\p{Cs}]/gu;

const SHORT_ESCAPES = new Map([["\n", "\\n"], ["\r", "\\r"], ["\t", "\\t"]]);

/**
 * Escapes `text` so that it is one line and safe to print. Clients can send line ends that forge a log line and
 * sequences that a terminal obeys. Control and invisible characters become `\n`, `\x1b` or `\u202e`. All messages of
 * this file use it.
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

/** `console.error`, which throws if the disk of the log is full: that must not end the process. */
function print(...data: unknown[]): void {
  try {
    console.error(...data);
  } catch (error) {
    if (errorCode(error) === "") throw error; // A getter of what is printed has thrown.
  }
}

/** The message of `error`, or any other thrown value, as printable text; never throws. */
function messageOf(error: unknown): string {
  try {
    return printable(error instanceof Error ? error.message : String(error));
  } catch {
    return "the thrown value cannot be printed"; // A getter of the thrown value has thrown.
  }
}

/** Prints an error with its stack, or without while descriptors are short; never throws. */
function printError(what: string, error: unknown): void {
  const format = what.replaceAll("%", "%%"); // A Unix client's path may look like a format.
  try {
    print(format, isExhausted() ? messageOf(error) : printableError(error));
  } catch {
    print(format, messageOf(error)); // A getter of the thrown value has thrown.
  }
}

/** `error` itself, or its escaped text if it is unprintable or could pass for a log line. */
function printableError(error: unknown): unknown {
  if (typeof error === "string") return printable(error);
  const text = Deno.inspect(error);
  const quoted = error instanceof Error ? text.replace(error.message, () => printable(error.message)) : text;
  const [first = "", ...rest] = quoted.split("\n").map(printable);
  const shown = [first, ...rest.map((line) => CONTINUES.test(line) ? line : `    ${line}`)].join("\n");
  return shown === text ? error : shown;
}

/** A line that cannot pass for another message: of a stack, or inside or at the end of an object. */
const CONTINUES = /^( |[}\])]+$|$)/;

/** The least time between two notices. */
const NOTICE_INTERVAL_MS = 1_000;

let noticedAt = -Infinity;
let unprinted = 0;

/** Prints one line a second at most, so that a port scanner cannot fill a log. */
function printNotice(line: string): void {
  const now = performance.now();
  if (now - noticedAt < NOTICE_INTERVAL_MS) return void unprinted++;
  const more = unprinted === 0 ? "" : ` (${unprinted} similar lines were left out before)`;
  noticedAt = now;
  unprinted = 0;
  print("%s", line + more);
}

function ignore(): void {}

/** What filters have given to `onEnd()`. It runs when the connection ends; what is added later runs at once. */
class Releases {
  #waiting: (() => void)[] | undefined;
  #isOver = false;

  add(release: () => void): void {
    if (this.#isOver) callRelease(release);
    else (this.#waiting ??= []).push(release);
  }

  callAll(): void {
    this.#isOver = true;
    this.#waiting?.splice(0).forEach(callRelease);
  }
}

function callRelease(release: () => void): void {
  try {
    release();
  } catch (error) {
    printError("Error in onEnd() of a filter:", error);
  }
}

/** Marks `promise` as handled, so that a caller may forget it: its error also meets the next call on the stream. */
function forgettable<T>(promise: Promise<T>): Promise<T> {
  promise.catch(ignore);
  return promise;
}

function rejection(error: unknown): Promise<never> {
  return forgettable(Promise.reject(error));
}

/** Plain JavaScript may return any thenable. */
function isThenable<T>(result: T | Promise<T>): result is Promise<T> {
  return typeof result === "object" && result !== null && "then" in result;
}

/** `result` as a promise if it is one. */
function asPromise<T>(result: T | Promise<T>): Promise<T> | undefined {
  return isThenable(result) ? Promise.resolve(result) : undefined;
}

function closeQuietly(closable: { close(): unknown }): void {
  try {
    closable.close();
  } catch {
    // It is closed already, which is the goal.
  }
}

// --- Options ----------------------------------------------------------------

/** Deadlines and limits of a {@linkcode SocketStream}. Times are above 0; `Infinity` is for ever. */
export interface StreamOptions {
  /**
   * Milliseconds that one read or one write may wait. A read that waits longer rejects with `Deno.errors.TimedOut`; its
   * bytes answer the next read. A write that waits longer rejects likewise and closes the stream. It fires no earlier
   * than asked, and at most 1/16 or 10 ms late, whichever is larger. The kernel reports a slow reader's progress in
   * steps of up to 1 MB, so a 30 s timeout also ends a steady 30 kB/s download.
   * @default {Infinity}
   */
  timeout?: number | undefined;
  /**
   * Milliseconds without a byte in either direction after which the stream is closed. Pending calls reject with
   * `Deno.errors.TimedOut`.
   * @default {Infinity}
   */
  idleTimeout?: number | undefined;
  /**
   * Milliseconds after which the stream is closed, however busy it is, and what `close()` has left to send is dropped.
   * Pending calls reject with `Deno.errors.TimedOut`.
   * @default {Infinity}
   */
  maxLifetime?: number | undefined;
  /**
   * Bytes that a line, a delimited record or a frame may have, without its delimiter or length prefix; whole, 1 or
   * more. A longer one rejects with {@linkcode LimitOverrunError}.
   * @default {65_536}
   */
  limit?: number | undefined;
  /**
   * Bytes that {@linkcode SocketStream.write} buffers before it waits for the peer; 0 for none.
   * @default {65_536}
   */
  highWaterMark?: number | undefined;
}

/** Options of a {@linkcode StreamServer}, besides its address. */
export interface ServerOptions extends StreamOptions {
  /**
   * Connections that are served at the same time, 1 or more; `Infinity` for no limit. Further clients wait in the
   * kernel's backlog. With 1 the server is Python's `TCPServer`. A connection takes one descriptor: keep the limit
   * below `ulimit -n`, and lower if handlers open files or connections of their own.
   * @default {10_000}
   */
  maxConnections?: number | undefined;
  /**
   * Filters that each accepted connection passes, in order, before it becomes a stream: a TLS handshake, a PROXY
   * header, {@linkcode perHost}.
   * @default {[]}
   */
  filters?: readonly ConnectionFilter[] | undefined;
  /**
   * Milliseconds that all filters of a connection may take together; above 0, `Infinity` for ever. After that the
   * connection is closed, `handleError()` runs, and {@linkcode ServerStats.handshakeFailures} counts it.
   * @default {5_000}
   */
  handshakeTimeout?: number | undefined;
  /**
   * Milliseconds that {@linkcode BaseServer.shutdown} lets handlers finish before it cuts them off; 0 cuts at once,
   * `Infinity` waits for ever.
   * @default {10_000}
   */
  grace?: number | undefined;
  /**
   * Whether small writes are sent at once (`TCP_NODELAY`). Without it an answer in two parts waits some 40 ms for the
   * peer's acknowledgement.
   * @default {true}
   */
  noDelay?: boolean | undefined;
}

/** Options of a {@linkcode DatagramServer}, besides its address. */
export interface DatagramServerOptions {
  /**
   * Datagrams that are served at the same time, 1 or more; `Infinity` for no limit. Further ones are dropped and
   * counted in {@linkcode ServerStats.dropped}.
   * @default {1_000}
   */
  maxConcurrent?: number | undefined;
  /**
   * Milliseconds that {@linkcode BaseServer.shutdown} lets handlers finish; 0 gives them up at once, `Infinity` waits
   * for ever.
   * @default {10_000}
   */
  grace?: number | undefined;
}

/** The length in front of a record; {@linkcode SocketStream.frames}, {@linkcode SocketStream.writeFrame}. */
export interface FrameOptions {
  /**
   * Bytes of the length.
   * @default {4}
   */
  lengthBytes?: 1 | 2 | 4 | undefined;
  /**
   * Whether the least significant byte comes first. Network protocols send it last.
   * @default {false}
   */
  littleEndian?: boolean | undefined;
}

/** The TLS of a client, by the runtime. The server's certificate is always checked. */
export interface ConnectTlsOptions {
  /** Authorities to trust besides those of the runtime, in PEM form. */
  caCerts?: string[] | undefined;
  /** The name or IP address that the server's certificate must have. Default: the `hostname` of `connect()`. */
  serverName?: string | undefined;
  /** Protocols to ask for by ALPN, the best one first. Default: none. */
  alpnProtocols?: string[] | undefined;
}

/** Options of {@linkcode connect}, besides the address. */
export interface DialOptions extends StreamOptions, Pick<ServerOptions, "noDelay"> {
  /**
   * Milliseconds that each try may take, and then that each read or write of the stream may wait, as in Python's
   * `create_connection`; above 0, `Infinity` for ever.
   * @default {Infinity}
   */
  timeout?: number | undefined;
  /**
   * How often a failed try is repeated; `Infinity` for ever. The first wait is 100 ms; it doubles up to 5 s, less a
   * random part of up to half, so that many clients do not come back at the same moment.
   * @default {0}
   */
  retries?: number | undefined;
  /**
   * Whether the connection is encrypted, and how it is checked. The handshake is part of the try. The runtime cannot
   * end a handshake: a server that stalls in it keeps one descriptor for each try until it leaves.
   * @default {false}
   */
  tls?: boolean | ConnectTlsOptions | undefined;
  /**
   * Filters that the connection passes, in order, before `tls`. They are part of the try. `tls` needs the bare
   * connection: over a filter that wraps it, use `tlsClient()` of the extra as a filter.
   * @default {[]}
   */
  filters?: readonly ConnectionFilter[] | undefined;
  /** Ends the tries and the waits between them; the promise rejects with its reason. */
  signal?: AbortSignal | undefined;
}

/**
 * Where {@linkcode connect} goes, and how: to a host (default `"127.0.0.1"`) and TCP port, or to the path of a Unix
 * socket.
 */
export type ConnectOptions = DialOptions & ({ hostname?: string | undefined; port: number } | { path: string });

/** All options of `T`, with their defaults filled in. */
type Resolved<T> = { [K in keyof T]-?: Exclude<T[K], undefined> };

type StreamSettings = Resolved<StreamOptions>;
type ServerSettings = Resolved<ServerOptions>;
type FrameFormat = Resolved<FrameOptions>;

const STREAM_DEFAULTS: StreamSettings = {
  timeout: Infinity,
  idleTimeout: Infinity,
  maxLifetime: Infinity,
  limit: 65_536,
  highWaterMark: 65_536,
};

const SERVER_DEFAULTS: ServerSettings = {
  ...STREAM_DEFAULTS,
  maxConnections: 10_000,
  filters: [],
  // Long enough for a slow line, short enough that stalled peers hold few descriptors. PROXY 2 asks for 3 s at least.
  handshakeTimeout: 5_000,
  grace: 10_000,
  noDelay: true,
};

const DATAGRAM_SERVER_DEFAULTS: Resolved<DatagramServerOptions> = { maxConcurrent: 1_000, grace: 10_000 };

const FRAME_DEFAULTS: FrameFormat = { lengthBytes: 4, littleEndian: false };

// The smallest number that an option may have, and whether it must be whole. `Infinity` passes; an option with a largest
// number is looked at by its class, too.
const ABOVE_0 = { min: Number.MIN_VALUE, isWhole: false };
const FROM_0 = { min: 0, isWhole: false };
const WHOLE_FROM_0 = { min: 0, isWhole: true };
const WHOLE_FROM_1 = { min: 1, isWhole: true };

const NUMBER_RULES: Record<string, typeof FROM_0> = {
  timeout: ABOVE_0,
  idleTimeout: ABOVE_0,
  maxLifetime: ABOVE_0,
  handshakeTimeout: ABOVE_0,
  highWaterMark: FROM_0,
  grace: FROM_0,
  limit: WHOLE_FROM_1,
  maxConnections: WHOLE_FROM_1,
  maxConcurrent: WHOLE_FROM_1,
  tcpBacklog: WHOLE_FROM_1,
  retries: WHOLE_FROM_0,
  mode: WHOLE_FROM_0,
};

/** Fills `options` up with `defaults`; throws for an unknown name and for a number out of its range. */
function resolveOptions<T extends object>(defaults: T, options: { [K in keyof T]?: T[K] | undefined }): T {
  if (typeof options !== "object" || options === null) {
    throw new TypeError(`Options must be an object such as { timeout: 5_000 }: they are ${Deno.inspect(options)}`);
  }
  const given = Object.entries(options).filter(([, value]) => value !== undefined);
  for (const [name, value] of given) {
    if (!Object.hasOwn(defaults, name)) {
      throw new TypeError(`Unknown option "${name}": the options are ${Object.keys(defaults).join(", ")}`);
    }
    if (Object.hasOwn(NUMBER_RULES, name)) checkNumber(name, value);
    if (name === "filters") checkFilters(value);
  }
  return { ...defaults, ...Object.fromEntries(given) };
}

/** Options of servers and dials that are resolved already, each as its own key: their streams need no second check. */
const resolvedStreamOptions = new WeakMap<StreamOptions, StreamSettings>();

function resolveStreamOptions(options: StreamOptions): StreamSettings {
  return resolvedStreamOptions.get(options) ?? resolveOptions(STREAM_DEFAULTS, options);
}

function resolveFrameOptions(options: FrameOptions): FrameFormat {
  const format = resolveOptions(FRAME_DEFAULTS, options);
  if ([1, 2, 4].includes(format.lengthBytes)) return format;
  throw new RangeError(`Option "lengthBytes" must be 1, 2 or 4: it is ${format.lengthBytes}`);
}

function checkNumber(name: string, value: unknown): void {
  const { min, isWhole } = NUMBER_RULES[name] ?? FROM_0;
  if (typeof value !== "number") throw wrongType(`Option "${name}" must be a number`, value);
  if (value >= min && (!isWhole || Number.isInteger(value) || value === Infinity)) return;
  const range = min === Number.MIN_VALUE ? "above 0" : `${isWhole ? "whole, " : ""}${min} or more`;
  throw new RangeError(`Option "${name}" must be ${range}, or Infinity for no limit: it is ${value}`);
}

function checkFilters(filters: unknown): void {
  if (Array.isArray(filters) && [...filters].every((filter) => typeof filter === "function")) return; // Holes, too.
  throw wrongType('Option "filters" must be an array of functions', filters);
}

function wrongType(rule: string, value: unknown): TypeError {
  return new TypeError(`${rule}: it is ${Deno.inspect(value)}`);
}

function checkPort(port: unknown): void {
  if (typeof port === "number" && Number.isInteger(port) && port >= 0 && port <= 65_535) return;
  throw new RangeError(`Port must be a whole number from 0 to 65535: it is ${Deno.inspect(port)}`);
}

/** Refuses a pair, too, which Python's servers take. */
function checkAddress(address: unknown): void {
  if (typeof address === "object" && address !== null && !Array.isArray(address)) return;
  throw wrongType('Address must be an object such as { hostname: "127.0.0.1", port: 8009 }', address);
}

/** Refuses a plain function, too, which Python's servers take. */
function checkHandler(Handler: unknown): void {
  if (typeof Handler === "function" && typeof Handler.prototype?.handle === "function") return;
  throw wrongType("Handler must be a class with a method handle()", Handler);
}

/** `hostname` as the system takes it: IPv6 without brackets, letters outside ASCII as IDNA writes them. */
function checkHostname(hostname: unknown): string {
  if (typeof hostname !== "string") throw wrongType('Option "hostname" must be a string', hostname);
  if (hostname === "") {
    throw new TypeError(`Hostname must not be empty: "127.0.0.1" is this machine, "0.0.0.0" all its IPv4 interfaces`);
  }
  const host = hostname.replace(/^\[(.*)\]$/, "$1");
  const isAscii = /^[\x20-\x7e]*$/.test(host);
  return !isAscii && URL.canParse(`http://${host}`) ? new URL(`http://${host}`).hostname : host;
}

// --- Addresses --------------------------------------------------------------

/**
 * Formats an address as people write it: `127.0.0.1:8009`, `[::1]:8009`, `/run/app.sock`. An IPv4 client of an IPv6
 * socket (`::ffff:127.0.0.1`) is written as IPv4. Control characters are escaped as in {@linkcode printable}.
 */
export function formatAddress(address: Deno.Addr): string {
  if ("hostname" in address) return printable(`${bracketed(address.hostname)}:${address.port}`);
  if (address.transport !== "unix" && address.transport !== "unixpacket") return Deno.inspect(address);
  // An unbound client has no path, despite the type.
  return address.path ? printable(address.path.replace(/^\0/, "@")) : "(unnamed Unix socket)";
}

function bracketed(hostname: string): string {
  const host = hostname.replace(/^\[|\]$/g, "").replace(/^::ffff:(\d+\.\d+\.\d+\.\d+)$/i, "$1");
  return host.includes(":") ? `[${host}]` : host;
}

/** The prefix of an IPv4 address in the form of IPv6; RFC 4291, 2.5.5.2. */
const MAPPED_PREFIX = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/** The bytes of a host's address without its zone; 4 for IPv4 in the form of IPv6. */
function hostBytes(hostname: string): Uint8Array | undefined {
  const bytes = inetPton(hostname.replace(/%.*$/, ""));
  const isMapped = bytes?.length === 16 && MAPPED_PREFIX.every((byte, index) => byte === bytes[index]);
  return isMapped ? bytes.subarray(MAPPED_PREFIX.length) : bytes;
}

/**
 * The host that {@linkcode perHost} counts: an IPv4 address, or the first 64 bits of an IPv6 address, as one customer
 * has all addresses behind them. Link-local and unique local addresses (RFC 4291, 2.5.6; RFC 4193) count each by
 * itself, as a whole network shares their prefix. `undefined` for a client of a Unix socket.
 */
export function hostOf(address: Deno.Addr): string | undefined {
  if (!("hostname" in address)) return undefined;
  const bytes = hostBytes(address.hostname);
  if (bytes === undefined) return address.hostname;
  const [first = 0, second = 0] = bytes;
  const isLocal = (first & 0xfe) === 0xfc || (first === 0xfe && (second & 0xc0) === 0x80);
  if (bytes.length === 4 || isLocal) return inetNtop(bytes);
  return `${inetNtop(Uint8Array.from(bytes, (byte, index) => index < 8 ? byte : 0))}/64`;
}

/**
 * Parses an IP address strictly: no leading zeros, no zone, no short IPv4; `inet_pton(3)`. Gives 4 or 16 bytes, or
 * `undefined`.
 */
export function inetPton(text: string): Uint8Array<ArrayBuffer> | undefined {
  return text.includes(":") ? ipv6Bytes(text) : ipv4Bytes(text);
}

function ipv4Bytes(text: string): Uint8Array<ArrayBuffer> | undefined {
  const parts = text.split(".");
  const areBytes = parts.every((part) => /^(0|[1-9]\d{0,2})$/.test(part) && Number(part) <= 0xff);
  return parts.length === 4 && areBytes ? Uint8Array.from(parts, Number) : undefined;
}

/** The URL parser is as strict, and writes one canonical form. */
function ipv6Bytes(text: string): Uint8Array<ArrayBuffer> | undefined {
  const url = `http://[${text}]`;
  if (!/^[\da-f:.]+$/i.test(text) || !URL.canParse(url)) return undefined;
  const halves = new URL(url).hostname.slice(1, -1).split("::");
  const [left = [], right = []] = halves.map((half) => half === "" ? [] : half.split(":"));
  const groups = [...left, ...Array<string>(8 - left.length - right.length).fill("0"), ...right];
  return Uint8Array.from(groups.flatMap((group) => [parseInt(group, 16) >> 8, parseInt(group, 16) & 0xff]));
}

/** Formats the 4 or 16 bytes of an IP address as RFC 5952 does, without dots in IPv6; `inet_ntop(3)`. */
export function inetNtop(bytes: Uint8Array): string {
  if (bytes.length === 4) return bytes.join(".");
  const groups = Array.from({ length: 8 }, (_, index) => (bytes[index * 2] ?? 0) << 8 | (bytes[index * 2 + 1] ?? 0));
  return new URL(`http://[${groups.map((group) => group.toString(16)).join(":")}]`).hostname.slice(1, -1);
}

/** The least permissions that opening `address` takes. */
function permissionFlags(address: Deno.Addr): string {
  // Answers go to the clients' own ports and paths.
  if (address.transport === "udp") return `--allow-net=${bracketed(address.hostname)}`;
  if ("path" in address) {
    const isPacket = address.transport === "unixpacket";
    const path = printable(isPacket ? address.path.replace(/[^/]*$/, "") || "." : address.path);
    return `--allow-read=${path} --allow-write=${path} --allow-net${isPacket ? "" : `=unix:${path}`}`;
  }
  return `--allow-net=${formatAddress(address).replace(/:0$/, "")}`;
}

/** What a person may do about an error, by its code. */
const ADVICE: Record<string, string> = {
  EADDRINUSE: "stop the program that has it or choose another address",
  EADDRNOTAVAIL: "this machine has no such address, choose one of its own",
  EACCES: "choose another address (ports below 1024 are reserved)",
  ECONNREFUSED: "start the server or check the address",
  ENOENT: "start the server or check the path",
  ENOTCONN: "the server has reset the connection at once",
};

/** Linux: `sun_path` of unix(7) has 108 bytes, the last one is 0. */
const MAX_PATH_BYTES = 107;

/** The system's own words for `error`, then what to do. */
function explain(error: unknown, address: Deno.Addr): string {
  if (error instanceof Deno.errors.NotCapable) {
    return `permission is missing; run again with ${permissionFlags(address)}`;
  }
  const pathBytes = "path" in address ? encoder.encode(address.path).length : 0;
  if (pathBytes > MAX_PATH_BYTES) {
    return `the path has ${pathBytes} bytes; a Unix socket's path has at most ${MAX_PATH_BYTES}`;
  }
  const words = systemWords(error);
  const isUnresolved = words.startsWith("failed to lookup address") || errorCode(error) === "ENOTFOUND";
  if (isUnresolved) return `the name cannot be resolved (${words}); check its spelling`;
  const advice = ADVICE[errorCode(error)];
  return advice === undefined ? words : `${words}; ${advice}`;
}

/** What the system says of an error, such as "connection refused". */
function systemWords(error: unknown): string {
  const words = messageOf(error).replace(/ \(os error \d+\)/g, "");
  return /^[A-Z][a-z]/.test(words) ? words.charAt(0).toLowerCase() + words.slice(1) : words;
}

function openingError(what: string, address: Deno.Addr, error: unknown): Error {
  if (error instanceof TypeError && errorCode(error) === "") return error; // It says by itself what was asked wrongly.
  return restate(error, `Cannot ${what} ${formatAddress(address)}: ${explain(error, address)}`);
}

// --- Faults of the runtime --------------------------------------------------

// Each was seen in Deno 2.9.6 on Linux, as its comment says. A workaround can go when the fault has gone.

/** Errors that have no `code`, by the number in their message. Seen with `strace -e inject=accept4:error=ENFILE`. */
const CODES_BY_NUMBER = new Map([
  ["23", "ENFILE"],
  ["64", "ENONET"],
  ["71", "EPROTO"],
  ["92", "ENOPROTOOPT"],
  ["100", "ENETDOWN"],
  ["107", "ENOTCONN"],
  ["112", "EHOSTDOWN"],
]);

/** The `code` of a system error, such as `"EMFILE"`, or "". It never reads `stack`, which opens a file. */
function errorCode(error: unknown): string {
  if (!(error instanceof Error)) return "";
  if ("code" in error) return String(error.code);
  const [, number = ""] = /\(os error (\d+)\)$/.exec(error.message) ?? [];
  return CODES_BY_NUMBER.get(number) ?? "";
}

/** Exhaustions that follow each other within this time are one: a descriptor that comes free is taken at once. */
const OVERLOAD_EPISODE_MS = 5_000;

/** When the process last ran out of descriptors or memory. */
let exhaustedAt = -Infinity;

/** Whether `stack` must not be read: the runtime opens the source map for it, and panics if it cannot. */
function isExhausted(): boolean {
  return performance.now() - exhaustedAt <= OVERLOAD_EPISODE_MS;
}

/**
 * Opens what the runtime would open later, when no descriptor may be left, on which it panics: the source map of this
 * module, at the first read of a `stack`, and its own signal listener, 500 ms after the start of the process.
 */
function prepareForExhaustion(): void {
  void new TypeError("unused").stack;
  try {
    Deno.addSignalListener("SIGINT", ignore);
    Deno.removeSignalListener("SIGINT", ignore);
  } catch {
    // A worker has no signals.
  }
}

/** The connection of `Deno.startTls` has addresses without a `transport`. */
function withAddresses(conn: Deno.TlsConn, { localAddr, remoteAddr }: StreamConn): StreamConn {
  return {
    localAddr,
    remoteAddr,
    under: conn,
    read: (into) => conn.read(into),
    write: (data) => conn.write(data),
    closeWrite: () => conn.closeWrite(),
    close: () => conn.close(),
  };
}

/**
 * The part of the runtime's datagram socket that a {@linkcode DatagramServer} needs; its own type needs
 * `--unstable-net`.
 */
export interface DatagramSocket {
  /** The bound address. */
  readonly addr: Deno.Addr;
  /** Receives into `into`; resolves to the part that was filled, and the sender. */
  receive(into: Uint8Array<ArrayBuffer>): Promise<Received>;
  /** Sends one datagram. */
  send(data: Uint8Array, to: Deno.Addr): Promise<number>;
  /** Closes the socket; pending calls reject. */
  close(): void;
}

/** The bytes of a datagram, and its sender. */
export type Received = [Uint8Array<ArrayBuffer>, Deno.Addr];

type DatagramAddress =
  | { transport: "udp"; hostname: string; port: number }
  | { transport: "unixpacket"; path?: string };

/** Without `--unstable-net` the function is not there. */
function openDatagramSocket(address: DatagramAddress): DatagramSocket {
  const runtime: object = Deno;
  if (hasUnstableNet(runtime)) return runtime.listenDatagram(address);
  throw new TypeError("Cannot open a datagram socket: Deno has them behind a flag; run again with --unstable-net");
}

function hasUnstableNet(runtime: object): runtime is { listenDatagram(address: DatagramAddress): DatagramSocket } {
  return "listenDatagram" in runtime && typeof runtime.listenDatagram === "function";
}

/** Without the flag the runtime prints a line and ends the process (exit code 70), which nobody can catch. */
function checkReusePort(): void {
  if (hasUnstableNet(Deno)) return;
  throw new TypeError("Cannot listen with reusePort: Deno has it behind a flag; run again with --unstable-net");
}

/** The peer may be gone: then `setNoDelay()` throws, and the first read rejects. */
function disableNagle(conn: StreamConn): void {
  try {
    if ("setNoDelay" in conn && typeof conn.setNoDelay === "function") conn.setNoDelay(true);
  } catch {
    // The first read says so.
  }
}

// --- Deadlines --------------------------------------------------------------

/** The longest wait that a timer can be set to: 2^31 - 1 ms, some 25 days. */
const MAX_TIMER_MS = 2_147_483_647;

/** Looks taken while a deadline runs. It fires at most 2/32 of its time, or two least waits, late. */
const LOOKS_PER_DEADLINE = 32;

/** The least wait between two looks. */
const MIN_LOOK_MS = 5;

/** The largest part of its time that a process spends on looks; a look at 10,000 streams takes some 0.3 ms. */
const MAX_LOOKING = 0.05;

/**
 * One timer for the deadlines of all streams. A timer for each read costs a fifth of the throughput, and reading the
 * clock 1.5 % (79 ns). Instead it looks at all watched streams now and then, and compares their counts with those of the
 * look before. A wait that begins notes nothing: its time starts at the first look that finds it.
 */
class DeadlineTimer {
  readonly #watched = new Set<Transport>();
  #timer: ReturnType<typeof setTimeout> | undefined;
  #looksAt = Infinity;

  /** Looks at `transport` from now on, often enough for a time of `ms`. */
  watch(transport: Transport, ms: number): void {
    this.#watched.add(transport);
    this.#lookIn(ms / LOOKS_PER_DEADLINE);
  }

  unwatch(transport: Transport): void {
    if (!this.#watched.delete(transport) || this.#watched.size > 0) return;
    clearTimeout(this.#timer);
    this.#looksAt = Infinity;
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
    for (const transport of this.#watched) {
      const time = transport.look(now);
      if (time === Infinity) this.#watched.delete(transport);
      shortest = Math.min(shortest, time);
    }
    const spent = performance.now() - now;
    if (shortest < Infinity) this.#lookIn(Math.max(shortest / LOOKS_PER_DEADLINE, spent / MAX_LOOKING));
  }
}

const deadlines = new DeadlineTimer();

/** How long a count was seen unchanged, which is never longer than the true time. */
class Standstill {
  #seenAt: number | undefined;
  #count = 0;

  /** Milliseconds that `count` was seen unchanged. */
  lasts(now: number, count: number): number {
    if (count !== this.#count) this.forget();
    this.#count = count;
    return now - (this.#seenAt ??= now);
  }

  /** Starts the time at the next look. */
  forget(): void {
    this.#seenAt = undefined;
  }
}

/** A timer for any time; none for `Infinity`. */
function startTimer(callback: () => void, ms: number): ReturnType<typeof setTimeout> | undefined {
  return ms === Infinity ? undefined : setTimeout(callback, Math.min(ms, MAX_TIMER_MS));
}

/** Resolves after `ms`, or as soon as one of `signals` aborts. */
function delay(ms: number, ...signals: (AbortSignal | undefined)[]): Promise<void> {
  if (signals.some((signal) => signal?.aborted)) return DONE;
  return new Promise((resolve) => {
    function done() {
      clearTimeout(timer);
      for (const signal of signals) signal?.removeEventListener("abort", done);
      resolve();
    }
    const timer = startTimer(done, ms);
    for (const signal of signals) signal?.addEventListener("abort", done);
  });
}

/** Whether `promise` settles within `ms`, and before `signal` aborts. */
async function settlesWithin(promise: Promise<unknown>, ms: number, signal?: AbortSignal): Promise<boolean> {
  const settlement = settlementOf(promise);
  await delay(ms, settlement, signal);
  return settlement.aborted;
}

/**
 * For each promise that is waited for. Nothing can be taken back from a promise, but a listener from a signal: so waits
 * for one promise, again and again, leave nothing at it.
 */
const settlements = new WeakMap<Promise<unknown>, AbortSignal>();

/** A signal that aborts when `promise` settles. */
function settlementOf(promise: Promise<unknown>): AbortSignal {
  const known = settlements.get(promise);
  if (known !== undefined) return known;
  const controller = new AbortController();
  const settle = () => controller.abort("settled"); // The default reason would be an error, with a stack.
  promise.then(settle, settle);
  settlements.set(promise, controller.signal);
  return controller.signal;
}

/**
 * Settles as `promise` does, but rejects as soon as `controller` aborts, with its reason. Aborts it after `ms`, with
 * `TimedOut` and a message that begins with `what`.
 */
async function inTime<T>(promise: Promise<T>, ms: number, what: string, controller: AbortController): Promise<T> {
  const isOver = await settlesWithin(promise, ms, controller.signal) || controller.signal.aborted;
  if (!isOver) controller.abort(new Deno.errors.TimedOut(`${what} ${ms} ms`));
  controller.signal.throwIfAborted();
  return await promise;
}

// --- Fair turns -------------------------------------------------------------

/** Operations that the runtime completes in one turn of its event loop (tokio's budget). */
const RUNTIME_BUDGET = 128;

/** Queued streams that go on in one turn. From 96 on order is lost again; with 8 a turn costs more than it brings. */
const READS_PER_TURN = 32;

/** Streams let go beyond the number served, because some have nothing to read. */
const EXTRA_READS = 8;

/** Milliseconds after which the queue moves on although nobody was served. */
const STALL_MS = 1;

/**
 * Lets busy streams read in turn.
 *
 * The runtime completes 128 operations in a turn and wakes the other ready ones in reverse order, so a connection that
 * reads again at once overtakes those that wait: of 1,000 busy ones some get one answer in four seconds and others two
 * thousand. Therefore streams queue up here once a turn has been full. Few more go on than were served, so the budget
 * always has room for accepting and for datagrams.
 *
 * A stream's first read, and a read that really had to wait, skip the queue. With fewer streams than the budget nobody
 * queues.
 */
class Turnstile {
  readonly #waiting: { takeTurn(): void }[] = [];
  /** Reads that completed in this turn. */
  #completed = 0;
  /** Whether the queue has moved since the last check. */
  #hasMoved = false;
  #isWatched = false;
  streams = 0;
  /** Reads that all streams have completed. */
  reads = 0;

  /** Whether `taker` may read at once; if not, `takeTurn()` is called later. */
  admits(taker: { takeTurn(): void }): boolean {
    if (this.streams < RUNTIME_BUDGET || (this.#completed < RUNTIME_BUDGET && this.#waiting.length === 0)) return true;
    this.#waiting.push(taker);
    if (!this.#isWatched) this.#moveOn();
    return false;
  }

  noteRead(): void {
    this.reads++;
    if (this.streams < RUNTIME_BUDGET) return;
    if (this.#completed++ === 0) setImmediate(this.#endTurn);
  }

  readonly #endTurn = (): void => {
    const count = Math.min(this.#completed + EXTRA_READS, READS_PER_TURN);
    this.#completed = 0;
    this.#hasMoved = true;
    if (this.#waiting.length > 0) this.#letGo(count);
  };

  /** Runs while streams wait, in case those that went on have nothing to read. */
  readonly #moveOn = (): void => {
    if (this.#isWatched && !this.#hasMoved) this.#letGo(READS_PER_TURN);
    this.#hasMoved = false;
    this.#isWatched = this.#waiting.length > 0;
    if (this.#isWatched) setTimeout(this.#moveOn, STALL_MS);
  };

  #letGo(count: number): void {
    for (const taker of this.#waiting.splice(0, count)) taker.takeTurn();
  }
}

const turnstile = new Turnstile();

// --- Input ------------------------------------------------------------------

/** The buffer of an idle connection: 10,000 of them hold 2.5 MB. */
const IDLE_BUFFER_BYTES = 256;

/**
 * The buffer of a busy connection, and the most memory that a small chunk keeps alive. A part of it costs 28 ns to
 * make, an array of its own 230.
 */
const BUSY_BUFFER_BYTES = 2_048;

/** Larger reads gain nothing over loopback. */
const MAX_BUFFER_BYTES = 32_768;

/** A part of a large buffer keeps all of it alive: at most this many times its own size. */
const MAX_RETENTION = 64;

/** Reads that leave most of the buffer empty before it shrinks. */
const SMALL_READS_BEFORE_SHRINKING = 16;

/** Less room than this at the end of a buffer is not worth a read. */
const MIN_ROOM_BYTES = 64;

/** Lines are decoded together, up to so many bytes: the decoder's call costs four times the rest. */
const TEXT_BYTES = 1_024;

const NO_BYTES: Uint8Array<ArrayBuffer> = new Uint8Array(0);
const LINE_FEED_BYTE = 0x0a;
const LINE_FEED = new Uint8Array([LINE_FEED_BYTE]);
const CARRIAGE_RETURN = 0x0d;

/** Lines are UTF-8. A byte order mark is kept, and invalid bytes become U+FFFD. */
const decoder = new TextDecoder("utf-8", { ignoreBOM: true });

/**
 * The bytes that arrived and that nobody has read yet. No I/O.
 *
 * Small chunks are handed out as parts of the buffer: bytes before `#ours` are their callers', and are never written
 * again. A small part of a large buffer is copied.
 */
class Input {
  /** The buffer, or what is left of it behind the chunks of callers. */
  #bytes = NO_BYTES;
  /** The length of the whole buffer. */
  #size = 0;
  #ours = 0;
  #start = 0;
  #end = 0;
  #wanted = IDLE_BUFFER_BYTES;
  #smallReads = 0;
  #lastCount = 0;
  /** Decoded lines, one character for each byte from `#textAt` on. */
  #text = "";
  #textAt = 0;
  /** No more bytes will come. */
  ended = false;
  /** Bytes known to hold no delimiter, so that a line that comes byte by byte is searched once. */
  searched = 0;
  /** Bytes that went straight into the reader's own array. */
  directCount = 0;

  get length(): number {
    return this.#end - this.#start;
  }

  /** The place of the next bytes; valid until `commit()`, and never empty. */
  room(): Uint8Array<ArrayBuffer> {
    this.#text = ""; // Bytes may move.
    if (this.length === 0 || this.#end === this.#bytes.length) this.#makeRoom();
    return this.#end === 0 ? this.#bytes : this.#bytes.subarray(this.#end);
  }

  /** Moves what is unread to the front of our part, or of a new buffer if this one is used up or of the wrong size. */
  #makeRoom(): void {
    const { length } = this;
    const left = this.#bytes.length - this.#ours;
    const isShared = left < this.#size;
    // Behind the chunks of callers there may be too little room for what comes.
    const isUsedUp = isShared && left - length < Math.max(this.#lastCount, MIN_ROOM_BYTES);
    if (isUsedUp) this.#wanted = Math.max(this.#wanted, BUSY_BUFFER_BYTES);
    const isMisfit = length === 0 && (this.#size > this.#wanted || (!isShared && left < this.#wanted));
    const unread = this.#unread(length);
    if (isUsedUp || isMisfit || length > left - length) {
      // Memory stays within twice of what the peer really sent, whatever length it announced.
      this.#size = Math.max(length * 2, this.#wanted);
      this.#bytes = new Uint8Array(this.#size);
    } else if (this.#ours > 0) {
      // The same array for us and for the read: a second one costs an idle connection 104 bytes.
      this.#bytes = this.#bytes.subarray(this.#ours);
    }
    if (length > 0) this.#bytes.set(unread);
    this.#start = this.#ours = 0;
    this.#end = length;
  }

  /** The first `count` unread bytes. A handler may have transferred the buffer with a chunk: then it has no parts. */
  #unread(count: number): Uint8Array<ArrayBuffer> {
    return count === 0 ? NO_BYTES : this.#bytes.subarray(this.#start, this.#start + count);
  }

  /** Takes in `count` bytes that were put into the room. */
  commit(count: number): void {
    this.#end += count;
    const isFull = this.#end === this.#bytes.length;
    this.#lastCount = isFull ? count * 2 : count; // More of it would have come.
    if (isFull && count > this.#size >> 1) this.#wanted = Math.min(this.#wanted * 4, MAX_BUFFER_BYTES);
    const isSmall = count <= this.#size >> 3 && this.#size > BUSY_BUFFER_BYTES;
    this.#smallReads = isSmall ? this.#smallReads + 1 : 0;
    if (this.#smallReads < SMALL_READS_BEFORE_SHRINKING) return;
    this.#smallReads = 0;
    this.#wanted = Math.max(this.#wanted >> 2, BUSY_BUFFER_BYTES);
  }

  /** Makes the next buffers as large as a caller wants its chunks. */
  want(count: number): void {
    this.#wanted = Math.max(this.#wanted, Math.min(count, MAX_BUFFER_BYTES));
  }

  /** Takes in bytes that have arrived elsewhere while nothing was unread. */
  adopt(bytes: Uint8Array): void {
    this.#bytes = new Uint8Array(bytes);
    this.#size = this.#end = bytes.length;
    this.#start = this.#ours = 0;
    this.#text = "";
  }

  /** The first `count` bytes behind `skipped` others, which are the caller's from now on. */
  take(count: number, skipped = 0): Uint8Array<ArrayBuffer> {
    const from = this.#start + skipped;
    const to = this.#start = from + count;
    if (count === 0) return new Uint8Array(0); // Of its own, as each chunk's buffer may be transferred.
    if (this.#size > BUSY_BUFFER_BYTES && count * MAX_RETENTION < this.#size) return this.#bytes.slice(from, to);
    this.#ours = to;
    return this.#bytes.subarray(from, to);
  }

  /** Moves bytes into `into`, unless they went there already; returns their count. */
  takeInto(into: Uint8Array): number {
    const direct = this.directCount;
    this.directCount = 0;
    if (direct > 0) return direct;
    const count = Math.min(into.length, this.length);
    into.set(this.#unread(count));
    this.#start += count;
    return count;
  }

  /** The first `count` bytes as text, without the last `dropped` of them. */
  takeText(count: number, dropped: number): string {
    const from = this.#start;
    this.#start += count;
    return decoder.decode(this.#bytes.subarray(from, this.#start - dropped));
  }

  /** The next line without its end, if it is decoded already and has at most `limit` bytes. */
  takeDecodedLine(limit: number): string | undefined {
    const from = this.#start - this.#textAt;
    const to = this.#text.indexOf("\n", from);
    if (to < 0) return undefined;
    const end = to > from && this.#text.charCodeAt(to - 1) === CARRIAGE_RETURN ? to - 1 : to;
    if (end - from > limit) return undefined;
    this.#start += to + 1 - from;
    return this.#text.slice(from, end);
  }

  /** Decodes the lines of which the first ends at `index`, if they are short, several, and one character a byte. */
  decodeLines(index: number): void {
    if (index >= TEXT_BYTES / 2 || index + 1 === this.length) return;
    const window = this.#bytes.subarray(this.#start, Math.min(this.#start + TEXT_BYTES, this.#end));
    const count = window.lastIndexOf(LINE_FEED_BYTE) + 1;
    const text = decoder.decode(window.subarray(0, count));
    if (text.length !== count) return; // A line's length in bytes could not be told.
    this.#text = text;
    this.#textAt = this.#start;
  }

  at(index: number): number {
    return this.#bytes[this.#start + index] ?? 0;
  }

  /** The place of `delimiter` at `from` or behind it; -1 if it is not there. */
  indexOf(delimiter: Uint8Array, from: number): number {
    if (this.length < from + delimiter.length) return -1;
    const first = delimiter[0] ?? 0;
    const window = this.#bytes.subarray(this.#start, this.#end);
    const last = window.length - delimiter.length;
    for (let at = window.indexOf(first, from); at >= 0 && at <= last; at = window.indexOf(first, at + 1)) {
      if (holdsAt(window, at, delimiter)) return at;
    }
    return -1;
  }

  /** A copy of the first bytes, `count` at most. */
  peek(count: number): Uint8Array<ArrayBuffer> {
    return this.#unread(Math.min(count, this.length)).slice();
  }
}

/** A plain loop: a client may send the first byte of a delimiter and nothing else. */
function holdsAt(bytes: Uint8Array, at: number, part: Uint8Array): boolean {
  for (let index = 1; index < part.length; index++) if (bytes[at + index] !== part[index]) return false;
  return true;
}

/** The answer of a `Take` when it needs more bytes. */
const MORE = Symbol("more bytes are needed");

/** One kind of read: takes its answer from the input. */
type Take<T, Argument> = (input: Input, argument: Argument, limit: number) => T | typeof MORE;

type Bytes = Uint8Array<ArrayBuffer>;

function takeChunk(input: Input, maxBytes: number): Bytes | null | typeof MORE {
  if (maxBytes < Infinity) input.want(maxBytes);
  if (input.length > 0) return input.take(Math.min(input.length, maxBytes));
  return input.ended ? null : MORE;
}

function takeInto(input: Input, into: Uint8Array): number | null | typeof MORE {
  return input.takeInto(into) || (input.ended ? null : MORE);
}

function takeExactly(input: Input, count: number): Bytes | typeof MORE {
  if (input.length >= count) return input.take(count);
  if (!input.ended) return MORE;
  throw new IncompleteReadError(input.take(input.length), count);
}

function takePeek(input: Input, count: number): Bytes | typeof MORE {
  return input.length >= count || input.ended ? input.peek(count) : MORE;
}

function takeUntil(input: Input, delimiters: readonly Uint8Array[], limit: number): Bytes | null | typeof MORE {
  let [at, end, longest] = [-1, Infinity, 1];
  for (const delimiter of delimiters) {
    const index = input.indexOf(delimiter, input.searched);
    if (index >= 0 && index + delimiter.length < end) [at, end] = [index, index + delimiter.length];
    longest = Math.max(longest, delimiter.length);
  }
  // The end of the input may cut a delimiter in two.
  input.searched = Math.max(0, input.length - longest + 1);
  const content = at < 0 ? input.searched : at;
  if (content > limit) throw limitOverrun("record", limit, content);
  if (at >= 0) return input.take(end);
  if (!input.ended) return MORE;
  if (input.length === 0) return null;
  throw new IncompleteReadError(input.take(input.length), null);
}

function takeLine(input: Input, _: unknown, limit: number): string | null | typeof MORE {
  const ready = input.takeDecodedLine(limit);
  if (ready !== undefined) return ready;
  const at = input.indexOf(LINE_FEED, input.searched);
  const before = input.searched = at < 0 ? input.length : at;
  // A last "\r" is part of a line's end, unless the stream ends behind it.
  const returns = (at >= 0 || !input.ended) && before > 0 && input.at(before - 1) === CARRIAGE_RETURN ? 1 : 0;
  if (before - returns > limit) throw limitOverrun("line", limit, before);
  if (at < 0) return !input.ended ? MORE : input.length === 0 ? null : input.takeText(input.length, 0);
  input.decodeLines(at);
  return input.takeDecodedLine(limit) ?? input.takeText(at + 1, 1 + returns);
}

function limitOverrun(what: string, limit: number, consumed: number): LimitOverrunError {
  const message = `Cannot find the end of the ${what} within the limit of ${limit} bytes (option "limit")`;
  return new LimitOverrunError(message, limit, consumed);
}

function takeFrame(input: Input, format: FrameFormat, limit: number): Bytes | null | typeof MORE {
  const { lengthBytes } = format;
  const length = input.length < lengthBytes ? 0 : frameLength(input, format);
  if (length > limit) {
    const message = `Cannot read a frame of ${length} bytes: the limit is ${limit} (option "limit")`;
    throw new LimitOverrunError(message, limit, lengthBytes);
  }
  if (input.length >= lengthBytes + length) return input.take(length, lengthBytes);
  if (!input.ended) return MORE;
  if (input.length === 0) return null;
  throw new IncompleteReadError(input.take(input.length), lengthBytes + length);
}

function frameLength(input: Input, { lengthBytes, littleEndian }: FrameFormat): number {
  let length = 0;
  for (let index = 0; index < lengthBytes; index++) {
    length = length * 256 + input.at(littleEndian ? lengthBytes - 1 - index : index);
  }
  return length;
}

// --- Output -----------------------------------------------------------------

/**
 * The part of a `Deno.Conn` that a {@linkcode SocketStream} needs. A {@linkcode ConnectionFilter} implements it around
 * another one, a test as a fake.
 */
export interface StreamConn {
  /** The address of this end. */
  readonly localAddr: Deno.Addr;
  /** The address of the peer. */
  readonly remoteAddr: Deno.Addr;
  /** The connection that this one runs over, if a filter has made it. */
  readonly under?: StreamConn | undefined;
  /** Reads into `into`; resolves to the count of bytes, or to `null` at the end. */
  read(into: Uint8Array): Promise<number | null>;
  /** Writes a part of `data`; resolves to the count of bytes. */
  write(data: Uint8Array): Promise<number>;
  /** Ends the outgoing side. */
  closeWrite(): Promise<void>;
  /** Ends both sides; pending calls reject. It may be called again, and what it throws is ignored. */
  close(): void;
}

/** Text is put together and encoded at once, up to so many characters: each line by itself costs four times as much. */
const TEXT_CHARACTERS = 4_096;

/** The block of the first small write; it doubles as it fills. */
const MIN_BLOCK_BYTES = 1_024;

/** The most bytes that one unit of a string becomes. */
const MAX_UTF8_BYTES = 3;

const encoder = new TextEncoder();
const DONE: Promise<void> = Promise.resolve();

function bytesOf(data: Uint8Array | string): Uint8Array {
  return typeof data === "string" ? encoder.encode(data) : data;
}

/** Plain JavaScript has no types: anything else would be sent as something else, or as nothing. */
function checkData(call: string, data: unknown): TypeError | undefined {
  if (typeof data === "string" || data instanceof Uint8Array) return undefined;
  const isObject = typeof data === "object" && data !== null;
  const kind = isObject ? `of the class ${data.constructor?.name ?? "null"}` : String(data);
  return new TypeError(`Cannot ${call}: data must be a Uint8Array or a string, it is ${kind}`);
}

/** A wait until the kernel has all bytes before `position`. */
interface SendWaiter extends PromiseWithResolvers<void> {
  readonly position: number;
}

/**
 * The bytes that a stream sends. Positions tell about them: `#taken` bytes were accepted, the kernel has `sent` of them;
 * text counts once it is encoded. One write is under way at a time, so nothing interleaves. What waits is first the
 * queue, then the block, then the text.
 */
class Output {
  #taken = 0;
  /** The bytes that the kernel has. */
  sent = 0;
  /** The write that is under way. */
  #writing: Promise<void> | undefined;
  #queue: Uint8Array[] | undefined;
  #block = NO_BYTES;
  #blockLength = 0;
  #text = "";
  #waiters: SendWaiter[] | undefined;
  #ending: PromiseWithResolvers<void> | undefined;
  #isEnding = false;
  #isScheduled = false;
  /** `upgrade()` is under way. */
  isHeld = false;
  /** Nothing can be sent any more, because of it. */
  failure: Error | undefined;

  /** `conn` is changed by `upgrade()` only. */
  constructor(public conn: StreamConn) {}

  get buffered(): number {
    return this.#taken - this.sent + encoder.encode(this.#text).length;
  }

  /** Whether nothing waits to leave. */
  get isIdle(): boolean {
    return this.#taken === this.sent && this.#text === "" && !this.#isEnding;
  }

  /** Gathers `data`; resolves at once unless more than `highWaterMark` bytes wait. */
  write(data: Uint8Array | string, highWaterMark: number): Promise<void> {
    if (typeof data === "string") {
      const characters = this.#text.length + data.length;
      const most = this.#taken - this.sent + characters * MAX_UTF8_BYTES;
      if (characters <= TEXT_CHARACTERS && most <= highWaterMark) {
        this.#text += data;
        return this.#flushSoon();
      }
    }
    this.#encodeText();
    const bytes = bytesOf(data);
    if (this.#taken - this.sent + bytes.length > highWaterMark) return this.#enqueue(bytes);
    this.#gather(bytes);
    this.#taken += bytes.length;
    return this.#flushSoon();
  }

  /** Sends `data` behind all that came before; resolves once the kernel has it. */
  send(data: Uint8Array | string): Promise<void> {
    const bytes = bytesOf(data);
    if (!this.isIdle || bytes.length === 0) return this.#enqueue(bytes);
    this.#taken += bytes.length;
    return this.#startWriting(bytes);
  }

  flush(): Promise<void> {
    if (this.failure !== undefined) return rejection(this.failure);
    return this.isIdle ? DONE : this.#enqueue(NO_BYTES);
  }

  closeWrite(): Promise<void> {
    if (this.#ending !== undefined) return this.#ending.promise;
    const refusal = this.refusal("closeWrite()");
    if (refusal !== undefined) return rejection(refusal);
    this.#ending = Promise.withResolvers();
    this.#isEnding = true;
    this.#end(this.#ending).catch((error) => this.#failWith(error));
    return forgettable(this.#ending.promise);
  }

  async #end({ resolve }: PromiseWithResolvers<void>): Promise<void> {
    await this.flush();
    await this.conn.closeWrite();
    this.#isEnding = false;
    resolve();
  }

  /** Resolves when everything has left, the end included. */
  finish(): Promise<void> {
    return this.#ending?.promise ?? this.flush();
  }

  /** Sends the gathered bytes, unless a write under way will. */
  flushGathered(): void {
    if (this.#writing === undefined && !this.isIdle) this.#writeNext();
  }

  flushAtTurnEnd(): void {
    this.#isScheduled = false;
    this.flushGathered();
  }

  /** Gives up all that waits; pending and later calls reject with `error`. */
  fail(error: Error): void {
    if (this.failure !== undefined) return;
    this.failure = error;
    this.#taken = this.sent;
    this.#block = NO_BYTES;
    this.#blockLength = 0;
    this.#queue = undefined;
    this.#text = "";
    this.#isEnding = false;
    this.#ending?.reject(error);
    if (this.#writing !== undefined) forgettable(this.#writing);
    for (const { promise, reject } of this.#waiters ?? []) {
      forgettable(promise);
      reject(error);
    }
    this.#waiters = undefined;
  }

  /** The reason why `call` cannot write, if there is one. */
  refusal(call: string): Error | undefined {
    if (this.failure !== undefined) return this.failure;
    if (this.isHeld) return new Deno.errors.Busy(`Cannot ${call}: upgrade() is under way`);
    if (this.#ending === undefined) return undefined;
    return new Deno.errors.BrokenPipe(`Cannot ${call}: closeWrite() has ended this side of the stream`);
  }

  /** Puts the text into the block, behind the bytes that came before it. */
  #encodeText(): void {
    if (this.#text !== "") this.#gather(this.#takeText());
  }

  #takeText(): Uint8Array {
    const bytes = encoder.encode(this.#text);
    this.#text = "";
    this.#taken += bytes.length;
    return bytes;
  }

  /** Copies `bytes`, so that they are the caller's again. */
  #gather(bytes: Uint8Array): void {
    const length = this.#blockLength + bytes.length;
    if (length > this.#block.length) {
      const larger = new Uint8Array(Math.max(length, this.#block.length * 2, MIN_BLOCK_BYTES));
      larger.set(this.#block.subarray(0, this.#blockLength));
      this.#block = larger;
    }
    this.#block.set(bytes, this.#blockLength);
    this.#blockLength = length;
  }

  /** Resolves once the kernel has `bytes` and all before them. */
  #enqueue(bytes: Uint8Array): Promise<void> {
    this.#encodeText();
    const queue = this.#queue ??= [];
    if (this.#blockLength > 0) queue.push(this.#takeBlock());
    if (bytes.length > 0) queue.push(bytes);
    this.#taken += bytes.length;
    const sent = this.#until(this.#taken);
    this.flushGathered();
    return sent;
  }

  #until(position: number): Promise<void> {
    if (this.sent >= position) return DONE;
    const last = this.#waiters?.at(-1);
    if (last?.position === position) return last.promise; // Many flushes in a row are one.
    const waiter = { position, ...Promise.withResolvers<void>() };
    (this.#waiters ??= []).push(waiter);
    return waiter.promise;
  }

  /** Sends the gathered bytes when this turn of the event loop is over, if nothing does before. */
  #flushSoon(): Promise<void> {
    if (!this.#isScheduled && this.#writing === undefined) {
      this.#isScheduled = true;
      if (unflushed.push(this) === 1) setImmediate(flushAll);
    }
    return DONE;
  }

  #writeNext(): void {
    const next = this.#next();
    if (next === undefined) this.#writing = undefined;
    else this.#startWriting(next);
  }

  /** The oldest bytes that wait. */
  #next(): Uint8Array | undefined {
    const queued = this.#queue?.shift();
    if (this.#queue?.length === 0) this.#queue = undefined;
    if (queued !== undefined) return queued;
    if (this.#blockLength === 0) return this.#text === "" ? undefined : this.#takeText(); // It needs no copy.
    this.#encodeText();
    return this.#takeBlock();
  }

  #takeBlock(): Uint8Array {
    const bytes = this.#block.subarray(0, this.#blockLength);
    this.#block = NO_BYTES;
    this.#blockLength = 0;
    return bytes;
  }

  /** Gives the promise of the write itself, so that a lone `send()` makes no other. As an `async` loop it costs 4 %. */
  #startWriting(bytes: Uint8Array): Promise<void> {
    this.#writing = DONE; // A connection of the caller's own may send from inside its write().
    try {
      return this.#writing = this.conn.write(bytes).then(
        (count) => this.#noteSent(bytes, count),
        (error) => {
          throw this.#failWith(error);
        },
      );
    } catch (error) {
      return this.#writing = rejection(this.#failWith(error)); // A connection of the caller's own has thrown.
    }
  }

  #noteSent(bytes: Uint8Array, count: number): void | Promise<void> {
    if (this.failure !== undefined) throw this.failure; // fail() was here first.
    this.sent += count;
    if (this.#waiters !== undefined) this.#settle(this.#waiters);
    if (count === bytes.length) return this.#writeNext();
    if (this.#writing !== undefined) forgettable(this.#writing); // It follows the next one, perhaps nobody follows it.
    return this.#startWriting(bytes.subarray(count));
  }

  #settle(waiters: SendWaiter[]): void {
    while (waiters[0] !== undefined && waiters[0].position <= this.sent) waiters.shift()?.resolve();
    if (waiters.length === 0) this.#waiters = undefined;
  }

  #failWith(error: unknown): Error {
    const failure = this.failure ?? (error instanceof Error ? error : new TypeError(messageOf(error)));
    this.fail(failure);
    return failure;
  }
}

/** Outputs whose gathered bytes leave at the end of this turn. */
let unflushed: Output[] = [];

function flushAll(): void {
  const outputs = unflushed;
  unflushed = [];
  for (const output of outputs) output.flushAtTurnEnd();
}

// --- Transports -------------------------------------------------------------

/** A read that waits for more bytes. */
class WaitingRead<T, Argument> {
  readonly promise: Promise<T>;
  readonly #resolve: (answer: T) => void;
  readonly #reject: (error: unknown) => void;
  /** The time of the first look at it. */
  seenAt: number | undefined;

  /**
   * `call` is its name, as callers write it. It waits for `timeout` milliseconds, which bytes that drip in do not
   * prolong. If it `startsMessage`, a draining server may end it. `into` is the caller's own array, if there is one.
   */
  constructor(
    readonly call: string,
    readonly take: Take<T, Argument>,
    readonly argument: Argument,
    readonly timeout: number,
    readonly startsMessage: boolean,
    readonly into?: Uint8Array,
  ) {
    ({ promise: this.promise, resolve: this.#resolve, reject: this.#reject } = Promise.withResolvers<T>());
  }

  /** Settles it if the input has its answer; throws what it has to reject with. */
  tryToAnswer(input: Input, limit: number): boolean {
    const answer = this.take(input, this.argument, limit);
    if (answer === MORE) return false;
    this.#resolve(answer);
    return true;
  }

  reject(error: unknown): void {
    forgettable(this.promise);
    this.#reject(error);
  }
}

/** The one call that waits for input: a read, or `upgrade()`, which no input answers. */
type PendingCall = Omit<WaitingRead<unknown, unknown>, "promise" | "take" | "argument">;

/** The deadlines of a stream that has any. */
class Watch {
  /** For `maxLifetime`: with that option the watch is made when the stream is. */
  readonly openedAt = performance.now();
  readonly traffic = new Standstill();
  readonly output = new Standstill();
  /** The shortest time that the deadline timer keeps for the stream. */
  shortest = Infinity;
}

/**
 * Milliseconds that a closed stream waits for its peer to take a byte of what is still buffered, if its `timeout` is
 * longer.
 */
const CLOSE_STALL_MS = 30_000;

/** The message of a call on a stream that this program has closed. */
const STREAM_IS_CLOSED = "The stream is closed";

/**
 * The machinery of one {@linkcode SocketStream}: buffers, the one reader, deadlines, the end. The stream is its face to
 * handlers; servers and timers use it directly.
 */
class Transport {
  readonly output: Output;
  bytesRead = 0;
  /** The server's record of this request. */
  session: { readonly controller: AbortController } | undefined;
  readonly #input = new Input();
  /** How far the peer's bytes were read at the last write. */
  #answered = 0;
  /** Set once it was changed: a number in each stream costs an idle connection 16 bytes. */
  #timeout: number | undefined;
  #watch: Watch | undefined;
  #pending: PendingCall | undefined;
  /** Whether a `conn.read()` waits for its turn or is under way. It cannot be cancelled: it may outlive its reader. */
  #isFilling = false;
  /** The caller's array that `conn.read()` fills. */
  #direct: Uint8Array | undefined;
  #isClosed = false;
  /** Reading cannot go on, because of it. */
  #failure: unknown;
  /** Errors that reads have rejected with, to tell a vanished peer from a handler's own trouble. */
  #raised: WeakSet<object> | undefined;
  #lingering: Promise<void> | undefined;
  /** The server drains: a wait for a new message reads the end, `"soon"` unless an answer is owed, `"late"` always. */
  #draining: "no" | "soon" | "late" = "no";
  #releases: Releases | undefined;

  constructor(conn: StreamConn, readonly settings: StreamSettings) {
    this.output = new Output(conn);
    turnstile.streams++;
    this.#watchFor(Math.min(settings.idleTimeout, settings.maxLifetime));
  }

  get conn(): StreamConn {
    return this.output.conn;
  }

  get timeout(): number {
    return this.#timeout ?? this.settings.timeout;
  }
  set timeout(ms: number) {
    if (this.#isClosed) return;
    this.#timeout = ms;
    this.#watch?.output.forget();
    if (!this.output.isIdle) this.#watchFor(ms);
  }

  /** Bytes were read since the last write, so the peer waits for an answer. */
  get owesAnswer(): boolean {
    return this.bytesRead - this.#input.length > this.#answered;
  }

  /** The call that it waits in; `"handler"` if it waits for nothing of the client's. */
  get waitsFor(): string {
    return this.#pending?.call ?? (this.output.isIdle ? "handler" : "send()");
  }

  get releases(): Releases {
    return this.#releases ??= new Releases();
  }

  /** Whether a call of this very stream has rejected with `error`. */
  hasRaised(error: unknown): boolean {
    return error instanceof Error && (error === this.output.failure || this.#raised?.has(error) === true);
  }

  /** The one place where reads begin. */
  read<T, Argument>(
    call: string,
    take: Take<T, Argument>,
    argument: Argument,
    startsMessage = true,
    into?: Uint8Array,
  ): Promise<T> {
    const refusal = this.#readRefusal(call);
    if (refusal !== undefined) return rejection(refusal);
    this.#input.searched = 0;
    try {
      const answer = take(this.#input, argument, this.settings.limit);
      if (answer !== MORE) return Promise.resolve(answer);
    } catch (error) {
      return rejection(this.#noteRaised(error));
    }
    if (this.#failure !== undefined) return rejection(this.#noteRaised(this.#failure));
    const waiting = new WaitingRead(call, take, argument, this.timeout, startsMessage, into);
    this.#pending = waiting;
    this.output.flushGathered(); // A question must leave before its answer is waited for.
    this.#watchFor(this.timeout);
    if (this.#endsHere()) this.#end();
    else if (!this.#isFilling) this.#fill();
    return waiting.promise;
  }

  #readRefusal(call: string): Error | undefined {
    if (this.#isClosed) return this.#closedError();
    if (this.#pending === undefined) return undefined;
    return new Deno.errors.Busy(`Cannot ${call}: ${this.#pending.call} waits on the same stream`);
  }

  #fill(): void {
    this.#isFilling = true;
    // The first read has no rivals yet.
    if (this.bytesRead === 0 || turnstile.admits(this)) this.#readNow();
  }

  takeTurn(): void {
    this.#isFilling = this.#pending !== undefined && !this.#isClosed; // Its reader may have given up meanwhile.
    if (this.#isFilling) this.#readNow();
  }

  #readNow(): void {
    // A read with a deadline may be over before its bytes come. They must not land in an array that is used again.
    if (this.#pending?.timeout === Infinity) this.#direct = this.#pending.into;
    try {
      this.conn.read(this.#direct ?? this.#input.room()).then(this.#onRead, this.#onReadFailure);
    } catch (error) {
      this.#onReadFailure(error); // A connection of the caller's own has thrown.
    }
  }

  readonly #onRead = (count: number | null): void => {
    this.#isFilling = false;
    const direct = this.#direct;
    this.#direct = undefined;
    if (this.#isClosed) return this.#rejectPending();
    if (count === null) return this.#end();
    turnstile.noteRead();
    this.bytesRead += count;
    if (direct === undefined) this.#input.commit(count);
    else if (this.#pending?.into === direct) this.#input.directCount = count;
    else this.#input.adopt(direct.subarray(0, count)); // Its reader is gone.
    this.#advance();
  };

  readonly #onReadFailure = (error: unknown): void => {
    this.#isFilling = false;
    this.#direct = undefined;
    // A TLS peer that closes without close_notify. Many real peers do, and Python and Node read it as the end, too.
    if (error instanceof Deno.errors.UnexpectedEof && !this.#isClosed) return this.#end();
    this.#failure ??= error;
    this.#rejectPending();
  };

  #end(): void {
    this.#input.ended = true;
    this.#advance();
  }

  /** Lets the reader look at the input. */
  #advance(): void {
    const pending = this.#pending;
    if (pending === undefined) return;
    try {
      if (!pending.tryToAnswer(this.#input, this.settings.limit)) return this.#fill();
      this.#pending = undefined;
    } catch (error) {
      this.#rejectPending(error);
    }
  }

  #rejectPending(error: unknown = this.#failure): void {
    const pending = this.#pending;
    this.#pending = undefined;
    pending?.reject(this.#noteRaised(error));
  }

  #noteRaised(error: unknown): unknown {
    if (error instanceof Error) (this.#raised ??= new WeakSet()).add(error);
    return error;
  }

  /** Begins a call that writes: the peer has its answer, and the time runs. Gives a rejection if it is refused. */
  beginWrite(call: string, data: unknown): Promise<never> | undefined {
    const refusal = this.#isClosed ? this.#closedError() : checkData(call, data) ?? this.output.refusal(call);
    if (refusal !== undefined) return rejection(refusal);
    this.#answered = this.bytesRead - this.#input.length;
    this.#watchFor(this.timeout);
    return undefined;
  }

  /** The same for a call that only sends what was written. */
  beginFlush(): Promise<never> | undefined {
    if (this.#isClosed) return rejection(this.#closedError());
    this.#watchFor(this.timeout);
    return undefined;
  }

  /** Goes on over the connection that `filter` makes of this one. */
  async upgrade(filter: ConnectionFilter, timeout: number): Promise<void> {
    this.#checkUpgradable();
    const controller = new AbortController();
    const waiting = new WaitingRead<never, undefined>("upgrade()", () => MORE, undefined, Infinity, false);
    waiting.promise.catch((error) => controller.abort(error));
    this.#pending = waiting;
    const passage = new Passage(this.conn, controller.signal, this.releases);
    this.output.isHeld = true;
    try {
      const passing = this.output.flush().then(() => {
        if (this.#isClosed) throw this.#closedError(); // It was closed meanwhile, or was late.
        return runFilters([filter], passage);
      });
      this.#goOn(await inTime(passing, timeout, "upgrade() waited for the timeout of", controller), passage.conn);
    } catch (error) {
      this.#pending = undefined;
      if (passage.conn !== this.conn) closeQuietly(passage.conn);
      this.cut(error instanceof Error ? error : undefined);
      throw this.#noteRaised(error);
    }
  }

  #goOn(hasPassed: boolean, conn: StreamConn): void {
    if (!hasPassed) throw new Deno.errors.ConnectionAborted("Cannot upgrade(): the filter has refused the connection");
    if (this.#isClosed) closeQuietly(conn); // It was closed in the same moment.
    this.#pending = undefined;
    this.output.isHeld = false;
    this.output.conn = conn;
  }

  #checkUpgradable(): void {
    const call = "upgrade()";
    const isOver = this.#isClosed || this.#failure !== undefined;
    const refusal = isOver ? this.#closedError() : this.output.refusal(call) ?? this.#readRefusal(call);
    if (refusal !== undefined) throw refusal;
    const { length, ended } = this.#input;
    if (ended) throw new Deno.errors.BrokenPipe("Cannot upgrade(): the peer has ended its side of the stream");
    if (this.#isFilling) throw new Deno.errors.Busy("Cannot upgrade(): an earlier read waits on the same stream");
    if (length === 0) return;
    throw new Deno.errors.Busy(`Cannot upgrade(): ${length} received bytes are unread; read them, or close`);
  }

  /**
   * Ends a read that waits for a new message. A client that has not spoken yet, or that is owed an answer, is ended only
   * if it `isLate`.
   */
  drain(isLate: boolean): void {
    if (!isLate && this.bytesRead === 0) return;
    this.#draining = isLate ? "late" : "soon";
    if (this.#endsHere()) this.#end();
  }

  /** Whether the read that waits ends here, as the server drains and no message has begun. */
  #endsHere(): boolean {
    if (this.#draining === "no" || !this.#pending?.startsMessage || this.#input.length > 0) return false;
    return this.#draining === "late" || !this.owesAnswer;
  }

  /**
   * Closes both sides; buffered bytes still leave as long as the peer takes them. Returns a promise if it has to wait
   * for that.
   */
  close(): Promise<void> | undefined {
    if (this.#isClosed) return this.#lingering;
    if (this.output.isIdle) return void this.cut();
    this.timeout = Math.min(this.timeout, CLOSE_STALL_MS);
    this.#shut();
    return this.#lingering = this.output.finish().catch(ignore).then(() => this.cut());
  }

  /** The outcome if the handler threw nothing: a deadline closed it, or its peer left before it took all bytes. */
  get silentOutcome(): "aborted" | "timedOut" | undefined {
    const unsent = this.#lingering && this.output.failure;
    const isLate = this.#failure instanceof Deno.errors.TimedOut || unsent instanceof Deno.errors.TimedOut;
    return isLate ? "timedOut" : unsent && "aborted";
  }

  /** Closes both sides now and drops buffered bytes; pending calls reject with `error`. */
  cut(error?: Error): void {
    this.#failure ??= error;
    this.#shut();
    if (!this.output.isIdle) this.output.fail(error ?? this.#closedError());
    deadlines.unwatch(this);
    closeQuietly(this.conn);
    this.releases.callAll();
  }

  /** Takes no more calls. A read into a caller's array rejects when the connection has let go of it. */
  #shut(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    turnstile.streams--;
    if (this.#pending === undefined) return;
    this.#closedError(); // Sets `#failure`, with which the call rejects.
    if (this.#direct === undefined) this.#rejectPending();
  }

  /** Makes the error when it is needed, as that costs as much as a message; later calls reject with it, too. */
  #closedError(): Error {
    const failure = this.#failure instanceof Error ? this.#failure : new Deno.errors.BadResource(STREAM_IS_CLOSED);
    this.#noteRaised(this.#failure = failure);
    return failure;
  }

  /** Makes sure that a time of `ms` is watched: such as that of a read or a write that begins. */
  #watchFor(ms: number): void {
    if (ms >= (this.#watch?.shortest ?? Infinity)) return;
    this.#watch ??= new Watch();
    this.#watch.shortest = ms;
    deadlines.watch(this, ms);
  }

  /** Ends what has taken too long by `now`; returns the shortest time that is left to be kept, or `Infinity`. */
  look(now: number): number {
    const watch = this.#watch ??= new Watch();
    const { idleTimeout, maxLifetime } = this.settings;
    if (now - watch.openedAt >= maxLifetime) this.#expire(`was open for the maxLifetime of ${maxLifetime} ms`);
    const quiet = watch.traffic.lasts(now, this.bytesRead + this.output.sent);
    if (!this.#isClosed && quiet >= idleTimeout) this.#expire(`moved no byte for the idleTimeout of ${idleTimeout} ms`);
    if (this.output.isIdle) watch.output.forget();
    else if (watch.output.lasts(now, this.output.sent) >= this.timeout) {
      const peer = formatAddress(this.conn.remoteAddr);
      this.#expire(`was closed because ${peer} took no byte for the timeout of ${this.timeout} ms`);
    }
    const pending = this.#pending;
    if (pending !== undefined && now - (pending.seenAt ??= now) >= pending.timeout) {
      this.#rejectPending(new Deno.errors.TimedOut(`${pending.call} waited for the timeout of ${pending.timeout} ms`));
    }
    return watch.shortest = this.#shortestTime();
  }

  #expire(what: string): void {
    this.cut(new Deno.errors.TimedOut(`The stream ${what}`));
  }

  #shortestTime(): number {
    const output = this.output.isIdle ? Infinity : this.timeout;
    if (this.#isClosed) return this.output.isIdle ? Infinity : Math.min(output, this.settings.maxLifetime);
    return Math.min(this.settings.idleTimeout, this.settings.maxLifetime, output, this.#pending?.timeout ?? Infinity);
  }
}

// --- Streams ----------------------------------------------------------------

/** The array of a `pipeTo()` whose chunks are small; it grows as they fill it. */
const MIN_PIPE_BYTES = 4_096;

/** Larger arrays gain nothing over loopback. */
const MAX_PIPE_BYTES = 65_536;

/** The machinery of a stream, for its server. */
let transportOf: (stream: SocketStream) => Transport;

/**
 * One buffered, two-way stream of bytes over a connection. A handler gets it as `this.request`, a client from
 * {@linkcode connect}, a test from {@linkcode socketPair}.
 *
 * One read waits at a time; a second one rejects with `Deno.errors.Busy` and disturbs nothing. Writes may overlap: each
 * goes out whole, in the order of the calls. The end of the peer's side does not end ours.
 *
 * Calls reject with the connection's own error (`Deno.errors.ConnectionReset`, `Deno.errors.BrokenPipe`) when the peer
 * is gone, with `Deno.errors.TimedOut` when a deadline has passed, with `Deno.errors.BadResource` after `close()`, and
 * with `RangeError` or `TypeError` for a wrong argument. No byte is lost: unread bytes answer the next read. A promise
 * may be forgotten; its error meets the next call.
 *
 * Read: `recv`, `read`, `readExactly`, `readUntil`, `readLine`, `lines`, `frames`, `peek`, `for await`. Write: `write`,
 * `flush`, `send`, `writeFrame`, `closeWrite`. Look: `localAddress`, `remoteAddress`, `bytesRead`, `bytesWritten`,
 * `bytesBuffered`, `under`. Set: `timeout`. Turn: `upgrade`. Pass on: `pipeTo`.
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
    transportOf = (stream) => stream.#transport;
  }

  readonly #transport: Transport;
  #readable: ReadableStream<Uint8Array<ArrayBuffer>> | undefined;
  #writable: WritableStream<Uint8Array> | undefined;

  /** Takes an open connection over: read, write and close it only through the stream. */
  constructor(conn: StreamConn, options: StreamOptions = {}) {
    this.#transport = new Transport(conn, resolveStreamOptions(options));
  }

  /** The connection that the stream reads and writes. Walk its `under` for those below; touch none of them. */
  get under(): StreamConn {
    return this.#transport.conn;
  }

  /** The address of this end; behind a proxy filter the one that the client has connected to. */
  get localAddress(): Deno.Addr {
    return this.#transport.conn.localAddr;
  }

  /** The address of the peer; behind a proxy filter the client's. */
  get remoteAddress(): Deno.Addr {
    return this.#transport.conn.remoteAddr;
  }

  /** Bytes that arrived so far, unread ones included. */
  get bytesRead(): number {
    return this.#transport.bytesRead;
  }

  /** Bytes that the kernel has taken so far. */
  get bytesWritten(): number {
    return this.#transport.output.sent;
  }

  /**
   * Written bytes that the kernel has not taken; asyncio's `get_write_buffer_size()`. In a chat room it tells which
   * peers do not read.
   */
  get bytesBuffered(): number {
    return this.#transport.output.buffered;
  }

  /** The option `timeout`. A change counts from the next call on, and for a write under way from now on. */
  get timeout(): number {
    return this.#transport.timeout;
  }
  set timeout(ms: number) {
    checkNumber("timeout", ms);
    this.#transport.timeout = ms;
  }

  /**
   * Reads what has arrived, or waits until something does. Resolves to 1 to `maxBytes` (default `Infinity`) bytes,
   * which are the caller's, and to `null` at the end of the stream. A number, as in `recv(1024)`, also makes room for so
   * much (32 KiB at most), so that it can come in one piece. To transfer the bytes to a worker, take a `slice()`: their
   * buffer may hold more.
   */
  recv(maxBytes: number = Infinity): Promise<Uint8Array<ArrayBuffer> | null> {
    if (!(maxBytes >= 1 && (Number.isInteger(maxBytes) || maxBytes === Infinity))) {
      return rejection(new RangeError(`Cannot recv(${maxBytes}): ask for a whole number of 1 or more, or Infinity`));
    }
    return this.#transport.read("recv()", takeChunk, maxBytes);
  }

  /**
   * Reads into a non-empty array of the caller, as `Deno.Conn.read` does: nothing is allocated, and without a `timeout`
   * nothing is copied. Resolves to the count of bytes, and to `null` at the end of the stream. Leave `into` alone until
   * the promise settles; if a shutdown has ended the stream, until the handler is done.
   */
  read(into: Uint8Array): Promise<number | null> {
    if (!(into instanceof Uint8Array)) return rejection(new TypeError(`Cannot read() into ${Deno.inspect(into)}`));
    if (into.length === 0) {
      return rejection(new RangeError("Cannot read() into an empty array: a loop over it would spin"));
    }
    return this.#transport.read("read()", takeInto, into, true, into);
  }

  /**
   * Reads exactly `bytes` bytes, a whole number of 0 or more, which are the caller's. Memory grows with what arrives,
   * not with the count. Rejects with {@linkcode IncompleteReadError} if the stream ends before; it has what came.
   */
  readExactly(bytes: number): Promise<Uint8Array<ArrayBuffer>> {
    if (!(Number.isSafeInteger(bytes) && bytes >= 0)) {
      return rejection(new RangeError(`Cannot readExactly(${bytes}): ask for a whole number of 0 or more`));
    }
    // A body that is read behind its header is the middle of a message.
    return this.#transport.read("readExactly()", takeExactly, bytes, !this.#transport.owesAnswer);
  }

  /**
   * Reads a record up to and with its delimiter. That is bytes, or text as UTF-8, and not empty. Of several delimiters
   * the one that ends first counts, as in asyncio's `readuntil`. Resolves to `null` if the stream ends between two
   * records. Rejects with {@linkcode IncompleteReadError} if it ends inside one, and with {@linkcode LimitOverrunError}
   * if more than `limit` bytes come before a delimiter.
   *
   * @example
   * ```ts
   * import { socketPair } from "@socketserver/socketserver";
   * import { assertEquals } from "@std/assert";
   *
   * const [ours, theirs] = socketPair();
   * await theirs.send("a;b\n");
   * assertEquals(new TextDecoder().decode(await ours.readUntil([";", "\n"]) ?? undefined), "a;");
   * ours.close();
   * theirs.close();
   * ```
   */
  readUntil(
    delimiter: Uint8Array | string | readonly (Uint8Array | string)[],
  ): Promise<Uint8Array<ArrayBuffer> | null> {
    const given = Array.isArray(delimiter) ? delimiter : [delimiter];
    const mistake = given.map((one) => checkData("readUntil()", one)).find((mistake) => mistake !== undefined);
    if (mistake !== undefined) return rejection(mistake);
    const delimiters = given.map((one) => bytesOf(one).slice());
    if (delimiters.length === 0 || delimiters.some(({ length }) => length === 0)) {
      return rejection(new RangeError("Cannot readUntil() an empty delimiter"));
    }
    return this.#transport.read("readUntil()", takeUntil, delimiters);
  }

  /**
   * Reads a line of UTF-8 text without its `"\n"` or `"\r\n"`; resolves to `null` at the end of the stream. A last line
   * needs no end. Bytes that are no UTF-8 become U+FFFD; `readUntil("\n")` gives bytes. Rejects with
   * {@linkcode LimitOverrunError} if the line is longer than `limit` bytes. A kept line may keep up to 1 KiB alive.
   */
  readLine(): Promise<string | null> {
    return this.#transport.read("readLine()", takeLine, undefined);
  }

  /**
   * Looks at the next `count` bytes, a whole number of 0 or more, without reading them. Resolves to a copy, of fewer
   * bytes if the stream ends before.
   */
  peek(count: number): Promise<Uint8Array<ArrayBuffer>> {
    if (!(Number.isSafeInteger(count) && count >= 0)) {
      return rejection(new RangeError(`Cannot peek(${count}): ask for a whole number of 0 or more`));
    }
    return this.#transport.read("peek()", takePeek, count);
  }

  /** Iterates over lines, as `readLine()` reads them. Leaving the loop early leaves the stream open. */
  lines(): AsyncIterableIterator<string> {
    return new Iteration(this.#transport, "lines()", takeLine, undefined);
  }

  /**
   * Iterates over records that each have their length in front, as `writeFrame()` sends them: 4 bytes, big-endian by
   * default. It throws {@linkcode LimitOverrunError} for a record of more than `limit` bytes, and {@linkcode
   * IncompleteReadError} if the stream ends inside one. Leaving the loop early leaves the stream open.
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
    return new Iteration(this.#transport, "frames()", takeFrame, resolveFrameOptions(options));
  }

  /** Iterates over chunks, as `recv()` reads them. Leaving the loop early leaves the stream open. */
  [Symbol.asyncIterator](): AsyncIterableIterator<Uint8Array<ArrayBuffer>> {
    return new Iteration(this.#transport, "for await", takeChunk, Infinity);
  }

  /**
   * Buffers `data`. It leaves when the handler waits for input, or at the end of this turn of the event loop, so many
   * small writes become few large ones.
   *
   * @param data Bytes, left alone until the promise settles, or text as UTF-8.
   * @returns Resolves at once, or, if more than `highWaterMark` bytes wait, once the kernel has `data`. Without `await`
   * nothing holds back a writer that is faster than its peer.
   */
  write(data: Uint8Array | string): Promise<void> {
    const { output, settings } = this.#transport;
    return this.#transport.beginWrite("write()", data) ?? output.write(data, settings.highWaterMark);
  }

  /** Sends what `write()` has buffered; resolves once the kernel has all of it. */
  flush(): Promise<void> {
    return this.#transport.beginFlush() ?? this.#transport.output.flush();
  }

  /**
   * Sends all of `data` after all that was written before; resolves once the kernel has it. Leave bytes alone until
   * then.
   */
  send(data: Uint8Array | string): Promise<void> {
    return this.#transport.beginWrite("send()", data) ?? this.#transport.output.send(data);
  }

  /**
   * Buffers `payload` with its length in front, as `frames()` reads it. Settles as `write()` does; rejects with
   * `RangeError` if the prefix has no room for the length.
   */
  writeFrame(payload: Uint8Array | string, options: FrameOptions = {}): Promise<void> {
    try {
      const mistake = checkData("writeFrame()", payload);
      if (mistake !== undefined) throw mistake;
      const bytes = bytesOf(payload);
      const prefix = this.write(encodeFrameLength(bytes.length, resolveFrameOptions(options)));
      const body = this.write(bytes); // In the same turn, so nothing comes between.
      return prefix === DONE ? body : forgettable(prefix.then(() => body));
    } catch (error) {
      return rejection(error);
    }
  }

  /**
   * Ends our side: the peer reads the end of the stream behind what was sent. Reading goes on. Resolves once the kernel
   * has everything; a second call resolves too.
   */
  closeWrite(): Promise<void> {
    return this.#transport.beginFlush() ?? this.#transport.output.closeWrite();
  }

  /**
   * Sends all that arrives on to `destination`, which may be this stream, until the peer ends its side; then ends
   * `destination`'s with `closeWrite()`: Go's `io.Copy`. A proxy calls it in both directions. It takes one array, of
   * 64 KiB at most.
   *
   * @returns Resolves to the count of bytes. Rejects as `read()` and `send()` do, and with `TypeError` for anything but a
   * `SocketStream`. It closes neither stream by itself; a chunk that could not be sent is lost. An error of a destination
   * shows when the next chunk is sent.
   */
  pipeTo(destination: SocketStream): Promise<number> {
    if (destination instanceof SocketStream) return forgettable(this.#pipeTo(destination));
    return rejection(new TypeError(`Cannot pipeTo() ${Deno.inspect(destination)}: give a SocketStream`));
  }

  async #pipeTo(destination: SocketStream): Promise<number> {
    await destination.send(""); // Rejects if nothing can be sent, before anything is taken.
    let buffer = new Uint8Array(MIN_PIPE_BYTES);
    let total = 0;
    for (let count; (count = await this.read(buffer)) !== null; total += count) {
      await destination.send(buffer.subarray(0, count));
      const isFull = count === buffer.length && count < MAX_PIPE_BYTES;
      if (isFull) buffer = new Uint8Array(count * 4);
    }
    await destination.closeWrite();
    return total;
  }

  /**
   * Goes on over another connection that `filter` makes of this one, in the middle of a conversation: STARTTLS. Written
   * data is sent first. Received bytes must be read before, because an attacker could have inserted them.
   *
   * @param filter Makes the connection, such as `tls()` of the extra.
   * @param options `handshakeTimeout`: milliseconds that it may take; above 0, `Infinity` for ever. Default: 5,000.
   * @returns Resolves when the stream has the new connection. Rejects with `Deno.errors.Busy` if a read waits or
   * received bytes are unread, and leaves the stream as it was; with the filter's error if that fails, and closes the
   * stream.
   */
  upgrade(filter: ConnectionFilter, options: { handshakeTimeout?: number | undefined } = {}): Promise<void> {
    return forgettable(Promise.try(() => {
      if (typeof filter !== "function") throw wrongType("Filter must be a function", filter);
      const { handshakeTimeout } = resolveOptions({ handshakeTimeout: SERVER_DEFAULTS.handshakeTimeout }, options);
      return this.#transport.upgrade(filter, handshakeTimeout);
    }));
  }

  /**
   * Closes both sides; pending and later calls reject with `Deno.errors.BadResource`. Buffered bytes are still sent as
   * long as the peer takes them. If it takes none for `timeout`, but 30 s at most, they are dropped. A second call does
   * nothing. `await using` waits for the bytes.
   */
  close(): void {
    this.#transport.close();
  }

  /** Closes both sides, as `close()` does. */
  [Symbol.dispose](): void {
    this.close();
  }

  /** Closes both sides, as `close()` does, and waits until buffered bytes are sent or dropped. Never rejects. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.#transport.close();
  }

  /** The incoming side as a web stream. Cancelling it closes both sides; reading its end does not. */
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

  /** The outgoing side as a web stream. Closing it is `closeWrite()`; aborting it closes both sides. */
  get writable(): WritableStream<Uint8Array> {
    return this.#writable ??= new WritableStream<Uint8Array>({
      write: (chunk) => this.send(chunk),
      close: () => this.closeWrite(),
      abort: () => this.close(),
    });
  }
}

/** Reads a stream again and again, with one `Take` for all. */
class Iteration<T, Argument> implements AsyncIterableIterator<T, undefined> {
  #isOver = false;

  constructor(
    readonly transport: Transport,
    readonly call: string,
    readonly take: Take<T | null, Argument>,
    readonly argument: Argument,
  ) {}

  next(): Promise<IteratorResult<T, undefined>> {
    if (this.#isOver) return Promise.resolve({ done: true, value: undefined });
    return this.transport.read<IteratorResult<T, undefined>, this>(this.call, takeResult, this);
  }

  return(): Promise<IteratorResult<T, undefined>> {
    this.#isOver = true;
    return this.next();
  }

  [Symbol.asyncIterator](): this {
    return this;
  }
}

function takeResult<T, Argument>(
  input: Input,
  { take, argument }: Iteration<T, Argument>,
  limit: number,
): IteratorResult<T, undefined> | typeof MORE {
  const value = take(input, argument, limit);
  if (value === MORE) return MORE;
  return value === null ? { done: true, value: undefined } : { done: false, value };
}

function encodeFrameLength(length: number, { lengthBytes, littleEndian }: FrameFormat): Uint8Array {
  if (length >= 256 ** lengthBytes) {
    throw new RangeError(`Cannot write a frame of ${length} bytes with a length of ${lengthBytes} bytes`);
  }
  const bytes = new Uint8Array(4);
  new DataView(bytes.buffer).setUint32(0, length, littleEndian);
  return littleEndian ? bytes.subarray(0, lengthBytes) : bytes.subarray(4 - lengthBytes);
}

// --- Filters ----------------------------------------------------------------

/** The context of a {@linkcode ConnectionFilter}: its deadline, its host, and the end of the connection. */
export interface FilterContext {
  /**
   * Aborts when the `handshakeTimeout` is over, the server cuts the connection, or `connect()` gives up. Its reason is
   * the error to reject with.
   */
  readonly signal: AbortSignal;
  /** The host that `connect()` was asked for; `undefined` on a server. */
  readonly hostname?: string | undefined;
  /** Calls `release` once, when the connection is over. */
  onEnd(release: () => void): void;
}

/**
 * Turns an accepted or dialled connection into the one to go on with: the same one, or one around it whose `under` is
 * the given one. Its `remoteAddr` says who the client is.
 *
 * A server closes the connection if a filter gives `null`, which refuses it quietly (`stats.refused`,
 * `handleRefuse()`), or throws, which is a failed handshake (`stats.handshakeFailures`, `handleError()`). `connect()`
 * rejects with `Deno.errors.ConnectionAborted`, or with what the filter has thrown.
 *
 * @example A server for one network
 * ```ts
 * import { type ConnectionFilter, StreamRequestHandler, TcpServer } from "@socketserver/socketserver";
 *
 * const onlyLocal: ConnectionFilter = (conn) => {
 *   return "hostname" in conn.remoteAddr && conn.remoteAddr.hostname.startsWith("127.") ? conn : null;
 * };
 *
 * class Hello extends StreamRequestHandler {
 *   override handle() {
 *     return this.request.send("hello\n");
 *   }
 * }
 *
 * await using server = new TcpServer({ port: 0 }, Hello, { filters: [onlyLocal] });
 * server.listen();
 * ```
 */
export type ConnectionFilter = (
  conn: StreamConn,
  context: FilterContext,
) => StreamConn | null | Promise<StreamConn | null>;

/** A connection on its way through filters, and their context. */
class Passage implements FilterContext {
  /** `conn`: the accepted or dialled connection, and later the one that the filters make of it. */
  constructor(
    public conn: StreamConn,
    readonly signal: AbortSignal,
    readonly releases: Releases,
    readonly hostname?: string,
  ) {}

  readonly onEnd = (release: () => void): void => this.releases.add(release);

  end(): void {
    closeQuietly(this.conn);
    this.releases.callAll();
  }
}

/** Runs `filters` in order; gives `false` if one refuses, and a promise only if one of them does. */
function runFilters(filters: readonly ConnectionFilter[], passage: Passage): boolean | Promise<boolean> {
  if (filters.length === 0) return true;
  const [filter = () => null, ...others] = filters; // The array may have a hole by now, which must let nobody in.
  const goOn = (conn: StreamConn | null) => passOn(passage, conn) && runFilters(others, passage);
  const next = filter(passage.conn, passage);
  return isThenable(next) ? Promise.resolve(next).then(goOn) : goOn(next);
}

/** Goes on with `conn`; gives `false` if there is none, or if it comes too late. */
function passOn(passage: Passage, conn: StreamConn | null): boolean {
  if (conn === null) return false;
  if (typeof conn !== "object" || !("close" in conn && "remoteAddr" in conn)) {
    throw new TypeError(`A filter must give a connection or null: it has given ${Deno.inspect(conn)}`);
  }
  if (passage.signal.aborted) closeQuietly(conn);
  else passage.conn = conn;
  return !passage.signal.aborted;
}

/**
 * Makes a filter that refuses a connection of a host that has `limit` (whole, 1 or more) open ones already; {@linkcode
 * hostOf} says what one host is. Behind a proxy filter it counts clients, in front of it proxies. Clients without a host
 * pass.
 */
export function perHost(limit: number): ConnectionFilter {
  if (!(limit >= 1 && (Number.isInteger(limit) || limit === Infinity))) {
    throw new RangeError(`perHost() takes a whole number of 1 or more, or Infinity: it was given ${limit}`);
  }
  const counts = new Map<string, number>();
  return (conn, context) => {
    const host = hostOf(conn.remoteAddr);
    if (host === undefined) return conn;
    const count = counts.get(host) ?? 0;
    if (count >= limit) return null;
    counts.set(host, count + 1);
    context.onEnd(() => {
      const left = (counts.get(host) ?? 1) - 1;
      if (left > 0) counts.set(host, left);
      else counts.delete(host);
    });
    return conn;
  };
}

// --- Socket pairs -----------------------------------------------------------

/** Bytes that one direction of a {@linkcode socketPair} holds before a write waits. */
const PIPE_BYTES = 65_536;

/** One direction of a pair, bounded as a socket's buffer in the kernel. */
class Pipe {
  #held = NO_BYTES;
  #isEnded = false;
  #changing = Promise.withResolvers<void>();

  /** Resolves at the next change. */
  get changed(): Promise<void> {
    return this.#changing.promise;
  }

  /** Moves bytes into `into`; `null` at the end, `undefined` if it has to wait. */
  take(into: Uint8Array): number | null | undefined {
    if (this.#held.length === 0) return this.#isEnded ? null : undefined;
    const part = this.#held.subarray(0, into.length);
    into.set(part);
    this.#held = this.#held.subarray(part.length);
    this.#wake();
    return part.length;
  }

  /** Takes a part of `data` in; `undefined` if it has to wait. */
  put(data: Uint8Array): number | undefined {
    if (this.#isEnded) {
      throw Object.assign(new Deno.errors.BrokenPipe("Broken pipe"), { code: "EPIPE" });
    }
    if (this.#held.length >= PIPE_BYTES) return undefined;
    const part = data.subarray(0, PIPE_BYTES - this.#held.length);
    const held = new Uint8Array(this.#held.length + part.length);
    held.set(this.#held);
    held.set(part, this.#held.length);
    this.#held = held;
    this.#wake();
    return part.length;
  }

  end(): void {
    this.#isEnded = true;
    this.#wake();
  }

  /** Ends it, and drops what nobody will read. */
  discard(): void {
    this.#held = NO_BYTES;
    this.end();
  }

  #wake(): void {
    this.#changing.resolve();
    this.#changing = Promise.withResolvers();
  }
}

/** One end of a pair. It fails as a `Deno.Conn` does, so that handlers meet in a test what they meet in production. */
class PairConn implements StreamConn {
  readonly localAddr: Deno.Addr = { transport: "unix", path: "" };
  readonly remoteAddr: Deno.Addr = { transport: "unix", path: "" };
  #isClosed = false;

  constructor(readonly incoming: Pipe, readonly outgoing: Pipe) {}

  read(into: Uint8Array): Promise<number | null> {
    return this.#whenever(this.incoming, () => this.incoming.take(into));
  }

  write(data: Uint8Array): Promise<number> {
    return this.#whenever(this.outgoing, () => this.outgoing.put(data));
  }

  /** Tries again whenever `pipe` changes; rejects as a socket does if this end is closed meanwhile. */
  async #whenever<T>(pipe: Pipe, action: () => T | undefined): Promise<T> {
    this.#checkOpen();
    while (!this.#isClosed) {
      const answer = action();
      if (answer !== undefined) return answer;
      await pipe.changed;
    }
    throw Object.assign(new Deno.errors.Interrupted("operation canceled"), { code: "EINTR" });
  }

  // deno-lint-ignore require-await -- A closed connection rejects; it does not throw.
  async closeWrite(): Promise<void> {
    this.#checkOpen();
    this.outgoing.end();
  }

  close(): void {
    this.#checkOpen();
    this.#isClosed = true;
    this.incoming.discard();
    this.outgoing.end();
  }

  #checkOpen(): void {
    if (this.#isClosed) throw new Deno.errors.BadResource("Bad resource ID");
  }
}

/**
 * Makes two streams in memory, each the other's peer, with a socket's back-pressure and half-close: a handler is tested
 * without network and permissions. Python's `socket.socketpair()`.
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
  const [there, back] = [new Pipe(), new Pipe()];
  return [new SocketStream(new PairConn(back, there), options), new SocketStream(new PairConn(there, back), options)];
}

// --- Connecting -------------------------------------------------------------

/** The wait before the second try; short enough to go unnoticed when a server restarts. */
const RETRY_MIN_MS = 100;

/** The longest wait between two tries; short enough to be back soon after a long outage. */
const RETRY_MAX_MS = 5_000;

type DialSettings = Resolved<Omit<DialOptions, "signal">>;

const DIAL_DEFAULTS: DialSettings = { ...STREAM_DEFAULTS, retries: 0, tls: false, filters: [], noDelay: true };

/** An address that can be dialled, or sent to. */
type PeerAddress = Deno.NetAddr | Deno.UnixAddr;

/**
 * Opens a connection to `{ hostname, port }` or `{ path }`. Resolves to the open stream, which is the caller's to
 * close. Rejects with the class and `code` of the last try's error, such as `Deno.errors.ConnectionRefused` or
 * `Deno.errors.TimedOut`; the message says what was dialled, why it failed and after how many tries. A missing
 * permission, a wrong option and a handshake that TLS itself fails, such as by a bad certificate, are not tried again.
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
  const { address, settings } = resolveDial(options);
  resolvedStreamOptions.set(settings, settings);
  const { signal } = options;
  for (let tries = 1;; tries++) {
    signal?.throwIfAborted();
    try {
      return await dial(address, settings, signal);
    } catch (error) {
      signal?.throwIfAborted();
      if (tries > settings.retries || !isWorthRetrying(error)) throw dialError(error, address, tries);
    }
    await delay(retryDelay(tries), signal);
  }
}

function resolveDial(options: ConnectOptions): { address: PeerAddress; settings: DialSettings } {
  if ("path" in options) {
    const { path, signal: _, ...others } = options;
    return { address: { transport: "unix", path }, settings: resolveOptions(DIAL_DEFAULTS, others) };
  }
  const { hostname = "127.0.0.1", port, signal: _, ...others } = options;
  checkPort(port);
  const address = { transport: "tcp", hostname: checkHostname(hostname), port } as const;
  return { address, settings: resolveOptions(DIAL_DEFAULTS, others) };
}

/** One try, which ends at `timeout` whatever the system does meanwhile. */
async function dial(
  address: PeerAddress,
  settings: DialSettings,
  signal: AbortSignal | undefined,
): Promise<SocketStream> {
  const controller = new AbortController();
  const onAbort = () => controller.abort(signal?.reason);
  signal?.addEventListener("abort", onAbort);
  try {
    const opening = open(address, settings, controller.signal);
    const { conn, releases } = await inTime(opening, settings.timeout, "no answer within", controller);
    controller.signal.throwIfAborted(); // It may have been aborted in the same moment.
    const stream = new SocketStream(conn, settings);
    transportOf(stream).releases.add(() => releases.callAll());
    return stream;
  } finally {
    signal?.removeEventListener("abort", onAbort);
  }
}

/** Dials, and runs the filters and the TLS handshake. `signal` closes the connection, also one that opens after it. */
async function open(address: PeerAddress, settings: DialSettings, signal: AbortSignal): Promise<Passage> {
  const conn = await dialConn(address, settings.noDelay, signal);
  const passage = new Passage(conn, signal, new Releases(), "hostname" in address ? address.hostname : undefined);
  signal.addEventListener("abort", () => passage.end()); // Filters may wait for the peer.
  try {
    signal.throwIfAborted(); // A Unix socket's dial takes no signal.
    if (!await runFilters(settings.filters, passage)) {
      throw new Deno.errors.ConnectionAborted("a filter has refused the connection");
    }
    await startTls(passage, settings.tls);
    return passage;
  } catch (error) {
    passage.end();
    throw error;
  }
}

async function dialConn(address: PeerAddress, noDelay: boolean, signal: AbortSignal): Promise<Deno.Conn> {
  if ("path" in address) return await Deno.connect({ transport: "unix", path: address.path });
  const { hostname, port } = address;
  const conn = await Deno.connect({ hostname, port, signal });
  // A dial to a dead port of the ephemeral range may meet itself (TCP's simultaneous open), and would echo its bytes.
  if (formatAddress(conn.localAddr) === formatAddress(conn.remoteAddr)) {
    conn.close();
    throw Object.assign(new Deno.errors.ConnectionRefused("Connection refused"), { code: "ECONNREFUSED" });
  }
  if (noDelay) disableNagle(conn);
  return conn;
}

async function startTls(passage: Passage, tls: boolean | ConnectTlsOptions): Promise<void> {
  if (tls === false) return;
  const { conn, hostname = "", signal } = passage;
  const defaults: Resolved<ConnectTlsOptions> = { caCerts: [], serverName: hostname, alpnProtocols: [] };
  const { caCerts, serverName, alpnProtocols } = resolveOptions(defaults, tls === true ? {} : tls);
  if (!isTcpConn(conn)) {
    throw new TypeError(
      'Option "tls" needs a bare TCP connection; over a Unix socket or another filter use a TLS filter',
    );
  }
  try {
    const encrypted = await Deno.startTls(conn, { hostname: serverName, caCerts, alpnProtocols });
    passage.conn = withAddresses(encrypted, conn);
    signal.throwIfAborted(); // The consumed connection may have been closed meanwhile.
    await encrypted.handshake();
  } catch (error) {
    throw restate(error, `the TLS handshake failed: ${systemWords(error)}`);
  }
}

function isTcpConn(conn: StreamConn): conn is StreamConn & Deno.TcpConn {
  return "setNoDelay" in conn && "setKeepAlive" in conn;
}

/** A missing permission, a wrong option, and a bad certificate do not go away. */
function isWorthRetrying(error: unknown): boolean {
  const isFinal = error instanceof Deno.errors.NotCapable || error instanceof Deno.errors.InvalidData ||
    error instanceof TypeError || error instanceof RangeError || error instanceof URIError;
  return !isFinal;
}

function dialError(error: unknown, address: PeerAddress, tries: number): Error {
  const times = tries === 1 ? "" : ` after ${tries} tries`;
  return restate(error, `Cannot connect to ${formatAddress(address)}${times}: ${explain(error, address)}`);
}

function retryDelay(tries: number): number {
  const full = Math.min(RETRY_MIN_MS * 2 ** (tries - 1), RETRY_MAX_MS);
  return full * (1 - Math.random() / 2);
}

// --- Handlers ---------------------------------------------------------------

/** The signal of the session that a request belongs to; `undefined` for a request that a test has made. */
function signalOf(request: unknown): AbortSignal | undefined {
  if (request instanceof SocketStream) return transportOf(request).session?.controller.signal;
  return request instanceof Datagram ? sessionOf(request)?.controller.signal : undefined;
}

/**
 * The class that a user extends: one object for each request.
 *
 * Override: `setup`, `handle`, `finish`. Read: `request`, `clientAddress`, `server`, `signal`.
 *
 * @typeParam Request What the handler serves, such as a {@linkcode SocketStream}.
 * @typeParam Server The server that made the handler.
 */
export abstract class BaseRequestHandler<Request, Server extends { readonly signal: AbortSignal }> {
  /** The stream or datagram to serve. */
  readonly request: Request;
  /** The client's address. */
  readonly clientAddress: Deno.Addr;
  /** The server that made this handler. A subclass may write `declare readonly server: MyServer`. */
  readonly server: Server;

  /** Called by {@linkcode BaseServer.finishRequest}. */
  constructor(request: Request, clientAddress: Deno.Addr, server: Server) {
    this.request = request;
    this.clientAddress = clientAddress;
    this.server = server;
  }

  /**
   * Aborts with the server's `signal` during a shutdown, or when the server cuts the connection; the handler should then
   * end. An abort's reason that it lets through is no error. The signal is this request's own: its listeners end with
   * it.
   */
  get signal(): AbortSignal {
    return signalOf(this.request) ?? this.server.signal;
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

/** A handler of datagrams: `this.request` is a {@linkcode Datagram}. */
export abstract class DatagramRequestHandler extends BaseRequestHandler<Datagram, DatagramServer> {}

/** The class of the handlers of a {@linkcode StreamServer}. */
export type StreamRequestHandlerClass = new (
  ...args: [request: SocketStream, clientAddress: Deno.Addr, server: StreamServer]
) => BaseRequestHandler<SocketStream, StreamServer>;

/** The class of the handlers of a {@linkcode DatagramServer}. */
export type DatagramRequestHandlerClass = new (
  ...args: [request: Datagram, clientAddress: Deno.Addr, server: DatagramServer]
) => BaseRequestHandler<Datagram, DatagramServer>;

type HandlerCalls = Pick<StreamRequestHandler, "setup" | "handle" | "finish">;

/** Runs a handler's calls, without a promise for those that give none. */
function runHandler(handler: HandlerCalls): void | Promise<void> {
  const preparing = asPromise(handler.setup());
  return preparing === undefined ? runPrepared(handler) : preparing.then(() => runPrepared(handler));
}

function runPrepared(handler: HandlerCalls): void | Promise<void> {
  // An idle connection needs no promise for a finish() that does nothing.
  if (handler.finish === BaseRequestHandler.prototype.finish) return handler.handle();
  return Promise.try(() => handler.handle()).then(() => handler.finish(), (error) => failAndFinish(handler, error));
}

async function failAndFinish(handler: HandlerCalls, error: unknown): Promise<never> {
  try {
    await handler.finish();
  } catch (second) {
    throw new SuppressedError(second, error, "Both handle() and finish() have thrown");
  }
  throw error;
}

// --- Accepting --------------------------------------------------------------

/**
 * The meaning of an error of `accept()`: `"closed"` the listener was closed, `"peer"` one client left before it was
 * accepted, `"overload"` the system is out of descriptors or memory for now, `"fatal"` anything else.
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
 * Classifies an error of `Deno.Listener.accept` by its `code` if it has one, as `EMFILE` is a plain `Error`, and else by
 * its class. It never reads `stack`, which opens a file.
 */
export function acceptFailure(error: unknown): AcceptFailure {
  const code = errorCode(error);
  if (PEER_CODES.has(code)) return "peer";
  if (OVERLOAD_CODES.has(code)) return "overload";
  if (error instanceof Deno.errors.BadResource || error instanceof Deno.errors.Interrupted) return "closed";
  if (error instanceof Deno.errors.InvalidData) return "peer"; // A Unix client's path is not UTF-8.
  return "fatal";
}

/** The first wait when descriptors run out. */
const OVERLOAD_WAIT_MIN_MS = 5;

/** Long enough for descriptors to come free, short enough for a client to bear. */
const OVERLOAD_WAIT_MAX_MS = 1_000;

/** Looks at a backlog that must all find it quiet; a busy event loop may come late to one of them. */
const BACKLOG_LOOKS = 5;

/** The time between two of these looks. */
const BACKLOG_LOOK_MS = 10;

/** Milliseconds that a shutdown waits for the backlog at most: under a steady load it is never quiet. */
const BACKLOG_PATIENCE_MS = 500;

/**
 * With more reads than these between two looks, accepting may not have had its turn: the runtime completes 128 a turn.
 */
const BUSY_READS = 64;

/** Something that a server accepts from; a `Deno.Listener` is one. */
export interface Listener<Arrival> {
  /**
   * Resolves to the next arrival; rejects with `Deno.errors.BadResource` once it is closed. {@linkcode acceptFailure}
   * says what other errors do: a fatal one closes the server.
   */
  accept(): Promise<Arrival>;
  /** Stops accepting; a pending `accept()` rejects. */
  close(): void | Promise<void>;
}

/** Never rejects: someone else may have closed it. */
function closeListener(listener: Listener<unknown>): Promise<void> {
  return Promise.try(() => listener.close()).catch(ignore);
}

/**
 * A mailbox around a listener. An accept that is under way cannot be cancelled, so what has arrived stays here until it
 * is taken: a caller that stops waiting loses nothing. No client's error ends it, and an exhaustion is waited out.
 */
class Acceptor<Arrival> implements AsyncIterableIterator<Arrival, undefined> {
  /** Aborts when the server stops: waits are short from then on. */
  readonly #stopping = new AbortController();
  /** Nothing more will arrive. */
  #isOver = false;
  #closing: Promise<void> | undefined;
  #arriving: Promise<void> | undefined;
  #arrived: Arrival | undefined;
  #overloadWait = 0;
  #count = 0;

  /**
   * Calls `onLost` for each client that left before it was accepted, and `onOverload` when the system is out of
   * something.
   */
  constructor(
    readonly listener: Listener<Arrival>,
    readonly onLost: () => void,
    readonly onOverload: (error: unknown) => void,
  ) {}

  /**
   * Resolves when there is something to take, or nothing will be any more; the same promise until it is taken. Rejects
   * with an error of accepting that cannot be waited out.
   */
  arrival(): Promise<void> {
    return this.#arriving ??= this.#accept();
  }

  /** What has arrived and was not taken yet. */
  take(): Arrival | undefined {
    const arrived = this.#arrived;
    this.#arrived = this.#arriving = undefined;
    return arrived;
  }

  readonly #takeNext = (): IteratorResult<Arrival, undefined> => {
    const value = this.take();
    return value === undefined ? { done: true, value: undefined } : { done: false, value };
  };

  /** Takes the next arrival; done when the listener is closed. Rejects as `arrival()` does. */
  next(): Promise<IteratorResult<Arrival, undefined>> {
    return this.arrival().then(this.#takeNext);
  }

  [Symbol.asyncIterator](): this {
    return this;
  }

  /** Resolves when nothing has come for some looks, as the kernel cannot be asked, or when patience is over. */
  async untilQuiet(): Promise<void> {
    this.#stopping.abort();
    let patience = BACKLOG_PATIENCE_MS;
    for (let looks = 0; looks < BACKLOG_LOOKS && patience > 0 && !this.#isOver;) {
      const [count, reads] = [this.#count, turnstile.reads];
      await delay(BACKLOG_LOOK_MS);
      const isAccepting = this.#arriving !== undefined;
      const isBusy = turnstile.reads - reads > BUSY_READS;
      if (isAccepting) patience -= BACKLOG_LOOK_MS;
      if (count !== this.#count) looks = 0;
      else if (isAccepting && !isBusy) looks++;
    }
  }

  /** Stops accepting; the address is free when it resolves. Never rejects. */
  async close(): Promise<void> {
    this.#isOver = true;
    this.#stopping.abort();
    this.#closing ??= closeListener(this.listener);
    await this.#closing;
    await this.#arriving?.catch(ignore);
  }

  #accept(): Promise<void> {
    if (this.#isOver) return DONE;
    try {
      return Promise.resolve(this.listener.accept()).then(this.#receive, this.#retry);
    } catch (error) {
      return this.#retry(error); // A listener of the caller's own has thrown.
    }
  }

  /** A loop: clients that fail one after the other must not nest promises. */
  readonly #retry = async (error: unknown): Promise<void> => {
    for (let failure = error; !await this.#isOverAfter(failure);) {
      try {
        return this.#receive(await this.listener.accept());
      } catch (error) {
        failure = error;
      }
    }
  };

  readonly #receive = (arrival: Arrival): void => {
    this.#arrived = arrival;
    this.#overloadWait = 0;
    this.#count++;
  };

  /** Rides an error out, if that is possible; throws one that is fatal. Resolves to whether accepting is over. */
  async #isOverAfter(error: unknown): Promise<boolean> {
    const failure = acceptFailure(error);
    if (failure === "peer" && !this.#isOver) this.onLost(); // A closed datagram socket rejects with EINTR.
    if (failure === "overload") {
      this.onOverload(error);
      await this.#waitOut();
    }
    if (failure === "closed" || failure === "fatal") this.#isOver = true;
    if (failure === "fatal") throw error;
    return this.#isOver;
  }

  #waitOut(): Promise<void> {
    const { signal } = this.#stopping;
    if (signal.aborted) return delay(OVERLOAD_WAIT_MIN_MS);
    this.#overloadWait = Math.min(Math.max(this.#overloadWait * 2, OVERLOAD_WAIT_MIN_MS), OVERLOAD_WAIT_MAX_MS);
    return delay(this.#overloadWait, signal);
  }
}

// --- Sessions ---------------------------------------------------------------

/**
 * The end of a connection: `"finished"` its handler is done, `"aborted"` the client vanished, `"timedOut"` a deadline
 * passed, `"error"` a handler or a hook threw, `"rejected"` `verifyRequest()` turned it away, `"cut"` the server was
 * closed or its `grace` was over.
 */
export type Outcome = "finished" | "aborted" | "timedOut" | "error" | "rejected" | "cut";

/**
 * How a request ends by an error: `"aborted"` its own client vanished, `"timedOut"` a deadline of its own connection
 * passed, `"handshakeFailed"` a filter threw, `"error"` anything else.
 */
export type ErrorOutcome = "aborted" | "timedOut" | "handshakeFailed" | "error";

/** The bytes of a request. */
export interface Traffic {
  /** Bytes that were received. */
  readonly bytesRead: number;
  /** Bytes that were sent. */
  readonly bytesWritten: number;
}

/** One request, from its arrival to its end. */
abstract class Session<Request extends Traffic> {
  /** Its place among the server's sessions. */
  index = 0;
  outcome: Outcome | "refused" | "handshakeFailed" = "finished";
  request: Request | undefined;
  /** What its filters have left to do; a datagram has none. */
  releases: Releases | undefined;
  #controller: AbortController | undefined;

  /** Its arrival, in the time of `performance.now()`; 0 for a datagram. */
  constructor(readonly since: number) {}

  abstract get clientAddress(): Deno.Addr;
  /** Makes the request; `null` if it is not served, and `outcome` says why. */
  abstract open(): Request | null | Promise<Request | null>;
  /** The outcome of an error; `undefined` if it only echoes that the server has cut the session off. */
  abstract outcomeOf(error: unknown): ErrorOutcome | undefined;
  /** Ends it if its client has nothing under way, or in any case if it `isLate`. */
  drain(_isLate: boolean): void {}
  /** Ends it now; its handler's calls reject with `error`. */
  cut(_error?: Error): void {}

  /** The outcome if the handler threw nothing: a deadline closed the stream, or buffered bytes could not be sent. */
  get silentOutcome(): "aborted" | "timedOut" | undefined {
    return undefined;
  }

  get isCut(): boolean {
    return this.outcome === "cut";
  }

  /** The controller of the handler's signal, made when it is asked for. */
  get controller(): AbortController {
    return this.#controller ??= new AbortController();
  }

  /** Whether the handler has let the reason of its signal through. */
  hasAbortedWith(error: unknown): boolean {
    const signal = this.#controller?.signal;
    return signal?.aborted === true && error === signal.reason;
  }
}

/** A connection's session. */
class StreamSession extends Session<SocketStream> {
  #transport: Transport | undefined;
  #handshake: AbortController | undefined;
  /** Its way through the filters, until they are done. */
  #passage: Passage | undefined;

  constructor(
    public conn: StreamConn,
    readonly settings: ServerSettings,
    readonly getRequest: (conn: StreamConn) => SocketStream,
  ) {
    super(performance.now());
  }

  /** As far as its filters have brought it. */
  get #current(): StreamConn {
    return (this.#passage ?? this).conn;
  }

  override get clientAddress(): Deno.Addr {
    return this.#current.remoteAddr;
  }

  override get silentOutcome(): "aborted" | "timedOut" | undefined {
    return this.#transport?.silentOutcome;
  }

  override open(): SocketStream | null | Promise<SocketStream | null> {
    const { filters, handshakeTimeout } = this.settings;
    if (filters.length === 0) return this.#makeRequest(true);
    const controller = this.#handshake = new AbortController();
    this.releases = new Releases();
    this.#passage = new Passage(this.conn, controller.signal, this.releases);
    const passed = runFilters(filters, this.#passage);
    if (typeof passed === "boolean") return this.#makeRequest(passed);
    return inTime(passed, handshakeTimeout, "filters took longer than", controller)
      .then((hasPassed) => this.#makeRequest(hasPassed));
  }

  #makeRequest(hasPassed: boolean): SocketStream | null {
    this.conn = this.#current;
    this.#passage = undefined;
    if (!hasPassed && !this.isCut) this.outcome = "refused";
    if (!hasPassed || this.isCut) return null; // A filter may have closed the server.
    const request = this.getRequest(this.conn);
    this.#transport = transportOf(request);
    this.#transport.session = this;
    return request;
  }

  override outcomeOf(error: unknown): ErrorOutcome | undefined {
    if (this.#passage !== undefined) return this.isCut ? undefined : "handshakeFailed";
    if (!this.#transport?.hasRaised(error)) return "error";
    if (this.isCut) return undefined;
    // A stream that its own handler has closed is the handler's mistake.
    if (error instanceof LimitOverrunError || error instanceof Deno.errors.BadResource) return "error";
    return error instanceof Deno.errors.TimedOut ? "timedOut" : "aborted";
  }

  override drain(isLate: boolean): void {
    this.#transport?.drain(isLate);
  }

  override cut(error?: Error): void {
    this.#handshake?.abort(error);
    if (this.#transport === undefined) closeQuietly(this.#current);
    else this.#transport.cut(error);
  }
}

// --- Servers ----------------------------------------------------------------

/** How often a shutdown looks for clients that it can end: long enough to read bytes that have arrived already. */
const DRAIN_LOOK_MS = 50;

/**
 * Milliseconds after which a shutdown also ends clients that have not spoken or are owed an answer, and cuts those in
 * their filters.
 */
const DRAIN_LATE_MS = 500;

/** Milliseconds after which the signals abort although the backlog is not served. */
const ABORT_AFTER_MS = 500;

/** Milliseconds that handlers which were cut off have to run their `finish()`. */
const UNWIND_MS = 200;

/** The interval of `serviceActions()`: Python's poll interval. */
const SERVICE_INTERVAL_MS = 500;

/** The work of a server so far. All are counts since it was made, except `active`. */
export interface ServerStats extends Traffic {
  /** Connections that were accepted and datagrams that were taken in, however they ended. */
  readonly accepted: number;
  /** Requests that are being served now, and connections in their filters. */
  readonly active: number;
  /** Requests that `verifyRequest()` turned away. */
  readonly rejected: number;
  /** Requests whose peer vanished: reset, broken pipe, or the end inside of a message. */
  readonly aborted: number;
  /** Requests that ended by a deadline, or whose peer the system has given up (`ETIMEDOUT`). */
  readonly timedOut: number;
  /** Errors that handlers or hooks threw, other than those of `aborted` and `timedOut`; one request may count twice. */
  readonly errors: number;
  /** Clients that left before they were accepted, and datagrams that could not be received. */
  readonly lost: number;
  /** Connections that a filter refused. */
  readonly refused: number;
  /** Connections whose filter threw or took too long, such as a TLS handshake. */
  readonly handshakeFailures: number;
  /** Datagrams that came while `maxConcurrent` were served, or late in a shutdown. */
  readonly dropped: number;
  /** Times that the system ran out of descriptors or memory. */
  readonly overloads: number;
}

/** How a connection went; the argument of {@linkcode StreamServer.handleClose}. */
export interface ConnectionReport extends Traffic {
  /** How it ended. */
  readonly outcome: Outcome;
  /** Milliseconds from its accept to its end. */
  readonly duration: number;
}

/** A connection that is being served; one of {@linkcode StreamServer.openConnections}. */
export interface OpenConnection extends Traffic {
  /** The client's address. */
  readonly clientAddress: Deno.Addr;
  /** Milliseconds since it was accepted. */
  readonly age: number;
  /**
   * The call that waits for the client, such as `"readLine()"` or `"send()"`; `"handshake"` in the filters; else
   * `"handler"`.
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

/** The call that serves. */
type ServingCall = "serveForever()" | "handleRequest()";

/**
 * The base of all servers: lifecycle, hooks and end. Its constructor opens nothing.
 *
 * Call: `listen`, `serveForever`, `handleRequest`, `shutdown`, `close`. Read: `address`, `signal`, `stats`. Override:
 * `verifyRequest`, `processRequest`, `finishRequest`, `handleError`, `handleTimeout`, `serviceActions`,
 * `handleOverload`. The guide shows how to add a kind of server.
 */
export abstract class BaseServer<Request extends Traffic, Address extends Deno.Addr = Deno.Addr, Arrival = unknown>
  implements AsyncDisposable {
  readonly #grace: number;
  readonly #maxSessions: number;
  /** For datagrams: handlers reply by the listener, so it stays open for them, and what is too much is dropped. */
  readonly #keepsListener: boolean;
  readonly #controller = new AbortController();
  /** In no order, as each session knows its index: a map costs a tenth of the datagrams' rate. */
  readonly #sessions: Session<Request>[] = [];
  readonly #cutOff: Deno.Addr[] = [];
  /** A counter of an outcome has the outcome's name. */
  readonly #counts = {
    accepted: 0,
    rejected: 0,
    aborted: 0,
    timedOut: 0,
    error: 0,
    lost: 0,
    refused: 0,
    handshakeFailed: 0,
    dropped: 0,
    overloads: 0,
    bytesRead: 0,
    bytesWritten: 0,
  };
  /** Sessions that ended by themselves since the shutdown began. */
  #finished = 0;
  /** All sessions are ended or cut off. */
  #isClosed = false;
  #address: Address | undefined;
  #acceptor: Acceptor<Arrival> | undefined;
  /** One at a time. */
  #serving: ServingCall | undefined;
  #shuttingDown: Promise<ShutdownReport> | undefined;
  /** Aborts when the shutdown is over; handlers that do not return may still run. */
  readonly #ended = new AbortController();
  #change: PromiseWithResolvers<void> | undefined;
  #overloadedAt = -Infinity;
  /** The backlog is served: what arrives now comes too late. */
  #dropsArrivals = false;

  /** `grace` in milliseconds; `keepsListener`: handlers need the listener until they are done. */
  protected constructor(grace: number, maxSessions: number, keepsListener = false) {
    this.#grace = grace;
    this.#maxSessions = maxSessions;
    this.#keepsListener = keepsListener;
  }

  /**
   * Binds the address and returns it, with the real port for port 0. From then on clients can connect, and wait until
   * `serveForever()` or `handleRequest()` serves them; these call it if nobody has. A second call returns the same.
   * Throws, or rejects with, `Deno.errors.AddrInUse`, `Deno.errors.NotCapable` without the permission, `TypeError` if
   * the server is closed.
   */
  abstract listen(): Address | Promise<Address>;

  /**
   * The session of an arrival, or the counter of those that are dropped. `isBusy`: `maxSessions` are open, or the server
   * is about to close.
   * @internal
   */
  protected abstract newSession(arrival: Arrival, isBusy: boolean): Session<Request> | "lost" | "dropped";

  /** The bound address. Throws `TypeError` before `listen()`. */
  get address(): Address {
    if (this.#address !== undefined) return this.#address;
    throw new TypeError("Cannot tell the address: the server does not listen yet, call listen()");
  }

  /**
   * Aborts during a shutdown, once the backlog is served or after 500 ms; `close()` aborts it at once. A handler has its
   * own, `this.signal`.
   */
  get signal(): AbortSignal {
    return this.#controller.signal;
  }

  /** The server's counters. */
  get stats(): ServerStats {
    const { error: errors, handshakeFailed: handshakeFailures, ...others } = this.#counts;
    const stats = { ...others, errors, handshakeFailures, active: this.#sessions.length };
    for (const { request } of this.#sessions) addTraffic(stats, request);
    return stats;
  }

  /**
   * Serves until {@linkcode BaseServer.shutdown} or {@linkcode BaseServer.close}.
   *
   * @param options When `signal` aborts, `shutdown()` is called.
   * @returns Resolves once the shutdown is over; at once if it is already. Rejects with the error of `listen()`, after
   * which it may be called again; with `Deno.errors.Busy` if the server serves already; and with an error of accepting
   * that cannot be waited out, which closes the server.
   */
  async serveForever(options: { signal?: AbortSignal | undefined } = {}): Promise<void> {
    const { signal } = resolveOptions<{ signal: AbortSignal | undefined }>({ signal: undefined }, options);
    const stop = () => void this.shutdown();
    await this.#serveBy("serveForever()", async (acceptor) => {
      const stopServices = this.#startServices();
      signal?.addEventListener("abort", stop);
      try {
        if (signal?.aborted) stop();
        await this.#serveArrivals(acceptor);
        if (!this.#isClosing) stop(); // Someone else has closed the listener.
      } finally {
        stopServices();
        signal?.removeEventListener("abort", stop);
      }
    });
    await this.#shuttingDown;
  }

  /**
   * Serves one request; Python's `handle_request()`. Resolves when it was served, when none came within `timeout`
   * (milliseconds above 0, default `Infinity`) and `handleTimeout()` has run, or when the server is closed. Rejects as
   * `serveForever()` does.
   */
  async handleRequest(options: { timeout?: number | undefined } = {}): Promise<void> {
    const { timeout } = resolveOptions({ timeout: Infinity }, options);
    const isLate = await this.#serveBy("handleRequest()", async (acceptor) => {
      if (!await settlesWithin(acceptor.arrival(), timeout)) return true;
      const { value: arrival } = await acceptor.next();
      if (arrival === undefined) return void await this.#shuttingDown; // It serves what has come at that moment.
      const served = Promise.resolve(this.#serve(arrival));
      await delay(Infinity, settlementOf(served), this.#ended.signal);
    });
    if (isLate) this.handleTimeout();
  }

  /**
   * Ends the server in good order:
   *
   * 1. It accepts the clients that wait in the kernel's backlog, and then no more.
   * 2. `signal` aborts.
   * 3. Handlers finish what they have begun. A read that would wait for a new message reads the end of the stream.
   *    Clients that have just connected get half a second to pass the filters and to say their first word.
   * 4. After `grace` the rest are cut off; their `finish()` has 200 ms.
   *
   * It may be called before the start, and again: it is the same shutdown, with the first call's `grace` (default: the
   * server's option); `close()` shortens it. A handler calls it without `await`, as the promise waits for that handler,
   * too. Never rejects; the address is free when it resolves.
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
  shutdown(options: { grace?: number | undefined } = {}): Promise<ShutdownReport> {
    const { grace } = resolveOptions({ grace: this.#grace }, options);
    return this.#shuttingDown ??= this.#drain(grace);
  }

  /**
   * Ends the server now: it stops accepting and cuts all clients off. `serveForever()` resolves soon after. A second
   * call does nothing.
   */
  close(): void {
    if (this.#isClosed) return;
    this.#closeNow();
    this.#shuttingDown ??= this.#drain(0);
  }

  /** Shuts the server down, as `shutdown()` does: Python's `with server:`. */
  async [Symbol.asyncDispose](): Promise<void> {
    await this.shutdown();
  }

  /** Decides whether a request is served, before a handler exists and before anything is read. Default: `true`. */
  verifyRequest(_request: Request, _clientAddress: Deno.Addr): boolean | Promise<boolean> {
    return true;
  }

  /**
   * Serves a verified request, by default with `finishRequest()`. Override it to put something around every request: a
   * lock, a measurement.
   */
  processRequest(request: Request, clientAddress: Deno.Addr): void | Promise<void> {
    return this.finishRequest(request, clientAddress);
  }

  /**
   * Makes the handler and runs its `setup()`, `handle()` and `finish()`. Throws, or rejects with, its error; a
   * `SuppressedError` of both if `finish()` threw after `handle()` had.
   */
  abstract finishRequest(request: Request, clientAddress: Deno.Addr): void | Promise<void>;

  /**
   * Runs after a handler, a hook or a filter threw; then the connection is closed. The default prints the program's own
   * errors with their stack, and failed handshakes in one line, one a second at most. It prints nothing of clients that
   * vanished or ran into a deadline.
   */
  handleError(error: unknown, clientAddress: Deno.Addr, outcome: ErrorOutcome): void | Promise<void> {
    const client = formatAddress(clientAddress);
    // The stack tells where a handler went wrong, and nothing about a client that sent too much or was closed.
    const isPlain = error instanceof LimitOverrunError || messageOf(error) === STREAM_IS_CLOSED;
    if (outcome === "error") printError(`Error while serving ${client}:`, isPlain ? messageOf(error) : error);
    if (outcome === "handshakeFailed") printNotice(`Handshake with ${client} failed: ${messageOf(error)}`);
  }

  /** Runs when `handleRequest()` has waited for its `timeout`. */
  handleTimeout(): void {}

  /** Override it for chores: runs every 500 ms while `serveForever()` accepts. */
  serviceActions(): void | Promise<void> {}

  /**
   * Runs when descriptors or memory have run out, once per shortage; it is over after 5 s without such an error. Clients
   * wait in the backlog meanwhile. The default prints one line. Do not read the error's `stack`, which opens a file.
   */
  handleOverload(error: unknown): void | Promise<void> {
    const where = this.#address === undefined ? "" : ` on ${formatAddress(this.#address)}`;
    const advice = errorCode(error) === "EMFILE" ? '; raise "ulimit -n" or lower maxConnections' : "";
    print(`Cannot accept connections${where} for now: ${messageOf(error)}${advice}`);
  }

  /**
   * Closes a request when its handler is done; Python's `shutdown_request()`. Resolves when nothing of it is left to be
   * sent. The default does nothing: a datagram has nothing to close.
   */
  protected closeRequest(_request: Request): void | Promise<void> {}

  /**
   * To be called by `listen()`: takes `listener` over. `serveForever()` and `handleRequest()` accept from it, and the end
   * of the server closes it. Returns `address`.
   */
  protected adopt(listener: Listener<Arrival>, address: Address): Address {
    if (this.#isClosing) {
      closeListener(listener);
      throw closedServer();
    }
    const onLost = () => this.#counts.lost++;
    this.#acceptor = new Acceptor(listener, onLost, (error) => this.#noteOverload(error));
    queueMicrotask(prepareForExhaustion);
    return this.#address = address;
  }

  /** The bound address, `undefined` before `listen()`. Throws `TypeError` if the server is closed. */
  protected get boundAddress(): Address | undefined {
    if (this.#isClosing) throw closedServer();
    return this.#address;
  }

  /**
   * Runs when a request is taken in.
   * @internal
   */
  protected noteOpen(_request: Request, _clientAddress: Deno.Addr): void {}

  /**
   * Runs when a session is over, or cut off.
   * @internal
   */
  protected noteClose(_session: Session<Request>): void {}

  /**
   * The sessions that were not cut off.
   * @internal
   */
  protected get openSessions(): Session<Request>[] {
    return this.#sessions.filter(({ isCut }) => !isCut);
  }

  /**
   * Runs a hook whose own error can only be printed; never rejects.
   * @internal
   */
  protected async runHook(name: string, hook: () => void | Promise<void>): Promise<void> {
    try {
      await hook();
    } catch (error) {
      this.#noteHookError(name, error);
    }
  }

  #noteHookError(name: string, error: unknown): void {
    this.#counts.error++;
    printError(`Error in ${name}():`, error);
  }

  get #isFull(): boolean {
    return this.#sessions.length >= this.#maxSessions;
  }

  /** Clients wait in the backlog; datagrams that are too many are received, dropped and counted. */
  get #mustWait(): boolean {
    return this.#isFull && !this.#keepsListener && !this.#isClosed;
  }

  get #isClosing(): boolean {
    return this.#isClosed || this.#shuttingDown !== undefined;
  }

  /**
   * Listens and runs `work`, one at a time, unless the server is closed. An error of accepting closes the server; after
   * one of listening it may be tried again.
   */
  async #serveBy<T>(call: ServingCall, work: (acceptor: Acceptor<Arrival>) => Promise<T>): Promise<T | undefined> {
    if (this.#isClosing) return undefined;
    if (this.#serving !== undefined) throw new Deno.errors.Busy(`Cannot ${call}: the server is serving already`);
    this.#serving = call;
    try {
      if (this.#acceptor === undefined) await this.listen();
      return this.#acceptor && await work(this.#acceptor);
    } catch (error) {
      if (this.#acceptor === undefined && this.#isClosing) return undefined; // It was closed while it began to listen.
      if (this.#acceptor !== undefined) this.close();
      throw error;
    } finally {
      this.#serving = undefined;
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

  async #serveArrivals(acceptor: Acceptor<Arrival>): Promise<void> {
    for await (const arrival of acceptor) {
      this.#serve(arrival);
      if (this.#mustWait) await this.#until(() => !this.#mustWait);
    }
  }

  /**
   * Serves an arrival; never rejects. Callbacks and no `async`: each layer costs an idle connection half a kilobyte.
   */
  #serve(arrival: Arrival): void | Promise<void> {
    const session = this.newSession(arrival, this.#isFull || this.#dropsArrivals);
    if (typeof session === "string") return void this.#counts[session]++;
    session.index = this.#sessions.push(session) - 1;
    this.#counts.accepted++;
    try {
      if (this.signal.aborted) session.controller.abort(this.signal.reason);
      if (this.#isClosed) this.#cut(session); // close() won the race.
      const opened = session.isCut ? null : session.open();
      const served = opened instanceof Promise
        ? opened.then((request) => this.#process(session, request))
        : this.#process(session, opened);
      const serving = asPromise(served);
      if (serving !== undefined) {
        return serving.then(() => this.#finish(session), (error) => this.#fail(error, session));
      }
    } catch (error) {
      return this.#fail(error, session);
    }
    return this.#finish(session);
  }

  #process(session: Session<Request>, request: Request | null): void | Promise<void> {
    if (request === null || session.isCut) return;
    session.request = request;
    this.noteOpen(request, session.clientAddress);
    if (session.isCut) return; // A hook has closed the server.
    const verified = this.verifyRequest(request, session.clientAddress);
    if (!isThenable(verified)) return this.#processIfVerified(verified, request, session);
    return Promise.resolve(verified).then((isVerified) => this.#processIfVerified(isVerified, request, session));
  }

  #processIfVerified(isVerified: boolean, request: Request, session: Session<Request>): void | Promise<void> {
    if (session.isCut) return;
    if (isVerified) return this.processRequest(request, session.clientAddress);
    this.#counts.rejected++;
    session.outcome = "rejected";
  }

  async #fail(error: unknown, session: Session<Request>): Promise<void> {
    try {
      const errors = error instanceof SuppressedError ? [error.suppressed, error.error] : [error];
      for (const each of errors) {
        const told = this.#report(each, session);
        if (session.request !== undefined) await told; // A failed filter must not keep its place while the hook runs.
      }
    } catch {
      this.#counts.error++; // A getter of the thrown value has thrown.
      session.outcome = "error";
    }
    await this.#finish(session);
  }

  async #report(error: unknown, session: Session<Request>): Promise<void> {
    const outcome = session.hasAbortedWith(error) ? undefined : session.outcomeOf(error);
    if (outcome === undefined) return;
    this.#counts[outcome]++;
    if (!session.isCut) session.outcome = outcome;
    await this.runHook("handleError", () => this.handleError(error, session.clientAddress, outcome));
  }

  #finish(session: Session<Request>): void | Promise<void> {
    let closing: Promise<void> | undefined;
    try {
      if (session.request === undefined) session.cut();
      else closing = asPromise(this.closeRequest(session.request));
    } catch (error) {
      closing = Promise.reject(error);
    }
    if (closing === undefined) return this.#leave(session);
    return closing.catch((error) => {
      // Only an overridden `closeRequest()` fails; the connection is closed all the same.
      this.#noteHookError("closeRequest", error);
      session.cut();
    }).then(() => this.#leave(session));
  }

  /** The one place where a session leaves `#sessions`. */
  #leave(session: Session<Request>): void {
    const last = this.#sessions.pop();
    if (last !== undefined && last !== session) {
      this.#sessions[session.index] = last;
      last.index = session.index;
    }
    const { silentOutcome } = session;
    if (session.outcome === "finished" && silentOutcome !== undefined) {
      this.#counts[silentOutcome]++;
      session.outcome = silentOutcome;
    }
    if (session.outcome === "refused") this.#counts.refused++;
    if (this.#isClosing && !session.isCut) this.#finished++;
    addTraffic(this.#counts, session.request);
    if (!session.isCut) this.#release(session);
    this.#wake();
  }

  #release(session: Session<Request>): void {
    session.releases?.callAll();
    this.noteClose(session);
  }

  #noteOverload(error: unknown): void {
    const now = performance.now();
    const isNew = now - this.#overloadedAt > OVERLOAD_EPISODE_MS;
    this.#overloadedAt = exhaustedAt = now;
    if (!isNew) return;
    this.#counts.overloads++;
    this.runHook("handleOverload", () => this.handleOverload(error));
  }

  async #drain(grace: number): Promise<ShutdownReport> {
    const begun = performance.now();
    const left = () => Math.max(0, begun + grace - performance.now());
    const looking = this.#startDrainingIdle(begun);
    const stopped = this.#stopAccepting();
    await settlesWithin(stopped, Math.min(ABORT_AFTER_MS, left()));
    this.#abortSignal();
    await settlesWithin(stopped.then(() => this.#idle()), left());
    clearInterval(looking);
    this.#closeNow();
    await stopped;
    await settlesWithin(this.#until(() => this.#sessions.length === 0), UNWIND_MS);
    this.#ended.abort();
    return { finished: this.#finished, cut: [...this.#cutOff], duration: performance.now() - begun };
  }

  /** Serves the backlog, and what a `handleRequest()` has waited for in vain; resolves when the address is free. */
  async #stopAccepting(): Promise<void> {
    if (this.#serving === "serveForever()") await this.#acceptor?.untilQuiet();
    this.#dropsArrivals = this.#keepsListener;
    if (this.#dropsArrivals) await this.#idle();
    await this.#acceptor?.close();
    const arrival = this.#acceptor?.take();
    if (arrival !== undefined) this.#serve(arrival);
  }

  #abortSignal(): void {
    const reason = new DOMException("The server is shutting down", "AbortError");
    this.#controller.abort(reason);
    for (const session of this.#sessions) session.controller.abort(reason);
  }

  /** Ends clients that have nothing under way, now and again. */
  #startDrainingIdle(begun: number): ReturnType<typeof setInterval> {
    let reads = turnstile.reads;
    return setInterval(() => {
      // Bytes of busy clients may still wait for their turn to be read.
      const isBusy = turnstile.reads - reads > BUSY_READS;
      reads = turnstile.reads;
      const now = performance.now();
      for (const session of [...this.#sessions]) {
        const isLate = now - Math.max(session.since, begun) >= DRAIN_LATE_MS;
        if (session.request === undefined && isLate) this.#cut(session);
        else if (isLate || !isBusy) session.drain(isLate);
      }
    }, DRAIN_LOOK_MS);
  }

  /** From here on nothing is accepted, and whoever waits for an idle server goes on. */
  #closeNow(): void {
    this.#isClosed = true;
    this.#abortSignal();
    this.#acceptor?.close();
    for (const session of [...this.#sessions]) this.#cut(session);
    this.#wake();
  }

  /** Ends the session for everyone else now; its handler may never return. */
  #cut(session: Session<Request>): void {
    if (session.isCut) return;
    session.outcome = "cut";
    this.#cutOff.push(session.clientAddress);
    const error = new Deno.errors.BadResource("The server has closed the connection");
    session.controller.abort(error);
    session.cut(error);
    this.#release(session);
  }

  #idle(): Promise<void> {
    return this.#until(() => this.#sessions.length === 0 || this.#isClosed);
  }

  /** Resolves when `condition` holds, which changes when sessions leave or the server closes. */
  async #until(condition: () => boolean): Promise<void> {
    while (!condition()) {
      this.#change ??= Promise.withResolvers();
      await this.#change.promise;
    }
  }

  #wake(): void {
    this.#change?.resolve();
    this.#change = undefined;
  }
}

function closedServer(): TypeError {
  return new TypeError("Cannot listen: the server is closed, make a new one");
}

function addTraffic(sum: { bytesRead: number; bytesWritten: number }, request: Traffic | undefined): void {
  sum.bytesRead += request?.bytesRead ?? 0;
  sum.bytesWritten += request?.bytesWritten ?? 0;
}

/**
 * A server of connections. Besides those of {@linkcode BaseServer}, override: `getRequest`, `handleOpen`,
 * `handleClose`, `handleRefuse`. Read: `openConnections`.
 */
export abstract class StreamServer<Address extends Deno.Addr = Deno.Addr>
  extends BaseServer<SocketStream, Address, StreamConn> {
  readonly #Handler: StreamRequestHandlerClass;
  readonly #settings: ServerSettings;
  /** The stream that `getRequest()` made last, to be closed if an override of it then throws. */
  #made: SocketStream | undefined;

  /** Keeps the options; nothing is opened. */
  protected constructor(Handler: StreamRequestHandlerClass, options: ServerOptions) {
    checkHandler(Handler);
    const settings = resolveOptions(SERVER_DEFAULTS, options);
    super(settings.grace, settings.maxConnections);
    this.#Handler = Handler;
    this.#settings = settings;
    resolvedStreamOptions.set(settings, settings);
  }

  /** The open connections, the oldest one first. */
  get openConnections(): OpenConnection[] {
    const now = performance.now();
    const connections = this.openSessions.map(({ request, clientAddress, since }) => ({
      clientAddress,
      age: now - since,
      bytesRead: request?.bytesRead ?? 0,
      bytesWritten: request?.bytesWritten ?? 0,
      waitsFor: request === undefined ? "handshake" : transportOf(request).waitsFor,
    }));
    return connections.sort((one, other) => other.age - one.age);
  }

  /**
   * Makes the stream of a connection that has passed the filters. Override it to put something around every connection,
   * and call `super.getRequest()` with that: it keeps the server's options.
   */
  getRequest(conn: StreamConn): SocketStream {
    return this.#made = new SocketStream(conn, this.#settings);
  }

  /** Runs for each connection that has passed the filters, before `verifyRequest()`. Nothing waits for its promise. */
  handleOpen(_request: SocketStream, _clientAddress: Deno.Addr): void | Promise<void> {}

  /**
   * Runs at the end of each connection that became a stream; the handler is done, unless it was cut off. `request` is
   * closed, but still knows what TLS or a proxy has said of the client. Nothing waits for the hook's promise.
   *
   * @example An access log
   * ```ts
   * import { type ConnectionReport, formatAddress, TcpServer } from "@socketserver/socketserver";
   *
   * class Logging extends TcpServer {
   *   override handleClose({ outcome, duration, bytesRead }: ConnectionReport, clientAddress: Deno.Addr) {
   *     console.log(formatAddress(clientAddress), outcome, `${Math.round(duration)} ms`, bytesRead);
   *   }
   * }
   * ```
   */
  handleClose(_report: ConnectionReport, _clientAddress: Deno.Addr, _request: SocketStream): void | Promise<void> {}

  /** Runs for each connection that a filter refused. No other hook runs for it, and nothing waits for its promise. */
  handleRefuse(_clientAddress: Deno.Addr): void | Promise<void> {}

  /** See {@linkcode BaseServer.finishRequest}. */
  override finishRequest(request: SocketStream, clientAddress: Deno.Addr): void | Promise<void> {
    return runHandler(new this.#Handler(request, clientAddress, this));
  }

  /** Sends what is buffered and closes the stream. */
  protected override closeRequest(request: SocketStream): void | Promise<void> {
    return transportOf(request).close();
  }

  /** @internal */
  protected override newSession(conn: StreamConn): Session<SocketStream> {
    if (this.#settings.noDelay) disableNagle(conn);
    return new StreamSession(conn, this.#settings, this.#tryToGetRequest);
  }

  readonly #tryToGetRequest = (conn: StreamConn): SocketStream => {
    try {
      const request: unknown = this.getRequest(conn);
      if (request instanceof SocketStream) return request;
      throw new TypeError(`getRequest() must return a SocketStream: it has returned ${Deno.inspect(request)}`);
    } catch (error) {
      this.#made?.close();
      throw error;
    } finally {
      this.#made = undefined;
    }
  };

  /** @internal */
  protected override noteOpen(request: SocketStream, clientAddress: Deno.Addr): void {
    if (this.handleOpen === StreamServer.prototype.handleOpen) return;
    this.runHook("handleOpen", () => this.handleOpen(request, clientAddress));
  }

  /** @internal */
  protected override noteClose(session: Session<SocketStream>): void {
    const { request, outcome, clientAddress, since } = session;
    if (outcome === "refused") this.runHook("handleRefuse", () => this.handleRefuse(clientAddress));
    if (request === undefined || outcome === "refused" || outcome === "handshakeFailed") return; // It has no request.
    if (this.handleClose === StreamServer.prototype.handleClose) return;
    const { bytesRead, bytesWritten } = request;
    const report = { outcome, duration: performance.now() - since, bytesRead, bytesWritten };
    this.runHook("handleClose", () => this.handleClose(report, clientAddress, request));
  }
}

// --- TCP and Unix servers ---------------------------------------------------

/**
 * In a burst over the backlog clients wait for a second and more: with the runtime's 511, 1,488 of 2,000 did; with
 * 4,096 none.
 */
const TCP_BACKLOG = 4_096;

/** listen(2) takes an `int`; of a larger number the runtime makes one that may be 0. */
const MAX_TCP_BACKLOG = 2_147_483_647;

/** The address of a {@linkcode TcpServer}. */
export interface TcpServerAddress {
  /**
   * The address of an interface, or a name that resolves to one. `"0.0.0.0"` is all IPv4 interfaces, `"::"` all of IPv6
   * and (on Linux) IPv4.
   * @default {"127.0.0.1"}
   */
  hostname?: string | undefined;
  /** The port, from 1 to 65535; 0 takes a free one. */
  port: number;
  /**
   * Connections that may wait in the kernel, from 1 to 2,147,483,647; the kernel takes the smaller of it and
   * net.core.somaxconn.
   * @default {4_096}
   */
  tcpBacklog?: number | undefined;
  /**
   * Whether several processes may listen on the port (`SO_REUSEPORT`), among which the kernel spreads the connections.
   * Linux only, with `--unstable-net`.
   * @default {false}
   */
  reusePort?: boolean | undefined;
  /**
   * Whether several threads of this process may listen on the port, which is not 0, and take from one queue, as in
   * `deno serve --parallel`. Deno does not document it.
   * @default {false}
   */
  loadBalanced?: boolean | undefined;
}

const TCP_DEFAULTS: Resolved<TcpServerAddress> = {
  hostname: "127.0.0.1",
  port: 0,
  tcpBacklog: TCP_BACKLOG,
  reusePort: false,
  loadBalanced: false,
};

/**
 * A TCP server: Python's `ThreadingTCPServer`, and with `maxConnections: 1` its `TCPServer`. `SO_REUSEADDR` is always
 * set, so a restart finds its port free.
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
  readonly #wanted: Resolved<TcpServerAddress> & { readonly transport: "tcp" };

  /** Makes a server; nothing is opened yet. Throws `RangeError` or `TypeError` for a wrong option. */
  constructor(address: TcpServerAddress, Handler: StreamRequestHandlerClass, options: ServerOptions = {}) {
    checkAddress(address);
    super(Handler, options);
    const wanted = resolveOptions(TCP_DEFAULTS, address);
    this.#wanted = { ...wanted, transport: "tcp", hostname: checkHostname(wanted.hostname) };
    checkPort(address.port);
    if (wanted.tcpBacklog <= MAX_TCP_BACKLOG) return;
    throw new RangeError(`Option "tcpBacklog" must be ${MAX_TCP_BACKLOG} or less: it is ${wanted.tcpBacklog}`);
  }

  /** Binds the port and lets clients connect; see {@linkcode BaseServer.listen}. */
  override listen(): Deno.NetAddr {
    if (this.boundAddress !== undefined) return this.boundAddress;
    try {
      if (this.#wanted.reusePort) checkReusePort();
      const listener = this.openListener(this.#wanted);
      return this.adopt(listener, listener.addr);
    } catch (error) {
      throw openingError("listen on", this.#wanted, error);
    }
  }

  /** Opens the port. Override it to listen in another way, such as with `Deno.listenTls`. */
  protected openListener(address: Deno.TcpListenOptions): Listener<Deno.Conn> & { readonly addr: Deno.NetAddr } {
    return Deno.listen(address);
  }
}

/** The address of a {@linkcode UnixServer} or a {@linkcode UnixDatagramServer}. */
export interface UnixServerAddress {
  /** The path of the socket file, of 107 bytes at most. With `"\0"` in front it is a name without a file (Linux). */
  path: string;
  /**
   * The permissions of the socket file, from 0 to `0o777`: programs that may write to it may connect. Until it is set,
   * the umask applies.
   * @default What the umask leaves of 0o777.
   */
  mode?: number | undefined;
}

/** All permissions that a file can grant. */
const MAX_MODE = 0o777;

/**
 * Paths whose servers are closing. The runtime removes the file late and by its path, so it could remove a successor's.
 */
const unbinding = new Map<string, Promise<void>>();

/** The file of a Unix socket. A name that begins with `"\0"` has none. */
class SocketFile {
  readonly path: string;
  /** The file that was made, to know it again. */
  made: Deno.FileInfo | undefined;
  readonly #mode: number | undefined;
  #binding: Promise<Deno.UnixAddr> | undefined;

  constructor(address: UnixServerAddress) {
    const defaults: { path: string; mode: number | undefined } = { path: "", mode: undefined };
    const { path, mode } = resolveOptions(defaults, address);
    if (typeof path !== "string" || path === "") throw wrongType("Path must be the name of the socket file", path);
    if (mode !== undefined && mode > MAX_MODE) {
      const octal = mode === Infinity ? "Infinity" : `0o${mode.toString(8)}`;
      throw new RangeError(`Option "mode" must be from 0 to 0o777, such as 0o660: it is ${octal}`);
    }
    this.path = path;
    this.#mode = mode;
  }

  /** Runs one `bind` at a time. */
  bindOnce(address: Deno.UnixAddr, bind: () => Promise<Deno.UnixAddr>): Promise<Deno.UnixAddr> {
    return this.#binding ??= bind()
      .catch((error) => Promise.reject(unixListenError(error, address)))
      .finally(() => this.#binding = undefined);
  }

  /** Runs `open`, which makes the file, in the place of one that no server answers on. */
  async open<Socket extends { close(): void }>(open: () => Socket): Promise<Socket> {
    await unbinding.get(this.path);
    await this.#removeIfStale();
    const socket = open();
    if (this.path.startsWith("\0")) return socket;
    try {
      if (this.#mode !== undefined) Deno.chmodSync(this.path, this.#mode);
      this.made = Deno.lstatSync(this.path);
    } catch (error) {
      closeQuietly(socket);
      throw error;
    }
    return socket;
  }

  async #removeIfStale(): Promise<void> {
    const found = fileAt(this.path);
    if (!found?.isSocket) return;
    try {
      (await Deno.connect({ transport: "unix", path: this.path })).close();
    } catch (error) {
      // Any other error is an answer of some kind, or meets the bind too. Meanwhile another file may be there.
      const isStale = error instanceof Deno.errors.ConnectionRefused;
      if (isStale && isSameFile(fileAt(this.path), found)) Deno.removeSync(this.path);
    }
  }
}

function fileAt(path: string): Deno.FileInfo | undefined {
  try {
    return Deno.lstatSync(path);
  } catch {
    return undefined; // It is not there, or we may not know: the bind will say so.
  }
}

/** Gives the file a second name. Throws instead of prompting for a permission: nobody may be there to answer. */
function linkQuietly(path: string, aside: string): void {
  for (const name of ["read", "write"] as const) {
    if (Deno.permissions.querySync({ name, path: aside }).state === "granted") continue;
    throw new Deno.errors.NotCapable(`it is another server's by now, and takes --allow-${name} of its folder to keep`);
  }
  Deno.linkSync(path, aside);
}

/** Gives a file its `path` back, and takes its other name away. */
function restoreLink(aside: string, path: string): void {
  Deno.renameSync(aside, path);
  if (fileAt(aside) !== undefined) Deno.removeSync(aside); // Both names were there: rename(2) does nothing then.
}

/** An inode number may be reused; then the birth time differs. */
function isSameFile(file: Deno.FileInfo | undefined, other: Deno.FileInfo | undefined): boolean {
  return file !== undefined && other !== undefined && file.ino === other.ino && file.dev === other.dev &&
    file.birthtime?.getTime() === other.birthtime?.getTime();
}

/** A listener that removes its socket file when it closes, unless the file is another server's by then. */
class FileListener<Arrival> implements Listener<Arrival> {
  #accepting: Promise<Arrival> | undefined;

  constructor(readonly file: SocketFile, readonly listener: Listener<Arrival>) {}

  accept(): Promise<Arrival> {
    return this.#accepting = this.listener.accept();
  }

  /** Never rejects. */
  close(): Promise<void> {
    const { path } = this.file;
    const closed = this.#close().finally(() => {
      if (unbinding.get(path) === closed) unbinding.delete(path);
    });
    unbinding.set(path, closed);
    return closed;
  }

  async #close(): Promise<void> {
    const { path, made } = this.file;
    // The runtime removes any file at the socket's path, so another's gets a second name for that moment.
    const present = made && fileAt(path);
    const isOthers = present !== undefined && !isSameFile(present, made);
    const aside = `${path}.${crypto.randomUUID()}`;
    const isKept = isOthers && tidyUp(path, () => linkQuietly(path, aside));
    closeQuietly(this.listener);
    await this.#accepting?.catch(ignore); // The file goes once it has let go of the socket.
    if (isKept) tidyUp(path, () => restoreLink(aside, path));
    else if (isSameFile(fileAt(path), made)) tidyUp(path, () => Deno.removeSync(path));
  }
}

/** Whether it could be done. */
function tidyUp(path: string, action: () => void): boolean {
  try {
    action();
    return true;
  } catch (error) {
    print(`Cannot tidy up the socket file ${printable(path)}: ${messageOf(error)}`);
    return false;
  }
}

/**
 * A server for programs of the same machine: Python's `ThreadingUnixStreamServer`.
 *
 * A socket file that a dead server has left is replaced. A live server's socket, or any other file, is
 * `Deno.errors.AddrInUse`. The file is removed when the server stops. If it is another server's by then, it stays, as
 * long as the program may write to the folder; else it goes, too, and a sentence says so.
 *
 * It needs `--allow-read` and `--allow-write` of the path, and `--allow-net=unix:PATH`, with an absolute path.
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

  /** Makes a server; nothing is opened yet. Throws `RangeError` or `TypeError` for a wrong option. */
  constructor(address: UnixServerAddress, Handler: StreamRequestHandlerClass, options: ServerOptions = {}) {
    checkAddress(address);
    super(Handler, options);
    this.#file = new SocketFile(address);
  }

  /**
   * Makes the socket file and lets clients connect; see {@linkcode BaseServer.listen}. Asynchronous, because it first
   * dials a server that may be there.
   */
  override async listen(): Promise<Deno.UnixAddr> {
    const address = { transport: "unix", path: this.#file.path } as const;
    return this.boundAddress ?? await this.#file.bindOnce(address, async () => {
      const listener = await this.#file.open(() => Deno.listen(address));
      return this.adopt(new FileListener(this.#file, listener), address);
    });
  }
}

function unixListenError(error: unknown, address: Deno.UnixAddr): Error {
  const isTaken = errorCode(error) === "EADDRINUSE" && fileAt(address.path)?.isSocket === false;
  if (!isTaken && errorCode(error) !== "ENOENT") return openingError("listen on", address, error);
  const reason = isTaken
    ? "a file that is no socket is there; choose another path"
    : "its folder does not exist; make it first";
  return restate(error, `Cannot listen on ${formatAddress(address)}: ${reason}`);
}

// --- Datagrams --------------------------------------------------------------

/** A datagram has 65,507 bytes at most over IPv4 and 65,527 over IPv6, so one that fills this was cut. */
const DATAGRAM_BUFFER_BYTES = 65_536;

/** Thousands of small datagrams share one allocation, without a copy; a datagram that is kept keeps its slab. */
const DATAGRAM_SLAB_BYTES = 4 * DATAGRAM_BUFFER_BYTES;

/** Milliseconds that a reply may wait for a Unix client whose queue is full. */
const REPLY_TIMEOUT_MS = 1_000;

/** The session of a datagram that a server has received. */
let sessionOf: (datagram: Datagram) => DatagramSession | undefined;
let joinSession: (datagram: Datagram, session: DatagramSession) => void;

/** One datagram that has arrived, and the way back. */
export class Datagram {
  static {
    sessionOf = (datagram) => datagram.#session;
    joinSession = (datagram, session) => datagram.#session = session;
  }

  /**
   * The bytes, which are the handler's to keep; there may be none. They lie beside other datagrams in one buffer: take
   * a `slice()` to keep them for long or to transfer them.
   */
  readonly data: Uint8Array<ArrayBuffer>;
  /** The sender's address. */
  readonly clientAddress: Deno.Addr;
  readonly #send: (data: Uint8Array, to: Deno.Addr) => Promise<unknown>;
  #session: DatagramSession | undefined;
  #bytesWritten = 0;

  /** Made by the server; a test makes its own, with a function that sends a reply. */
  constructor(
    data: Uint8Array<ArrayBuffer>,
    clientAddress: Deno.Addr,
    send: (data: Uint8Array, to: Deno.Addr) => Promise<unknown>,
  ) {
    this.data = data;
    this.clientAddress = clientAddress;
    this.#send = send;
  }

  /** Bytes that arrived. */
  get bytesRead(): number {
    return this.data.length;
  }

  /** Bytes that were sent back. */
  get bytesWritten(): number {
    return this.#bytesWritten;
  }

  /**
   * Sends bytes, or text as UTF-8, back to the client: 65,507 bytes at most. Resolves once the kernel has it; nothing
   * tells whether it arrives. Rejects if it is too long, if the client cannot be answered, with `Deno.errors.TimedOut`
   * if a Unix client took nothing for a second, and with `Deno.errors.BadResource` if the server is closed.
   */
  reply(data: Uint8Array | string): Promise<void> {
    const mistake = checkData("reply()", data);
    if (mistake !== undefined) return rejection(mistake);
    return forgettable(this.#reply(bytesOf(data)));
  }

  async #reply(bytes: Uint8Array): Promise<void> {
    try {
      await this.#send(bytes, this.clientAddress);
      this.#bytesWritten += bytes.length;
    } catch (error) {
      throw this.#replyError(error, bytes.length);
    }
  }

  #replyError(error: unknown, count: number): Error {
    const isForbidden = error instanceof Deno.errors.NotCapable;
    const reason = isForbidden ? explain(error, this.clientAddress) : systemWords(error);
    const client = formatAddress(this.clientAddress);
    const failure = restate(error, `Cannot reply with ${count} bytes to ${client}: ${reason}`);
    // Not the client's fault: a missing permission, or a reply that is too long.
    const isOwnMistake = isForbidden || errorCode(error) === "EMSGSIZE";
    if (this.#session !== undefined && !isOwnMistake) this.#session.raised = failure;
    return failure;
  }
}

/** A datagram's session. */
class DatagramSession extends Session<Datagram> {
  /** The client's own trouble, which a reply has met. */
  raised: Error | undefined;

  constructor(readonly datagram: Datagram) {
    super(0); // The clock costs 1 % of a datagram's time, and nothing needs it.
    joinSession(datagram, this);
  }

  override get clientAddress(): Deno.Addr {
    return this.datagram.clientAddress;
  }

  override open(): Datagram {
    return this.datagram;
  }

  override outcomeOf(error: unknown): ErrorOutcome | undefined {
    if (error !== this.raised || error === undefined) return "error";
    return this.isCut ? undefined : "aborted";
  }
}

/**
 * A server of datagrams: each is a request with a handler of its own, and up to `maxConcurrent` are served side by
 * side. It needs `--unstable-net`.
 */
export abstract class DatagramServer<Address extends Deno.Addr = Deno.Addr>
  extends BaseServer<Datagram, Address, Received> {
  readonly #Handler: DatagramRequestHandlerClass;
  /** Datagrams lie behind each other in it; those before `#slabStart` are their handlers'. */
  #slab: Uint8Array<ArrayBuffer> = NO_BYTES;
  #slabStart = 0;
  #socket: DatagramSocket | undefined;
  readonly #send = (data: Uint8Array, to: Deno.Addr): Promise<number> => {
    return this.#socket?.send(data, to) ?? Promise.reject(new Deno.errors.BadResource("the server is closed"));
  };

  /** Keeps the options; nothing is opened. */
  protected constructor(Handler: DatagramRequestHandlerClass, options: DatagramServerOptions) {
    checkHandler(Handler);
    const { maxConcurrent, grace } = resolveOptions(DATAGRAM_SERVER_DEFAULTS, options);
    super(grace, maxConcurrent, true);
    this.#Handler = Handler;
  }

  /** Makes the handler and runs its `setup()`, `handle()` and `finish()`. */
  override finishRequest(request: Datagram, clientAddress: Deno.Addr): void | Promise<void> {
    return runHandler(new this.#Handler(request, clientAddress, this));
  }

  /**
   * Does what {@linkcode BaseServer.handleError} says; of clients that cannot be answered it prints one line a second
   * at most.
   */
  override handleError(error: unknown, clientAddress: Deno.Addr, outcome: ErrorOutcome): void | Promise<void> {
    if (outcome === "aborted") printNotice(messageOf(error));
    else return super.handleError(error, clientAddress, outcome);
  }

  /** {@linkcode BaseServer.adopt} for a datagram socket; to be called by `listen()`. */
  protected adoptSocket(socket: DatagramSocket, address: Address): Address {
    this.#socket = socket;
    return this.adopt({
      accept: () => socket.receive(this.#room()),
      close: () => {
        this.#socket = undefined;
        socket.close();
      },
    }, address);
  }

  #room(): Uint8Array<ArrayBuffer> {
    if (this.#slab.length - this.#slabStart < DATAGRAM_BUFFER_BYTES) {
      this.#slab = new Uint8Array(DATAGRAM_SLAB_BYTES);
      this.#slabStart = 0;
    }
    return this.#slab.subarray(this.#slabStart, this.#slabStart + DATAGRAM_BUFFER_BYTES);
  }

  /** @internal */
  protected override newSession([data, sender]: Received, isBusy: boolean): DatagramSession | "lost" | "dropped" {
    if (data.length === DATAGRAM_BUFFER_BYTES) return "lost"; // It may have been cut.
    if (isBusy) return "dropped";
    this.#slabStart += data.length;
    return new DatagramSession(new Datagram(data, sender, this.#send));
  }
}

/** The address of a {@linkcode UdpServer}. */
export interface UdpServerAddress {
  /**
   * The address of an interface, or a name that resolves to one. On `"0.0.0.0"` and `"::"` an answer may leave from
   * another address of this machine than the client has asked, and most clients drop it; the runtime cannot choose. On
   * a machine with several addresses run a server on each.
   * @default {"127.0.0.1"}
   */
  hostname?: string | undefined;
  /** The port, from 1 to 65535; 0 takes a free one. */
  port: number;
}

/**
 * A UDP server: Python's `ThreadingUDPServer`. With `maxConcurrent: 1` it is its `UDPServer`, but drops datagrams that
 * come while it is busy. It needs `--unstable-net`.
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
  readonly #wanted: Deno.NetAddr & { readonly transport: "udp" };

  /** Makes a server; nothing is opened yet. Throws `RangeError` or `TypeError` for a wrong option. */
  constructor(address: UdpServerAddress, Handler: DatagramRequestHandlerClass, options: DatagramServerOptions = {}) {
    checkAddress(address);
    super(Handler, options);
    const { hostname, port } = resolveOptions({ hostname: "127.0.0.1", port: 0 }, address);
    this.#wanted = { transport: "udp", hostname: checkHostname(hostname), port };
    checkPort(address.port);
  }

  /** Binds the port; see {@linkcode BaseServer.listen}. */
  override listen(): Deno.NetAddr {
    if (this.boundAddress !== undefined) return this.boundAddress;
    try {
      const socket = openDatagramSocket(this.#wanted);
      return this.adoptSocket(socket, socket.addr.transport === "udp" ? socket.addr : this.#wanted);
    } catch (error) {
      throw openingError("listen on", this.#wanted, error);
    }
  }
}

/**
 * A server of Unix datagrams: Python's `ThreadingUnixDatagramServer`. It needs `--unstable-net`, and `--allow-read` and
 * `--allow-write` of its path and of its clients' paths. It treats its socket file as {@linkcode UnixServer} does.
 *
 * A client that wants an answer binds its socket to a path and does not connect it, as replies leave by another socket.
 * A client that reads no answers is given up after a second.
 */
export class UnixDatagramServer extends DatagramServer<Deno.UnixAddr> {
  readonly #file: SocketFile;

  /** Makes a server; nothing is opened yet. Throws `RangeError` or `TypeError` for a wrong option. */
  constructor(address: UnixServerAddress, Handler: DatagramRequestHandlerClass, options: DatagramServerOptions = {}) {
    checkAddress(address);
    super(Handler, options);
    this.#file = new SocketFile(address);
  }

  /** Makes the socket file; see {@linkcode UnixServer.listen}. */
  override async listen(): Promise<Deno.UnixAddr> {
    const address = { transport: "unixpacket", path: this.#file.path } as const;
    return this.boundAddress ?? await this.#file.bindOnce(address, async () => {
      const socket = await this.#file.open(() => openDatagramSocket(address));
      return this.adoptSocket(new UnixDatagramSocket(socket, address), address);
    });
  }

  /** Accepts from `listener` and removes the socket file in the end. */
  protected override adopt(listener: Listener<Received>, address: Deno.UnixAddr): Deno.UnixAddr {
    return super.adopt(new FileListener(this.#file, listener), address);
  }
}

/**
 * A bound Unix datagram socket that can send while it receives, which the runtime's cannot ("Socket already in use";
 * Deno 2.9.6): each reply leaves by a socket of its own, so that a client that does not read holds up no other.
 */
class UnixDatagramSocket implements DatagramSocket {
  /** The last send to each client that one is under way to. */
  readonly #turns = new Map<string, Promise<void>>();
  /** The paths of clients that a send is stuck on. */
  readonly #deaf = new Set<string>();

  constructor(readonly socket: DatagramSocket, readonly addr: Deno.UnixAddr) {}

  receive(into: Uint8Array<ArrayBuffer>): Promise<Received> {
    return this.socket.receive(into);
  }

  async send(data: Uint8Array, to: Deno.Addr): Promise<number> {
    if (!("path" in to) || !to.path) {
      throw new Deno.errors.NotConnected("the client has bound its socket to no path, so it cannot be answered");
    }
    try {
      return await this.#inTurn(data, to);
    } catch (error) {
      if (errorCode(error) !== "EPERM") throw error;
      throw restate(error, `${systemWords(error)}: the client has connected its socket, which must only be bound`);
    }
  }

  /**
   * Sends one after the other to each client, so that a client that does not read takes one descriptor and not many.
   */
  #inTurn(data: Uint8Array, to: Deno.UnixAddr): Promise<number> {
    const before = this.#turns.get(to.path) ?? DONE;
    const sent = before.then(() => this.#sendInTime(data, to));
    const turn = sent.then(ignore, ignore).then(() => {
      if (this.#turns.get(to.path) === turn) this.#turns.delete(to.path);
    });
    this.#turns.set(to.path, turn);
    return sent;
  }

  /** A send to a client whose queue is full cannot be cancelled. */
  async #sendInTime(data: Uint8Array, to: Deno.UnixAddr): Promise<number> {
    if (this.#deaf.has(to.path)) throw new Deno.errors.TimedOut("the client takes nothing");
    const sent = sendFromNowhere(data, to);
    if (await settlesWithin(sent, REPLY_TIMEOUT_MS)) return await sent;
    this.#deaf.add(to.path);
    forgettable(sent.finally(() => this.#deaf.delete(to.path)));
    throw new Deno.errors.TimedOut(`the client took nothing for ${REPLY_TIMEOUT_MS} ms`);
  }

  close(): void {
    this.socket.close();
  }
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

/**
 * The server of a {@linkcode DatagramClient}: a host (default `"127.0.0.1"`) and port, or the path of a Unix socket and
 * of the client's own, which is made, and removed at the end. `timeout`: milliseconds that `recv()` waits, above 0;
 * default `Infinity`.
 */
export type DatagramClientOptions =
  & { timeout?: number | undefined }
  & ({ hostname?: string | undefined; port: number } | { path: string; localPath: string });

/** The server, and the path of the client's own Unix socket, or "". */
type ClientSettings = { readonly server: PeerAddress; readonly localPath: string; readonly timeout: number };

/** A client's open socket, and the server's address as the system knows it. */
interface OpenClient {
  readonly socket: DatagramSocket;
  readonly server: PeerAddress;
  /** The client's own file, to know it again. */
  readonly file: Deno.FileInfo | undefined;
}

/**
 * The other end of a {@linkcode DatagramServer}: it sends to one server, and takes datagrams from that one only; over a
 * Unix socket also from senders without a path, as the server's replies come from one. The first call opens the socket.
 * It needs `--unstable-net`. Over a Unix socket the runtime cannot send while a `recv()` waits.
 *
 * @example
 * ```ts
 * import { DatagramClient } from "@socketserver/socketserver";
 *
 * using client = new DatagramClient({ port: 9 });
 * await client.send("nothing tells whether it arrives");
 * ```
 */
export class DatagramClient implements Disposable {
  readonly #settings: ClientSettings;
  readonly #buffer = new Uint8Array(DATAGRAM_BUFFER_BYTES);
  #opening: Promise<OpenClient> | undefined;
  #opened: OpenClient | undefined;
  /** A receive cannot be cancelled, so it may outlive the call that began it. */
  #receiving: Promise<Received> | undefined;
  #isWaiting = false;
  #isClosed = false;

  /** Makes a client; nothing is opened yet. Throws `RangeError` or `TypeError` for a wrong option. */
  constructor(options: DatagramClientOptions) {
    this.#settings = resolveClient(options);
  }

  /**
   * Sends bytes, or text as UTF-8: 65,507 bytes at most. Resolves once the kernel has it; nothing tells whether it
   * arrives. Rejects with `Deno.errors.NotCapable` without the permission, and with `TypeError` without
   * `--unstable-net`.
   */
  async send(data: Uint8Array | string): Promise<void> {
    const mistake = checkData("send()", data);
    if (mistake !== undefined) throw mistake;
    const bytes = bytesOf(data);
    const { socket, server } = await this.#open();
    try {
      await socket.send(bytes, server);
    } catch (error) {
      const to = this.#settings.server;
      throw restate(error, `Cannot send ${bytes.length} bytes to ${formatAddress(to)}: ${explain(error, to)}`);
    }
  }

  /**
   * Receives the next datagram of the server; its bytes are the caller's. Rejects with `Deno.errors.TimedOut` if none
   * came within `timeout`, and with `Deno.errors.Busy` if another call waits. A datagram that comes later answers the
   * next call.
   */
  async recv(): Promise<Uint8Array<ArrayBuffer>> {
    if (this.#isWaiting) throw new Deno.errors.Busy("Cannot recv(): another recv() waits on the same socket");
    this.#isWaiting = true;
    try {
      return await this.#nextOf(await this.#open());
    } finally {
      this.#isWaiting = false;
    }
  }

  async #nextOf({ socket, server }: OpenClient): Promise<Uint8Array<ArrayBuffer>> {
    const { timeout } = this.#settings;
    const expiresAt = performance.now() + timeout;
    while (true) {
      const receiving = this.#receiving ??= socket.receive(this.#buffer);
      const left = expiresAt - performance.now();
      // Strangers must not prolong the wait.
      if (left <= 0 || !await settlesWithin(receiving, left)) {
        const from = formatAddress(this.#settings.server);
        throw new Deno.errors.TimedOut(`No answer came from ${from} within ${timeout} ms`);
      }
      this.#receiving = undefined;
      const [data, from] = await receiving;
      if (isSameSender(from, server)) return data.slice();
    }
  }

  #open(): Promise<OpenClient> {
    if (this.#isClosed) return rejection(new Deno.errors.BadResource("The client is closed"));
    if (this.#opening !== undefined) return this.#opening;
    const opening = this.#openSocket();
    opening.catch(() => this.#opening = undefined); // It may be tried again.
    return this.#opening = opening;
  }

  async #openSocket(): Promise<OpenClient> {
    const { localPath } = this.#settings;
    const server = await resolveServer(this.#settings.server);
    if (this.#isClosed) return this.#open(); // It was closed meanwhile, so this rejects.
    const local = localAddressFor(server, localPath);
    try {
      const socket = openDatagramSocket(local);
      return this.#opened = { socket, server, file: "path" in local ? fileAt(localPath) : undefined };
    } catch (error) {
      throw openingError("open a socket on", local, error);
    }
  }

  /** Closes the socket; pending calls reject. */
  close(): void {
    if (this.#isClosed) return;
    this.#isClosed = true;
    if (this.#opened === undefined) return;
    closeQuietly(this.#opened.socket);
    const { localPath } = this.#settings;
    if (isSameFile(fileAt(localPath), this.#opened.file)) tidyUp(localPath, () => Deno.removeSync(localPath));
  }

  /** Closes the socket. */
  [Symbol.dispose](): void {
    this.close();
  }
}

function resolveClient(options: DatagramClientOptions): ClientSettings {
  if ("path" in options) {
    const { path, ...others } = resolveOptions({ path: "", localPath: "", timeout: Infinity }, options);
    if (path !== "" && others.localPath !== "") return { server: { transport: "unixpacket", path }, ...others };
    throw new TypeError("Paths must not be empty: name the server's and the client's");
  }
  const { hostname, port, timeout } = resolveOptions({ hostname: "127.0.0.1", port: 0, timeout: Infinity }, options);
  checkPort(port);
  return { server: { transport: "udp", hostname: checkHostname(hostname), port }, localPath: "", timeout };
}

/** The server's address with its name resolved, so that answers can be compared with it, and the family is known. */
async function resolveServer(server: PeerAddress): Promise<PeerAddress> {
  if ("path" in server || hostBytes(server.hostname) !== undefined) return server;
  if (server.hostname === "localhost") return { ...server, hostname: "127.0.0.1" }; // As the runtime does.
  try {
    const { address } = await process.getBuiltinModule("node:dns").promises.lookup(server.hostname);
    return { ...server, hostname: address };
  } catch (error) {
    throw openingError("send to", server, error);
  }
}

/** A client's own address: on the loopback interface for a server on it, else on all. */
function localAddressFor(server: PeerAddress, path: string): PeerAddress & DatagramAddress {
  if ("path" in server) return { transport: "unixpacket", path };
  const bytes = hostBytes(server.hostname) ?? NO_BYTES;
  const isIpv6 = server.hostname.includes(":");
  const isLoopback = isIpv6 ? inetNtop(bytes) === "::1" : bytes[0] === 127;
  const hostname = isIpv6 ? isLoopback ? "::1" : "::" : isLoopback ? "127.0.0.1" : "0.0.0.0";
  return { transport: "udp", hostname, port: 0 };
}

/** Anyone can send to a datagram socket. A Unix server answers from a socket without a path. */
function isSameSender(from: Deno.Addr, server: PeerAddress): boolean {
  if ("path" in server) return !("path" in from && from.path) || from.path === server.path;
  if (!("hostname" in from) || from.port !== server.port) return false;
  const [expected, actual] = [hostBytes(server.hostname) ?? NO_BYTES, hostBytes(from.hostname) ?? NO_BYTES];
  const isAny = expected.every((byte) => byte === 0); // A server that is addressed as 0.0.0.0 answers from another.
  return isAny || (expected.length === actual.length && expected.every((byte, index) => byte === actual[index]));
}
