/** PROXY headers: which are read, refused and sent, and which peers are trusted. No network. */

import {
  encodeProxyHeader,
  parseProxyHeader,
  proxyAddressOf,
  proxyHeaderOf,
  type ProxyHeaderOptions,
  proxyProtocol,
  type ProxyProtocolOptions,
  sendProxyHeader,
} from "../../extras/proxy_protocol.ts";
import { type FilterContext, SocketStream, type StreamConn } from "../../mod.ts";
import { assert, assertEquals, assertMatch, assertRejects, assertStrictEquals, assertThrows } from "../../deps.ts";
import { brokenPipe, bytesOf, concat, connectionReset, FakeConn } from "../fake_conn.ts";
import { rejectionOf } from "../testing.ts";
import {
  binary,
  checked,
  crc32c,
  GOOD,
  hex,
  IPV4,
  IPV4_BLOCK,
  IPV6,
  IPV6_BLOCK,
  SIGNATURE,
  tcp,
  tlv,
} from "./proxy_headers.ts";

function messageOf(action: () => unknown): string {
  try {
    action();
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
  return "nothing was thrown";
}

// --- Parsing ------------------------------------------------------------------

for (const [what, bytes, said] of GOOD) {
  Deno.test(`parseProxyHeader() reads ${what}, whatever follows`, () => {
    for (const following of ["", "\r\n", "PROXY ", "\0".repeat(5_000)]) {
      const parsed = parseProxyHeader(concat([bytes, bytesOf(following)]));
      assert(parsed !== undefined);
      assertEquals(parsed.length, bytes.length);
      assertEquals({ ...parsed.header, ...said }, parsed.header);
    }
  });

  Deno.test(`parseProxyHeader() asks for more bytes with every prefix of ${what}`, () => {
    for (let length = 0; length < bytes.length; length++) {
      assertEquals(parseProxyHeader(bytes.subarray(0, length)), undefined);
    }
  });
}

/** Wrong headers up to the byte that makes them wrong, and what the message says. */
const BAD: [string, Uint8Array, RegExp][] = [
  ["the first byte of HTTP", bytesOf("G"), /must begin with it, but begins with "G" \(PROXY 2\.2\)$/],
  ["the first byte of TLS", hex("16"), /"\\x16", which is TLS: .* \(PROXY 2\.2\)/],
  ["a zero", hex("00"), /\(PROXY 2\.2\)/],
  ["version 1 in small letters", bytesOf("p"), /PROXY 2\.2/],
  ["a second space", bytesOf("PROXY  "), /PROXY 2\.2/],
  ["a tab", bytesOf("PROXY\t"), /PROXY 2\.2/],
  ["another protocol", bytesOf("PROXY TCP5"), /PROXY 2\.2/],
  ["UDP in version 1", bytesOf("PROXY U4"), /PROXY 2\.2/],
  ["UNKNOWN that goes on without a space", bytesOf("PROXY UNKNOWNS"), /PROXY 2\.2/],
  ["a line of nothing", bytesOf("PROXY\r"), /PROXY 2\.2/],
  ["a single LF", bytesOf("PROXY UNKNOWN x\n"), /single CR or LF: "PROXY UNKNOWN x\\n" \(PROXY 2\.1\)/],
  ["a single CR", bytesOf("PROXY TCP4 \rx"), /single CR or LF/],
  ["107 bytes without an end", bytesOf(`PROXY UNKNOWN ${"x".repeat(93)}`), /more than 107 bytes/],
  ["an end behind 107 bytes", bytesOf(`PROXY UNKNOWN ${"x".repeat(92)}\r`), /more than 107 bytes/],
  ["a signature that goes on differently", hex("0d0a0d0a01"), /goes on differently \(PROXY 2\.2\)/],
  ["an empty line", bytesOf("\r\n\r\nG"), /goes on differently/],
  ["version 1 in the binary format", hex(`${SIGNATURE} 11`), /its version is 1, but a binary header has 2/],
  ["version 3", hex(`${SIGNATURE} 31`), /its version is 3/],
  ["version 0 with the command LOCAL", hex(`${SIGNATURE} 00`), /its version is 0/],
  ["an unassigned command", hex(`${SIGNATURE} 22`), /its command is 2, but only 0 and 1 are assigned/],
  ["an unassigned family", hex(`${SIGNATURE} 21 41`), /its family 4 and transport 1 are not assigned/],
  ["an unassigned transport", hex(`${SIGNATURE} 21 13`), /its family 1 and transport 3 are not assigned/],
  ["a length over the limit", hex(`${SIGNATURE} 21 11 0ff1`), /announces 4097 bytes, over the limit of 4096/],
  ["the greatest length", hex(`${SIGNATURE} 20 00 ffff`), /announces 65551 bytes/],
  ["too few bytes for IPv4", hex(`${SIGNATURE} 21 11 000b`), /announces 27 bytes, too few for addresses of family 1/],
  ["too few bytes for IPv6", hex(`${SIGNATURE} 21 21 0023`), /too few for addresses of family 2/],
  ["too few bytes for Unix", hex(`${SIGNATURE} 21 31 00d7`), /too few for addresses of family 3/],
  ["one byte behind the addresses", binary(0x21, 0x11, IPV4_BLOCK, hex("04")), /its vectors do not end where it ends/],
  ["two bytes behind the addresses", binary(0x21, 0x11, IPV4_BLOCK, hex("0400")), /vectors do not end/],
  ["a vector that is longer than the header", binary(0x21, 0x11, IPV4_BLOCK, hex("040001")), /vectors do not end/],
  ["a unique id of 129 bytes", binary(0x21, 0x11, IPV4_BLOCK, tlv(5, "a".repeat(129))), /128 bytes \(PROXY 2\.2\.5\)/],
  ["a short TLS vector", binary(0x21, 0x11, IPV4_BLOCK, tlv(0x20, "\0\0\0\0")), /its TLS vector .* \(PROXY 2\.2\.6\)/],
  ["an empty TLS vector", binary(0x21, 0x11, IPV4_BLOCK, tlv(0x20, "")), /PROXY 2\.2\.6/],
  [
    "a TLS vector with an odd end",
    binary(0x21, 0x11, IPV4_BLOCK, tlv(0x20, hex("01 00000000 21 0007 54"))),
    /PROXY 2\.2\.6/,
  ],
  [
    "a wrong checksum",
    binary(0x21, 0x11, IPV4_BLOCK, tlv(3, hex("01020304"))),
    /its checksum is 1020304, but that of its bytes is [0-9a-f]+ \(PROXY 2\.2\.3\)/,
  ],
  ["a wrong checksum without addresses", binary(0x21, 0x00, tlv(3, hex("01020304"))), /its checksum is/],
  ["a checksum of 3 bytes", binary(0x21, 0x11, IPV4_BLOCK, tlv(3, "\0\0\0")), /one checksum, of 4 bytes/],
  [
    "two checksums",
    binary(0x21, 0x11, IPV4_BLOCK, tlv(3, "\0\0\0\0"), tlv(3, "\0\0\0\0")),
    /it may have one checksum, of 4 bytes \(PROXY 2\.2\.3\)/,
  ],
];

for (const [what, bytes, sentence] of BAD) {
  Deno.test(`parseProxyHeader() refuses ${what} with its last byte, and no sooner`, () => {
    assertThrows(() => parseProxyHeader(bytes), Deno.errors.InvalidData);
    assertMatch(messageOf(() => parseProxyHeader(bytes)), sentence);
    assertEquals(parseProxyHeader(bytes.subarray(0, -1)), undefined);
    assertThrows(() => parseProxyHeader(concat([bytes, new Uint8Array(300)])), Deno.errors.InvalidData);
  });
}

/** Lines of version 1 that break clause 2.1. */
const BAD_LINES: [string, string][] = [
  ["TCP4 192.0.2.1 198.51.100.2 50000", "single spaces"],
  ["TCP4 192.0.2.1 198.51.100.2 50000 443 ", "single spaces"],
  ["TCP4 192.0.2.1 198.51.100.2 50000 443 1", "single spaces"],
  ["TCP4  192.0.2.1 198.51.100.2 50000 443", "single spaces"],
  ["TCP4 192.0.2.1  198.51.100.2 50000", '"198.51.100.2" is not a port'],
  ["TCP4 192.0.2.1 198.51.100.2 50000 ", '"" is not a port'],
  ["TCP4 192.0.2.1 198.51.100.2 050000 443", '"050000" is not a port'],
  ["TCP4 192.0.2.1 198.51.100.2 50000 00", '"00" is not a port'],
  ["TCP4 192.0.2.1 198.51.100.2 65536 443", '"65536" is not a port'],
  ["TCP4 192.0.2.1 198.51.100.2 -1 443", '"-1" is not a port'],
  ["TCP4 192.0.2.1 198.51.100.2 1e3 443", '"1e3" is not a port'],
  ["TCP4 192.0.2.1 198.51.100.2 0x1 443", '"0x1" is not a port'],
  ["TCP4 192.0.2.1 198.51.100.2 50000 \t443", '"\\t443" is not a port'],
  ["TCP4 192.0.2.01 198.51.100.2 50000 443", '"192.0.2.01" is not an IPv4 address'],
  ["TCP4 192.0.2.256 198.51.100.2 50000 443", "is not an IPv4 address"],
  ["TCP4 192.0.2 198.51.100.2 50000 443", "is not an IPv4 address"],
  ["TCP4 192.0.2.1 ::1 50000 443", '"::1" is not an IPv4 address'],
  ["TCP4 192.0.2.1 ::ffff:192.0.2.1 50000 443", "is not an IPv4 address"],
  ["TCP4 192.0.2.1 example.org 50000 443", "is not an IPv4 address"],
  ["TCP4 192.0.2.1 \x1b[2J 50000 443", '"\\x1b[2J" is not an IPv4 address'],
  ["TCP6 192.0.2.1 ::1 50000 443", '"192.0.2.1" is not an IPv6 address'],
  ["TCP6 ::1 ::1::2 50000 443", "is not an IPv6 address"],
  ["TCP6 ::1 1:2:3:4:5:6:7:8:9 50000 443", "is not an IPv6 address"],
  ["TCP6 ::1 ::g 50000 443", "is not an IPv6 address"],
  ["TCP6 ::1 [::1] 50000 443", "is not an IPv6 address"],
  ["TCP6 ::1 fe80::1%eth0 50000 443", "is not an IPv6 address"],
];

for (const [line, words] of BAD_LINES) {
  Deno.test(`parseProxyHeader() refuses ${Deno.inspect(line)}`, () => {
    const bytes = bytesOf(`PROXY ${line}\r\n`);
    const message = messageOf(() => parseProxyHeader(bytes));
    assert(message.includes(words) && message.endsWith("(PROXY 2.1)"), message);
    assertEquals(parseProxyHeader(bytes.subarray(0, -1)), undefined); // The whole line is needed first.
  });
}

Deno.test("parseProxyHeader() quotes 40 bytes of what is not a header, without control characters", () => {
  const message = messageOf(() => parseProxyHeader(bytesOf("\x1b[2J" + "a".repeat(1_000))));
  const quote = `"\\x1b[2J${"a".repeat(36)}"...`;
  assertEquals(
    message,
    `Cannot read the PROXY header: the connection must begin with it, but begins with ${quote} (PROXY 2.2)`,
  );
});

Deno.test("parseProxyHeader() returns copies and leaves the bytes as they are", () => {
  const tls = tlv(0x20, concat([hex("0100000000"), tlv(0x28, "c")]));
  const bytes = checked(binary(0x21, 0x11, IPV4_BLOCK, tlv(3, "\0\0\0\0"), tlv(5, "id"), tlv(0xe0, "own"), tls));
  const before = bytes.slice();
  const header = parseProxyHeader(bytes)?.header;
  assertEquals(bytes, before);
  bytes.fill(0);
  assertEquals(header?.uniqueId, bytesOf("id"));
  assertEquals(header?.tlvs[1], { type: 0xe0, value: bytesOf("own") });
  assertEquals(header?.tls?.tlvs, [{ type: 0x28, value: bytesOf("c") }]);
});

// RFC 3720, appendix B.4, has the first three; catalogues of checksums list the last one.
const CHECKSUMS: [Uint8Array, number][] = [
  [new Uint8Array(32), 0x8a9136aa],
  [new Uint8Array(32).fill(0xff), 0x62a8ab43],
  [Uint8Array.from({ length: 32 }, (_, index) => index), 0x46dd794e],
  [bytesOf("123456789"), 0xe3069283],
];

Deno.test("the checksum that the tests compare with is CRC32c", () => {
  for (const [bytes, wanted] of CHECKSUMS) assertEquals(crc32c(bytes), wanted);
});

Deno.test("one wrong bit anywhere makes a header with a checksum wrong", () => {
  const header = checked(binary(0x21, 0x11, IPV4_BLOCK, tlv(2, "example.org"), tlv(3, "\0\0\0\0")));
  for (let bit = 0; bit < header.length * 8; bit++) {
    const broken = header.slice();
    broken[bit >> 3] = (broken[bit >> 3] ?? 0) ^ 1 << (bit & 7);
    let parsed;
    try {
      parsed = parseProxyHeader(broken);
    } catch (error) {
      assert(error instanceof Deno.errors.InvalidData);
      continue;
    }
    // It may have become a longer header, one without addresses, or the checksum a vector of another type.
    const hasChecksum = broken.at(-7) === 3 && broken.at(-5) === 4;
    assert(parsed?.header.source === undefined || !hasChecksum, `bit ${bit}`);
  }
});

// --- Encoding -----------------------------------------------------------------

/** Headers to send, and their bytes. */
const ENCODED: [string, ProxyHeaderOptions, Uint8Array][] = [
  ["an unknown client", {}, binary(0x21, 0x00)],
  ["LOCAL", { command: "LOCAL" }, binary(0x20, 0x00)],
  ["TCP over IPv4", IPV4, binary(0x21, 0x11, IPV4_BLOCK)],
  ["TCP over IPv6", IPV6, binary(0x21, 0x21, IPV6_BLOCK)],
  ["version 1", { version: 1, ...IPV4 }, bytesOf("PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\n")],
  ["version 1 with IPv6", { version: 1, ...IPV6 }, bytesOf("PROXY TCP6 2001:db8::1 2001:db8::2 50000 443\r\n")],
  ["version 1 with an unknown client", { version: 1 }, bytesOf("PROXY UNKNOWN\r\n")],
  [
    "version 1 with an IPv4 client of an IPv6 server, without dots",
    { version: 1, source: IPV4.source, destination: IPV6.destination },
    bytesOf("PROXY TCP6 ::ffff:c000:201 2001:db8::2 50000 443\r\n"),
  ],
  [
    "an IPv6 client of an IPv4 server",
    { source: IPV6.source, destination: IPV4.destination },
    binary(0x21, 0x21, IPV6_BLOCK.subarray(0, 16), hex("00000000000000000000ffff c6336402 c350 01bb")),
  ],
  [
    "an address without its zone",
    { source: tcp("2001:db8::1%eth0", 50_000), destination: IPV6.destination },
    binary(0x21, 0x21, IPV6_BLOCK),
  ],
  [
    "vectors in their order",
    { ...IPV4, tlvs: [{ type: 0xe0, value: bytesOf("a") }, { type: 2, value: bytesOf("example.org") }] },
    binary(0x21, 0x11, IPV4_BLOCK, tlv(0xe0, "a"), tlv(2, "example.org")),
  ],
  ["vectors of LOCAL", { command: "LOCAL", tlvs: [{ type: 4, value: bytesOf("") }] }, binary(0x20, 0, tlv(4, ""))],
];

for (const [what, options, wanted] of ENCODED) {
  Deno.test(`encodeProxyHeader() writes ${what}`, () => {
    assertEquals(encodeProxyHeader(options), wanted);
    assertEquals(parseProxyHeader(wanted)?.length, wanted.length);
  });
}

for (const [what, bytes] of GOOD) {
  Deno.test(`encodeProxyHeader() takes the header of ${what}, and it is read as the same again`, () => {
    const header = parseProxyHeader(bytes)?.header ?? {};
    assertEquals(parseProxyHeader(encodeProxyHeader(header))?.header, header);
  });
}

/** Options that are wrong. Plain JavaScript has no types. */
const MISTAKES: [string, unknown, typeof TypeError | typeof RangeError, RegExp][] = [
  ["one address", { source: IPV4.source }, TypeError, /both source and destination or neither/],
  ["addresses of LOCAL", { command: "LOCAL", ...IPV4 }, TypeError, /neither with "LOCAL"/],
  ["another command", { command: "local" }, TypeError, /"command" must be "PROXY" or "LOCAL": it is "local"/],
  ["another version", { version: 3 }, RangeError, /"version" must be 1 or 2: it is 3/],
  ["LOCAL in version 1", { version: 1, command: "LOCAL" }, TypeError, /take version 2/],
  ["vectors in version 1", { version: 1, tlvs: [{ type: 2, value: bytesOf("a") }] }, TypeError, /take version 2/],
  [
    "a Unix socket in version 1",
    { version: 1, source: { transport: "unix", path: "a" }, destination: { transport: "unix", path: "b" } },
    TypeError,
    /two TCP addresses or none.*take version 2/,
  ],
  [
    "two kinds of addresses",
    { source: IPV4.source, destination: { transport: "unix", path: "b" } },
    TypeError,
    /must both be TCP, UDP or Unix addresses: they are tcp and unix/,
  ],
  [
    "a name for an address",
    { source: tcp("localhost\n", 1), destination: IPV4.destination },
    TypeError,
    /needs IP addresses, not .*"localhost\\n"/,
  ],
  ["a port over 65535", { ...IPV4, source: tcp("192.0.2.1", 65_536) }, RangeError, /from 0 to 65535, not .*65536/],
  ["a port below 0", { ...IPV4, destination: tcp("192.0.2.1", -1) }, RangeError, /from 0 to 65535, not .*-1/],
  ["a fraction of a port", { version: 1, ...IPV4, source: tcp("192.0.2.1", 0.5) }, RangeError, /A port must be/],
  [
    "a long path",
    { source: { transport: "unix", path: "a".repeat(109) }, destination: { transport: "unix", path: "b" } },
    RangeError,
    /at most 108 bytes: "a+" has more/,
  ],
  ["a long vector", { tlvs: [{ type: 0xe0, value: new Uint8Array(65_536) }] }, RangeError, /65551 bytes: .* 65555/],
  [
    "too much of all",
    { tlvs: [{ type: 0xe0, value: new Uint8Array(65_000) }, { type: 0xe1, value: new Uint8Array(1_000) }] },
    RangeError,
    /at most 65551 bytes: this has 66022/,
  ],
  ["a checksum", { tlvs: [{ type: 3, value: new Uint8Array(4) }] }, RangeError, /not 3, the checksum/],
  ["a type over 255", { tlvs: [{ type: 256, value: new Uint8Array() }] }, RangeError, /0 to 255.*: 256$/],
  ["a fraction of a type", { tlvs: [{ type: 1.5, value: new Uint8Array() }] }, RangeError, /0 to 255.*: 1\.5$/],
  [
    "an option that does not exist",
    { checksum: true },
    TypeError,
    /Unknown option "checksum": the options are version/,
  ],
];

for (const [what, options, Kind, sentence] of MISTAKES) {
  Deno.test(`encodeProxyHeader() and sendProxyHeader() refuse ${what} at once`, () => {
    const header = options as ProxyHeaderOptions;
    for (const action of [() => encodeProxyHeader(header), () => sendProxyHeader(header)]) {
      assertThrows(action, Kind);
      assertMatch(messageOf(action), sentence);
    }
  });
}

// --- Filters ------------------------------------------------------------------

/** A connection with a peer anywhere. */
class ConnFrom extends FakeConn {
  override readonly remoteAddr: Deno.Addr;

  constructor(remoteAddr: Deno.Addr = tcp("127.0.0.1", 50_000)) {
    super();
    this.remoteAddr = remoteAddr;
  }
}

function contextOf(signal = new AbortController().signal): FilterContext {
  return { signal, onEnd: () => {} };
}

/** Peers, whether they are trusted, and the list of proxies. */
const PEERS: [string, boolean, string[]][] = [
  ["192.0.2.1", true, ["192.0.2.1"]],
  ["192.0.2.1", true, ["198.51.100.1", "192.0.2.1"]],
  ["192.0.2.2", false, ["192.0.2.1"]],
  ["192.0.2.1", true, ["192.0.2.1/32"]],
  ["192.0.2.255", true, ["192.0.2.0/24"]],
  ["192.0.3.0", false, ["192.0.2.0/24"]],
  ["192.0.3.0", true, ["192.0.2.0/23"]],
  ["10.255.255.255", true, ["10.0.0.0/8"]],
  ["11.0.0.0", false, ["10.0.0.0/8"]],
  ["172.31.0.1", true, ["172.16.0.0/12"]],
  ["172.32.0.1", false, ["172.16.0.0/12"]],
  ["203.0.113.1", true, ["0.0.0.0/0"]],
  ["::ffff:192.0.2.1", true, ["192.0.2.1"]],
  ["::ffff:c000:201", true, ["192.0.2.0/24"]],
  ["192.0.2.1", true, ["::ffff:192.0.2.1"]],
  ["192.0.2.1", true, ["::ffff:192.0.2.0/120"]],
  ["::ffff:192.0.2.1", true, ["::ffff:0:0/96"]],
  ["192.0.2.1", false, ["::/0"]],
  ["::ffff:192.0.2.1", false, ["::/0"]],
  ["2001:db8::1", true, ["::/0"]],
  ["2001:db8::1", false, ["0.0.0.0/0"]],
  ["2001:db8::1", true, ["2001:DB8:0:0:0:0:0:1"]],
  ["2001:db8::1", true, ["2001:db8::/32"]],
  ["2001:db9::1", false, ["2001:db8::/32"]],
  ["2001:db8:0:7fff::1", true, ["2001:db8::/49"]],
  ["2001:db8:0:8000::1", false, ["2001:db8::/49"]],
  ["fe80::1%eth0", true, ["fe80::/10"]],
  ["febf::1", true, ["fe80::/10"]],
  ["fec0::1", false, ["fe80::/10"]],
  ["192.0.2.1", false, ["unix"]],
  ["/run/proxy.sock", true, ["unix"]],
  ["", true, ["192.0.2.1", "unix"]],
  ["/run/proxy.sock", false, ["0.0.0.0/0", "::/0"]],
];

for (const [peer, isTrusted, from] of PEERS) {
  const name = peer === "" ? "the peer of a Unix socket without a name" : peer;
  Deno.test(`proxyProtocol() ${isTrusted ? "trusts" : "does not trust"} ${name} with ${from.join(", ")}`, async () => {
    const address = /^(\/|$)/.test(peer) ? { transport: "unix", path: peer } as const : tcp(peer, 50_000);
    const conn = new ConnFrom(address).give(encodeProxyHeader(IPV4));
    assertEquals((await proxyProtocol({ from })(conn, contextOf()))?.remoteAddr, isTrusted ? IPV4.source : undefined);
    const direct = new ConnFrom(address).give(encodeProxyHeader(IPV4));
    const served = proxyProtocol({ from, others: "direct" })(direct, contextOf());
    if (!isTrusted) assertStrictEquals(served, direct); // No promise, and nothing was read.
    else assertEquals((await served)?.remoteAddr, IPV4.source);
  });
}

/** Options that are wrong. */
const BAD_OPTIONS: [string, unknown, RegExp][] = [
  ["no list", {}, /Option "from" must list the proxies, such as \["10\.0\.0\.0\/8"\]$/],
  ["an empty list", { from: [] }, /"from" must list the proxies/],
  ["text", { from: "10.0.0.0/8" }, /"from" must list the proxies/],
  ["a name", { from: ["proxy.example\n"] }, /such as "192\.0\.2\.1", .*: it has "proxy\.example\\n"$/],
  ["an empty text", { from: [""] }, /it has ""$/],
  ["a number", { from: [10] }, /it has 10$/],
  ["part of an address", { from: ["10.0.0/8"] }, /it has "10\.0\.0\/8"$/],
  ["a length that is none", { from: ["10.0.0.0/x"] }, /it has "10\.0\.0\.0\/x"$/],
  ["an empty length", { from: ["10.0.0.0/"] }, /it has "10\.0\.0\.0\/"$/],
  ["a length with a leading zero", { from: ["10.0.0.0/08"] }, /it has/],
  ["a mask", { from: ["10.0.0.0/255.0.0.0"] }, /it has/],
  ["two lengths", { from: ["10.0.0.0/8/8"] }, /it has/],
  ["a length over 32", { from: ["10.0.0.0/33"] }, /it has/],
  ["a length over 128", { from: ["::/129"] }, /it has/],
  ["a zone", { from: ["fe80::1%eth0"] }, /it has/],
  ["a port", { from: ["10.0.0.1:80"] }, /it has/],
  ["an address inside its range", { from: ["10.0.0.1/8"] }, /"10\.0\.0\.1\/8", whose last 24 bits are not 0: name/],
  ["the same of IPv6", { from: ["2001:db8::1/32"] }, /last 96 bits are not 0/],
  ["a range that is cut inside of the mapped prefix", { from: ["::ffff:0:0/80"] }, /last 48 bits are not 0/],
  ["other others", { from: ["::1"], others: "believe" }, /"refuse" or "direct": it is "believe"/],
  ["an option that does not exist", { from: ["::1"], other: "direct" }, /Unknown option "other": .* from, others$/],
];

for (const [what, options, sentence] of BAD_OPTIONS) {
  Deno.test(`proxyProtocol() refuses ${what}`, () => {
    const make = () => proxyProtocol(options as ProxyProtocolOptions);
    assertThrows(make, TypeError);
    assertMatch(messageOf(make), sentence);
  });
}

/** Reads the header of `conn`, whose peer is trusted. */
async function filtered(conn: ConnFrom, signal?: AbortSignal): Promise<StreamConn | null> {
  return await proxyProtocol({ from: ["127.0.0.1"] })(conn, contextOf(signal));
}

Deno.test("the filtered connection has the header's addresses, and proxyHeaderOf() finds it below others", async () => {
  const conn = new ConnFrom().give(encodeProxyHeader(IPV4));
  const proxied = await filtered(conn);
  assert(proxied !== null);
  assertEquals([proxied.remoteAddr, proxied.localAddr], [IPV4.source, IPV4.destination]);
  assertStrictEquals(proxied.under, conn);
  class Above extends FakeConn {
    readonly under = proxied ?? undefined;
  }
  for (const stream of [new SocketStream(proxied), new SocketStream(new Above())]) {
    assertEquals(proxyHeaderOf(stream)?.source, IPV4.source);
    assertEquals(proxyAddressOf(stream), conn.remoteAddr);
  }
  const without = new SocketStream(new FakeConn());
  assertEquals([proxyHeaderOf(without), proxyAddressOf(without)], [undefined, undefined]);
});

Deno.test("the filtered connection keeps the proxy's addresses if the header has none", async () => {
  for (const header of [{ command: "LOCAL" }, { version: 1 }, {}] as const) {
    const conn = new ConnFrom().give(encodeProxyHeader(header));
    const proxied = await filtered(conn);
    assertEquals([proxied?.remoteAddr, proxied?.localAddr], [conn.remoteAddr, conn.localAddr]);
  }
});

/** What came behind the header, and the reads that take it. */
const BEHIND: [string, string[]][] = [["", []], ["hello", ["hel", "lo"]], ["hello", ["hello"]]];

for (const [behind, parts] of BEHIND) {
  Deno.test(`the filtered connection gives out ${Deno.inspect(parts)} and then is the one below`, async () => {
    const conn = new ConnFrom().give(concat([encodeProxyHeader(IPV4), bytesOf(behind)]));
    const proxied = await filtered(conn);
    assert(proxied !== null);
    const into = new Uint8Array(parts[0]?.length ?? 3);
    for (const part of parts) {
      assertEquals(await proxied.read(into), part.length);
      assertEquals(into.subarray(0, part.length), bytesOf(part));
    }
    const below = Promise.resolve(7);
    conn.read = conn.write = () => below;
    assertStrictEquals(proxied.read(into), below); // The same promise, without another around it.
    assertStrictEquals(proxied.write(into), below);
    await proxied.closeWrite();
    proxied.close();
    assertEquals(conn.calls, ["closeWrite()", "close()"]);
  });
}

Deno.test("proxyProtocol() offers each read no more room than a header of 4,096 bytes leaves", async () => {
  const longest = GOOD.at(-1)?.[1] ?? new Uint8Array();
  const conn = new ConnFrom().give(longest.subarray(0, 1_000), longest.subarray(1_000), "behind");
  const read = conn.read.bind(conn);
  const rooms: number[] = [];
  conn.read = (into) => {
    rooms.push(into.length);
    return read(into);
  };
  assert(await filtered(conn) !== null);
  assert(rooms.every((room, index) => room <= 4_096 - index * 1_000), Deno.inspect(rooms));
  assertEquals(await read(new Uint8Array(9)), 6);
});

Deno.test("a proxy that leaves before its first byte is refused, and one that leaves later is an error", async () => {
  assertEquals(await filtered(new ConnFrom().end()), null);
  assertEquals(await filtered(new ConnFrom().failReads(connectionReset())), null);
  const error = await rejectionOf(filtered(new ConnFrom().give("PROXY TCP4 ").end()));
  assert(error instanceof Deno.errors.InvalidData);
  assertEquals(error.message, "Cannot read the PROXY header: the connection ended after 11 bytes of it (PROXY 2)");
  await assertRejects(filtered(new ConnFrom().give("P").failReads(connectionReset())), Deno.errors.ConnectionReset);
  await assertRejects(filtered(new ConnFrom().failReads(brokenPipe())), Deno.errors.BrokenPipe);
  await assertRejects(filtered(new ConnFrom().give("GET /")), Deno.errors.InvalidData);
});

Deno.test("proxyProtocol() rejects with the signal's reason when it aborts and the connection is closed", async () => {
  for (const failure of [undefined, connectionReset()]) {
    const conn = new ConnFrom();
    const controller = new AbortController();
    const reading = rejectionOf(filtered(conn, controller.signal));
    const reason = new Deno.errors.TimedOut("on purpose");
    controller.abort(reason);
    if (failure === undefined) conn.close();
    else conn.failReads(failure);
    assertStrictEquals(await reading, reason);
  }
});

Deno.test("sendProxyHeader() sends the whole header in short writes and returns the same connection", async () => {
  const conn = new FakeConn();
  conn.takes = () => 5;
  assertStrictEquals(await sendProxyHeader(IPV4)(conn, contextOf()), conn);
  assertEquals(conn.written, encodeProxyHeader(IPV4));
  const broken = new FakeConn().failWrites(brokenPipe());
  await assertRejects(async () => void await sendProxyHeader({})(broken, contextOf()), Deno.errors.BrokenPipe);
});
