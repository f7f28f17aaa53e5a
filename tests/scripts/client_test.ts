/** client.ts with messages and with piped input. */

import { assertEquals, assertMatch } from "../../deps.ts";
import {
  assertFailed,
  FakeServer,
  freePort,
  type Outcome,
  type Peer,
  permissionsIn,
  portOf,
  runScript,
  startPython,
  startScript,
  startServer,
  TalkingServer,
} from "../programs.ts";
import { peerTest, programTest } from "../testing.ts";
import { STAMP, stamped } from "./kit.ts";

/** Answers each chunk with itself. */
async function echo(peer: Peer): Promise<void> {
  for (let chunk; (chunk = await peer.receiveChunk()).length > 0;) await peer.send(chunk);
}

function runClient(server: FakeServer | number, args: string[], input: string | Uint8Array = ""): Promise<Outcome> {
  const port = typeof server === "number" ? server : server.port;
  return runScript("client.ts", ["--port", String(port), ...args], { input });
}

// --- Messages -------------------------------------------------------------------

programTest("messages are sent in turn, and their answers printed", async () => {
  await using server = startServer();
  const port = await portOf(server);
  const { code, stdout, stderr } = await runClient(port, ["hello python", "你好"]);
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, stamped("hello python\n", "你好\n"));
});

programTest("with --no-newline messages are sent as they are", async () => {
  await using server = startServer();
  const port = await portOf(server);
  const { code, stdout } = await runClient(port, ["--no-newline", "one", "two"]);
  assertEquals(code, 0);
  assertMatch(stdout, stamped("one", "two"));
});

programTest("behind -- a message may look like a flag", async () => {
  await using server = new FakeServer(echo);
  assertEquals((await runClient(server, ["--", "--help"])).stdout, "--help\n");
});

programTest("behind -- a number is a message, whatever stands before it", async () => {
  await using server = new FakeServer(echo);
  assertEquals((await runClient(server, ["--", "--timeout", "-1"])).stdout, "--timeout\n-1\n");
});

// --- Piped input ------------------------------------------------------------------

const PIPED = [
  { name: "lines", input: "one\ntwo\n" },
  { name: "CRLF line ends", input: "one\r\ntwo\r\n" },
  { name: "an empty line", input: "one\n\ntwo\n" },
  { name: "a last line without an end", input: "one\ntwo" },
  { name: "one line without an end", input: "one" },
  { name: "nothing", input: "" },
  { name: "text of any language", input: "你好\nпривет\n" },
  { name: "a line of 200,000 characters", input: "x".repeat(200_000) + "\n" },
];

programTest("piped lines are answered in turn, byte by byte as they were", async (t) => {
  await using server = startServer(["--lines"]);
  const port = await portOf(server);
  await using echoing = new FakeServer(echo);
  for (const { name, input } of PIPED) {
    await t.step(name, async () => {
      const { code, stdout, stderr } = await runClient(echoing, [], input);
      assertEquals([code, stderr, stdout.length, stdout === input], [0, "", input.length, true]);
    });
    if (input.length > 65_536) continue;
    await t.step(`${name}, to a server of lines`, async () => {
      const { code, stdout, stderr } = await runClient(port, [], input);
      assertEquals([code, stderr, stdout.replaceAll(new RegExp(STAMP, "g"), "")], [0, "", input]);
    });
  }
});

programTest("10,000 piped lines are answered in order", async () => {
  await using server = startServer(["--lines"]);
  const port = await portOf(server);
  const lines = Array.from({ length: 10_000 }, (_, i) => `line ${i}\n`).join("");
  const { code, stdout } = await runClient(port, [], lines);
  assertEquals([code, stdout.replaceAll(new RegExp(STAMP, "g"), "") === lines], [0, true]);
});

programTest("an answer that looks like the alert of a TLS server is printed, if it is not the first", async () => {
  await using server = new FakeServer(echo);
  const alert = "\x15\x03\x03\x00\x02\x02";
  const input = `hello\n${alert}\n${alert}2\n`;
  const { code, stdout } = await runScript("client.ts", ["--port", String(server.port)], { input });
  assertEquals([code, stdout], [0, input]);
});

programTest("bytes that are no UTF-8 pass both ways", async () => {
  await using server = startServer();
  const port = await portOf(server);
  const bytes = Uint8Array.from({ length: 256 }, (_, i) => i);
  const { code, bytes: answer } = await runClient(port, [], bytes);
  assertEquals(code, 0);
  const stamp = "[Thu Sep 15 22:29:12 2016] ".length;
  const firstLine = bytes.subarray(0, 11); // Up to the line feed, which is byte 10.
  assertEquals(answer.subarray(stamp, stamp + 11), firstLine);
  assertEquals(answer.subarray(2 * stamp + 11), bytes.subarray(11));
});

programTest("with --no-newline piped lines are sent without their line end", async () => {
  const received: string[] = [];
  await using server = new FakeServer(async (peer) => {
    for (let chunk; (chunk = await peer.receiveChunk()).length > 0; await peer.send("ok ")) received.push(chunk);
  });
  const { code, stdout } = await runClient(server, ["--no-newline"], "one\n\ntwo\nthree");
  assertEquals([code, stdout, received], [0, "ok ok ok ", ["one", "two", "three"]]);
});

programTest("an answer is printed while the input waits", async () => {
  await using server = new FakeServer(echo);
  await using client = startScript("client.ts", ["--port", String(server.port)]);
  for (const line of ["one\n", "two\n"]) {
    await client.write(line);
    await client.printed(line);
  }
  await client.closeInput();
  assertEquals((await client.ended()).code, 0);
});

programTest("an answer that comes in several chunks is printed whole", async () => {
  await using server = new FakeServer(async (peer) => {
    let rest = "";
    for (let line; (line = await peer.receive("\n")) !== "";) {
      await peer.send(`${rest}first half of ${line}`);
      rest = `second half of ${line}`;
    }
    await peer.send(rest);
  });
  const { code, stdout } = await runClient(server, [], "one\ntwo\n");
  const halves = ["one", "two"].flatMap((line) => [`first half of ${line}\n`, `second half of ${line}\n`]);
  assertEquals([code, stdout], [0, halves.join("")]);
});

programTest("what the server says behind the half-close is printed", async () => {
  await using server = new FakeServer(async (peer) => {
    await peer.receive("\n");
    await peer.send("answer\n");
    await peer.receiveAll();
    for (let i = 0; i < 100; i++) await peer.send("x".repeat(10_000) + "\n");
  });
  const { code, stdout } = await runClient(server, [], "question\n");
  assertEquals([code, stdout], [0, "answer\n" + ("x".repeat(10_000) + "\n").repeat(100)]);
});

// --- Flags ------------------------------------------------------------------------

programTest("--retries waits for a server that comes later", async () => {
  const port = await freePort();
  await using client = startScript("client.ts", ["--port", String(port), "--retries", "50", "hello"]);
  const hasty = await runClient(port, ["--retries", "1", "hello"]);
  assertFailed(hasty, 1, / after 2 tries: /);
  await using _server = new FakeServer(echo, port);
  const { code, stdout } = await client.ended();
  assertEquals([code, stdout], [0, "hello\n"]);
});

// --- Failures -----------------------------------------------------------------------

programTest("a server that does not answer within --timeout is one sentence and exit code 1", async () => {
  for (const input of ["hello\n", "hello"]) {
    await using server = new TalkingServer();
    assertFailed(
      await runClient(server, ["--timeout", "100"], input),
      1,
      /^client\.ts: no answer came within --timeout\n$/,
    );
  }
});

programTest("a server that leaves in the middle is one sentence about what happened, and exit code 1", async () => {
  await using server = new FakeServer(async (peer) => {
    await peer.receive("\n");
    await peer.send("bye: you have asked enough\n");
  });
  const outcome = await runClient(server, [], "one\ntwo\nthree\n");
  assertFailed(
    outcome,
    1,
    /^client\.ts: the (server closed the connection before it answered|other side has left: .*)\n$/,
  );
  assertEquals(outcome.stdout, "bye: you have asked enough\n");
});

peerTest(
  ["python3"],
  "a server that resets the connection is one sentence with the system's words, and exit code 1",
  async () => {
    await using server = startPython("resetting_server.py");
    assertFailed(await runClient(await portOf(server), ["hello"]), 1, /^client\.ts: .*connection reset by peer/i);
  },
);

programTest(
  "what a server says while a long line is sent is printed, although it ends before it has read it",
  async () => {
    await using server = startServer(["--lines"]);
    const outcome = await runClient(await portOf(server), [], `${"x".repeat(30_000_000)}\nnever\n`);
    assertFailed(outcome, 1, /^client\.ts: /);
    assertEquals(outcome.stdout, "The line is too long, and nothing after it is read\n");
  },
);

programTest(
  "a line of 30 MB passes through an echo server, which takes no more before its answer is read",
  async () => {
    await using server = new FakeServer(echo);
    const line = new TextEncoder().encode(`${"x".repeat(30_000_000)}\n`);
    const { code, stderr, bytes } = await runClient(server, [], line);
    assertEquals([code, stderr, bytes.length], [0, "", line.length]);
  },
);

programTest("what a server says unasked is printed while the input waits", async () => {
  await using server = new TalkingServer();
  await using client = startScript("client.ts", ["--port", String(server.port), "--timeout", "50"]);
  await server.say("news\n");
  await client.printed("news\n");
  await server.say("more\n");
  await client.printed("more\n");
  await server.hangUp();
  await client.closeInput();
  assertEquals((await client.ended()).code, 0);
});

programTest("a server that is not there is one sentence and exit code 1", async () => {
  const port = await freePort();
  const outcome = await runClient(port, ["hello"]);
  assertFailed(outcome, 1, new RegExp(`^client\\.ts: .*127\\.0\\.0\\.1:${port}: connection refused; `));
});

programTest("a name that does not exist is one sentence and exit code 1", async () => {
  const outcome = await runScript("client.ts", ["--hostname", "no-such-host.invalid", "hello"], {
    permissions: ["--allow-net=no-such-host.invalid"],
  });
  assertFailed(outcome, 1, /^client\.ts: .*no-such-host\.invalid:8009: the name cannot be resolved \(/);
});

programTest("a socket file that is not there is one sentence and exit code 1", async () => {
  const outcome = await runScript("client.ts", ["--unix", "/no-such-folder/server.sock", "hello"], {
    permissions: ["--allow-net", "--allow-read", "--allow-write"],
  });
  assertFailed(outcome, 1, /^client\.ts: .*\/no-such-folder\/server\.sock: no such file or directory; /);
});

programTest("a missing permission is named, and with exactly that flag the client runs", async () => {
  await using server = new FakeServer(echo);
  const args = ["--port", String(server.port), "hello"];
  const refused = await runScript("client.ts", args, { permissions: [] });
  assertFailed(refused, 1, /permission/);
  const permissions = permissionsIn(refused.stderr);
  assertEquals(permissions, [`--allow-net=127.0.0.1:${server.port}`]);
  assertEquals((await runScript("client.ts", args, { permissions })).stdout, "hello\n");
});

programTest("the first line of client.ts asks for its default address only", async () => {
  const script = new URL("../../client.ts", import.meta.url);
  const [first] = (await Deno.readTextFile(script)).split("\n");
  assertEquals(first, "#!/usr/bin/env -S deno run --allow-net=127.0.0.1:8009");
  const { mode } = await Deno.stat(script);
  assertEquals((mode ?? 0) & 0o111, 0o111);
  const refused = await runScript("client.ts", ["hello"], { permissions: [] });
  assertEquals(permissionsIn(refused.stderr), ["--allow-net=127.0.0.1:8009"]);
});

programTest("a reader that leaves is no reason for a stack trace", async () => {
  await using server = new FakeServer(echo);
  await using client = startScript("client.ts", ["--port", String(server.port)]);
  await client.write("one\n");
  await client.printed("one\n");
  await client.leaveOutput();
  await client.write("two\n");
  assertFailed(await client.ended(), 1, /^client\.ts: standard output is closed/);
});
