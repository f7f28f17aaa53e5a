/** The PROXY protocol's headers: what is read, what is refused and why, and what is sent. No network. */

import {
  connect,
  encodeProxyHeader,
  parseProxyHeader,
  type ProxyHeader,
  type ProxyHeaderOptions,
  type ProxyProtocolOptions,
  type ProxyTls,
  StreamRequestHandler,
  StreamServer,
  TcpServer,
  UnixServer,
} from "../mod.ts";
import { assert, assertEquals, assertMatch, assertThrows } from "../deps.ts";
import { bytesOf, concat, FakeConn, randomNumbers } from "./fake_conn.ts";
import { FakeListener, rejectionOf, scaled } from "./testing.ts";

/** Headers that are made of any bytes, and good ones with some bytes changed. */
const FUZZED = scaled(20_000, 1_000_000);

const SEED = 20_261_122;

/** PROXY 2.2. */
const SIGNATURE = "0d0a0d0a000d0a515549540a";

/** The bytes that are written as hexadecimal digits, with spaces to see them better. */
function hex(digits: string): Uint8Array {
  return Uint8Array.from(digits.replaceAll(/\s/g, "").match(/../g) ?? [], (byte) => parseInt(byte, 16));
}

/** A vector. */
function tlv(type: number, value: Uint8Array | string): Uint8Array {
  const bytes = bytesOf(value);
  return concat([new Uint8Array([type, bytes.length >> 8, bytes.length & 0xff]), bytes]);
}

/** A header of version 2 whose length is right. */
function binary(versionAndCommand: number, family: number, ...rest: Uint8Array[]): Uint8Array {
  const block = concat(rest);
  const fixed = new Uint8Array([versionAndCommand, family, block.length >> 8, block.length & 0xff]);
  return concat([hex(SIGNATURE), fixed, block]);
}

/** From 192.0.2.1:50000 to 198.51.100.2:443. */
const IPV4_BLOCK = hex("c0000201 c6336402 c350 01bb");

/** From [2001:db8::1]:50000 to [2001:db8::2]:443. */
const IPV6_BLOCK = hex("20010db8000000000000000000000001 20010db8000000000000000000000002 c350 01bb");

function tcp(hostname: string, port: number): Deno.NetAddr {
  return { transport: "tcp", hostname, port };
}

function path(text: string): Uint8Array {
  return concat([bytesOf(text), new Uint8Array(108 - text.length)]);
}

/** What a header says that is not the default. */
function facts(header: ProxyHeader): Partial<ProxyHeader> {
  const isSaid = ([, value]: [string, unknown]) => value !== undefined && value !== false && !isEmpty(value);
  return Object.fromEntries(Object.entries(header).filter(isSaid));
}

function isEmpty(value: unknown): boolean {
  return Array.isArray(value) && value.length === 0;
}

const NO_TLS: ProxyTls = {
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

const IPV4 = { source: tcp("192.0.2.1", 50_000), destination: tcp("198.51.100.2", 443) };
const IPV6 = { source: tcp("2001:db8::1", 50_000), destination: tcp("2001:db8::2", 443) };
const LONGEST_IPV6 = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";

/** What a header says that names no client. */
const NOBODY = { source: undefined, destination: undefined };

/** What the client has shown, as HAProxy tells it. */
const CLIENT_TLS = concat([
  hex("07 00000000"),
  tlv(0x21, "TLSv1.3"),
  tlv(0x23, "TLS_AES_256_GCM_SHA384"),
  tlv(0x24, "RSA-SHA256"),
  tlv(0x25, "RSA2048"),
  tlv(0x22, "alice"),
]);

/** Headers that are right, with what they say. */
const GOOD: [string, Uint8Array, Partial<ProxyHeader>][] = [
  [
    "the example of clause 2.1",
    bytesOf("PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"),
    { version: 1, source: tcp("192.168.0.1", 56_324), destination: tcp("192.168.0.11", 443) },
  ],
  [
    "the longest line for IPv4 of clause 2.1",
    bytesOf("PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n"),
    { version: 1, source: tcp("255.255.255.255", 65_535), destination: tcp("255.255.255.255", 65_535) },
  ],
  [
    "the longest line for IPv6 of clause 2.1",
    bytesOf(`PROXY TCP6 ${LONGEST_IPV6} ${LONGEST_IPV6} 65535 65535\r\n`),
    { version: 1, source: tcp(LONGEST_IPV6, 65_535), destination: tcp(LONGEST_IPV6, 65_535) },
  ],
  ["the short line of an unknown connection of clause 2.1", bytesOf("PROXY UNKNOWN\r\n"), { version: 1, ...NOBODY }],
  [
    "the longest line of an unknown connection of clause 2.1",
    bytesOf(`PROXY UNKNOWN ${LONGEST_IPV6} ${LONGEST_IPV6} 65535 65535\r\n`),
    { version: 1, ...NOBODY },
  ],
  ["an unknown connection with anything in its line", bytesOf("PROXY UNKNOWN \xff  TCP4 :-)\r\n"), {
    version: 1,
    ...NOBODY,
  }],
  [
    "version 1 with zeros",
    bytesOf("PROXY TCP4 0.0.0.0 10.0.0.1 0 0\r\n"),
    { version: 1, source: tcp("0.0.0.0", 0), destination: tcp("10.0.0.1", 0) },
  ],
  [
    "version 1 with short IPv6 addresses",
    bytesOf("PROXY TCP6 2001:DB8::1 ::1 50000 443\r\n"),
    { version: 1, source: tcp("2001:db8::1", 50_000), destination: tcp("::1", 443) },
  ],
  [
    "version 1 with an IPv4 client among IPv6 addresses, as inet_ntop(3) writes it",
    bytesOf("PROXY TCP6 ::ffff:192.0.2.1 1:2:3:4:5:6:7:: 50000 443\r\n"),
    { version: 1, source: tcp("::ffff:192.0.2.1", 50_000), destination: tcp("1:2:3:4:5:6:7:0", 443) },
  ],
  ["TCP over IPv4", binary(0x21, 0x11, IPV4_BLOCK), { version: 2, ...IPV4 }],
  ["TCP over IPv6", binary(0x21, 0x21, IPV6_BLOCK), { version: 2, ...IPV6 }],
  [
    "UDP over IPv4",
    binary(0x21, 0x12, IPV4_BLOCK),
    {
      source: { transport: "udp", hostname: "192.0.2.1", port: 50_000 },
      destination: { transport: "udp", hostname: "198.51.100.2", port: 443 },
    },
  ],
  [
    "UDP over IPv6",
    binary(0x21, 0x22, IPV6_BLOCK),
    {
      source: { transport: "udp", hostname: "2001:db8::1", port: 50_000 },
      destination: { transport: "udp", hostname: "2001:db8::2", port: 443 },
    },
  ],
  [
    "a Unix stream",
    binary(0x21, 0x31, path("/run/client.sock"), path("/run/server.sock")),
    {
      source: { transport: "unix", path: "/run/client.sock" },
      destination: { transport: "unix", path: "/run/server.sock" },
    },
  ],
  [
    "Unix datagrams of a name without a file and of no name",
    binary(0x21, 0x32, path("\0client"), path("")),
    {
      source: { transport: "unixpacket", path: "\0client" },
      destination: { transport: "unixpacket", path: "" },
    },
  ],
  [
    "a Unix path that fills its place",
    binary(0x21, 0x31, path("a".repeat(108)), path("b")),
    { source: { transport: "unix", path: "a".repeat(108) }, destination: { transport: "unix", path: "b" } },
  ],
  ["LOCAL with nothing", binary(0x20, 0x00), { ...NOBODY, version: 2, command: "LOCAL" }],
  ["LOCAL with addresses, which are discarded", binary(0x20, 0x11, IPV4_BLOCK), { ...NOBODY, command: "LOCAL" }],
  ["LOCAL with a family that is none, which is ignored", binary(0x20, 0xff, IPV4_BLOCK), {
    ...NOBODY,
    command: "LOCAL",
  }],
  ["LOCAL with bytes of any kind", binary(0x20, 0x00, hex("01ffff")), { ...NOBODY, command: "LOCAL" }],
  ["LOCAL with vectors, which are discarded", binary(0x20, 0x00, tlv(2, "example.org")), {
    ...NOBODY,
    command: "LOCAL",
  }],
  ["an unspecified connection", binary(0x21, 0x00), { version: 2, ...NOBODY }],
  ["an unspecified connection with addresses of some kind", binary(0x21, 0x00, hex("0102")), { version: 2, ...NOBODY }],
  ["an unspecified family", binary(0x21, 0x01, tlv(2, "example.org")), { ...NOBODY, authority: "example.org" }],
  ["an unspecified transport", binary(0x21, 0x10, IPV4_BLOCK, tlv(2, "example.org")), {
    ...NOBODY,
    authority: "example.org",
  }],
  [
    "names",
    binary(0x21, 0x11, IPV4_BLOCK, tlv(1, "h2"), tlv(2, "bücher.example"), tlv(0x30, "blue"), tlv(5, "\0\x7f")),
    {
      ...IPV4,
      alpnProtocol: "h2",
      authority: "bücher.example",
      networkNamespace: "blue",
      uniqueId: new Uint8Array([0, 0x7f]),
    },
  ],
  [
    "padding, which is left out",
    binary(0x21, 0x11, IPV4_BLOCK, tlv(4, ""), tlv(4, "\0\0\0"), tlv(2, "example.org")),
    { authority: "example.org" },
  ],
  [
    "the first of two, and text that is no UTF-8",
    binary(0x21, 0x11, IPV4_BLOCK, tlv(2, new Uint8Array([0x61, 0xff])), tlv(2, "example.org")),
    { authority: "a\ufffd" },
  ],
  [
    "vectors of applications",
    binary(0x21, 0x11, IPV4_BLOCK, tlv(0xe0, "a"), tlv(0xff, ""), tlv(0xe0, "b")),
    {
      tlvs: [
        { type: 0xe0, value: bytesOf("a") },
        { type: 0xff, value: new Uint8Array() },
        { type: 0xe0, value: bytesOf("b") },
      ],
    },
  ],
  [
    "a client's TLS",
    binary(0x21, 0x11, IPV4_BLOCK, tlv(0x20, CLIENT_TLS)),
    {
      tls: {
        isTls: true,
        hasCertificate: true,
        sessionHasCertificate: true,
        isVerified: true,
        protocol: "TLSv1.3",
        commonName: "alice",
        cipher: "TLS_AES_256_GCM_SHA384",
        signatureAlgorithm: "RSA-SHA256",
        keyAlgorithm: "RSA2048",
        tlvs: [],
      },
    },
  ],
  [
    "a client's TLS without a certificate, of which HAProxy says that it is verified",
    binary(0x21, 0x11, IPV4_BLOCK, tlv(0x20, concat([hex("01 00000000"), tlv(0x21, "TLSv1.2"), tlv(0x28, "?")]))),
    { tls: { ...NO_TLS, isTls: true, protocol: "TLSv1.2", tlvs: [{ type: 0x28, value: bytesOf("?") }] } },
  ],
  [
    "a client's certificate that is not valid",
    binary(0x21, 0x11, IPV4_BLOCK, tlv(0x20, hex("03 00000012"))),
    { tls: { ...NO_TLS, isTls: true, hasCertificate: true } },
  ],
  ["a client without TLS", binary(0x21, 0x11, IPV4_BLOCK, tlv(0x20, hex("00 00000001"))), { tls: NO_TLS }],
  [
    // As an AWS Network Load Balancer sends it for a client of a VPC endpoint: PP2_TYPE_AWS with its subtype 1, and
    // padding; both of its checksums are right.
    "a header of AWS's load balancer",
    checked(
      hex(`${SIGNATURE} 2111 0054 c0000201 c6336402 c350 01bb 03 0004 00000000
        ea 0017 01 ${hexOf("vpce-08d2bf15fac5001c9")}
        04 0024 ${"00".repeat(36)}`),
    ),
    { ...IPV4, hasChecksum: true, tlvs: [{ type: 0xea, value: bytesOf("\x01vpce-08d2bf15fac5001c9") }] },
  ],
  ["LOCAL with a checksum, which is discarded", checked(binary(0x20, 0x00, tlv(3, "\0\0\0\0"))), {
    ...NOBODY,
    command: "LOCAL",
  }],
  ["LOCAL with a wrong checksum, which is discarded", binary(0x20, 0x00, tlv(3, hex("01020304"))), {
    ...NOBODY,
    command: "LOCAL",
  }],
  ["4,096 bytes", binary(0x21, 0x11, IPV4_BLOCK, tlv(0xe0, "a".repeat(4_096 - 16 - 12 - 3))), { version: 2 }],
];

function hexOf(text: string): string {
  return Array.from(bytesOf(text), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** CRC32c bit by bit, unlike the library's. */
function crc32c(bytes: Uint8Array): number {
  let checksum = 0xffff_ffff;
  for (const byte of bytes) {
    checksum ^= byte;
    for (let bit = 0; bit < 8; bit++) checksum = checksum & 1 ? checksum >>> 1 ^ 0x82f63b78 : checksum >>> 1;
  }
  return ~checksum >>> 0;
}

/** `header` with its checksum, which is its first vector and all 0, set right. */
function checked(header: Uint8Array): Uint8Array {
  const at = header.findIndex((byte, index) => index >= 16 && byte === 3 && header[index + 2] === 4) + 3;
  new DataView(header.buffer).setUint32(at, crc32c(header));
  return header;
}

for (const [what, bytes, wanted] of GOOD) {
  Deno.test(`parseProxyHeader() reads ${what}, whatever is behind it`, () => {
    for (const behind of ["", "\r\n", "PROXY ", "\0".repeat(5_000)]) {
      const parsed = parseProxyHeader(concat([bytes, bytesOf(behind)]));
      assert(parsed !== undefined);
      assertEquals(parsed.length, bytes.length);
      const found = facts(parsed.header);
      for (const [name, value] of Object.entries(wanted)) {
        assertEquals([name, found[name as keyof ProxyHeader]], [name, value]);
      }
    }
  });

  Deno.test(`parseProxyHeader() asks for more with each part of ${what}`, () => {
    for (let length = 0; length < bytes.length; length++) {
      assertEquals(parseProxyHeader(bytes.subarray(0, length)), undefined);
    }
  });
}

/** What is refused, and what the sentence says of it. */
const BAD: [string, Uint8Array, RegExp][] = [
  ["the first byte of HTTP", bytesOf("G"), /begins with one, and this one with "G" \(PROXY 2\.2\)$/],
  ["the first byte of TLS", hex("16"), /"\\x16" \(PROXY 2\.2\)/],
  ["a zero", hex("00"), /\(PROXY 2\.2\)/],
  ["version 1 in small letters", bytesOf("p"), /PROXY 2\.2/],
  ["a second space", bytesOf("PROXY  "), /PROXY 2\.2/],
  ["a tab", bytesOf("PROXY\t"), /PROXY 2\.2/],
  ["another protocol", bytesOf("PROXY TCP5"), /PROXY 2\.2/],
  ["UDP in version 1", bytesOf("PROXY U4"), /PROXY 2\.2/],
  ["more behind UNKNOWN without a space", bytesOf("PROXY UNKNOWNS"), /PROXY 2\.2/],
  ["a line of nothing", bytesOf("PROXY\r"), /PROXY 2\.2/],
  ["a single LF", bytesOf("PROXY UNKNOWN x\n"), /single CR or LF: "PROXY UNKNOWN x\\n" \(PROXY 2\.1\)/],
  ["a single CR", bytesOf("PROXY TCP4 \rx"), /single CR or LF/],
  ["107 bytes without an end", bytesOf(`PROXY UNKNOWN ${"x".repeat(93)}`), /more than 107 bytes/],
  ["an end behind 107 bytes", bytesOf(`PROXY UNKNOWN ${"x".repeat(92)}\r`), /more than 107 bytes/],
  ["a signature that goes on otherwise", hex("0d0a0d0a01"), /goes on otherwise \(PROXY 2\.2\)/],
  ["an empty line", bytesOf("\r\n\r\nG"), /goes on otherwise/],
  ["version 1 in the binary format", hex(`${SIGNATURE} 11`), /its version is 1, and 2 is the only one/],
  ["version 3", hex(`${SIGNATURE} 31`), /its version is 3/],
  ["an unassigned command", hex(`${SIGNATURE} 22`), /its command is 2, and only 0 and 1 are assigned/],
  ["a family that is none", hex(`${SIGNATURE} 21 41`), /family and transport are 0x41, which is none/],
  ["a transport that is none", hex(`${SIGNATURE} 21 13`), /family and transport are 0x13/],
  [
    "a length over the most",
    hex(`${SIGNATURE} 21 11 0ff1`),
    /announces 4097 bytes, and the most that are read are 4096/,
  ],
  ["the greatest length", hex(`${SIGNATURE} 20 00 ffff`), /announces 65551 bytes/],
  ["too few bytes for IPv4", hex(`${SIGNATURE} 21 11 000b`), /announces 27 bytes, too few for addresses of family 1/],
  ["too few bytes for IPv6", hex(`${SIGNATURE} 21 21 0023`), /too few for addresses of family 2/],
  ["too few bytes for Unix", hex(`${SIGNATURE} 21 31 00d7`), /too few for addresses of family 3/],
  ["one byte behind the addresses", binary(0x21, 0x11, IPV4_BLOCK, hex("04")), /vectors do not end where it ends/],
  ["two bytes behind the addresses", binary(0x21, 0x11, IPV4_BLOCK, hex("0400")), /vectors do not end/],
  ["a vector that is longer than the header", binary(0x21, 0x11, IPV4_BLOCK, hex("040001")), /vectors do not end/],
  [
    "a unique id of 129 bytes",
    binary(0x21, 0x11, IPV4_BLOCK, tlv(5, "a".repeat(129))),
    /unique id has 129 bytes, and 128 are the most \(PROXY 2\.2\.5\)/,
  ],
  ["a short vector of TLS", binary(0x21, 0x11, IPV4_BLOCK, tlv(0x20, "\0\0\0\0")), /tell of TLS .* \(PROXY 2\.2\.6\)/],
  [
    "a vector of TLS with an odd end",
    binary(0x21, 0x11, IPV4_BLOCK, tlv(0x20, hex("01 00000000 21 0007 54"))),
    /PROXY 2\.2\.6/,
  ],
  [
    "a wrong checksum",
    binary(0x21, 0x11, IPV4_BLOCK, tlv(3, hex("01020304"))),
    /its checksum is 1020304, and that of its bytes [0-9a-f]+ \(PROXY 2\.2\.3\)/,
  ],
  ["a checksum of 3 bytes", binary(0x21, 0x11, IPV4_BLOCK, tlv(3, "\0\0\0")), /a checksum has 4 bytes/],
  [
    "two checksums",
    binary(0x21, 0x11, IPV4_BLOCK, tlv(3, "\0\0\0\0"), tlv(3, "\0\0\0\0")),
    /a header has one at most \(PROXY 2\.2\.3\)/,
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

function messageOf(action: () => unknown): string {
  try {
    action();
  } catch (error) {
    return error instanceof Error ? error.message : String(error);
  }
  return "nothing was thrown";
}

/** Fields of a line of version 1 that are not as clause 2.1 wants them. */
const BAD_LINES: [string, string][] = [
  ["TCP4 192.0.2.1 198.51.100.2 50000", "single spaces"],
  ["TCP4 192.0.2.1 198.51.100.2 50000 443 ", "single spaces"],
  ["TCP4 192.0.2.1 198.51.100.2 50000 443 1", "single spaces"],
  ["TCP4  192.0.2.1 198.51.100.2 50000 443", "single spaces"],
  ["TCP4 192.0.2.1  198.51.100.2 50000", "is no port"],
  ["TCP4 192.0.2.1 198.51.100.2 050000 443", '"050000" is no port'],
  ["TCP4 192.0.2.1 198.51.100.2 50000 00", '"00" is no port'],
  ["TCP4 192.0.2.1 198.51.100.2 65536 443", '"65536" is no port'],
  ["TCP4 192.0.2.1 198.51.100.2 -1 443", '"-1" is no port'],
  ["TCP4 192.0.2.1 198.51.100.2 1e3 443", '"1e3" is no port'],
  ["TCP4 192.0.2.1 198.51.100.2 0x1 443", '"0x1" is no port'],
  ["TCP4 192.0.2.1 198.51.100.2 50000 \t443", '"\\t443" is no port'],
  ["TCP4 192.0.2.01 198.51.100.2 50000 443", '"192.0.2.01" is no IPv4 address'],
  ["TCP4 192.0.2.256 198.51.100.2 50000 443", "is no IPv4 address"],
  ["TCP4 192.0.2 198.51.100.2 50000 443", "is no IPv4 address"],
  ["TCP4 192.0.2.1. 198.51.100.2 50000 443", "is no IPv4 address"],
  ["TCP4 192.0.2.1 ::1 50000 443", '"::1" is no IPv4 address'],
  ["TCP4 192.0.2.1 example.org 50000 443", "is no IPv4 address"],
  ["TCP4 192.0.2.1 \x1b[2J 50000 443", '"\\x1b[2J" is no IPv4 address'],
  ["TCP6 192.0.2.1 ::1 50000 443", '"192.0.2.1" is no IPv6 address'],
  ["TCP6 ::1 ::1::2 50000 443", "is no IPv6 address"],
  ["TCP6 ::1 ::: 50000 443", "is no IPv6 address"],
  ["TCP6 ::1 :1:2:3:4:5:6:7 50000 443", "is no IPv6 address"],
  ["TCP6 ::1 1:2:3:4:5:6:7 50000 443", "is no IPv6 address"],
  ["TCP6 ::1 1:2:3:4:5:6:7:8:9 50000 443", "is no IPv6 address"],
  ["TCP6 ::1 1:2:3:4::5:6:7:8 50000 443", "is no IPv6 address"],
  ["TCP6 ::1 ::12345 50000 443", "is no IPv6 address"],
  ["TCP6 ::1 ::g 50000 443", "is no IPv6 address"],
  ["TCP6 ::1 [::1] 50000 443", "is no IPv6 address"],
  ["TCP6 ::1 fe80::1%eth0 50000 443", "is no IPv6 address"],
  ["TCP6 ::1 ::192.0.2.256 50000 443", "is no IPv6 address"],
  ["TCP6 ::1 1:2:3:4:5:6:7:192.0.2.1 50000 443", "is no IPv6 address"],
];

for (const [line, words] of BAD_LINES) {
  Deno.test(`parseProxyHeader() refuses ${Deno.inspect(line)}`, () => {
    const bytes = bytesOf(`PROXY ${line}\r\n`);
    const message = messageOf(() => parseProxyHeader(bytes));
    assert(message.includes(words) && message.endsWith("(PROXY 2.1)"), message);
    assertEquals(parseProxyHeader(bytes.subarray(0, -1)), undefined); // The text wants the whole line first.
  });
}

Deno.test("parseProxyHeader() quotes the beginning of what is no header, without control characters", () => {
  const message = messageOf(() => parseProxyHeader(bytesOf("\x1b[2J" + "a".repeat(1_000))));
  assertEquals(
    message,
    `Cannot read the PROXY header: a connection begins with one, and this one with "\\x1b[2J${
      "a".repeat(36)
    }"... (PROXY 2.2)`,
  );
});

Deno.test("what parseProxyHeader() returns is its own: the bytes may change", () => {
  const bytes = binary(
    0x21,
    0x11,
    IPV4_BLOCK,
    tlv(5, "id"),
    tlv(0xe0, "own"),
    tlv(0x20, concat([hex("0100000000"), tlv(0x28, "c")])),
  );
  const parsed = parseProxyHeader(bytes);
  bytes.fill(0);
  assertEquals(parsed?.header.uniqueId, bytesOf("id"));
  assertEquals(parsed?.header.tlvs, [{ type: 0xe0, value: bytesOf("own") }]);
  assertEquals(parsed?.header.tls?.tlvs, [{ type: 0x28, value: bytesOf("c") }]);
});

// RFC 3720, appendix B.4, has the first three, and the last one is what catalogues of checksums list.
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
  const header = encodeProxyHeader({ ...IPV4, authority: "example.org", hasChecksum: true });
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
    // It may be taken for a longer one, or the vector's own type may be what is broken.
    assert(parsed === undefined || !parsed.header.hasChecksum, `bit ${bit}`);
  }
});

// What is sent

/** What is encoded, and the bytes that it becomes. */
const ENCODED: [string, ProxyHeaderOptions, Uint8Array][] = [
  ["nothing known", {}, binary(0x21, 0x00)],
  ["LOCAL", { command: "LOCAL" }, binary(0x20, 0x00)],
  ["TCP over IPv4", IPV4, binary(0x21, 0x11, IPV4_BLOCK)],
  ["TCP over IPv6", IPV6, binary(0x21, 0x21, IPV6_BLOCK)],
  ["version 1", { version: 1, ...IPV4 }, bytesOf("PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\n")],
  ["version 1 with IPv6", { version: 1, ...IPV6 }, bytesOf("PROXY TCP6 2001:db8::1 2001:db8::2 50000 443\r\n")],
  ["version 1 with nothing known", { version: 1 }, bytesOf("PROXY UNKNOWN\r\n")],
  [
    "version 1 with a client of IPv4 at a server of IPv6, without dots",
    { version: 1, source: IPV4.source, destination: IPV6.destination },
    bytesOf("PROXY TCP6 ::ffff:c000:201 2001:db8::2 50000 443\r\n"),
  ],
  [
    "a client of IPv6 at a server of IPv4",
    { source: IPV6.source, destination: IPV4.destination },
    binary(0x21, 0x21, IPV6_BLOCK.subarray(0, 16), hex("00000000000000000000ffff c6336402 c350 01bb")),
  ],
  [
    "an address with a zone, which only its own machine knows",
    { source: tcp("2001:db8::1%eth0", 50_000), destination: IPV6.destination },
    binary(0x21, 0x21, IPV6_BLOCK),
  ],
  [
    "names, in the order of their types but for the own ones",
    { ...IPV4, authority: "example.org", alpnProtocol: "h2", tlvs: [{ type: 0xe0, value: bytesOf("a") }] },
    binary(0x21, 0x11, IPV4_BLOCK, tlv(1, "h2"), tlv(2, "example.org"), tlv(0xe0, "a")),
  ],
  [
    "TLS without a certificate",
    { ...IPV4, tls: { isTls: true, protocol: "TLSv1.3" } },
    binary(0x21, 0x11, IPV4_BLOCK, tlv(0x20, concat([hex("01 00000001"), tlv(0x21, "TLSv1.3")]))),
  ],
  ["a checksum", { ...IPV4, hasChecksum: true }, checked(binary(0x21, 0x11, IPV4_BLOCK, tlv(3, "\0\0\0\0")))],
];

for (const [what, options, wanted] of ENCODED) {
  Deno.test(`encodeProxyHeader() writes ${what}`, () => {
    assertEquals(encodeProxyHeader(options), wanted);
    assertEquals(parseProxyHeader(wanted)?.length, wanted.length);
  });
}

for (const [what, bytes] of GOOD) {
  Deno.test(`encodeProxyHeader() writes what was read of ${what} so that it reads the same`, () => {
    const header = parseProxyHeader(bytes)?.header ?? {};
    assertEquals(parseProxyHeader(encodeProxyHeader(header))?.header, header);
  });
}

type Mistake = [string, unknown, typeof TypeError | typeof RangeError, RegExp];

/** What cannot be sent. Plain JavaScript has no types. */
const MISTAKES: Mistake[] = [
  ["one address", { source: IPV4.source }, TypeError, /source and destination must be given together/],
  ["addresses of LOCAL", { command: "LOCAL", ...IPV4 }, TypeError, /"LOCAL" has no addresses/],
  ["another command", { command: "local" }, TypeError, /"command" must be "PROXY" or "LOCAL": it is "local"/],
  ["another version", { version: 3 }, RangeError, /"version" must be 1 or 2: it is 3/],
  ["LOCAL in version 1", { version: 1, command: "LOCAL" }, TypeError, /take version 2/],
  ["a name in version 1", { version: 1, ...IPV4, authority: "example.org" }, TypeError, /take version 2/],
  ["a checksum in version 1", { version: 1, ...IPV4, hasChecksum: true }, TypeError, /take version 2/],
  [
    "a Unix socket in version 1",
    { version: 1, source: { transport: "unix", path: "a" }, destination: { transport: "unix", path: "b" } },
    TypeError,
    /addresses of TCP: take version 2/,
  ],
  [
    "two kinds of addresses",
    { source: IPV4.source, destination: { transport: "unix", path: "b" } },
    TypeError,
    /must be of one kind, TCP, UDP or Unix: they are tcp and unix/,
  ],
  [
    "a name for an address",
    { source: tcp("localhost\n", 1), destination: IPV4.destination },
    TypeError,
    /has IP addresses and no names: "localhost\\n" is none/,
  ],
  [
    "a port out of range",
    { source: tcp("192.0.2.1", 65_536), destination: IPV4.destination },
    RangeError,
    /Port must be/,
  ],
  [
    "a long path",
    { source: { transport: "unix", path: "a".repeat(109) }, destination: { transport: "unix", path: "b" } },
    RangeError,
    /108 bytes at most/,
  ],
  ["a long unique id", { uniqueId: new Uint8Array(129) }, RangeError, /"uniqueId" has 128 bytes at most: it has 129/],
  ["a long vector", { tlvs: [{ type: 0xe0, value: new Uint8Array(65_536) }] }, RangeError, /65535 bytes at most/],
  [
    "too much of all",
    { tlvs: [{ type: 0xe0, value: new Uint8Array(65_000) }, { type: 0xe1, value: new Uint8Array(1_000) }] },
    RangeError,
    /65551 bytes at most: this has 66022/,
  ],
  [
    "a vector that has a field of its own",
    { tlvs: [{ type: 3, value: new Uint8Array(4) }] },
    TypeError,
    /type 0x03 has a field of its own/,
  ],
  ["a type out of range", { tlvs: [{ type: 256, value: new Uint8Array() }] }, RangeError, /from 0 to 255: it is 256/],
  ["an option that does not exist", { checksum: true }, TypeError, /Unknown option "checksum"/],
  ["an option of TLS that does not exist", { tls: { version: "1.3" } }, TypeError, /Unknown option "version"/],
];

for (const [what, options, Kind, sentence] of MISTAKES) {
  Deno.test(`encodeProxyHeader() and connect() refuse ${what}`, async () => {
    const proxyHeader = options as ProxyHeaderOptions;
    assertThrows(() => encodeProxyHeader(proxyHeader), Kind);
    assertMatch(messageOf(() => encodeProxyHeader(proxyHeader)), sentence);
    assert(await rejectionOf(connect({ port: 1, proxyHeader })) instanceof Kind); // Before it dials.
  });
}

// Whom a server believes

class Idle extends StreamRequestHandler {
  override handle() {}
}

/** A connection from anywhere, which its peer has left. */
class ConnFrom extends FakeConn implements Deno.Conn {
  override readonly remoteAddr: Deno.Addr;
  readonly readable = new ReadableStream<Uint8Array<ArrayBuffer>>();
  readonly writable = new WritableStream<Uint8Array<ArrayBufferLike>>();

  constructor(remoteAddr: Deno.Addr) {
    super();
    this.remoteAddr = remoteAddr;
    this.end();
  }

  ref(): void {}
  unref(): void {}
  [Symbol.dispose](): void {
    this.close();
  }
}

class FakeServer extends StreamServer {
  readonly #fake: FakeListener;

  constructor(fake: FakeListener, from: string[]) {
    super(Idle, { proxyProtocol: { from } });
    this.#fake = fake;
  }

  override listen(): Deno.Addr {
    return this.adopt(this.#fake, this.#fake.addr);
  }
}

/** Who is among whom. */
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

for (const [peer, isBelieved, from] of PEERS) {
  const name = peer === "" ? "a Unix socket's client without a name" : peer;
  Deno.test(`${name} is ${isBelieved ? "" : "not "}among ${from.join(", ")}`, async () => {
    const address = /^(\/|$)/.test(peer) ? { transport: "unix", path: peer } as const : tcp(peer, 50_000);
    const listener = new FakeListener([new ConnFrom(address)]);
    const server = new FakeServer(listener, from);
    const over = server.serveForever();
    await listener.drained;
    await server.shutdown();
    await over;
    // Whoever is believed has left without a header, and the others were not served at all.
    const { lost, refused, accepted } = server.stats;
    assertEquals([lost, refused, accepted], isBelieved ? [1, 0, 1] : [0, 1, 0]);
  });
}

/** What is no list of proxies. */
const BAD_OPTIONS: [string, unknown, RegExp][] = [
  ["no list", {}, /"proxyProtocol\.from" must list the proxies/],
  ["an empty list", { from: [] }, /"proxyProtocol\.from" must list the proxies/],
  ["text", { from: "10.0.0.0/8" }, /"proxyProtocol\.from" must list the proxies/],
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
  [
    "an address inside of its range",
    { from: ["10.0.0.1/8"] },
    /which is an address inside of 10\.0\.0\.0\/8: name one/,
  ],
  ["the same of IPv6", { from: ["2001:db8::1/32"] }, /inside of 2001:db8::\/32/],
  ["other others", { from: ["::1"], others: "believe" }, /"refuse" or "direct": it is "believe"/],
  ["an option that does not exist", { from: ["::1"], other: "direct" }, /Unknown option "other"/],
];

for (const [what, option, sentence] of BAD_OPTIONS) {
  Deno.test(`a server refuses proxyProtocol with ${what}`, () => {
    const proxyProtocol = option as ProxyProtocolOptions;
    assertThrows(() => new TcpServer({ port: 0 }, Idle, { proxyProtocol }), TypeError);
    assertMatch(messageOf(() => new TcpServer({ port: 0 }, Idle, { proxyProtocol })), sentence);
  });
}

Deno.test('UnixServer refuses proxyProtocol without "unix", as its clients have no addresses', () => {
  const make = (from: string[]) => () => new UnixServer({ path: "/run/app.sock" }, Idle, { proxyProtocol: { from } });
  assertThrows(make(["127.0.0.1"]), TypeError);
  assertMatch(messageOf(make(["127.0.0.1"])), /"proxyProtocol\.from" must list "unix"/);
  make(["127.0.0.1", "unix"])();
});

Deno.test("handshakeTimeout is an option of all servers of connections", () => {
  new TcpServer({ port: 0 }, Idle, { handshakeTimeout: Infinity });
  for (const handshakeTimeout of [0, -1, NaN]) {
    assertThrows(() => new TcpServer({ port: 0 }, Idle, { handshakeTimeout }), RangeError);
  }
});

// Any bytes at all

/** One that a fuzzer has changed. */
function mutated(bytes: Uint8Array, random: () => number): Uint8Array {
  const upTo = (most: number) => Math.floor(random() * (most + 1));
  let changed: Uint8Array = bytes.slice();
  for (let changes = 1 + upTo(3); changes > 0; changes--) {
    const at = upTo(changed.length - 1);
    const [before, behind] = [changed.subarray(0, at), changed.subarray(at)];
    switch (upTo(4)) {
      case 0:
        changed = concat([before, behind.subarray(upTo(8))]);
        break;
      case 1:
        changed = concat([before, Uint8Array.from({ length: upTo(8) }, () => upTo(255)), behind]);
        break;
      case 2:
        changed = concat([changed, changed.subarray(at)]);
        break;
      default:
        changed[at] = random() < 0.5 ? upTo(255) : (changed[at] ?? 0) ^ 1 << upTo(7);
    }
    if (changed.length === 0) return changed;
  }
  return changed;
}

Deno.test(`fuzz: ${FUZZED} headers that are wrong somewhere are read, refused, or too short, in any cuts alike`, () => {
  const random = randomNumbers(SEED);
  const counts = { read: 0, refused: 0, short: 0 };
  for (let round = 0; round < FUZZED; round++) {
    const [, good] = GOOD[Math.floor(random() * GOOD.length)] ?? ["", new Uint8Array()];
    const bytes = random() < 0.1 ? Uint8Array.from({ length: 40 }, () => random() * 256) : mutated(good, random);
    const outcome = outcomeOf(bytes);
    counts[outcome.kind]++;
    // More bytes change neither what was read nor what was refused, and fewer bytes only make it too short.
    const part = bytes.subarray(0, Math.floor(random() * bytes.length));
    const earlier = outcomeOf(part);
    if (earlier.kind !== "short") assertEquals({ round, ...earlier }, { round, ...outcome });
  }
  assert(counts.read > 0 && counts.refused > 0 && counts.short > 0, Deno.inspect(counts));
});

function outcomeOf(bytes: Uint8Array): { kind: "read" | "refused" | "short"; length?: number } {
  try {
    const parsed = parseProxyHeader(bytes);
    if (parsed === undefined) return { kind: "short" };
    assert(parsed.length > 0 && parsed.length <= bytes.length);
    // What was no UTF-8 has become longer.
    const isText = !Deno.inspect(parsed.header).includes("\ufffd");
    if (isText) assertEquals(parseProxyHeader(encodeProxyHeader(parsed.header))?.header, parsed.header);
    return { kind: "read", length: parsed.length };
  } catch (error) {
    if (!(error instanceof Deno.errors.InvalidData)) throw error;
    assertMatch(error.message, /^Cannot read the PROXY header: [ -~\xa0-\xff]+ \(PROXY 2(\.\d)*\)$/);
    return { kind: "refused" };
  }
}
