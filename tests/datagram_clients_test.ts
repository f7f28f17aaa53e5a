/** The client of datagrams, over UDP. */

import { assert, assertEquals, assertMatch, assertRejects, assertThrows } from "../deps.ts";
import { DatagramClient, UdpServer } from "../mod.ts";
import {
  ask,
  decoded,
  EchoDatagram,
  handlerOf,
  PATIENCE_MS,
  PlainSocket,
  receiveLate,
  withServer,
} from "./datagrams.ts";
import { networkTest, rejectionOf, until, withDeno } from "./testing.ts";
import { promises as dns } from "node:dns";
import { freePort } from "./programs.ts";

/** Whether this machine has the address ::1. */
function hasIpv6(): boolean {
  try {
    Deno.listenDatagram({ transport: "udp", hostname: "::1", port: 0 }).close();
    return true;
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) return true; // The test is left out.
    return false;
  }
}

// --- Options -----------------------------------------------------------------------

for (
  const [name, options, kind] of [
    ["a timeout of 0", { port: 9, timeout: 0 }, RangeError],
    ["a port out of range", { port: 65_536 }, RangeError],
    ["an empty hostname", { hostname: "", port: 9 }, TypeError],
    ["an empty path", { path: "", localPath: "/tmp/a.sock" }, TypeError],
    ["an empty path of its own", { path: "/tmp/a.sock", localPath: "" }, TypeError],
    ["an option that does not exist", { ...{ port: 9 }, ...{ retries: 1 } }, TypeError],
    ["an option of Unix sockets that does not exist", { ...{ path: "a", localPath: "b" }, ...{ port: 1 } }, TypeError],
  ] as const
) {
  Deno.test({
    name: `DatagramClient refuses ${name}`,
    permissions: "none",
    fn: () => void assertThrows(() => new DatagramClient(options).close(), kind),
  });
}

Deno.test("a client without the permission is made, and its first call says which flag is missing", {
  permissions: { net: false },
}, async () => {
  const client = new DatagramClient({ port: 8009 });
  for (const call of [() => client.send("hello"), () => client.recv()]) {
    const error = await rejectionOf(call());
    assert(error instanceof Deno.errors.NotCapable);
    assertMatch(error.message, /^Cannot [^\n]*permission is missing; run again with --allow-net=127\.0\.0\.1$/);
  }
  client.close();
});

// --- Finding the server --------------------------------------------------------------

/** Names of 127.0.0.1. */
const SPELLINGS = {
  "as it is": "127.0.0.1",
  "of all interfaces": "0.0.0.0",
  "written short": "127.1",
  "by name": "localhost",
  "by name in capitals": "LOCALHOST",
  "in the form of IPv6": "::ffff:127.0.0.1",
  "in the form of IPv6, in hexadecimal": "::ffff:7f00:1",
};

for (const [name, hostname] of Object.entries(SPELLINGS)) {
  networkTest(`a client takes the answer of a server whose address is given ${name}`, async () => {
    const server = new UdpServer({ hostname: "127.0.0.1", port: 0 }, EchoDatagram);
    await withServer(server, async (_server, { port }, dial) => {
      assertEquals(await ask(dial({ hostname, port, timeout: 1_000 }), "hello"), "hello");
    });
  });
}

if (hasIpv6()) {
  for (const hostname of ["::1", "0:0:0:0:0:0:0:1", "[::1]", "::"]) {
    networkTest(`a client takes the answer of a server over IPv6 whose address is written ${hostname}`, async () => {
      const server = new UdpServer({ hostname: "::1", port: 0 }, EchoDatagram);
      await withServer(server, async (_server, { port }, dial) => {
        assertEquals(await ask(dial({ hostname, port, timeout: 1_000 }), "hello"), "hello");
      });
    });
  }
}

/** Runs `test` while `names` resolve, and tells how often each was asked for. */
async function withNames(
  names: Record<string, string>,
  test: (asked: string[]) => Promise<void>,
): Promise<void> {
  const { lookup } = dns;
  const asked: string[] = [];
  const fake = (name: string) => {
    asked.push(name);
    const address = names[name];
    if (address === undefined) return Promise.reject(Object.assign(new Error(`getaddrinfo ENOTFOUND ${name}`)));
    return Promise.resolve({ address, family: address.includes(":") ? 6 : 4 });
  };
  Reflect.set(dns, "lookup", fake);
  try {
    await test(asked);
  } finally {
    Reflect.set(dns, "lookup", lookup);
  }
}

for (const [family, address] of [["IPv4", "127.0.0.1"], ["IPv6", "::1"]] as const) {
  if (family === "IPv6" && !hasIpv6()) continue;
  networkTest(`a client finds a server whose name has only an ${family} address, and resolves it once`, async () => {
    await withNames({ "only.example": address }, async (asked) => {
      const server = new UdpServer({ hostname: address, port: 0 }, EchoDatagram);
      await withServer(server, async (_server, { port }, dial) => {
        const client = dial({ hostname: "only.example", port });
        for (const text of ["one", "two"]) assertEquals(await ask(client, text), text);
      });
      assertEquals(asked, ["only.example"]);
    });
  });
}

networkTest("a client takes localhost for 127.0.0.1, as servers do, and asks nobody", async () => {
  await withNames({ localhost: "::1" }, async (asked) => {
    await withServer(
      new UdpServer({ hostname: "localhost", port: 0 }, EchoDatagram),
      async (_server, { port }, dial) => {
        assertEquals(await ask(dial({ hostname: "localhost", port }), "hello"), "hello");
      },
    );
    assertEquals(asked, []);
  });
});

networkTest("a name that cannot be resolved is one sentence, and is asked for again", async () => {
  const names: Record<string, string> = {};
  await withNames(names, async () => {
    await withServer(new UdpServer({ port: 0 }, EchoDatagram), async (_server, { port }, dial) => {
      const client = dial({ hostname: "late.example", port });
      const { message } = await rejectionOf(client.send("hello"));
      assertMatch(message, /^Cannot send to late\.example:\d+: [^\n]*ENOTFOUND[^\n]*$/);
      names["late.example"] = "127.0.0.1";
      assertEquals(await ask(client, "hello"), "hello");
    });
  });
});

interface FakeDatagram {
  from: Deno.NetAddr;
  text: string;
}

/** Runs `test` with sockets that receive `datagrams`, and tells where they were bound and to whom they have sent. */
async function withSockets(
  datagrams: FakeDatagram[],
  test: (seen: { bound: string[]; sentTo: string[] }) => Promise<void>,
): Promise<void> {
  const seen = { bound: [] as string[], sentTo: [] as string[] };
  const open = ({ hostname = "" }: Deno.UdpListenOptions) => {
    seen.bound.push(hostname);
    return {
      receive: (into: Uint8Array) => {
        const next = datagrams.shift();
        if (next === undefined) return new Promise(() => {});
        const { written } = new TextEncoder().encodeInto(next.text, into);
        return Promise.resolve([into.subarray(0, written), next.from]);
      },
      send: (data: Uint8Array, to: Deno.NetAddr) => {
        seen.sentTo.push(to.hostname);
        return Promise.resolve(data.length);
      },
      close: () => {},
    };
  };
  await withDeno("listenDatagram", open, () => test(seen));
}

/** How a server's address is given, how its datagrams come, and where the client's own socket is. */
const SENDERS = [
  { asked: "fe80::1%eth0", comes: "fe80::1", bound: "::" },
  { asked: "fe80::1%2", comes: "fe80::1%eth0", bound: "::" },
  { asked: "FE80:0::1%eth0", comes: "fe80::1%2", bound: "::" },
  { asked: "192.0.2.7", comes: "::ffff:192.0.2.7", bound: "0.0.0.0" },
  { asked: "::ffff:192.0.2.7", comes: "192.0.2.7", bound: "::" },
  { asked: "127.0.0.2", comes: "127.0.0.2", bound: "127.0.0.1" },
  { asked: "0.0.0.0", comes: "192.0.2.7", bound: "0.0.0.0" },
  { asked: "::", comes: "2001:db8::7", bound: "::" },
  { asked: "0:0::0:1", comes: "::1", bound: "::1" },
  { asked: "::2", comes: "::2", bound: "::" },
];

for (const { asked, comes, bound } of SENDERS) {
  Deno.test(`a client of ${asked} binds ${bound}, and takes what ${comes} sends`, async () => {
    const from = (hostname: string, port: number) => ({ transport: "udp", hostname, port }) as const;
    const datagrams = [
      { from: from(comes, 8), text: "from another port" },
      ...asked === "0.0.0.0" || asked === "::" ? [] : [
        { from: from("203.0.113.9", 9), text: "from another address" },
        { from: from("fe80::9", 9), text: "from another address of IPv6" },
      ],
      { from: from(comes, 9), text: "from the server" },
    ];
    await withSockets(datagrams, async (seen) => {
      using client = new DatagramClient({ hostname: asked, port: 9, timeout: PATIENCE_MS });
      assertEquals(seen.bound, []);
      assertEquals(await ask(client, "hello"), "from the server");
      assertEquals(seen, { bound: [bound], sentTo: [asked] });
    });
  });
}

// --- Sending and receiving -----------------------------------------------------------

networkTest("the bytes that a client has received never change when others come", async () => {
  await withServer(new UdpServer({ port: 0 }, EchoDatagram), async (_server, { port }, dial) => {
    const client = dial({ port });
    const kept: Uint8Array[] = [];
    const sent = Array.from({ length: 100 }, (_, i) => `datagram ${i}`);
    for (const text of sent) {
      await client.send(text);
      kept.push(await client.recv());
    }
    assertEquals(kept.map(decoded), sent);
  });
});

networkTest("recv() rejects after the timeout, and a late answer answers the next call", async () => {
  const exit = Promise.withResolvers<void>();
  const Slow = handlerOf(async (request) => {
    await exit.promise;
    await request.reply(request.data);
  });
  await withServer(new UdpServer({ port: 0 }, Slow), async (_server, { port }, dial) => {
    const client = dial({ port, timeout: 20 });
    await client.send("first");
    const error = await rejectionOf(client.recv());
    assert(error instanceof Deno.errors.TimedOut);
    assertEquals(error.message, `No answer came from 127.0.0.1:${port} within 20 ms`);
    exit.resolve();
    assertEquals(await receiveLate(client), "first");
  });
});

networkTest("a stranger's datagram is not taken for the server's, and does not prolong the timeout", async () => {
  const clients: Deno.Addr[] = [];
  const exit = Promise.withResolvers<void>();
  const Slow = handlerOf(async (request, { clientAddress }) => {
    clients.push(clientAddress);
    await exit.promise;
    await request.reply("from the server");
  });
  await withServer(new UdpServer({ port: 0 }, Slow), async (_server, { port }, dial) => {
    using stranger = new PlainSocket();
    const client = dial({ port, timeout: 50 });
    await client.send("hello");
    await until(() => clients.length === 1);
    const chatter = setInterval(() => {
      for (const to of clients) stranger.send("chatter", to);
    }, 5);
    try {
      await assertRejects(() => client.recv(), Deno.errors.TimedOut);
    } finally {
      clearInterval(chatter);
    }
    exit.resolve();
    assertEquals(await receiveLate(client), "from the server");
  });
});

networkTest("a second recv() of a DatagramClient rejects while one waits", async () => {
  await withServer(new UdpServer({ port: 0 }, EchoDatagram), async (_server, { port }, dial) => {
    const client = dial({ port });
    const first = client.recv();
    await assertRejects(() => client.recv(), Deno.errors.Busy);
    await client.send("one");
    assertEquals(decoded(await first), "one");
  });
});

networkTest("a datagram that is too long for send() rejects in one sentence, and the client goes on", async () => {
  await withServer(new UdpServer({ port: 0 }, EchoDatagram), async (_server, { port }, dial) => {
    const client = dial({ port });
    const { message } = await rejectionOf(client.send(new Uint8Array(65_508)));
    assertEquals(message, `Cannot send 65508 bytes to 127.0.0.1:${port}: message too long`);
    assertEquals(await ask(client, "fine"), "fine");
  });
});

networkTest("a client outlives a server that is not there yet", async () => {
  const port = await freePort();
  using client = new DatagramClient({ port, timeout: 20 });
  await client.send("too early");
  await assertRejects(() => client.recv(), Deno.errors.TimedOut);
  await withServer(new UdpServer({ port }, EchoDatagram), async () => {
    await client.send("in time");
    assertEquals(await receiveLate(client), "in time");
  });
});

// --- The end -------------------------------------------------------------------------

networkTest("close() ends a recv() that waits, and may be called again", async () => {
  for (const isOpen of [false, true]) {
    const client = new DatagramClient({ port: 9 });
    if (isOpen) await client.send("hello");
    const received = rejectionOf(client.recv());
    if (isOpen) await new Promise((resolve) => setTimeout(resolve));
    client.close();
    client.close();
    assert(await received instanceof Error);
    await assertRejects(() => client.recv(), Deno.errors.BadResource);
    await assertRejects(() => client.send("more"), Deno.errors.BadResource);
  }
});

Deno.test("a client that nobody has used closes without a permission", { permissions: "none" }, () => {
  using _client = new DatagramClient({ port: 9 });
});
