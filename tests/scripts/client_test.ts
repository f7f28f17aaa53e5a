/** client.ts as a person runs it: with messages, with piped input, and on a terminal. */

import { assertEquals, assertMatch } from "../../deps.ts";
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
} from "../programs.ts";
import { programTest } from "../testing.ts";

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

programTest("with --hex messages are bytes, and so is what comes", async () => {
  const received: Uint8Array[] = [];
  await using server = new FakeServer(async (peer) => {
    received.push(new TextEncoder().encode(await peer.receive("\n")));
    await peer.send(Uint8Array.from({ length: 20 }, (_, i) => i + 0x30));
    await peer.receive("!");
    await peer.send(new Uint8Array([0xff, 0x0a]));
  });
  const { code, stdout, stderr } = await runClient(server, ["--hex", "68 6f0A", "21"]);
  const rows = [
    "00000000  30 31 32 33 34 35 36 37  38 39 3a 3b 3c 3d 3e 3f  |0123456789:;<=>?|",
    "00000010  40 41 42 43                                       |@ABC|",
    "00000014  ff 0a                                             |..|",
  ];
  assertEquals([code, stderr, stdout], [0, "", rows.join("\n") + "\n"]);
  assertEquals(received, [new Uint8Array([0x68, 0x6f, 0x0a])]);
});

programTest("--timing tells on standard error how long each answer took", async () => {
  await using server = new FakeServer(echo);
  const { code, stdout, stderr } = await runClient(server, ["--timing", "one", "two"]);
  assertEquals([code, stdout], [0, "one\ntwo\n"]);
  assertMatch(stderr, /^\d+\.\d ms\n\d+\.\d ms\n$/);
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

programTest("with --hex each piped line is bytes, and a line that is none ends it before it is sent", async () => {
  await using server = new FakeServer(echo);
  const { code, stdout } = await runClient(server, ["--hex"], "6f 6e 65\n\n  74776F \r\n21");
  const row = (at: number, bytes: string, text: string) => `${`0000000${at}  ${bytes}`.padEnd(58)}  |${text}|\n`;
  assertEquals([code, stdout], [0, row(0, "6f 6e 65", "one") + row(3, "74 77 6f", "two") + row(6, "21", "!")]);
  const wrong = await runClient(server, ["--hex"], "21\n2 1\n21\n");
  assertFailed(wrong, 1, /^client\.ts: line 2 and what follows is not sent: "2" is not in hexadecimal; /);
  assertEquals(wrong.stdout, row(0, "21", "!"));
});

programTest("with --reconnect no piped line is sent twice, and one without an answer is named", async () => {
  const received: string[] = [];
  let answers = 1;
  await using server = new FakeServer(async (peer) => {
    for (let line; (line = await peer.receive("\n")) !== ""; answers--) {
      received.push(line);
      if (answers === 0) return void (answers = 10);
      await peer.send(line);
    }
  });
  const { code, stdout, stderr } = await runClient(server, ["--reconnect"], "one\ntwo\nthree\nfour\n");
  assertEquals([code, stdout, received.join("")], [1, "one\nthree\nfour\n", "one\ntwo\nthree\nfour\n"]);
  assertEquals(stderr.split("\n"), [
    "client.ts: the server has left before it answered line 2, which is not sent again",
    "client.ts: trying to reach the server again…",
    "client.ts: the server is back",
    "client.ts: 1 of 4 lines were not answered; send them again if need be",
    "",
  ]);
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

// --- On a terminal ------------------------------------------------------------------

const ENTER = "\r";
const TAB = "\t";
const [UP, DOWN, LEFT] = ["\x1b[A", "\x1b[B", "\x1b[D"];
const [CTRL_C, CTRL_D, CTRL_L, CTRL_U] = ["\x03", "\x04", "\x0c", "\x15"];
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

programTest("the arrows bring back each line once, and no empty one", async () => {
  await using server = new FakeServer(echoLines);
  await using terminal = terminalOf(server, ["--keep-open"]);
  await terminal.shows(">>>");
  const rows: string[] = [];
  for (const line of ["one", "two", "one", "", "one"]) {
    await terminal.type(`${line}${ENTER}`);
    rows.push(`>>> ${line}`.trimEnd(), ...(line === "" ? [] : [`echo: ${line}`]));
    await terminal.shows(...rows, ">>>");
  }
  for (const shown of ["one", "two"]) {
    await terminal.type(UP);
    await terminal.shows(...rows, `>>> ${shown}`);
  }
  await terminal.type(DOWN);
  await terminal.shows(...rows, ">>> one");
});

programTest("Tab completes a line of this session", async () => {
  await using server = new FakeServer(echoLines);
  await using terminal = terminalOf(server);
  await terminal.shows(">>>");
  await terminal.type(`hello there${ENTER}`);
  const rows = [">>> hello there", "echo: hello there"];
  await terminal.shows(...rows, ">>>");
  await terminal.type("he");
  await terminal.shows(...rows, ">>> he");
  await terminal.type(TAB);
  await terminal.shows(...rows, ">>> hello there");
});

programTest("Ctrl-L clears the screen and keeps what is typed", async () => {
  await using server = new FakeServer(echoLines);
  await using terminal = terminalOf(server);
  await terminal.shows(">>>");
  await terminal.type(`one${ENTER}`);
  await terminal.shows(">>> one", "echo: one", ">>>");
  await terminal.type("half");
  await terminal.shows(">>> one", "echo: one", ">>> half");
  await terminal.type(CTRL_L);
  await terminal.shows(">>> half");
});

programTest("a terminal does not obey what the server sends", async () => {
  await using server = new FakeServer(async (peer) => {
    await peer.receive("\n");
    await peer.send("\x1b[2J\x9b2J\u202e\tkept\r\n");
    await peer.send(new Uint8Array([0xe4, 0xbd]));
    await peer.receive("\n");
    await peer.send(new Uint8Array([0xa0, 0x0a]));
    await peer.receive("\n");
  });
  await using terminal = terminalOf(server);
  await terminal.shows(">>>");
  await terminal.type(`one${ENTER}`);
  await terminal.shows(">>> one", "\\x1b[2J\\x9b2J\\u202e\tkept", ">>>");
  await terminal.type(`two${ENTER}`);
  await terminal.shows(">>> one", "\\x1b[2J\\x9b2J\\u202e\tkept", ">>> two", "你", ">>>");
});

programTest("with --hex a line that is no bytes is not sent, and says why", async () => {
  await using server = new FakeServer(echo);
  await using terminal = terminalOf(server, ["--hex"]);
  await terminal.shows(">>>");
  await terminal.type(`xy${ENTER}`);
  const why = '"xy" is not in hexadecimal; write two digits for each byte, such as 68 65 6c 6c 6f.';
  const rows = [">>> xy", `Not sent: ${why}`.slice(0, 80), `Not sent: ${why}`.slice(80)];
  await terminal.shows(...rows, ">>>");
  await terminal.type(`68 69${ENTER}`);
  const row = "00000000  68 69                                             |hi|";
  await terminal.shows(...rows, ">>> 68 69", row, ">>>");
});

programTest("--timing stands below each answer", async () => {
  await using server = new FakeServer(echoLines);
  await using terminal = terminalOf(server, ["--timing", "--keep-open"]);
  await terminal.shows(">>>");
  await terminal.type(`one${ENTER}`);
  await terminal.showsLike(/^>>> one\necho: one\n\d+\.\d ms\n>>>$/);
});

programTest(
  "with --reconnect a server that leaves and comes back is told of, and what was typed is neither lost nor sent",
  async () => {
    const accepted = Promise.withResolvers<void>();
    const left = new FakeServer(async (peer) => {
      accepted.resolve();
      await peer.receive("\n");
    });
    const { port } = left;
    await using terminal = terminalOf(left, ["--reconnect"]);
    await terminal.shows(">>>");
    await accepted.promise;
    const closed = left[Symbol.asyncDispose](); // It takes no more, and serves the one it has.
    await terminal.type(`one${ENTER}`);
    await closed;
    const gone = "The server has left before it answered, and nothing is sent again; trying again…";
    await terminal.shows(">>> one", gone, "---");
    await terminal.type(`two${ENTER}`);
    const kept = "Not sent, as the server is away; the up arrow brings the line back.";
    await terminal.shows(">>> one", gone, "--- two", kept, "---");
    await terminal.type("half");
    await terminal.shows(">>> one", gone, "--- two", kept, "--- half");
    await using _back = new FakeServer(echoLines, port);
    const rows = [">>> one", gone, "--- two", kept, "The server is back."];
    await terminal.shows(...rows, ">>> half");
    await terminal.type(`${CTRL_U}${UP}${ENTER}`);
    await terminal.shows(...rows, ">>> two", "echo: two", ">>>");
    await terminal.type(CTRL_D);
    assertEquals((await terminal.ended()).how, SANE);
  },
);

programTest("a person need not wait for a server that does not come back", async () => {
  const server = new TalkingServer();
  await using terminal = terminalOf(server, ["--reconnect"]);
  await terminal.shows(">>>");
  await server.hangUp();
  await server[Symbol.asyncDispose]();
  await terminal.shows("The server has left; trying again…", "---");
  await terminal.type(CTRL_D);
  assertEquals(await terminal.ended(), { how: SANE, screen: ["The server has left; trying again…", "---", ""] });
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
