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
  TcpServer,
  UnixServer,
} from "../mod.ts";
import { assert, assertEquals, assertMatch, assertThrows } from "../deps.ts";
import { bytesOf, concat, randomNumbers } from "./fake_conn.ts";
import { rejectionOf, scaled } from "./testing.ts";

/** Headers that are made of any bytes, and good ones with some bytes changed. */
const FUZZED = scaled(20_000, 2_000_000);

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
  ["the short line of an unknown connection of clause 2.1", bytesOf("PROXY UNKNOWN\r\n"), { version: 1 }],
  [
    "the longest line of an unknown connection of clause 2.1",
    bytesOf(`PROXY UNKNOWN ${LONGEST_IPV6} ${LONGEST_IPV6} 65535 65535\r\n`),
    { version: 1 },
  ],
  ["an unknown connection with anything in its line", bytesOf("PROXY UNKNOWN \xff  TCP4 :-)\r\n"), { version: 1 }],
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
  ["LOCAL with nothing", binary(0x20, 0x00), { version: 2, command: "LOCAL" }],
  ["LOCAL with addresses, which are discarded", binary(0x20, 0x11, IPV4_BLOCK), { command: "LOCAL" }],
  ["LOCAL with a family that is none, which is ignored", binary(0x20, 0xff, IPV4_BLOCK), { command: "LOCAL" }],
  ["LOCAL with bytes of any kind", binary(0x20, 0x00, hex("01ffff")), { command: "LOCAL" }],
  ["LOCAL with vectors, which are discarded", binary(0x20, 0x00, tlv(2, "example.org")), { command: "LOCAL" }],
  ["an unspecified connection", binary(0x21, 0x00), { version: 2 }],
  ["an unspecified connection with addresses of some kind", binary(0x21, 0x00, hex("0102")), { version: 2 }],
  ["an unspecified family", binary(0x21, 0x01, tlv(2, "example.org")), { authority: "example.org" }],
  ["an unspecified transport", binary(0x21, 0x10, IPV4_BLOCK, tlv(2, "example.org")), { authority: "example.org" }],
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
  ["LOCAL with a checksum", checked(binary(0x20, 0x00, tlv(3, "\0\0\0\0"))), { command: "LOCAL", hasChecksum: true }],
  ["4,096 bytes", binary(0x21, 0x11, IPV4_BLOCK, tlv(0xe0, "a".repeat(4_096 - 16 - 12 - 3))), { version: 2 }],
];

function hexOf(text: string): string {
  return Array.from(bytesOf(text), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** `header` with its checksum, which is its first vector, set right; bit by bit, unlike the library. */
function checked(header: Uint8Array): Uint8Array {
  const at = header.indexOf(3, 16) + 3;
  let checksum = 0xffff_ffff;
  for (const byte of header) {
    checksum ^= byte;
    for (let bit = 0; bit < 8; bit++) checksum = checksum & 1 ? checksum >>> 1 ^ 0x82f63b78 : checksum >>> 1;
  }
  new DataView(header.buffer).setUint32(at, ~checksum >>> 0);
  return header;
}

for (const [what, bytes, wanted] of GOOD) {
  Deno.test(`parseProxyHeader() reads ${what}, whatever is behind it`, () => {
    for (const behind of ["", "\r\n", "PROXY ", "\0".repeat(5_000)]) {
      const parsed = parseProxyHeader(concat([bytes, bytesOf(behind)]));
      assert(parsed !== undefined);
      assertEquals(parsed.length, bytes.length);
      const found = facts(parsed.header);
      for (const [name, value] of Object.entries(wanted)) assertEquals([name, found[name as keyof ProxyHeader]], [name, value]);
      if (wanted.source === undefined) assertEquals([found.source, found.destination].filter(Boolean).length % 2, 0);
    }
  });

  Deno.test(`parseProxyHeader() asks for more with each part of ${what}`, () => {
    for (let length = 0; length < bytes.length; length++) {
      assertEquals(parseProxyHeader(bytes.subarray(0, length)), undefined);
    }
  });
}
