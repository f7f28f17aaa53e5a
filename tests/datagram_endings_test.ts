/** How servers of datagrams end. */

import { assert, assertEquals, assertMatch, assertThrows } from "../deps.ts";
import { type Datagram, DatagramClient, UdpServer } from "../mod.ts";
import {
  ask,
  decoded,
  EchoDatagram,
  handlerOf,
  PATIENCE_MS,
  PlainSocket,
  RecordingServer,
  withServer,
} from "./datagrams.ts";
import { turnEnd } from "./fake_conn.ts";
import { withFakeTime } from "./fake_time.ts";
import { listenAgain, networkTest, rejectionOf, until } from "./testing.ts";
import { freePort } from "./programs.ts";

networkTest("shutdown() waits for the datagram of a handleRequest(), and its reply goes out", async () => {
  const exit = Promise.withResolvers<void>();
  const Slow = handlerOf(async (request) => {
    await exit.promise;
    await request.reply("at last");
  });
  const server = new RecordingServer({ port: 0 }, Slow);
  const { port } = server.listen();
  using client = new DatagramClient({ port, timeout: PATIENCE_MS });
  await client.send("question");
  const handled = server.handleRequest();
  await until(() => server.stats.active === 1);
  const down = server.shutdown();
  exit.resolve();
  await handled;
  assertEquals(server.errors, []);
  assertEquals(decoded(await client.recv()), "at last");
  assertEquals((await down).cut, []);
});

networkTest("shutdown() waits for handlers, their replies go out, and then the port is free", async () => {
  const started = Promise.withResolvers<void>();
  const Slow = handlerOf(async (request, { signal }) => {
    started.resolve();
    await new Promise((resolve) => signal.addEventListener("abort", resolve));
    await request.reply("goodbye");
  });
  const port = await freePort();
  const server = new UdpServer({ port }, Slow);
  const serving = server.serveForever();
  using client = new DatagramClient({ port, timeout: PATIENCE_MS });
  await client.send("hello");
  await started.promise;
  const { finished, cut } = await server.shutdown();
  await using next = new UdpServer({ port }, EchoDatagram);
  await listenAgain(() => next.listen());
  await serving;
  assertEquals({ finished, cut }, { finished: 1, cut: [] });
  assertEquals(decoded(await client.recv()), "goodbye");
});

networkTest("shutdown() serves the datagrams that wait in the kernel", async () => {
  const server = new UdpServer({ port: 0 }, EchoDatagram);
  const { port } = server.listen();
  using client = new DatagramClient({ port, timeout: PATIENCE_MS });
  const sent = Array.from({ length: 20 }, (_, i) => `datagram ${i}`);
  for (const text of sent) await client.send(text);
  const serving = server.serveForever();
  await until(() => server.stats.accepted > 0);
  await server.shutdown();
  await serving;
  const received: string[] = [];
  for (const _ of sent) received.push(decoded(await client.recv()));
  assertEquals(received.sort(), sent.sort());
});

networkTest("shutdown() serves all that wait in the kernel, also if its signal aborts meanwhile", async () => {
  const Slow = handlerOf((_request, { signal }) => {
    aborted ||= signal.aborted;
    for (const begun = performance.now(); performance.now() - begun < 6;); // As if there were much to compute.
    return Promise.resolve();
  });
  let aborted = false;
  const server = new UdpServer({ port: 0 }, Slow);
  const { port } = server.listen();
  using client = new DatagramClient({ port });
  for (let count = 0; count < 150; count++) await client.send("one of many");
  const serving = server.serveForever();
  await server.shutdown();
  await serving;
  const { accepted, dropped } = server.stats;
  assertEquals({ accepted, dropped, aborted }, { accepted: 150, dropped: 0, aborted: true });
});

networkTest("shutdown() ends although datagrams keep coming", async () => {
  const server = new UdpServer({ port: 0 }, EchoDatagram);
  const { port } = server.listen();
  const serving = server.serveForever();
  using client = new DatagramClient({ port });
  let isOver = false;
  const flooding = (async () => {
    while (!isOver) await client.send("more");
  })();
  await until(() => server.stats.accepted > 100);
  const { cut } = await server.shutdown({ grace: 60_000 });
  isOver = true;
  await flooding;
  await serving;
  assertEquals(cut, []);
});

networkTest("a datagram that comes while a slow handler holds up the shutdown is dropped and counted", async () => {
  const exit = Promise.withResolvers<void>();
  const Slow = handlerOf(async (request) => {
    await exit.promise;
    await request.reply(request.data);
  });
  const server = new UdpServer({ port: 0 }, Slow);
  const { port } = server.listen();
  const serving = server.serveForever();
  using client = new DatagramClient({ port, timeout: PATIENCE_MS });
  await client.send("in time");
  await until(() => server.stats.active === 1);
  const down = server.shutdown();
  await new Promise((resolve) => server.signal.addEventListener("abort", resolve));
  await client.send("too late");
  await until(() => server.stats.dropped === 1);
  exit.resolve();
  await serving;
  assertEquals((await down).finished, 1);
  assertEquals(decoded(await client.recv()), "in time");
});

networkTest("shutdown() gives up a datagram's handler that never ends, and names its client", async () => {
  const Endless = handlerOf(async (request) => {
    await request.reply("ready");
    await new Promise(() => {});
  });
  const server = new UdpServer({ port: 0 }, Endless);
  const { port } = server.listen();
  const serving = server.serveForever();
  using client = new PlainSocket();
  await client.send("hello", { transport: "udp", hostname: "127.0.0.1", port });
  await client.receive();
  const { finished, cut } = await server.shutdown({ grace: 20 });
  assertEquals({ finished, cut }, { finished: 0, cut: [client.addr] });
  await serving;
});

networkTest("a datagram server that never served shuts down, and its port is free", async () => {
  const port = await freePort();
  const server = new UdpServer({ port }, EchoDatagram);
  server.listen();
  await server.shutdown();
  await using next = new UdpServer({ port }, EchoDatagram);
  await listenAgain(() => next.listen());
  await server.serveForever();
  assertThrows(() => server.close() ?? server.shutdown({ grace: -1 }), RangeError);
});

networkTest("the end of a datagram server loses no datagram, and counts none as lost", async () => {
  for (const end of ["shutdown", "close"] as const) {
    const server = new UdpServer({ port: 0 }, EchoDatagram);
    const serving = server.serveForever();
    await turnEnd(); // Now it receives.
    await server[end]();
    await serving;
    assertEquals([server.stats.lost, server.stats.errors], [0, 0]);
  }
});

networkTest("close() ends a datagram server now, and a reply behind it rejects", async () => {
  const requests: Datagram[] = [];
  const Endless = handlerOf(async (request) => {
    requests.push(request);
    await new Promise(() => {});
  });
  await withServer(new UdpServer({ port: 0 }, Endless), async (server, { port }, dial) => {
    await dial({ port }).send("hello");
    await until(() => requests.length === 1);
    server.close();
    const error = await rejectionOf(requests[0]?.reply("too late") ?? Promise.resolve());
    assert(error instanceof Deno.errors.BadResource);
    assertMatch(error.message, /^Cannot reply with 8 bytes to 127\.0\.0\.1:\d+: [^\n]*closed/);
    assertEquals(server.stats.bytesWritten, 0);
  });
});

networkTest("close() of a datagram server frees its port at once", async () => {
  const port = await freePort();
  await withFakeTime(async () => { // It stands still: close() does not wait for what may still come.
    const server = new UdpServer({ port }, EchoDatagram);
    const serving = server.serveForever();
    using client = new DatagramClient({ port });
    assertEquals(await ask(client, "hello"), "hello");
    server.close();
    await serving;
  });
  await using next = new UdpServer({ port }, EchoDatagram);
  await listenAgain(() => next.listen());
});

networkTest("a datagram's handler may reply and then shut its server down, or the other way round", async () => {
  for (const order of ["reply first", "reply last"]) {
    const Last = handlerOf(async (request, { server }) => {
      if (order === "reply first") await request.reply("ending");
      void server.shutdown();
      if (order === "reply last") await request.reply("ending");
    });
    const server = new RecordingServer({ port: 0 }, Last);
    const { port } = server.listen();
    const serving = server.serveForever();
    using client = new DatagramClient({ port, timeout: PATIENCE_MS });
    assertEquals(await ask(client, "end"), "ending");
    await serving;
    assertEquals([server.errors, (await server.shutdown()).cut], [[], []]);
  }
});

networkTest("a datagram's handler that awaits the shutdown is given up after grace", async () => {
  const Waiting = handlerOf(async (request, { server }) => {
    await request.reply("ending");
    await server.shutdown();
  });
  const server = new RecordingServer({ port: 0 }, Waiting, { grace: 20 });
  const { port } = server.listen();
  const serving = server.serveForever();
  using client = new DatagramClient({ port, timeout: PATIENCE_MS });
  assertEquals(await ask(client, "end"), "ending");
  await serving;
  assertEquals([server.errors, (await server.shutdown()).cut.length], [[], 1]);
});

networkTest("serveForever() of a datagram server ends with its signal", async () => {
  const ending = new AbortController();
  const server = new UdpServer({ port: 0 }, EchoDatagram);
  const { port } = server.listen();
  const serving = server.serveForever({ signal: ending.signal });
  using client = new DatagramClient({ port, timeout: PATIENCE_MS });
  assertEquals(await ask(client, "hello"), "hello");
  ending.abort();
  await serving;
});
