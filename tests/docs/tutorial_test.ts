/** The programs of docs/tutorial.md run as they are written, and example 1 goes wrong as the page says. */

import { assert, assertEquals, assertMatch } from "../../deps.ts";
import { connect as connectNode } from "node:net";
import { Peer, type Program } from "../programs.ts";
import { networkTest, programTest } from "../testing.ts";
import { Programs } from "./pages.ts";

const PAGE = "docs/tutorial.md";

const STAMP = String.raw`\[[A-Z][a-z]{2} [A-Z][a-z]{2} \d\d \d{4} \d\d:\d\d:\d\d\]`;

/** Runs a server of the page. */
async function withServer(
  name: string,
  test: (port: number, server: Program, programs: Programs) => Promise<void>,
): Promise<void> {
  await using programs = await Programs.of(PAGE, ["server1.ts", "client1.ts", "server2.ts", "client2.ts"]);
  await using server = programs.start(name);
  await server.printed("waiting for connection...\n");
  await until(programs.port);
  await test(programs.port, server, programs);
}

/** Waits for a server that prints its line before it listens. */
async function until(port: number): Promise<void> {
  for (;;) {
    try {
      return (await Peer.connect(port))[Symbol.dispose]();
    } catch (error) {
      if (!(error instanceof Deno.errors.ConnectionRefused)) throw error;
    }
  }
}

/** A client that breaks off: its connection is reset. */
async function reset(port: number, word = ""): Promise<void> {
  const socket = connectNode(port, "127.0.0.1");
  const ended = new Promise((resolve) => socket.once("close", resolve));
  await new Promise((resolve) => socket.once("connect", resolve));
  if (word !== "") {
    socket.write(word);
    await new Promise((resolve) => socket.once("data", resolve));
  }
  socket.resetAndDestroy();
  await ended;
}

async function assertStillServes(port: number): Promise<void> {
  using peer = await Peer.connect(port);
  await peer.send("still there?\n");
  assertMatch(await peer.receive("\n"), new RegExp(`^${STAMP} still there\\?\n$`));
}

programTest("the tutorial's programs have the right types", async () => {
  const names = ["server1.ts", "client1.ts", "server2.ts", "client2.ts"];
  await using programs = await Programs.of(PAGE, names);
  assertEquals(await programs.check(names), "");
});

for (const number of [1, 2]) {
  programTest(`the tutorial's client${number}.ts and server${number}.ts talk, on a terminal`, async () => {
    await withServer(`server${number}.ts`, async (_port, server, programs) => {
      await using client = programs.startOnTerminal(`client${number}.ts`);
      await client.printed(">>>");
      await client.write("hello deno\r");
      await client.printed(new RegExp(`${STAMP} hello deno\r\n[^]*>>>`));
      await client.write("\r"); // An empty line ends the first client, and the second asks again.
      if (number === 2) {
        await client.printed(/hello deno\r\n[^]*>>>[^]*>>>/);
        await client.write("\x04");
      }
      assertEquals((await client.ended()).code, 0);
      await server.printed(/\.\.\.connected from: 127\.0\.0\.1[: ]\d+\n/);
    });
  });
}

programTest("server1.ts serves a second client only when the first one leaves; server2.ts serves both", async () => {
  await withServer("server1.ts", async (port) => {
    const first = await Peer.connect(port);
    await first.send("one");
    await first.receiveChunk();
    using second = await Peer.connect(port);
    await second.send("two");
    let hasLeft = false;
    const answered = second.receiveChunk().then(() => assert(hasLeft));
    for (let times = 0; times < 3; times++) {
      await first.send("again");
      assertMatch(await first.receiveChunk(), /again$/);
    }
    hasLeft = true;
    first[Symbol.dispose]();
    await answered;
  });
  await withServer("server2.ts", async (port) => {
    using first = await Peer.connect(port);
    await first.send("one\n");
    await first.receive("\n");
    await assertStillServes(port);
  });
});

programTest("a reset ends server1.ts, and not server2.ts", async () => {
  await withServer("server1.ts", async (port, server) => {
    await reset(port, "hello");
    const { code, stderr } = await server.ended();
    assertEquals(code, 1);
    assertMatch(stderr, /Uncaught \(in promise\) ConnectionReset/);
  });
  await withServer("server2.ts", async (port) => {
    await reset(port, "hello\n");
    await assertStillServes(port);
  });
});

programTest("a reset before the accept ends server1.ts, and not server2.ts", async () => {
  await withServer("server1.ts", async (port, server) => {
    const first = await Peer.connect(port);
    await first.send("one"); // The server is busy with this client, so the next one waits in the kernel.
    await first.receiveChunk();
    await reset(port);
    first[Symbol.dispose]();
    const { code, stderr } = await server.ended();
    assertEquals(code, 1);
    assertMatch(stderr, /Uncaught \(in promise\) NotConnected/);
  });
  await withServer("server2.ts", async (port) => {
    for (let times = 0; times < 20; times++) await reset(port);
    await assertStillServes(port);
  });
});

programTest(
  "server1.ts answers the pieces of a message and of a character; server2.ts answers the whole line",
  async () => {
    await withServer("server1.ts", async (port) => {
      using peer = await Peer.connect(port);
      for (const [piece, answer] of [["hel", "hel"], ["lo", "lo"], [new Uint8Array([0xc3]), "\ufffd"]] as const) {
        await peer.send(piece);
        assertMatch(await peer.receiveChunk(), new RegExp(`^${STAMP} ${answer}$`));
      }
    });
    await withServer("server2.ts", async (port) => {
      using peer = await Peer.connect(port);
      for (const piece of ["hel", "lo", new Uint8Array([0xc3]), new Uint8Array([0xa9]), "\n"]) await peer.send(piece);
      assertMatch(await peer.receive("\n"), new RegExp(`^${STAMP} helloé\n$`));
    });
  },
);

networkTest("a write() of the runtime to a client that does not read sends a part, and says how much", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  using conn = await Deno.connect({ hostname: "127.0.0.1", port: listener.addr.port });
  using accepted = await listener.accept();
  assert(await accepted.write(new Uint8Array(100_000_000)) < 100_000_000);
  assert(conn.remoteAddr.transport === "tcp");
});

programTest("an error in a function that the loop does not await ends the process", async () => {
  const loop = `
    const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
    console.log(listener.addr.port);
    async function serve(conn) {
      const buffer = new Uint8Array(1_024);
      const count = await conn.read(buffer);
      JSON.parse(new TextDecoder().decode(buffer.subarray(0, count)));
    }
    for await (const conn of listener) serve(conn);
  `;
  await using programs = await Programs.of(PAGE, [], { "loop.js": loop });
  await using server = programs.start("loop.js");
  const [port] = await server.printed(/\d+\n/);
  using bystander = await Peer.connect(Number(port));
  using peer = await Peer.connect(Number(port));
  await peer.send("no JSON");
  const { code, stderr } = await server.ended();
  assertEquals(code, 1);
  assertMatch(stderr, /Uncaught \(in promise\) SyntaxError/);
  assertEquals(await bystander.receiveBytes(), null);
});
