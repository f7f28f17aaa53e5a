/** What server.ts tells a balancer, and what it does between SIGTERM and its end. */

import { assertEquals, assertMatch } from "../../deps.ts";
import { assertFailed, Peer, type Program, runScript, startScript } from "../programs.ts";
import { programTest } from "../testing.ts";

/** Starts server.ts; resolves to its port and to the one of its health. */
async function start(...args: string[]): Promise<{ server: Program; port: number; health: number }> {
  const server = startScript("server.ts", ["--port", "0", "--health", "0", ...args]);
  const ports = await server.printed(/connection... on 127\.0\.0\.1:(\d+)\nhealth is told on 127\.0\.0\.1:(\d+)\n/);
  return { server, port: Number(ports[1]), health: Number(ports[2]) };
}

/** Sends one HTTP request, and resolves to the whole answer. */
async function request(port: number, head: string): Promise<string> {
  using peer = await Peer.connect(port);
  await peer.send(`${head}\r\n\r\n`);
  return new TextDecoder().decode(await peer.receiveAll());
}

/** Asks until the server has got the signal, which nobody is told. */
async function untilDraining(health: number): Promise<void> {
  while (!(await request(health, "GET / HTTP/1.0")).includes(" 503 ")) { /* Each look is a whole connection. */ }
}

programTest("--health answers GET and HEAD with 200, as HAProxy, curl and Kubernetes ask", async () => {
  const { server, health } = await start();
  await using _server = server;
  const requests = [
    "GET / HTTP/1.0", // HAProxy, without fields.
    "GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: kube-probe/1.34\r\nAccept: */*\r\nConnection: close",
  ];
  for (const head of requests) {
    assertMatch(await request(health, head), /^HTTP\/1\.1 200 OK\r\n[^]*Content-Length: 3\r\n\r\nok\n$/);
  }
  const answer = await fetch(`http://127.0.0.1:${health}/`);
  assertEquals([answer.status, await answer.text()], [200, "ok\n"]);
  assertMatch(await request(health, "HEAD / HTTP/1.1"), /^HTTP\/1\.1 200 OK\r\n[^]*Content-Length: 3\r\n\r\n$/);
  assertMatch(await request(health, "OPTIONS * HTTP/1.0"), /^HTTP\/1\.1 200 OK\r\n[^]*\r\n\r\nok\n$/);
  assertMatch(await request(health, "POST / HTTP/1.1"), /^HTTP\/1\.1 405 [^]*Allow: GET, HEAD, OPTIONS\r\n/);
  assertEquals(await request(health, `GET / HTTP/1.1\r\nCookie: ${"x".repeat(10_000)}`), "");
  assertEquals(server.stderr, "");
});

programTest("who only connects to --health, or stays silent there, keeps nobody from being answered", async () => {
  const { server, health } = await start();
  await using _server = server;
  using _silent = await Peer.connect(health);
  using half = await Peer.connect(health);
  await half.send("GET / HT");
  (await Peer.connect(health))[Symbol.dispose]();
  assertMatch(await request(health, "GET / HTTP/1.0"), / 200 OK/);
  assertEquals(server.stderr, "");
});

programTest("--health says 503 from SIGTERM on until the last client has left", async () => {
  const { server, port, health } = await start("--lines");
  await using _server = server;
  using client = await Peer.connect(port);
  await client.send("half of ");
  await server.printed("connected from");
  server.kill("SIGTERM");
  await untilDraining(health);
  await client.send("a line\n");
  assertMatch(await client.receive("\n"), /half of a line\n$/);
  assertEquals(await client.receiveChunk(), "");
  const { code, stdout } = await server.ended();
  assertEquals(code, 0);
  assertMatch(stdout, /clients: 1, cut off: 0/);
});

programTest("--drain-delay accepts clients while --health says 503, and a second signal ends it", async () => {
  const { server, port, health } = await start("--drain-delay", "3600000");
  await using _server = server;
  server.kill("SIGTERM");
  await untilDraining(health);
  using client = await Peer.connect(port);
  await client.send("late\n");
  assertMatch(await client.receive("\n"), /late\n$/);
  server.kill("SIGTERM");
  assertEquals((await server.ended()).code, 0);
});

programTest("--drain-delay ends the server by itself", async () => {
  const { server } = await start("--drain-delay", "1");
  await using _server = server;
  server.kill("SIGTERM");
  assertEquals((await server.ended()).code, 0);
});

for (
  const [args, sentence] of [
    [["--health", "here"], /^server\.ts: --health must be a whole number from 0 to 65535: it is "here"; --help/],
    [["--health", "127.0.0.1:"], /^server\.ts: --health must be a whole number from 0 to 65535: it is ""; --help/],
    [
      ["--drain-delay", "-1"],
      /^server\.ts: --drain-delay must be a whole number from 0 to 3600000: it is "-1"; --help/,
    ],
  ] as const
) {
  programTest(`${args.join(" ")} is refused with one sentence`, async () => {
    assertFailed(await runScript("server.ts", [...args]), 2, sentence);
  });
}
