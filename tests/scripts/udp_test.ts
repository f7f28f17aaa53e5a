/** server.ts --udp and client.ts --udp as a person runs them. */

import { assertEquals, assertMatch } from "../../deps.ts";
import {
  assertFailed,
  type Outcome,
  permissionsIn,
  portOf,
  Program,
  runScript,
  startScript,
  startServer,
  Terminal,
} from "../programs.ts";
import { peerTest, programTest, programTestIn } from "../testing.ts";
import { ENTER, PlainServer, SANE, STAMP_LENGTH, stamped } from "./kit.ts";

/** The client ends the line of an answer that has no end. */
function asLine(answer: string): string {
  return answer.endsWith("\n") ? answer : `${answer}\n`;
}

function runClient(port: number, args: string[], input: string | Uint8Array = ""): Promise<Outcome> {
  return runScript("client.ts", ["--udp", "--port", String(port), ...args], { input });
}

/** A port that was free a moment ago. */
function freeUdpPort(): number {
  const socket = Deno.listenDatagram({ transport: "udp", hostname: "127.0.0.1", port: 0 });
  socket.close();
  return socket.addr.transport === "udp" ? socket.addr.port : NaN;
}

const echo = (text: string) => [`echo: ${text}`];
const silence = () => [];

// --- server.ts --------------------------------------------------------------------

programTest("server.ts --udp says what it does, and what it has done", async () => {
  await using server = startServer(["--udp"]);
  const port = await portOf(server);
  const { code, stdout, stderr } = await runClient(port, ["hello python"]);
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, stamped("hello python\n"));
  server.kill("SIGTERM");
  const ended = await server.ended();
  assertEquals([ended.code, ended.stderr], [0, ""]);
  assertMatch(
    ended.stdout,
    new RegExp(
      String.raw`^waiting for connection\.\.\. on 127\.0\.0\.1:${port}\n\.\.\.datagram from: 127\.0\.0\.1:\d+\n` +
        String.raw`datagrams: 1, dropped: 0, bytes in: 12, bytes out: ${12 + STAMP_LENGTH}\n$`,
    ),
  );
});

programTest("server.ts --udp --quiet prints nothing", async () => {
  const port = freeUdpPort();
  await using server = startScript("server.ts", ["--udp", "--quiet", "--port", String(port)]);
  let answered = await runClient(port, ["--timeout", "200", "hello"]);
  for (let tries = 1; tries < 50 && answered.code !== 0; tries++) {
    answered = await runClient(port, ["--timeout", "200", "hello"]);
  }
  assertMatch(answered.stdout, stamped("hello\n"));
  server.kill("SIGINT");
  assertEquals(await server.ended(), { code: 0, stdout: "", stderr: "", bytes: new Uint8Array() });
});

programTest("all 256 bytes pass through a datagram unchanged", async () => {
  await using server = startServer(["--udp"]);
  const bytes = Uint8Array.from({ length: 256 }, (_, i) => i);
  const { code, bytes: answer } = await runClient(await portOf(server), [], bytes);
  assertEquals(code, 0);
  // The line feed, which is byte 10, divides it in two datagrams.
  assertEquals(answer.subarray(STAMP_LENGTH, STAMP_LENGTH + 10), bytes.subarray(0, 10));
  // Behind each answer the client has ended the line.
  assertEquals(answer.subarray(2 * STAMP_LENGTH + 11, -1), bytes.subarray(11));
});

programTest("a datagram whose answer would be too long is one sentence, and server.ts goes on", async () => {
  await using server = startServer(["--udp"]);
  const port = await portOf(server);
  const unanswered = await runClient(port, ["--timeout", "100"], "x".repeat(65_500));
  assertFailed(unanswered, 1, /no answer/);
  const { stdout } = await runClient(port, ["hello"]);
  assertMatch(stdout, stamped("hello\n"));
  assertMatch(server.stderr, /^server\.ts: Cannot reply with 65527 bytes to 127\.0\.0\.1:\d+: [^\n]*\n$/);
});

peerTest(["socat"], "socat talks to server.ts --udp", async () => {
  await using server = startServer(["--udp"]);
  await using socat = Program.start("socat", ["-", `UDP4:127.0.0.1:${await portOf(server)}`]);
  await socat.write("hello\n");
  await socat.printed(stamped("hello\n"));
  await socat.closeInput();
  assertEquals((await socat.ended()).code, 0);
});

const SENSELESS = [
  { args: ["--lines"], named: /--lines/ },
  { args: ["--max-connections", "5"], named: /--max-connections/ },
  { args: ["--idle-timeout", "5"], named: /--idle-timeout/ },
];

programTest("flags that mean nothing to datagrams end server.ts --udp with 2", async (t) => {
  for (const { args, named } of SENSELESS) {
    await t.step(args.join(" "), async () => {
      const outcome = await runScript("server.ts", ["--udp", ...args], { permissions: [] });
      assertFailed(outcome, 2, named);
      assertMatch(outcome.stderr, /^server\.ts: .*--udp.*; --help lists the flags\n$/);
    });
  }
});

programTest("--retries ends client.ts --udp with 2", async () => {
  const outcome = await runScript("client.ts", ["--udp", "--retries", "1", "hello"], { permissions: [] });
  assertFailed(outcome, 2, /^client\.ts: --retries .*--udp.*; --help lists the flags\n$/);
});

for (const script of ["server.ts", "client.ts"] as const) {
  programTest(`${script} --udp without --unstable-net is one sentence and exit code 1`, async () => {
    const permissions = ["--no-config", "--allow-net"];
    const outcome = await runScript(script, ["--udp"], { permissions, input: "hello" });
    assertFailed(outcome, 1, new RegExp(`^${script}: .*run again with --unstable-net\n$`));
  });
}

programTest("a port in use is one sentence and exit code 1", async () => {
  await using busy = new PlainServer(silence);
  const outcome = await runScript("server.ts", ["--udp", "--port", String(busy.port)]);
  assertFailed(outcome, 1, new RegExp(`^server\\.ts: .*127\\.0\\.0\\.1:${busy.port}.* in use.*\n$`));
});

programTest("the missing permission of server.ts --udp is named, and with exactly that flag it runs", async () => {
  const refused = await runScript("server.ts", ["--udp", "--port", "0"], { permissions: [] });
  assertFailed(refused, 1, /permission/);
  await using server = startScript("server.ts", ["--udp", "--port", "0"], {
    permissions: permissionsIn(refused.stderr),
  });
  await server.printed("waiting for connection...");
});

// --- client.ts --------------------------------------------------------------------

programTest("each message is one datagram, without a line end", async () => {
  await using server = new PlainServer(echo);
  const { code, stdout, stderr } = await runClient(server.port, ["one", "你好", "", "three\n"]);
  assertEquals([code, stderr, stdout], [0, "", "echo: one\necho: 你好\necho: \necho: three\n"]);
  assertEquals(server.received, ["one", "你好", "", "three\n"]);
});

const PIPED = [
  { name: "lines", input: "one\ntwo\n", received: ["one", "two"] },
  { name: "CRLF line ends", input: "one\r\ntwo\r\n", received: ["one\r", "two\r"] },
  { name: "an empty line", input: "one\n\ntwo\n", received: ["one", "", "two"] },
  { name: "a last line without an end", input: "one\ntwo", received: ["one", "two"] },
  { name: "nothing", input: "", received: [] },
  { name: "a line of 60,000 characters", input: "x".repeat(60_000) + "\n", received: ["x".repeat(60_000)] },
];

programTest("each piped line is one datagram, answered before the next", async (t) => {
  for (const { name, input, received } of PIPED) {
    await t.step(name, async () => {
      await using server = new PlainServer(echo);
      const { code, stdout, stderr } = await runClient(server.port, [], input);
      assertEquals([code, stderr], [0, ""]);
      assertEquals(server.received.join("|") === received.join("|"), true);
      assertEquals(stdout === received.flatMap(echo).map(asLine).join(""), true);
    });
  }
});

programTest("a server that does not answer is one sentence and exit code 1", async () => {
  await using server = new PlainServer(silence);
  for (const input of ["hello\nagain\n", "hello"]) {
    const outcome = await runClient(server.port, ["--timeout", "100"], input);
    assertFailed(outcome, 1, /^client\.ts: no answer came within --timeout\n$/);
  }
  assertEquals(server.received, ["hello", "hello"]);
});

programTest("a server that is not there is one sentence and exit code 1", async () => {
  assertFailed(
    await runClient(freeUdpPort(), ["--timeout", "100", "hello"]),
    1,
    /^client\.ts: no answer came within --timeout\n$/,
  );
});

programTest("a line that is too long for a datagram is one sentence and exit code 1", async () => {
  await using server = new PlainServer(echo);
  const outcome = await runClient(server.port, [], "x".repeat(65_508));
  assertFailed(outcome, 1, new RegExp(`^client\\.ts: Cannot send 65508 bytes to 127\\.0\\.0\\.1:${server.port}: `));
});

programTest("the missing permission of client.ts --udp is named, and with exactly that flag it runs", async () => {
  await using server = new PlainServer(echo);
  const args = ["--udp", "--port", String(server.port), "hello"];
  const refused = await runScript("client.ts", args, { permissions: [] });
  assertFailed(refused, 1, /permission is missing; run again with --allow-net=/);
  const { stdout } = await runScript("client.ts", args, { permissions: permissionsIn(refused.stderr) });
  assertEquals(stdout, "echo: hello\n");
});

// --- On a terminal; what holds for TCP too is in client_terminal_test.ts -------------

function terminalOf(server: PlainServer, args: string[] = []): Terminal {
  return new Terminal(["--udp", "--port", String(server.port), ...args]);
}

peerTest(["python3"], "an empty answer is shown as an empty line", async () => {
  await using server = new PlainServer(() => [""]);
  await using terminal = terminalOf(server);
  await terminal.shows(">>>");
  await terminal.type(`hello${ENTER}`);
  await terminal.shows(">>> hello", "", ">>>");
});

peerTest(["python3"], "several answers to one line are all printed", async () => {
  await using server = new PlainServer((text) => [`first: ${text}`, `second: ${text}`]);
  await using terminal = terminalOf(server);
  await terminal.shows(">>>");
  await terminal.type(`hello${ENTER}`);
  await terminal.shows(">>> hello", "first: hello", "second: hello", ">>>");
});

peerTest(["python3"], "a server may not think for longer than --timeout about a typed line", async () => {
  await using server = new PlainServer((text) => text === "hello" ? echo(text) : []);
  await using terminal = terminalOf(server, ["--timeout", "50"]);
  await terminal.shows(">>>");
  await terminal.type(`hello${ENTER}`);
  await terminal.shows(">>> hello", "echo: hello", ">>>");
  await terminal.type(`silence${ENTER}`);
  const { how, screen } = await terminal.ended();
  assertEquals(how, "exit code 1, terminal as it was");
  assertEquals(screen.slice(-2), ["client.ts: no answer came within --timeout", ""]);
});

peerTest(["python3"], "an answer to a message ends its line on a terminal", async () => {
  await using server = new PlainServer((text) => [text]);
  await using terminal = terminalOf(server, ["one", "two\n", "three"]);
  assertEquals(await terminal.ended(), { how: SANE, screen: ["one", "two", "three", ""] });
});

// --- Unix sockets -------------------------------------------------------------------

function folderPermissions(folder: string): string[] {
  return [`--allow-read=${folder}`, `--allow-write=${folder}`, "--allow-net"];
}

programTestIn(
  "server.ts and client.ts talk with --udp over a Unix socket, and leave no file behind",
  async (folder) => {
    const path = `${folder}/server.sock`;
    const permissions = folderPermissions(folder);
    await using server = startScript("server.ts", ["--udp", "--unix", path], { permissions });
    await server.printed(`on ${path}\n`);
    const { code, stdout, stderr } = await runScript("client.ts", ["--udp", "--unix", path, "hello"], { permissions });
    assertEquals([code, stderr], [0, ""]);
    assertMatch(stdout, stamped("hello\n"));
    server.kill("SIGTERM");
    const ended = await server.ended();
    assertEquals([ended.code, ended.stderr], [0, ""]);
    assertMatch(ended.stdout, new RegExp(`\n\\.\\.\\.datagram from: ${path}\\.client-\\d+\ndatagrams: 1, `));
    assertEquals(await Array.fromAsync(Deno.readDir(folder)), []);
  },
);

peerTest(["socat"], "socat talks to server.ts --udp --unix", async (folder) => {
  const path = `${folder}/server.sock`;
  await using server = startScript("server.ts", ["--udp", "--unix", path], { permissions: folderPermissions(folder) });
  await server.printed(`on ${path}\n`);
  await using socat = Program.start("socat", ["-", `UNIX-SENDTO:${path},bind=${folder}/client.sock`]);
  await socat.write("hello\n");
  await socat.printed(stamped("hello\n"));
  await socat.closeInput();
  assertEquals((await socat.ended()).code, 0);
});

programTestIn(
  "a Unix server that is not there, or does not answer, is one sentence and exit code 1",
  async (folder) => {
    const path = `${folder}/server.sock`;
    const permissions = folderPermissions(folder);
    const args = ["--udp", "--unix", path, "--timeout", "100", "hello"];
    assertFailed(await runScript("client.ts", args, { permissions }), 1, /server\.sock: no such file or directory; /);
    const silent = Deno.listenDatagram({ transport: "unixpacket", path });
    try {
      assertFailed(
        await runScript("client.ts", args, { permissions }),
        1,
        /^client\.ts: no answer came within --timeout\n$/,
      );
    } finally {
      silent.close();
    }
    assertEquals((await Array.fromAsync(Deno.readDir(folder))).filter(({ name }) => name.includes("client")), []);
  },
);
