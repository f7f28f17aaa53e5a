/** client.ts as a person runs it: with messages, with piped input, and on a terminal. */

import { assertEquals, assertMatch } from "../deps.ts";
import {
  assertFailed,
  FakeServer,
  freePort,
  type Outcome,
  type Peer,
  permissionsIn,
  portOf,
  Program,
  runScript,
  startPython,
  startScript,
  startServer,
  TalkingServer,
  Terminal,
} from "./programs.ts";
import { programTest } from "./testing.ts";

const STAMP = String.raw`\[[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4}\] `;

/** A pattern for `chunks`, each behind its stamp, and for nothing else. */
function stamped(...chunks: string[]): RegExp {
  return new RegExp(`^${chunks.map((chunk) => STAMP + chunk).join("")}$`);
}

/** Answers each chunk with itself. */
async function echo(peer: Peer): Promise<void> {
  for (let chunk; (chunk = await peer.receiveChunk()).length > 0;) await peer.send(chunk);
}

/** Answers each line with "echo: " and the line. */
async function echoLines(peer: Peer): Promise<void> {
  for (let text; (text = await peer.receive("\n")) !== "";) await peer.send(text.replace(/^/gm, "echo: ").slice(0, -6));
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

const TOLD = [
  { flag: "--help", told: /^Sends what .*\n\nUsage: .*--hostname HOST.*--port PORT.*--unix PATH/s },
  { flag: "--version", told: /^client\.ts \d+\.\d+\.\d+\n$/ },
];

for (const { flag, told } of TOLD) {
  programTest(`client.ts ${flag} needs no permission and ends with 0`, async () => {
    const { code, stdout, stderr } = await runScript("client.ts", [flag], { permissions: [] });
    assertEquals([code, stderr], [0, ""]);
    assertMatch(stdout, told);
  });
}

const BAD_FLAGS = [
  { args: ["--nope"], named: /'--nope'/ },
  { args: ["--port"], named: /'--port <value>'/ },
  { args: ["--port", "http"], named: /--port .*"http"/ },
  { args: ["--port", "0"], named: /--port .*"0"/ },
  { args: ["--port=-1"], named: /--port .*"-1"/ },
  { args: ["--port", "65536"], named: /--port .*65535.*"65536"/ },
  { args: ["--port", "Infinity"], named: /--port .*"Infinity"/ },
  { args: ["--timeout", "0"], named: /--timeout .*"0"/ },
  { args: ["--timeout", "1s"], named: /--timeout .*"1s"/ },
  { args: ["--retries=-1"], named: /--retries .*"-1"/ },
  { args: ["--retries", "many"], named: /--retries .*"many"/ },
  { args: ["--keep-open=yes"], named: /'--keep-open'/ },
  { args: ["--hostname", ""], named: /--hostname/ },
  { args: ["--unix", ""], named: /--unix/ },
  { args: ["--host", "x"], named: /: Unknown option '--host'; --help/ },
  { args: ["-x"], named: /: Unknown option '-x'; --help/ },
  { args: ["--port", "-1"], named: /: --port must be a whole number from 1 to 65535: it is "-1"; --help/ },
  {
    args: ["--timeout", "-1"],
    named: /: --timeout must be a whole number, 1 or more, or Infinity: it is "-1"; --help/,
  },
  {
    args: ["--retries", "-1"],
    named: /: --retries must be a whole number, 0 or more, or Infinity: it is "-1"; --help/,
  },
  {
    args: ["--unix", "--keep-open"],
    named: /: Option '--unix' argument is missing; one with a dash in front is written --unix=VALUE; --help/,
  },
  { args: ["--port", "1", "--unix", "/tmp/a.sock"], named: /: choose one of --port and --unix; --help/ },
  { args: ["--hostname", "http://x"], named: /: --hostname takes a name or an address only; the port goes to --port/ },
  {
    args: ["--hostname", "127.0.0.1:8009"],
    named: /: --hostname takes a name or an address only; .*"127\.0\.0\.1:8009"/,
  },
  { args: ["--hostname", "[::1]:8009"], named: /: --hostname takes a name or an address only; / },
];

programTest("a bad flag is named, and ends client.ts with 2", async (t) => {
  for (const { args, named } of BAD_FLAGS) {
    await t.step(args.join(" "), async () => {
      const outcome = await runScript("client.ts", args, { permissions: ["--allow-net", "--allow-read"] });
      assertFailed(outcome, 2, named);
      assertMatch(outcome.stderr, /^client\.ts: .*; --help lists the flags\n$/);
    });
  }
});

programTest("--retries waits for a server that comes later", async () => {
  const port = freePort();
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
      /^client\.ts: the server did not answer within 100 ms; try a longer --timeout\n$/,
    );
  }
});

programTest("a server that leaves in the middle is one sentence and exit code 1", async () => {
  await using server = new FakeServer(async (peer) => {
    await peer.receive("\n");
    await peer.send("answer\n");
  });
  const outcome = await runClient(server, [], "one\ntwo\nthree\n");
  assertFailed(outcome, 1, /^client\.ts: .*server has left/);
  assertEquals(outcome.stdout, "answer\n");
});

programTest("a server that resets the connection is one sentence and exit code 1", async () => {
  await using server = startPython("resetting_server.py");
  assertFailed(await runClient(await portOf(server), ["hello"]), 1, /^client\.ts: .*server has left/);
});

programTest("a server that is not there is one sentence and exit code 1", async () => {
  const port = freePort();
  const outcome = await runClient(port, ["hello"]);
  assertFailed(outcome, 1, new RegExp(`^client\\.ts: .*127\\.0\\.0\\.1:${port}: nobody listens there; `));
});

programTest("a name that does not exist is one sentence and exit code 1", async () => {
  const outcome = await runScript("client.ts", ["--hostname", "no-such-host.invalid", "hello"], {
    permissions: ["--allow-net=no-such-host.invalid"],
  });
  assertFailed(outcome, 1, /^client\.ts: .*no-such-host\.invalid:8009: the name cannot be resolved; /);
});

programTest("a socket file that is not there is one sentence and exit code 1", async () => {
  const outcome = await runScript("client.ts", ["--unix", "/no-such-folder/server.sock", "hello"], {
    permissions: ["--allow-net", "--allow-read", "--allow-write"],
  });
  assertFailed(outcome, 1, /^client\.ts: .*\/no-such-folder\/server\.sock: no such file; /);
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
  const script = new URL("../client.ts", import.meta.url);
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

// --- On a terminal ------------------------------------------------------------------

const ENTER = "\r";
const [UP, LEFT] = ["\x1b[A", "\x1b[D"];
const [CTRL_C, CTRL_D] = ["\x03", "\x04"];
const SANE = "exit code 0, terminal as it was";

function terminalOf(server: FakeServer, args: string[] = [], columns = 80): Terminal {
  return new Terminal(["--port", String(server.port), ...args], columns);
}

programTest("a typed line is sent, and the answer printed above a new prompt", async () => {
  await using server = new FakeServer(echoLines);
  await using terminal = terminalOf(server);
  await terminal.shows(">>>");
  await terminal.type("hello");
  await terminal.shows(">>> hello");
  await terminal.type(ENTER);
  await terminal.shows(">>> hello", "echo: hello", ">>>");
  await terminal.type(`你好${ENTER}`);
  await terminal.shows(">>> hello", "echo: hello", ">>> 你好", "echo: 你好", ">>>");
});

const ENDINGS = [
  { name: "an empty line", keys: ENTER },
  { name: "Ctrl-D", keys: CTRL_D },
  { name: "Ctrl-C", keys: CTRL_C },
  { name: "Ctrl-C behind half a line", keys: `half${CTRL_C}`, shown: ">>> half" },
];

for (const { name, keys, shown = ">>>" } of ENDINGS) {
  programTest(`${name} ends the client and leaves a sane terminal`, async () => {
    await using server = new FakeServer(echoLines);
    await using terminal = terminalOf(server);
    await terminal.shows(">>>");
    await terminal.type(keys);
    assertEquals(await terminal.ended(), { how: SANE, screen: [shown, ""] });
  });
}

programTest("a server that does not close its end is left after a moment", async () => {
  await using server = new TalkingServer();
  await using terminal = terminalOf(server);
  await terminal.shows(">>>");
  await terminal.type(CTRL_D);
  assertEquals(await terminal.ended(), { how: SANE, screen: [">>>", ""] });
});

for (const ending of [ENTER, CTRL_D]) {
  programTest(
    `what is typed ahead is answered before ${ending === ENTER ? "the empty line" : "Ctrl-D"} ends it`,
    async () => {
      await using server = new FakeServer(echoLines);
      await using terminal = terminalOf(server);
      await terminal.shows(">>>");
      await terminal.type(`one${ENTER}two${ENTER}${ending}`);
      const { how, screen } = await terminal.ended();
      assertEquals(how, SANE);
      assertEquals(screen.filter((row) => row.startsWith("echo: ")), ["echo: one", "echo: two"]);
    },
  );
}

programTest("with --keep-open an empty line asks again and sends nothing", async () => {
  await using server = new FakeServer(echoLines);
  await using terminal = terminalOf(server, ["--keep-open"]);
  await terminal.shows(">>>");
  await terminal.type(ENTER);
  await terminal.shows(">>>", ">>>");
  await terminal.type(`hello${ENTER}`);
  await terminal.shows(">>>", ">>> hello", "echo: hello", ">>>");
  await terminal.type(CTRL_D);
  assertEquals((await terminal.ended()).how, SANE);
});

programTest("the up arrow brings back the last line", async () => {
  await using server = new FakeServer(echoLines);
  await using terminal = terminalOf(server);
  await terminal.shows(">>>");
  await terminal.type(`hello${ENTER}`);
  await terminal.shows(">>> hello", "echo: hello", ">>>");
  await terminal.type(UP);
  await terminal.shows(">>> hello", "echo: hello", ">>> hello");
  await terminal.type(ENTER);
  await terminal.shows(">>> hello", "echo: hello", ">>> hello", "echo: hello", ">>>");
});

programTest("a line can be edited in its middle", async () => {
  await using server = new FakeServer(echoLines);
  await using terminal = terminalOf(server);
  await terminal.shows(">>>");
  await terminal.type(`hllo${LEFT.repeat(3)}e${ENTER}`);
  await terminal.shows(">>> hello", "echo: hello", ">>>");
});

const TYPED = [
  { name: "nothing", typed: "", columns: 80, rows: [">>>"] },
  { name: "half a line", typed: "half", columns: 80, rows: [">>> half"] },
  { name: "more than a row", typed: "0123456789abcdef", columns: 10, rows: [">>> 012345", "6789abcdef", ""] },
  { name: "more than two rows", typed: "0123456789abcdefg", columns: 10, rows: [">>> 012345", "6789abcdef", "g"] },
];

for (const { name, typed, columns, rows } of TYPED) {
  programTest(`what the server says is printed above the prompt, with ${name} typed`, async () => {
    await using server = new TalkingServer();
    await using terminal = terminalOf(server, [], columns);
    await terminal.shows(">>>");
    await terminal.type(typed);
    await terminal.shows(...rows);
    await server.say("news\n");
    await terminal.shows("news", ...rows);
    await server.say("no end");
    await terminal.shows("news", "no end", ...rows);
    await terminal.type(`!${ENTER}`);
    assertEquals(await server.hear(), `${typed}!\n`);
  });
}

programTest("the cursor stays where it was while the server speaks", async () => {
  await using server = new TalkingServer();
  await using terminal = terminalOf(server);
  await terminal.shows(">>>");
  await terminal.type(`hllo${LEFT.repeat(3)}`);
  await terminal.shows(">>> hllo");
  await server.say("news\n");
  await terminal.shows("news", ">>> hllo");
  await terminal.type(`e${ENTER}`);
  assertEquals(await server.hear(), "hello\n");
});

programTest("a server that leaves while the prompt waits ends the client with a clear line", async () => {
  await using server = new TalkingServer();
  await using terminal = terminalOf(server);
  await terminal.shows(">>>");
  await terminal.type("half");
  await terminal.shows(">>> half");
  await server.hangUp();
  assertEquals(await terminal.ended(), { how: SANE, screen: [">>> half", "The server has left.", ""] });
});

programTest("a server that resets the connection ends the client with a clear line", async () => {
  await using server = startPython("resetting_server.py");
  await using terminal = new Terminal(["--port", String(await portOf(server))]);
  await terminal.shows(">>>");
  await terminal.type(`hello${ENTER}`);
  const { how, screen } = await terminal.ended();
  assertEquals(how, "exit code 1, terminal as it was");
  assertEquals(screen[0], ">>> hello");
  assertEquals(screen.slice(-2), ["client.ts: the server has left in the middle; start it again", ""]);
});

programTest("a server that cannot be reached leaves the terminal sane", async () => {
  await using terminal = new Terminal(["--port", String(freePort())]);
  const { how, screen } = await terminal.ended();
  assertEquals(how, "exit code 1, terminal as it was");
  assertMatch(screen.join("\n"), /^client\.ts: .* nobody listens there; /);
});

programTest("a person may think for longer than --timeout", async () => {
  await using server = new FakeServer(echoLines);
  await using terminal = terminalOf(server, ["--timeout", "50"]);
  await terminal.shows(">>>");
  // Another client that is started now runs for longer than that.
  await using other = Program.start(Deno.execPath(), ["eval", "await new Promise((done) => setTimeout(done, 100))"]);
  assertEquals((await other.ended()).code, 0);
  await terminal.type(`hello${ENTER}`);
  await terminal.shows(">>> hello", "echo: hello", ">>>");
});

programTest("messages are not asked for on a terminal", async () => {
  await using server = new FakeServer(echoLines);
  await using terminal = terminalOf(server, ["hello"]);
  assertEquals(await terminal.ended(), { how: SANE, screen: ["echo: hello", ""] });
});
