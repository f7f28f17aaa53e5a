import {
  connect,
  formatAddress,
  hostOf,
  inetNtop,
  inetPton,
  socketPair,
  StreamRequestHandler,
  TcpServer,
} from "../mod.ts";
import { assert, assertEquals, assertMatch } from "../deps.ts";
import { networkTest, rejectionOf, unixTest, untilRefused } from "./testing.ts";

class Idle extends StreamRequestHandler {
  override handle() {}
}

const texts: [Deno.Addr, string][] = [
  [{ transport: "tcp", hostname: "127.0.0.1", port: 8009 }, "127.0.0.1:8009"],
  [{ transport: "udp", hostname: "127.0.0.1", port: 53 }, "127.0.0.1:53"],
  [{ transport: "tcp", hostname: "0.0.0.0", port: 0 }, "0.0.0.0:0"],
  [{ transport: "tcp", hostname: "localhost", port: 80 }, "localhost:80"],
  [{ transport: "tcp", hostname: "::1", port: 8009 }, "[::1]:8009"],
  [{ transport: "udp", hostname: "fe80::1%eth0", port: 8009 }, "[fe80::1%eth0]:8009"],
  [{ transport: "tcp", hostname: "::", port: 65_535 }, "[::]:65535"],
  [{ transport: "tcp", hostname: "::ffff:127.0.0.1", port: 8009 }, "127.0.0.1:8009"],
  [{ transport: "tcp", hostname: "::FFFF:192.0.2.255", port: 1 }, "192.0.2.255:1"],
  [{ transport: "tcp", hostname: "64:ff9b::192.0.2.1", port: 1 }, "[64:ff9b::192.0.2.1]:1"],
  [{ transport: "unix", path: "/run/app.sock" }, "/run/app.sock"],
  [{ transport: "unixpacket", path: "/run/app.sock" }, "/run/app.sock"],
  [{ transport: "unix", path: "\0abstract" }, "@abstract"],
  [{ transport: "unix", path: "" }, "(unnamed Unix socket)"],
  [{ transport: "unix", path: "\0a\0b\n\x1b[31m" }, "@a\\x00b\\n\\x1b[31m"],
  [{ transport: "unixpacket", path: "/tmp/\u202egnp.sock" }, "/tmp/\\u202egnp.sock"],
  [{ transport: "tcp", hostname: "a\nb", port: 1 }, "a\\nb:1"],
];

for (const [address, text] of texts) {
  Deno.test(`formatAddress() writes ${Deno.inspect(address)} as ${text}`, () => {
    assertEquals(formatAddress(address), text);
  });
}

Deno.test("formatAddress() writes every kind of address as one line", () => {
  const text = formatAddress({ transport: "vsock", cid: 3, port: 8009 });
  assertMatch(text, /8009/);
  assert(!text.includes("\n"));
});

Deno.test("formatAddress() writes the addresses of a pair, which has no path", () => {
  const [ours, theirs] = socketPair();
  assertEquals(formatAddress(ours.remoteAddress), "(unnamed Unix socket)");
  assertEquals(formatAddress(theirs.localAddress), "(unnamed Unix socket)");
  ours.close();
  theirs.close();
});

const hosts: [string, string][] = [
  ["192.0.2.1", "192.0.2.1"],
  ["::ffff:192.0.2.1", "192.0.2.1"],
  ["::FFFF:c000:201", "192.0.2.1"],
  ["0:0:0:0:0:ffff:192.0.2.1", "192.0.2.1"],
  ["::1", "::/64"],
  ["::", "::/64"],
  ["2001:db8::1", "2001:db8::/64"],
  ["2001:db8::ffff:192.0.2.1", "2001:db8::/64"],
  ["2001:0DB8:0:0:1:2:3:4", "2001:db8::/64"],
  ["2001:db8:1:2::", "2001:db8:1:2::/64"],
  ["2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"],
  ["2001:db8:1:3:3:4:5:6", "2001:db8:1:3::/64"],
  ["2001:0:0:1::1", "2001:0:0:1::/64"],
  ["1::3:4:5:6", "1::/64"],
  ["1::2:3:4:5:6", "1:0:0:2::/64"],
  ["fe80::1%eth0", "fe80::1"],
  ["fe80::1", "fe80::1"],
  ["FE80::0001", "fe80::1"],
  ["fe80::2", "fe80::2"],
  ["febf::1", "febf::1"],
  ["fec0::1", "fec0::/64"],
  ["fe7f::1", "fe7f::/64"],
  ["fc00::1", "fc00::1"],
  ["fd12:3456:789a:1::1", "fd12:3456:789a:1::1"],
  ["fbff::1", "fbff::/64"],
  ["fe00::1", "fe00::/64"],
  ["localhost", "localhost"],
  ["::ffff:192.0.2.1%eth0", "192.0.2.1"],
];

for (const [hostname, host] of hosts) {
  Deno.test(`hostOf() takes ${hostname} for ${host}`, () => {
    assertEquals(hostOf({ transport: "tcp", hostname, port: 50_000 }), host);
  });
}

Deno.test("hostOf() knows no host of a Unix socket", () => {
  assertEquals(hostOf({ transport: "unix", path: "/run/app.sock" }), undefined);
});

/** Texts, and their bytes; none if they are no IP address. */
const addresses: [string, number[] | undefined, canonical?: string][] = [
  ["127.0.0.1", [127, 0, 0, 1]],
  ["0.0.0.0", [0, 0, 0, 0]],
  ["255.255.255.255", [255, 255, 255, 255]],
  ["256.0.0.1", undefined],
  ["1.2.3", undefined],
  ["1.2.3.4.5", undefined],
  ["1.2.3.", undefined],
  ["01.2.3.4", undefined],
  ["1.2.3.0x4", undefined],
  ["1.2.3. 4", undefined],
  ["1.2.3.-4", undefined],
  ["", undefined],
  ["localhost", undefined],
  ["::", groups()],
  ["::1", groups(0, 0, 0, 0, 0, 0, 0, 1)],
  ["1::", groups(1), "1::"],
  ["2001:db8::1", groups(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)],
  ["2001:0DB8:0:0:0:0:0:1", groups(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1), "2001:db8::1"],
  ["1:2:3:4:5:6:7:8", groups(1, 2, 3, 4, 5, 6, 7, 8)],
  ["1:0:0:2:0:0:0:3", groups(1, 0, 0, 2, 0, 0, 0, 3), "1:0:0:2::3"],
  ["1:0:2:3:4:5:6:7", groups(1, 0, 2, 3, 4, 5, 6, 7)],
  ["1::2:3:4:5:6:7", groups(1, 0, 2, 3, 4, 5, 6, 7), "1:0:2:3:4:5:6:7"],
  ["::ffff:192.0.2.1", groups(0, 0, 0, 0, 0, 0xffff, 0xc000, 0x201), "::ffff:c000:201"],
  ["1:2:3:4:5:6:192.0.2.1", groups(1, 2, 3, 4, 5, 6, 0xc000, 0x201), "1:2:3:4:5:6:c000:201"],
  ["::192.0.2.256", undefined],
  ["192.0.2.1::", undefined],
  ["1:2:3:4:5:6:7", undefined],
  ["1:2:3:4:5:6:7:8:9", undefined],
  ["1:2:3:4:5:6:7:192.0.2.1", undefined],
  ["1::2:3:4:5:6:7:8", undefined],
  ["1::2::3", undefined],
  [":::", undefined],
  [":1:2:3:4:5:6:7", undefined],
  ["1:2:3:4:5:6:7:", undefined],
  ["12345::", undefined],
  ["g::", undefined],
  ["fe80::1%eth0", undefined],
  ["[::1]", undefined],
  ["::1/64", undefined],
];

/** The bytes of eight groups; those left out are 0. */
function groups(...values: number[]): number[] {
  return Array.from({ length: 8 }, (_, index) => values[index] ?? 0).flatMap((value) => [value >> 8, value & 255]);
}

for (const [text, bytes, canonical = text] of addresses) {
  const what = bytes === undefined ? "no IP address" : `the bytes of ${canonical}`;
  Deno.test(`inetPton() takes ${JSON.stringify(text)} for ${what}`, () => {
    const parsed = inetPton(text);
    assertEquals(parsed && [...parsed], bytes);
    if (parsed !== undefined) assertEquals(inetNtop(parsed), canonical);
  });
}

const flags: [string, Parameters<typeof connect>[0], string][] = [
  ["a TCP address", { hostname: "127.0.0.1", port: 8009 }, "--allow-net=127.0.0.1:8009"],
  ["an IPv6 address", { hostname: "::1", port: 8009 }, "--allow-net=[::1]:8009"],
  ["a Unix socket", { path: "/run/a.sock" }, "--allow-read=/run/a.sock --allow-write=/run/a.sock"],
];

for (const [what, address, flag] of flags) {
  Deno.test({
    name: `connect() to ${what} without permission names the flag to run with`,
    permissions: "none",
    fn: async () => {
      const error = await rejectionOf(connect(address));
      assert(error instanceof Deno.errors.NotCapable);
      assert(error.message.includes(flag), error.message);
    },
  });
}

Deno.test({
  name: "listen() on port 0 without permission names a flag that permits every port",
  permissions: "none",
  fn: () => {
    const server = new TcpServer({ hostname: "127.0.0.1", port: 0 }, Idle);
    assertMatch(thrownBy(() => server.listen()).message, /--allow-net=127\.0\.0\.1$/);
  },
});

networkTest("listen() on an address in use says so, and names it", async () => {
  await using first = new TcpServer({ hostname: "127.0.0.1", port: 0 }, Idle);
  const { port } = portOf(first.listen());
  const second = new TcpServer({ hostname: "127.0.0.1", port }, Idle);
  const error = thrownBy(() => second.listen());
  assert(error instanceof Deno.errors.AddrInUse);
  assertMatch(error.message, new RegExp(`127\\.0\\.0\\.1:${port}: address already in use; stop `));
  assert("code" in error && error.code === "EADDRINUSE");
});

networkTest("listen() on an address of another machine says so", () => {
  const server = new TcpServer({ hostname: "192.0.2.1", port: 0 }, Idle);
  const error = thrownBy(() => server.listen());
  assert(error instanceof Deno.errors.AddrNotAvailable);
  assertMatch(
    error.message,
    /192\.0\.2\.1:0: (cannot assign requested address|address not available); this machine has no such address, choose one of its own$/,
  );
});

networkTest("connect() to a port without a server says so, and names it", async () => {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  listener.close();
  await untilRefused(() => Deno.connect({ port }));
  const error = await rejectionOf(connect({ port }));
  assert(error instanceof Deno.errors.ConnectionRefused);
  assertMatch(error.message, new RegExp(`127\\.0\\.0\\.1:${port}: connection refused; start `));
});

unixTest("connect() to a socket that does not exist says so, and names it", async (folder) => {
  const path = `${folder}/none.sock`;
  const error = await rejectionOf(connect({ path }));
  assert(error instanceof Deno.errors.NotFound);
  assert(error.message.includes(`${path}: no such file or directory; start the server`), error.message);
});

function portOf(address: Deno.Addr): Deno.NetAddr {
  if (!("port" in address && "hostname" in address)) throw new TypeError("Expected an address with a port");
  return address;
}

function thrownBy(fn: () => unknown): Error {
  try {
    fn();
  } catch (error) {
    if (error instanceof Error) return error;
    throw error;
  }
  throw new TypeError("Expected an exception");
}
