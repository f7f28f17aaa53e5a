/**
 * PROXY headers for the tests: how to put them together byte by byte, without the
 * library, and a table of good ones with what they say.
 *
 * @module
 */

import type { ProxyHeader, ProxyTls } from "../../extras/proxy_protocol.ts";
import { bytesOf, concat } from "../fake_conn.ts";

/** PROXY 2.2. */
export const SIGNATURE = "0d0a0d0a000d0a515549540a";

/** The bytes of hexadecimal digits; spaces are for the reader. */
export function hex(digits: string): Uint8Array {
  return Uint8Array.from(digits.replaceAll(/\s/g, "").match(/../g) ?? [], (byte) => parseInt(byte, 16));
}

function hexOf(text: string): string {
  return Array.from(bytesOf(text), (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A type-length-value vector. */
export function tlv(type: number, value: Uint8Array | string): Uint8Array {
  const bytes = bytesOf(value);
  return concat([new Uint8Array([type, bytes.length >> 8, bytes.length & 0xff]), bytes]);
}

/** A version 2 header with the right length. */
export function binary(versionAndCommand: number, family: number, ...rest: Uint8Array[]): Uint8Array {
  const block = concat(rest);
  const fixed = new Uint8Array([versionAndCommand, family, block.length >> 8, block.length & 0xff]);
  return concat([hex(SIGNATURE), fixed, block]);
}

/** A Unix address of version 2. */
export function path(text: string): Uint8Array {
  return concat([bytesOf(text), new Uint8Array(108 - text.length)]);
}

/** CRC32c with its bits in the other order than the library's. */
export function crc32c(bytes: Uint8Array): number {
  let sum = 0xffff_ffff;
  for (const byte of bytes) {
    sum ^= reversed(byte, 8) << 24;
    for (let bit = 0; bit < 8; bit++) sum = sum & 0x8000_0000 ? sum << 1 ^ 0x1edc6f41 : sum << 1;
  }
  return ~reversed(sum, 32) >>> 0;
}

function reversed(value: number, bits: number): number {
  let result = 0;
  for (let bit = 0; bit < bits; bit++) result = result << 1 | value >>> bit & 1;
  return result;
}

/** `header` with the right checksum, which is 0 until now. */
export function checked(header: Uint8Array): Uint8Array {
  const at = header.findIndex((byte, index) => index >= 16 && byte === 3 && header[index + 2] === 4) + 3;
  new DataView(header.buffer).setUint32(at, crc32c(header));
  return header;
}

export function tcp(hostname: string, port: number): Deno.NetAddr {
  return { transport: "tcp", hostname, port };
}

function udp(hostname: string, port: number): Deno.NetAddr {
  return { transport: "udp", hostname, port };
}

/** From 192.0.2.1:50000 to 198.51.100.2:443. */
export const IPV4_BLOCK = hex("c0000201 c6336402 c350 01bb");
export const IPV4 = { source: tcp("192.0.2.1", 50_000), destination: tcp("198.51.100.2", 443) };

/** From [2001:db8::1]:50000 to [2001:db8::2]:443. */
export const IPV6_BLOCK = hex("20010db8000000000000000000000001 20010db8000000000000000000000002 c350 01bb");
export const IPV6 = { source: tcp("2001:db8::1", 50_000), destination: tcp("2001:db8::2", 443) };

const LONGEST_IPV6 = "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
const UNKNOWN = { source: undefined, destination: undefined, tlvs: [] };
const LOCAL = { ...UNKNOWN, version: 2, command: "LOCAL", authority: undefined } as const;
const NO_TLS: ProxyTls = {
  isTls: false,
  isVerified: false,
  protocol: undefined,
  commonName: undefined,
  cipher: undefined,
  tlvs: [],
};

/** A TCP header over IPv4 with vectors. */
function withTlvs(...tlvs: Uint8Array[]): Uint8Array {
  return binary(0x21, 0x11, IPV4_BLOCK, ...tlvs);
}

/** Good headers: what each is, its bytes, and what they say. */
export const GOOD: [what: string, bytes: Uint8Array, said: Partial<ProxyHeader>][] = [
  // Clause 2.1
  [
    "the example of clause 2.1",
    bytesOf("PROXY TCP4 192.168.0.1 192.168.0.11 56324 443\r\n"),
    { version: 1, command: "PROXY", source: tcp("192.168.0.1", 56_324), destination: tcp("192.168.0.11", 443) },
  ],
  [
    "the longest line with IPv4 of clause 2.1",
    bytesOf("PROXY TCP4 255.255.255.255 255.255.255.255 65535 65535\r\n"),
    { version: 1, source: tcp("255.255.255.255", 65_535), destination: tcp("255.255.255.255", 65_535) },
  ],
  [
    "the longest line with IPv6 of clause 2.1",
    bytesOf(`PROXY TCP6 ${LONGEST_IPV6} ${LONGEST_IPV6} 65535 65535\r\n`),
    { version: 1, source: tcp(LONGEST_IPV6, 65_535), destination: tcp(LONGEST_IPV6, 65_535) },
  ],
  ["the shortest UNKNOWN of clause 2.1", bytesOf("PROXY UNKNOWN\r\n"), { version: 1, command: "PROXY", ...UNKNOWN }],
  [
    "the longest UNKNOWN of clause 2.1",
    bytesOf(`PROXY UNKNOWN ${LONGEST_IPV6} ${LONGEST_IPV6} 65535 65535\r\n`),
    { version: 1, ...UNKNOWN },
  ],
  ["UNKNOWN with anything in its line", bytesOf("PROXY UNKNOWN \xff  TCP4 :-)\r\n"), { version: 1, ...UNKNOWN }],
  [
    "version 1 with zeros",
    bytesOf("PROXY TCP4 0.0.0.0 10.0.0.1 0 0\r\n"),
    { source: tcp("0.0.0.0", 0), destination: tcp("10.0.0.1", 0) },
  ],
  [
    "version 1 with short IPv6 addresses and capital letters",
    bytesOf("PROXY TCP6 2001:DB8::1 ::1 50000 443\r\n"),
    { source: tcp("2001:db8::1", 50_000), destination: tcp("::1", 443) },
  ],
  [
    "version 1 with a mapped IPv4 address as inet_ntop(3) writes it",
    bytesOf("PROXY TCP6 ::ffff:192.0.2.1 2001:db8::2 50000 443\r\n"),
    { source: tcp("::ffff:192.0.2.1", 50_000), destination: tcp("2001:db8::2", 443) },
  ],

  // Clause 2.2, addresses
  ["TCP over IPv4", withTlvs(), { version: 2, command: "PROXY", ...IPV4, tlvs: [] }],
  ["TCP over IPv6", binary(0x21, 0x21, IPV6_BLOCK), { version: 2, ...IPV6 }],
  [
    "a mapped IPv4 address in version 2",
    binary(0x21, 0x21, hex("00000000000000000000ffff c0000201"), IPV6_BLOCK.subarray(16)),
    { source: tcp("::ffff:192.0.2.1", 50_000), destination: IPV6.destination },
  ],
  [
    "UDP over IPv4",
    binary(0x21, 0x12, IPV4_BLOCK),
    { source: udp("192.0.2.1", 50_000), destination: udp("198.51.100.2", 443) },
  ],
  [
    "UDP over IPv6",
    binary(0x21, 0x22, IPV6_BLOCK),
    { source: udp("2001:db8::1", 50_000), destination: udp("2001:db8::2", 443) },
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
    "Unix datagrams with an abstract name and with none",
    binary(0x21, 0x32, path("\0client"), path("")),
    { source: { transport: "unixpacket", path: "\0client" }, destination: { transport: "unixpacket", path: "" } },
  ],
  [
    "a Unix path that fills its place",
    binary(0x21, 0x31, path("a".repeat(108)), path("b")),
    { source: { transport: "unix", path: "a".repeat(108) }, destination: { transport: "unix", path: "b" } },
  ],
  ["LOCAL with nothing", binary(0x20, 0x00), LOCAL],
  ["LOCAL with addresses", binary(0x20, 0x11, IPV4_BLOCK), LOCAL],
  ["LOCAL with a family that is not assigned", binary(0x20, 0xff, IPV4_BLOCK), LOCAL],
  ["LOCAL with bytes of any kind", binary(0x20, 0x00, hex("01ffff")), LOCAL],
  ["LOCAL with too few bytes for its family", binary(0x20, 0x11, hex("01")), LOCAL],
  ["LOCAL with vectors", binary(0x20, 0x00, tlv(2, "example.org")), LOCAL],
  ["LOCAL with a checksum", checked(binary(0x20, 0x00, tlv(3, "\0\0\0\0"))), LOCAL],
  ["LOCAL with a wrong checksum", binary(0x20, 0x00, tlv(3, hex("01020304"))), LOCAL],
  ["an unspecified connection", binary(0x21, 0x00), { version: 2, command: "PROXY", ...UNKNOWN }],
  ["an unspecified connection with unknown addresses", binary(0x21, 0x00, hex("0102")), { version: 2, ...UNKNOWN }],
  [
    "an unspecified family",
    binary(0x21, 0x01, tlv(2, "example.org")),
    { source: undefined, destination: undefined, authority: "example.org" },
  ],
  [
    "an unspecified transport",
    binary(0x21, 0x10, IPV4_BLOCK, tlv(2, "example.org")),
    { source: undefined, destination: undefined, authority: "example.org" },
  ],

  // Clause 2.2, vectors
  [
    "vectors with fields",
    withTlvs(tlv(1, "h2"), tlv(2, "bücher.example"), tlv(5, "\0\x7f")),
    { ...IPV4, alpnProtocol: "h2", authority: "bücher.example", uniqueId: bytesOf("\0\x7f") },
  ],
  ["a unique id of 128 bytes", withTlvs(tlv(5, "a".repeat(128))), { uniqueId: bytesOf("a".repeat(128)) }],
  [
    "padding, which is left out",
    withTlvs(tlv(4, ""), tlv(4, "\0\0\0"), tlv(2, "example.org")),
    { authority: "example.org", tlvs: [{ type: 2, value: bytesOf("example.org") }] },
  ],
  [
    "the first of two vectors of a type, and text that is not UTF-8",
    withTlvs(tlv(2, new Uint8Array([0x61, 0xff])), tlv(2, "example.org")),
    { authority: "a\ufffd" },
  ],
  [
    "vectors without fields",
    withTlvs(tlv(0xe0, "a"), tlv(0xff, ""), tlv(0xe0, "b"), tlv(0x30, "blue")),
    {
      tlvs: [
        { type: 0xe0, value: bytesOf("a") },
        { type: 0xff, value: new Uint8Array() },
        { type: 0xe0, value: bytesOf("b") },
        { type: 0x30, value: bytesOf("blue") },
      ],
    },
  ],
  [
    "TLS with a verified certificate, as HAProxy reports it",
    withTlvs(tlv(
      0x20,
      concat([hex("07 00000000"), tlv(0x21, "TLSv1.3"), tlv(0x23, "TLS_AES_256_GCM_SHA384"), tlv(0x22, "alice")]),
    )),
    {
      tls: {
        isTls: true,
        isVerified: true,
        protocol: "TLSv1.3",
        commonName: "alice",
        cipher: "TLS_AES_256_GCM_SHA384",
        tlvs: [
          { type: 0x21, value: bytesOf("TLSv1.3") },
          { type: 0x23, value: bytesOf("TLS_AES_256_GCM_SHA384") },
          { type: 0x22, value: bytesOf("alice") },
        ],
      },
    },
  ],
  [
    "TLS without a certificate, which HAProxy reports as verified",
    withTlvs(tlv(0x20, concat([hex("01 00000000"), tlv(0x21, "TLSv1.2")]))),
    { tls: { ...NO_TLS, isTls: true, protocol: "TLSv1.2", tlvs: [{ type: 0x21, value: bytesOf("TLSv1.2") }] } },
  ],
  ["a certificate of the connection", withTlvs(tlv(0x20, hex("03 00000000"))), {
    tls: { ...NO_TLS, isTls: true, isVerified: true },
  }],
  ["a certificate of the TLS session", withTlvs(tlv(0x20, hex("05 00000000"))), {
    tls: { ...NO_TLS, isTls: true, isVerified: true },
  }],
  ["a certificate that is not valid", withTlvs(tlv(0x20, hex("03 00000012"))), { tls: { ...NO_TLS, isTls: true } }],
  ["a client without TLS", withTlvs(tlv(0x20, hex("00 00000001"))), { tls: NO_TLS }],
  [
    // Of a client behind a VPC endpoint: PP2_TYPE_AWS with its subtype 1, and padding.
    "a captured header of AWS's load balancer",
    checked(
      hex(`${SIGNATURE} 2111 0054 c0000201 c6336402 c350 01bb 03 0004 00000000
        ea 0017 01 ${hexOf("vpce-08d2bf15fac5001c9")}
        04 0024 ${"00".repeat(36)}`),
    ),
    { ...IPV4, tlvs: [{ type: 0xea, value: bytesOf("\x01vpce-08d2bf15fac5001c9") }] },
  ],
  ["4,096 bytes", withTlvs(tlv(0xe0, "a".repeat(4_096 - 16 - 12 - 3))), { version: 2, ...IPV4 }],
];
