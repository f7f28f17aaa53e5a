/** client.ts on a terminal: its prompt, its editing, and what it does to the screen. */

import { assert, assertEquals, assertMatch } from "../../deps.ts";
import {
  denoArgs,
  FakeServer,
  freePort,
  type Peer,
  portOf,
  Program,
  startPython,
  TalkingServer,
  Terminal,
} from "../programs.ts";
import { peerTest } from "../testing.ts";
import { CTRL_D, ENTER, PlainServer, SANE } from "./kit.ts";

/** Answers each line with "echo: " and the line. */
async function echoLines(peer: Peer): Promise<void> {
  for (let text; (text = await peer.receive("\n")) !== "";) await peer.send(text.replace(/^/gm, "echo: ").slice(0, -6));
}

const [UP, DOWN, LEFT] = ["\x1b[A", "\x1b[B", "\x1b[D"];
const [CTRL_C, CTRL_L, CTRL_Z] = ["\x03", "\x0c", "\x1a"];

function terminalOf(server: { readonly port: number }, args: string[] = [], columns = 80): Terminal {
  return new Terminal(["--port", String(server.port), ...args], { columns });
}

/** What both kinds of clients do. */
const KINDS = [
  { over: "TCP", flags: [], serve: () => new FakeServer(echoLines) },
  { over: "UDP", flags: ["--udp"], serve: () => new PlainServer((text) => [`echo: ${text}`]) },
];

const ENDINGS = [
  { name: "an empty line", keys: ENTER },
  { name: "Ctrl-D", keys: CTRL_D },
  { name: "Ctrl-C", keys: CTRL_C },
  { name: "Ctrl-C behind half a line", keys: `half${CTRL_C}`, shown: ">>> half" },
];

for (const { over, flags, serve } of KINDS) {
  peerTest(["python3"], `a line typed over ${over} is sent, and the answer printed above a new prompt`, async () => {
    await using server = serve();
    await using terminal = terminalOf(server, flags);
    await terminal.shows(">>>");
    await terminal.type("hello");
    await terminal.shows(">>> hello");
    await terminal.type(ENTER);
    await terminal.shows(">>> hello", "echo: hello", ">>>");
    await terminal.type(`你好${ENTER}`);
    await terminal.shows(">>> hello", "echo: hello", ">>> 你好", "echo: 你好", ">>>");
    if (server instanceof PlainServer) assertEquals(server.received, ["hello", "你好"]); // Without its end.
  });

  for (const { name, keys, shown = ">>>" } of ENDINGS) {
    peerTest(["python3"], `${name} ends the client over ${over} and leaves a sane terminal`, async () => {
      await using server = serve();
      await using terminal = terminalOf(server, flags);
      await terminal.shows(">>>");
      await terminal.type(keys);
      assertEquals(await terminal.ended(), { how: SANE, screen: [shown, ""] });
    });
  }

  for (const { name, keys } of ENDINGS.slice(0, 2)) {
    peerTest(["python3"], `what is typed ahead over ${over} is answered before ${name} ends it`, async () => {
      await using server = serve();
      await using terminal = terminalOf(server, flags);
      await terminal.shows(">>>");
      await terminal.type(`one${ENTER}two${ENTER}${keys}`);
      const { how, screen } = await terminal.ended();
      assertEquals(how, SANE);
      assertEquals(screen.filter((row) => row.startsWith("echo: ")), ["echo: one", "echo: two"]);
    });
  }

  peerTest(["python3"], `a person may think for longer than --timeout over ${over}`, async () => {
    await using server = serve();
    await using terminal = terminalOf(server, [...flags, "--timeout", "50"]);
    await terminal.shows(">>>");
    // Another client that is started now runs for longer than that.
    await using other = Program.start(Deno.execPath(), ["eval", "await new Promise((done) => setTimeout(done, 100))"]);
    assertEquals((await other.ended()).code, 0);
    await terminal.type(`hello${ENTER}`);
    await terminal.shows(">>> hello", "echo: hello", ">>>");
  });
}

peerTest(["python3"], "a server that does not close its end is left after a moment", async () => {
  await using server = new TalkingServer();
  await using terminal = terminalOf(server);
  await terminal.shows(">>>");
  await terminal.type(CTRL_D);
  assertEquals(await terminal.ended(), { how: SANE, screen: [">>>", ""] });
});

peerTest(["python3"], "with --keep-open an empty line asks again and sends nothing", async () => {
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

peerTest(["python3"], "the up arrow brings back the last line", async () => {
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

peerTest(["python3"], "the arrows bring back each line once, and no empty one", async () => {
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

peerTest(["python3"], "Ctrl-L clears the screen and keeps what is typed", async () => {
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

peerTest(["python3"], "a terminal does not obey what the server sends", async () => {
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

peerTest(["python3"], "a line can be edited in its middle", async () => {
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
  peerTest(["python3"], `what the server says is printed above the prompt, with ${name} typed`, async () => {
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

peerTest(["python3"], "the cursor stays where it was while the server speaks", async () => {
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

peerTest(["python3"], "a server that leaves while the prompt waits ends the client with a clear line", async () => {
  await using server = new TalkingServer();
  await using terminal = terminalOf(server);
  await terminal.shows(">>>");
  await terminal.type("half");
  await terminal.shows(">>> half");
  await server.hangUp();
  assertEquals(await terminal.ended(), { how: SANE, screen: [">>> half", "The server has left.", ""] });
});

peerTest(["python3"], "a server that resets the connection ends the client with a clear line", async () => {
  await using server = startPython("resetting_server.py");
  await using terminal = new Terminal(["--port", String(await portOf(server))]);
  await terminal.shows(">>>");
  await terminal.type(`hello${ENTER}`);
  const { how, screen } = await terminal.ended();
  assertEquals(how, "exit code 1, terminal as it was");
  assertEquals(screen[0], ">>> hello");
  assertEquals(screen.slice(-2), ["client.ts: Connection reset by peer (os error 104)", ""]);
});

peerTest(["python3"], "a server that cannot be reached leaves the terminal sane", async () => {
  await using terminal = new Terminal(["--port", String(await freePort())]);
  const { how, screen } = await terminal.ended();
  assertEquals(how, "exit code 1, terminal as it was");
  assertMatch(screen.join("\n"), /^client\.ts: .* connection refused; /);
});

peerTest(["python3"], "messages are not asked for on a terminal", async () => {
  await using server = new FakeServer(echoLines);
  await using terminal = terminalOf(server, ["hello"]);
  assertEquals(await terminal.ended(), { how: SANE, screen: ["echo: hello", ""] });
});

// --- Special terminals ----------------------------------------------------------------

peerTest(["python3"], "a stopped client goes on after fg, with what was typed, whoever has stopped it", async () => {
  await using server = new FakeServer(echoLines);
  const command = [Deno.execPath(), ...denoArgs("client.ts", ["--port", `${server.port}`], ["--allow-net=127.0.0.1"])];
  await using shell = new Terminal([], { command: ["bash", "--norc", "--noprofile", "-i"] });
  await shell.showsLike(/[#$]$/);
  await shell.type(`${command.join(" ")}\n`);
  await shell.showsLike(/>>>$/);
  await shell.type("half");
  await shell.showsLike(/>>> half$/);
  await shell.type(CTRL_Z);
  await shell.showsLike(/Stopped[^]*[#$]$/);
  await shell.type("fg\n");
  await shell.showsLike(/ fg\n[^]*>>> half$/);
  await shell.type(`!${ENTER}`);
  await shell.showsLike(/echo: half!\n>>>$/);
  await shell.type(CTRL_C);
  await shell.showsLike(/>>>\n.*[#$]$/);
  await shell.type("exit\n");
  assertMatch((await shell.ended()).how, /^exit code 0/);
});

const SEPARATORS = "a\u2028b\u2029c";

peerTest(["python3"], "U+2028 and U+2029 are characters of a line, typed or pasted", async () => {
  await using server = new TalkingServer();
  await using terminal = terminalOf(server);
  await terminal.shows(">>>");
  for (const text of [SEPARATORS, SEPARATORS.repeat(10)]) {
    await terminal.type(`${text}${ENTER}`);
    assertEquals(await server.hear(), `${text}\n`);
  }
});

peerTest(
  ["python3"],
  "a pasted line of 8,000 characters is there at once, and can be edited and brought back",
  async () => {
    await using server = new TalkingServer();
    await using terminal = terminalOf(server);
    await terminal.shows(">>>");
    const begun = performance.now();
    const text = "0123456789".repeat(800);
    await terminal.type(`${text}z${LEFT}!${ENTER}`);
    assertEquals(await server.hear(), `${text}!z\n`);
    assert(performance.now() - begun < 3_000); // Key by key it would take 30 s.
    await terminal.type(`${UP}?${ENTER}`);
    assertEquals(await server.hear(), `${text}!z?\n`);
  },
);

peerTest(["python3"], "with TERM=dumb there is a prompt and no escape sequence", async () => {
  await using server = new FakeServer(echoLines);
  await using terminal = new Terminal(["--port", String(server.port)], { env: { TERM: "dumb" } });
  await terminal.shows(">>>");
  await terminal.type("hello\n");
  await terminal.shows(">>> hello", "echo: hello", ">>>");
  await terminal.type("\n");
  assertEquals(await terminal.ended(), { how: SANE, screen: [">>> hello", "echo: hello", ">>>", ""] });
  // The runtime itself may have cleared a progress bar before.
  assert(!terminal.output.slice(terminal.output.indexOf(">>>")).includes("\x1b"));
});

for (const [columns, rows] of [[0, 0], [0, 24], [80, 0]] as const) {
  peerTest(
    ["python3"],
    `on a terminal of ${columns} columns and ${rows} rows nothing is cut and nothing thrown`,
    async () => {
      await using server = new TalkingServer();
      await using terminal = new Terminal(["--port", String(server.port)], { columns, rows });
      await terminal.showsLike(/>>>$/);
      const text = "x".repeat(300);
      await terminal.type(`${text}${ENTER}`);
      assertEquals(await server.hear(), `${text}\n`);
      await server.say(`${text}y\n`);
      await terminal.showsLike(/x{20}y\n>>>$/);
      await terminal.type(CTRL_D);
      assertEquals((await terminal.ended()).how, SANE);
      assert(terminal.output.includes(`${text}y`), JSON.stringify(terminal.output));
    },
  );
}
