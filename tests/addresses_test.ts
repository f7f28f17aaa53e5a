import { connect, formatAddress, hostOf, socketPair, StreamRequestHandler, TcpServer } from "../mod.ts";
import { assert, assertEquals, assertMatch } from "../deps.ts";
import { networkTest, rejectionOf, unixTest } from "./testing.ts";

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
  ["fe80::1%eth0", "fe80::/64"],
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
  assertMatch(error.message, new RegExp(`127\\.0\\.0\\.1:${port}: the address is in use`));
  assert("code" in error && error.code === "EADDRINUSE");
});

networkTest("listen() on an address of another machine says so", () => {
  const server = new TcpServer({ hostname: "192.0.2.1", port: 0 }, Idle);
  const error = thrownBy(() => server.listen());
  assert(error instanceof Deno.errors.AddrNotAvailable);
  assertMatch(error.message, /192\.0\.2\.1:0: this machine has no such address/);
});

networkTest("connect() to a port where nobody listens says so, and names it", async () => {
  const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  listener.close();
  const error = await rejectionOf(connect({ port }));
  assert(error instanceof Deno.errors.ConnectionRefused);
  assertMatch(error.message, new RegExp(`127\\.0\\.0\\.1:${port}: nobody listens there`));
});

unixTest("connect() to a socket that does not exist says so, and names it", async (folder) => {
  const path = `${folder}/none.sock`;
  const error = await rejectionOf(connect({ path }));
  assert(error instanceof Deno.errors.NotFound);
  assert(error.message.includes(`${path}: no such file`), error.message);
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
