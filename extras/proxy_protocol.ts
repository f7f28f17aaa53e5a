/**
 * The {@link https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt | PROXY protocol},
 * versions 1 and 2: a proxy begins each connection with a header that names its client.
 *
 * ```ts
 * import { connect, formatAddress, perHost, StreamRequestHandler, TcpServer } from "@socketserver/socketserver";
 * import { proxyProtocol, sendProxyHeader } from "@socketserver/socketserver/proxy_protocol";
 * import { assertEquals } from "@std/assert";
 *
 * class Hello extends StreamRequestHandler {
 *   override async handle() {
 *     await this.request.send(`Hello, ${formatAddress(this.clientAddress)}\n`);
 *   }
 * }
 * const filters = [proxyProtocol({ from: ["127.0.0.0/8"] }), perHost(64)]; // A tls() filter comes last.
 * await using server = new TcpServer({ port: 0 }, Hello, { filters });
 * const { port } = server.listen();
 * server.serveForever();
 *
 * const source = { transport: "tcp", hostname: "203.0.113.7", port: 50_000 } as const;
 * const header = { source, destination: { ...source, port: 443 } };
 * await using stream = await connect({ port, filters: [sendProxyHeader(header)] }); // As a proxy does.
 * assertEquals(await stream.readLine(), "Hello, 203.0.113.7:50000");
 * ```
 *
 * @module
 */

import type { ConnectionFilter, FilterContext, SocketStream, StreamConn } from "../mod.ts";
import { inetNtop, inetPton, printable } from "../mod.ts";

// --- Headers ----------------------------------------------------------------

/** A type-length-value vector of a version 2 header. */
export interface ProxyTlv {
  /** The type, 0 to 255; 0xe0 to 0xef are for applications. */
  readonly type: number;
  /** The value, up to 65,532 bytes. */
  readonly value: Uint8Array;
}

/** The TLS connection between client and proxy (PROXY 2.2.6). */
export interface ProxyTls {
  /** Whether the client uses TLS. */
  readonly isTls: boolean;
  /** Whether the proxy verified a certificate of the client, now or earlier in the same TLS session. */
  readonly isVerified: boolean;
  /** The version, such as `"TLSv1.3"`; HAProxy's `proxy-v2-options ssl`. */
  readonly protocol: string | undefined;
  /** The common name of the client's certificate; trust it only if `isVerified`. HAProxy's `cert-cn`. */
  readonly commonName: string | undefined;
  /** The cipher suite, such as `"TLS_AES_256_GCM_SHA384"`; HAProxy's `ssl-cipher`. */
  readonly cipher: string | undefined;
  /** All vectors inside this one. */
  readonly tlvs: readonly ProxyTlv[];
}

/** A received header. In its texts, U+FFFD replaces what is not UTF-8. The first of two vectors of one type counts. */
export interface ProxyHeader {
  /** 1 is a line of text, 2 is binary. */
  readonly version: 1 | 2;
  /** `"PROXY"` for a client's connection, `"LOCAL"` for the proxy's own, such as a health check. */
  readonly command: "PROXY" | "LOCAL";
  /** The client's address; `undefined` with `"LOCAL"`, or if the proxy does not know it. */
  readonly source: Deno.Addr | undefined;
  /** The address that the client connected to; `undefined` if `source` is. */
  readonly destination: Deno.Addr | undefined;
  /** All vectors but checksum and padding; the fields below are taken from them. */
  readonly tlvs: readonly ProxyTlv[];
  /** The protocol that client and proxy agreed on by ALPN. */
  readonly alpnProtocol: string | undefined;
  /** The host that the client asked for, for example by SNI; HAProxy's `authority`. */
  readonly authority: string | undefined;
  /** The proxy's name for the connection, up to 128 bytes. */
  readonly uniqueId: Uint8Array | undefined;
  /** The client's TLS connection. */
  readonly tls: ProxyTls | undefined;
}

/**
 * A header to send, for example a received one. By default `version` is 2, `command` is `"PROXY"`, and the client is
 * unknown. Of the vectors only `tlvs` is sent: fields such as `authority` are ignored.
 */
export type ProxyHeaderOptions = Partial<Pick<ProxyHeader, "version" | "command" | "source" | "destination" | "tlvs">>;

/** PROXY 2.1, the CRLF included. */
const MAX_LINE_BYTES = 107;

const LINE_STARTS = ["PROXY TCP4 ", "PROXY TCP6 ", "PROXY UNKNOWN ", "PROXY UNKNOWN\r\n"];

/** Room for large vectors: headers without them fit in 536 bytes (PROXY 2). */
const MAX_HEADER_BYTES = 4_096;

/** PROXY 2.2: the first bytes of version 2. */
const SIGNATURE = [0x0d, 0x0a, 0x0d, 0x0a, 0x00, 0x0d, 0x0a, 0x51, 0x55, 0x49, 0x54, 0x0a];

/** RFC 8446, 5.1: the first byte of a client that begins TLS. */
const TLS_HANDSHAKE = 0x16;

/** The signature, version and command, family and transport, and the length of the rest. */
const FIXED_BYTES = 16;

/** PROXY 2.2: families, transports, and by family the bytes of one address, and of two with their ports. */
const UNSPECIFIED = 0;
const UNIX = 3;
const STREAM = 1;
const DATAGRAM = 2;
const HOST_BYTES = [0, 4, 16, 108];
const BLOCK_BYTES = [0, 12, 36, 216];

/** PROXY 2.2: types of vectors; inside the TLS vector, other types and flags (2.2.6). */
const TYPE = { alpnProtocol: 0x01, authority: 0x02, checksum: 0x03, padding: 0x04, uniqueId: 0x05, tls: 0x20 };
const TLS_TYPE = { protocol: 0x21, commonName: 0x22, cipher: 0x23 };
const TLS_FLAG = { isTls: 1, hasCertificate: 2 | 4 };

/** How much of a wrong header a message quotes. */
const QUOTED_BYTES = 40;

const encoder = new TextEncoder();
const decoder = new TextDecoder();

// --- Parsing ----------------------------------------------------------------

/**
 * Parses a header of version 1 or 2, without I/O: call it with more bytes until it returns one. It is strict: version 1
 * has one spelling for everything but IPv6 addresses (inet_pton(3)), vectors fill their room exactly, a checksum must be
 * right, and a header has up to 4,096 bytes. The content of a `LOCAL` header is discarded.
 *
 * @returns The header and its length in bytes; `undefined` if more bytes are needed. Bytes behind it are ignored.
 * @throws {Deno.errors.InvalidData} As soon as the bytes cannot begin a header; the message names the clause.
 */
export function parseProxyHeader(bytes: Uint8Array): { header: ProxyHeader; length: number } | undefined {
  return bytes[0] === SIGNATURE[0] ? parseBinary(bytes) : parseText(bytes);
}

function wrong(what: string, clause: string): Error {
  return new Deno.errors.InvalidData(`Cannot read the PROXY header: ${what} (PROXY ${clause})`);
}

function quoted(bytes: Uint8Array): string {
  const text = printable(String.fromCharCode(...bytes.subarray(0, QUOTED_BYTES)));
  return `"${text}"${bytes.length > QUOTED_BYTES ? "..." : ""}`;
}

function parseText(bytes: Uint8Array): ReturnType<typeof parseProxyHeader> {
  const text = String.fromCharCode(...bytes.subarray(0, MAX_LINE_BYTES));
  if (!LINE_STARTS.some((start) => start.startsWith(text.slice(0, start.length)))) {
    const hint = bytes[0] === TLS_HANDSHAKE ? ", which is TLS: let the proxy send the header" : "";
    throw wrong(`the connection must begin with it, but begins with ${quoted(bytes)}${hint}`, "2.2");
  }
  // A CR at the end may be half of an ending.
  const [line = "", ending] = text.split(/(\n|\r[^])/, 2);
  if (ending === "\r\n") return { header: parseLine(line), length: line.length + 2 };
  if (ending !== undefined) throw wrong(`its line ends with a single CR or LF: ${quoted(bytes)}`, "2.1");
  if (text.length < MAX_LINE_BYTES) return undefined;
  throw wrong(`its line has more than ${MAX_LINE_BYTES} bytes: ${quoted(bytes)}`, "2.1");
}

function parseLine(line: string): ProxyHeader {
  const [, protocol, ...fields] = line.split(" ");
  if (protocol === "UNKNOWN") return headerOf({ version: 1 });
  if (fields.length !== 4) {
    throw wrong(`it needs two addresses and two ports behind single spaces, not "${printable(line)}"`, "2.1");
  }
  const size = protocol === "TCP4" ? 4 : 16;
  const [source, destination] = [0, 1].map((index) => parseLineAddress(size, fields[index], fields[index + 2]));
  return headerOf({ version: 1, source, destination });
}

function parseLineAddress(size: 4 | 16, host = "", port = ""): Deno.NetAddr {
  const bytes = inetPton(host);
  const kind = size === 4 ? "IPv4" : "IPv6";
  if (bytes?.length !== size) throw wrong(`"${printable(host)}" is not an ${kind} address`, "2.1");
  if (!/^(0|[1-9]\d{0,4})$/.test(port) || !isUint16(Number(port))) {
    throw wrong(`"${printable(port)}" is not a port, a number from 0 to 65535 without leading zeros`, "2.1");
  }
  return { transport: "tcp", hostname: hostText(bytes), port: Number(port) };
}

/** Checks each byte as soon as it is there: bytes that are still to come count as good ones. */
function parseBinary(bytes: Uint8Array): ReturnType<typeof parseProxyHeader> {
  if (bytes.subarray(0, SIGNATURE.length).some((byte, index) => byte !== SIGNATURE[index])) {
    throw wrong(`${quoted(bytes)} begins like the signature of version 2, but goes on differently`, "2.2");
  }
  const [versionAndCommand = 0x20, familyAndTransport = 0] = bytes.subarray(SIGNATURE.length);
  const [version, command] = [versionAndCommand >> 4, versionAndCommand & 0x0f];
  if (version !== 2) throw wrong(`its version is ${version}, but a binary header has 2`, "2.2");
  if (command > 1) throw wrong(`its command is ${command}, but only 0 and 1 are assigned`, "2.2");
  // The family of LOCAL is ignored.
  const [family, transport] = command === 0 ? [0, 0] : [familyAndTransport >> 4, familyAndTransport & 0x0f];
  if (family > UNIX || transport > DATAGRAM) {
    throw wrong(`its family ${family} and transport ${transport} are not assigned`, "2.2");
  }
  if (bytes.length < FIXED_BYTES) return undefined;
  const length = FIXED_BYTES + uint16At(bytes, FIXED_BYTES - 2);
  if (length > MAX_HEADER_BYTES) throw wrong(`it announces ${length} bytes, over the limit of 4096`, "2.2");
  if (transport !== UNSPECIFIED && length < FIXED_BYTES + (BLOCK_BYTES[family] ?? 0)) {
    throw wrong(`it announces ${length} bytes, too few for addresses of family ${family}`, "2.2");
  }
  if (bytes.length < length) return undefined;
  // A copy, as the header outlives the buffer that it came in.
  const header = command === 0 ? headerOf({ command: "LOCAL" }) : parseRest(bytes.slice(0, length), family, transport);
  return { header, length };
}

function uint16At(bytes: Uint8Array, at: number): number {
  return (bytes[at] ?? 0) << 8 | (bytes[at + 1] ?? 0);
}

function parseRest(header: Uint8Array, family: number, transport: number): ProxyHeader {
  const block = header.subarray(FIXED_BYTES);
  const isAddressed = family !== UNSPECIFIED && transport !== UNSPECIFIED;
  const all = splitTlvs(block.subarray(BLOCK_BYTES[family]));
  if (all === undefined && isAddressed) throw wrong("its vectors do not end where it ends", "2.2");
  // "Unspecified" addresses may have any length: bytes that are not vectors belong to them.
  const tlvs = (all ?? []).filter(({ type }) => type !== TYPE.checksum && type !== TYPE.padding);
  checkChecksum(header, all ?? []);
  if (!isAddressed) return headerOf({ tlvs });
  const [source, destination] = [0, 1].map((index) => parseAddress(block, family, transport, index));
  return headerOf({ source, destination, tlvs });
}

function parseAddress(block: Uint8Array, family: number, transport: number, index: number): Deno.Addr {
  const size = HOST_BYTES[family] ?? 0;
  const host = block.subarray(index * size, (index + 1) * size);
  const isStream = transport === STREAM;
  if (family === UNIX) return { transport: isStream ? "unix" : "unixpacket", path: parsePath(host) };
  return { transport: isStream ? "tcp" : "udp", hostname: hostText(host), port: uint16At(block, 2 * (size + index)) };
}

/** Zeros fill the room behind it. An abstract name begins with `"\0"`; an unnamed socket has `""`. */
function parsePath(bytes: Uint8Array): string {
  return /^\0?[^\0]+/.exec(decoder.decode(bytes))?.[0] ?? "";
}

/** The vectors that fill `bytes`; `undefined` if they do not. */
function splitTlvs(bytes: Uint8Array): ProxyTlv[] | undefined {
  const tlvs: ProxyTlv[] = [];
  for (let at = 0; at < bytes.length;) {
    const end = at + 3 + uint16At(bytes, at + 1);
    if (end > bytes.length) return undefined;
    tlvs.push({ type: bytes[at] ?? 0, value: bytes.subarray(at + 3, end) });
    at = end;
  }
  return tlvs;
}

function headerOf({ version = 2, command = "PROXY", source, destination, tlvs = [] }: ProxyHeaderOptions): ProxyHeader {
  const tls = valueOf(tlvs, TYPE.tls);
  const uniqueId = valueOf(tlvs, TYPE.uniqueId);
  if (uniqueId && uniqueId.length > 128) throw wrong("its unique id has more than 128 bytes", "2.2.5");
  const [alpnProtocol, authority] = [textOf(tlvs, TYPE.alpnProtocol), textOf(tlvs, TYPE.authority)];
  const fields = { alpnProtocol, authority, uniqueId, tls: tls && parseTls(tls) };
  return { version, command, source, destination, tlvs, ...fields };
}

function valueOf(tlvs: readonly ProxyTlv[], wanted: number): Uint8Array | undefined {
  return tlvs.find(({ type }) => type === wanted)?.value;
}

function textOf(tlvs: readonly ProxyTlv[], wanted: number): string | undefined {
  const value = valueOf(tlvs, wanted);
  return value && decoder.decode(value);
}

/** Throws if there is a checksum that is wrong. Sets it to 0 in `header`, as it was when the proxy took the sum. */
function checkChecksum(header: Uint8Array, tlvs: ProxyTlv[]): void {
  const [value, second] = tlvs.filter(({ type }) => type === TYPE.checksum).map(({ value }) => value);
  if (value === undefined) return;
  if (value.length !== 4 || second !== undefined) throw wrong("it may have one checksum, of 4 bytes", "2.2.3");
  const found = new DataView(value.buffer, value.byteOffset).getUint32(0);
  value.fill(0);
  const sum = crc32c(header);
  if (sum === found) return;
  throw wrong(`its checksum is ${found.toString(16)}, but that of its bytes is ${sum.toString(16)}`, "2.2.3");
}

/** RFC 4960, appendix B, bit by bit: headers are short, and few have a checksum. */
function crc32c(bytes: Uint8Array): number {
  const reversedPolynomial = 0x82f63b78;
  let sum = 0xffff_ffff;
  for (const byte of bytes) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit++) sum = sum & 1 ? sum >>> 1 ^ reversedPolynomial : sum >>> 1;
  }
  return ~sum >>> 0;
}

function parseTls(value: Uint8Array): ProxyTls {
  const [flags = 0, ...verification] = value.subarray(0, 5);
  const tlvs = verification.length < 4 ? undefined : splitTlvs(value.subarray(5));
  if (tlvs === undefined) throw wrong("the vectors inside its TLS vector do not end where that ends", "2.2.6");
  const isTls = (flags & TLS_FLAG.isTls) !== 0;
  // HAProxy reports "verified", 0, also for clients without a certificate.
  const isVerified = (flags & TLS_FLAG.hasCertificate) !== 0 && verification.every((byte) => byte === 0);
  const [protocol, commonName] = [textOf(tlvs, TLS_TYPE.protocol), textOf(tlvs, TLS_TYPE.commonName)];
  return { isTls, isVerified, protocol, commonName, cipher: textOf(tlvs, TLS_TYPE.cipher), tlvs };
}

// --- Encoding ---------------------------------------------------------------

/**
 * Encodes a header. `source` and `destination` come together and have one transport; if only one of them is IPv4, it is
 * sent as IPv6. Zones (`%eth0`) are left out.
 *
 * @throws {TypeError} If options contradict each other, such as vectors and version 1, or do not exist.
 * @throws {RangeError} If a number or a length is out of range.
 */
export function encodeProxyHeader(options: ProxyHeaderOptions): Uint8Array<ArrayBuffer> {
  checkNames(options, Object.keys(headerOf({})));
  const { version = 2, command = "PROXY", source, destination } = options;
  if (version !== 1 && version !== 2) {
    throw new RangeError(`Option "version" must be 1 or 2: it is ${Deno.inspect(version)}`);
  }
  if (command !== "PROXY" && command !== "LOCAL") {
    throw new TypeError(`Option "command" must be "PROXY" or "LOCAL": it is ${Deno.inspect(command)}`);
  }
  if ((source === undefined) !== (destination === undefined) || (command === "LOCAL" && source !== undefined)) {
    throw new TypeError('A PROXY header has both source and destination or neither; neither with "LOCAL"');
  }
  return version === 1 ? encoder.encode(encodeLine(options)) : encodeBinary(options);
}

function checkNames(options: object, names: string[]): void {
  const unknown = Object.keys(options).find((name) => !names.includes(name));
  if (unknown !== undefined) throw new TypeError(`Unknown option "${unknown}": the options are ${names.join(", ")}`);
}

function encodeLine({ command, source, destination, tlvs = [] }: ProxyHeaderOptions): string {
  const isPlain = command !== "LOCAL" && tlvs.length === 0;
  if (isPlain && source === undefined) return "PROXY UNKNOWN\r\n";
  if (isPlain && source?.transport === "tcp" && destination?.transport === "tcp") {
    const hosts = encodeHosts(source, destination);
    const protocol = hosts[0].length === 4 ? "TCP4" : "TCP6";
    return `PROXY ${protocol} ${hosts.map(inetNtop).join(" ")} ${source.port} ${destination.port}\r\n`;
  }
  throw new TypeError("A PROXY header of version 1 has two TCP addresses or none, and nothing else: take version 2");
}

function encodeBinary({ command, source, destination, tlvs = [] }: ProxyHeaderOptions): Uint8Array<ArrayBuffer> {
  const [familyAndTransport, addresses] = source && destination ? encodeAddresses(source, destination) : [0, []];
  const rest = [...addresses, ...tlvs.flatMap(encodeTlv)];
  if (!isUint16(rest.length)) {
    throw new RangeError(`A PROXY header has at most 65551 bytes: this has ${FIXED_BYTES + rest.length}`);
  }
  const versionAndCommand = command === "LOCAL" ? 0x20 : 0x21;
  return new Uint8Array([...SIGNATURE, versionAndCommand, familyAndTransport, ...uint16(rest.length), ...rest]);
}

function isUint16(value: number): boolean {
  return Number.isInteger(value) && value >= 0 && value <= 0xffff;
}

function uint16(value: number): [number, number] {
  return [value >> 8, value & 0xff];
}

function encodeTlv({ type, value }: ProxyTlv): number[] {
  const isType = isUint16(type) && type <= 0xff && type !== TYPE.checksum;
  if (isType) return [type, ...uint16(value.length), ...value];
  throw new RangeError(`The type of a vector is whole, from 0 to 255, but not 3, the checksum: ${Deno.inspect(type)}`);
}

function encodeAddresses(source: Deno.Addr, destination: Deno.Addr): [familyAndTransport: number, bytes: number[]] {
  if (source.transport !== destination.transport) {
    const transports = `${source.transport} and ${destination.transport}`;
    throw new TypeError(`source and destination must both be TCP, UDP or Unix addresses: they are ${transports}`);
  }
  const [from, to] = encodeHosts(source, destination);
  const ports = [source, destination].flatMap((address) => "port" in address ? uint16(address.port) : []);
  const transport = source.transport === "tcp" || source.transport === "unix" ? STREAM : DATAGRAM;
  return [HOST_BYTES.indexOf(from.length) << 4 | transport, [...from, ...to, ...ports]];
}

/** Both addresses in one family. */
function encodeHosts(source: Deno.Addr, destination: Deno.Addr): [Uint8Array, Uint8Array] {
  const [from, to] = [encodeHost(source), encodeHost(destination)];
  const asIpv6 = (bytes: Uint8Array) => bytes.length === 4 ? new Uint8Array([...MAPPED_PREFIX, ...bytes]) : bytes;
  return from.length === to.length ? [from, to] : [asIpv6(from), asIpv6(to)];
}

function encodeHost(address: Deno.Addr): Uint8Array {
  if ("path" in address) return encodePath(address.path);
  const bytes = bytesOf(address);
  if (bytes === undefined) throw new TypeError(`A PROXY header needs IP addresses, not ${Deno.inspect(address)}`);
  if ("port" in address && isUint16(address.port)) return bytes;
  throw new RangeError(`A port must be a whole number from 0 to 65535, not ${Deno.inspect(address)}`);
}

function encodePath(path: string): Uint8Array {
  const bytes = new Uint8Array(108);
  const { read } = encoder.encodeInto(path, bytes);
  if (read === path.length) return bytes;
  throw new RangeError(`A path in a PROXY header has at most 108 bytes: "${printable(path)}" has more`);
}

// --- IP addresses -----------------------------------------------------------

/** RFC 4291, 2.5.5.2: an IPv4 address that is written as an IPv6 one begins with these. */
const MAPPED_PREFIX = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

function unmapped(bytes: Uint8Array): Uint8Array {
  const isMapped = bytes.length === 16 && MAPPED_PREFIX.every((byte, index) => byte === bytes[index]);
  return isMapped ? bytes.subarray(MAPPED_PREFIX.length) : bytes;
}

/** As the runtime writes addresses: mapped ones with dots. */
function hostText(bytes: Uint8Array): string {
  const own = unmapped(bytes);
  return own === bytes ? inetNtop(bytes) : `::ffff:${inetNtop(own)}`;
}

/** The IP address without its zone, which names an interface of our own machine; `undefined` if there is none. */
function bytesOf(address: Deno.Addr): Uint8Array | undefined {
  return "hostname" in address ? inetPton(address.hostname.replace(/%.*$/, "")) : undefined;
}

/** The IP version and the bits of an address, as text: a range is how that begins. */
function bitsOf(bytes: Uint8Array): string {
  const own = unmapped(bytes);
  const bits = Array.from(own, (byte) => byte.toString(2).padStart(8, "0"));
  return `${own.length === 4 ? 4 : 6}${bits.join("")}`;
}

function parseRange(entry: unknown): string {
  const [text = "", length = "", ...more] = typeof entry === "string" ? entry.split("/") : [];
  const bytes = inetPton(text);
  const most = (bytes?.length ?? 0) * 8;
  const kept = text === entry ? most : /^(0|[1-9]\d{0,2})$/.test(length) ? Number(length) : NaN;
  if (bytes === undefined || more.length > 0 || !(kept <= most)) {
    const examples = 'such as "192.0.2.1", "10.0.0.0/8", "2001:db8::/32" or "unix"';
    throw new TypeError(`Option "from" lists addresses and ranges, ${examples}: it has ${Deno.inspect(entry)}`);
  }
  const bits = bitsOf(bytes);
  const end = bits.length - (most - kept);
  if (end > 0 && !bits.includes("1", end)) return bits.slice(0, end);
  throw new TypeError(
    `Option "from" has "${entry}", whose last ${most - kept} bits are not 0: name a range or an address`,
  );
}

// --- Filters ----------------------------------------------------------------

/** The proxies that {@linkcode proxyProtocol} trusts, and what happens to other peers. */
export interface ProxyProtocolOptions {
  /**
   * The proxies: addresses, ranges (`"10.0.0.0/8"`), and `"unix"` for all peers of a `UnixServer`. An IPv4 peer of an
   * IPv6 socket matches IPv4 ranges; `"::/0"` is IPv6 only. All of them must send a header, and can name any client.
   */
  readonly from: readonly string[];
  /**
   * `"refuse"` closes connections of other peers (`stats.refused`, `handleRefuse()`); `"direct"` serves them as they
   * are, and a header of theirs is the first that the handler reads.
   * @default {"refuse"}
   */
  readonly others?: "refuse" | "direct";
}

/**
 * A filter for servers that reads the header of each trusted proxy. The connection goes on with the header's `source` as
 * its remote address and `destination` as its local one; without them (unknown, `LOCAL`), both stay as they are.
 *
 * A proxy that leaves before its first byte is refused quietly: it is a health check. The handshake fails with
 * `Deno.errors.InvalidData` if a proxy sends anything but a header, and with the read's error if a read fails.
 *
 * @throws {TypeError} If an option is wrong.
 */
export function proxyProtocol(options: ProxyProtocolOptions): ConnectionFilter {
  checkNames(options, ["from", "others"]);
  const { from, others = "refuse" } = options;
  if (!Array.isArray(from) || from.length === 0) {
    throw new TypeError('Option "from" must list the proxies, such as ["10.0.0.0/8"]');
  }
  if (others !== "refuse" && others !== "direct") {
    throw new TypeError(`Option "others" must be "refuse" or "direct": it is ${Deno.inspect(others)}`);
  }
  const ranges = from.filter((entry) => entry !== "unix").map(parseRange);
  const trustsUnix = ranges.length < from.length;
  return (conn, context) => {
    const bytes = bytesOf(conn.remoteAddr);
    const bits = bytes && bitsOf(bytes);
    const isTrusted = bits ? ranges.some((range) => bits.startsWith(range)) : trustsUnix && "path" in conn.remoteAddr;
    if (isTrusted) return receiveHeader(conn, context);
    return others === "direct" ? conn : null;
  };
}

async function receiveHeader(conn: StreamConn, context: FilterContext): Promise<StreamConn | null> {
  const buffer = new Uint8Array(MAX_HEADER_BYTES); // The parser asks for no byte beyond.
  let length = 0;
  try {
    for (let count; (count = await conn.read(buffer.subarray(length))) !== null;) {
      length += count;
      const parsed = parseProxyHeader(buffer.subarray(0, length));
      if (parsed) return new ProxiedConn(conn, parsed.header, buffer.slice(parsed.length, length));
    }
  } catch (error) {
    context.signal.throwIfAborted();
    if (length > 0 || !(error instanceof Deno.errors.ConnectionReset)) throw error;
  }
  if (length === 0) return null;
  throw wrong(`the connection ended after ${length} bytes of it`, "2");
}

/** A connection behind its header. */
class ProxiedConn implements StreamConn {
  readonly localAddr: Deno.Addr;
  readonly remoteAddr: Deno.Addr;
  /** Came behind the header and is not read yet. */
  #first: Uint8Array | undefined;

  constructor(readonly under: StreamConn, readonly header: ProxyHeader, first: Uint8Array) {
    this.localAddr = header.destination ?? under.localAddr;
    this.remoteAddr = header.source ?? under.remoteAddr;
    if (first.length > 0) this.#first = first;
  }

  read(into: Uint8Array): Promise<number | null> {
    const first = this.#first;
    if (first === undefined) return this.under.read(into);
    into.set(first.subarray(0, into.length));
    this.#first = into.length < first.length ? first.subarray(into.length) : undefined;
    return Promise.resolve(Math.min(into.length, first.length));
  }

  write(data: Uint8Array): Promise<number> {
    return this.under.write(data);
  }

  closeWrite(): Promise<void> {
    return this.under.closeWrite();
  }

  close(): void {
    this.under.close();
  }
}

/** A filter for `connect()` that sends `header`, before TLS. It throws at once what {@linkcode encodeProxyHeader} throws. */
export function sendProxyHeader(header: ProxyHeaderOptions): ConnectionFilter {
  const bytes = encodeProxyHeader(header);
  return async (conn) => {
    for (let sent = 0; sent < bytes.length;) sent += await conn.write(bytes.subarray(sent));
    return conn;
  };
}

/** The header that {@linkcode proxyProtocol} read for `request`; `undefined` if it read none. */
export function proxyHeaderOf(request: Pick<SocketStream, "under">): ProxyHeader | undefined {
  return proxiedConnOf(request)?.header;
}

/** The proxy's own address, if {@linkcode proxyProtocol} read a header for `request`; else `undefined`. */
export function proxyAddressOf(request: Pick<SocketStream, "under">): Deno.Addr | undefined {
  return proxiedConnOf(request)?.under.remoteAddr;
}

function proxiedConnOf({ under }: Pick<SocketStream | StreamConn, "under">): ProxiedConn | undefined {
  return under instanceof ProxiedConn ? under : under && proxiedConnOf(under);
}
