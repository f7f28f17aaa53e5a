/** server.ts as a person runs it: its flags, its signals, what it says. */

import { assert, assertEquals, assertMatch } from "../../deps.ts";
import {
  assertFailed,
  freePort,
  Peer,
  permissionsIn,
  portOf,
  Program,
  runScript,
  startScript,
  startServer,
  startUnixServer,
  Terminal,
  unixPermissions,
} from "../programs.ts";
import { peerTest, programTest, programTestIn } from "../testing.ts";
import { STAMP_LENGTH, stamped } from "./kit.ts";

// --- Answers ------------------------------------------------------------------

programTest("the server prints the tutorial's words and answers with the time", async () => {
  await using server = startServer();
  const port = await portOf(server);
  using peer = await Peer.connect(port);
  await peer.send("hello python");
  assertMatch(await peer.receive("hello python"), stamped("hello python"));
  const lines = [`waiting for connection... on 127.0.0.1:${port}`, `...connected from: 127.0.0.1:${peer.port}`];
  assertEquals(server.stdout, lines.join("\n") + "\n");
});

peerTest(["python3"], "the time is written as Python's time.ctime() writes it", async (folder) => {
  const preload = `${folder}/frozen_date.ts`;
  for (const TZ of ["UTC", "Asia/Kathmandu", "America/New_York"]) {
    for (const seconds of [1_472_768_952, 1_473_949_752, 946_684_800]) {
      await Deno.writeTextFile(
        preload,
        `const Real = Date; globalThis.Date = class extends Real { constructor() { super(${seconds}_000); } } as any;`,
      );
      await using server = startScript("server.ts", ["--port", "0"], {
        env: { TZ },
        permissions: ["--allow-net=127.0.0.1", `--preload=${preload}`],
      });
      await using python = Program.start("python3", ["-c", `import time; print(time.ctime(${seconds}))`], {
        env: { TZ },
      });
      using peer = await Peer.connect(await portOf(server));
      await peer.send("now\n");
      assertEquals(await peer.receive("\n"), `[${(await python.ended()).stdout.trimEnd()}] now\n`);
    }
  }
});

programTest("the time is now", async () => {
  await using server = startServer([], { env: { TZ: "UTC" } });
  const port = await portOf(server);
  using peer = await Peer.connect(port);
  const before = Date.now();
  await peer.send("now\n");
  const time = Date.parse((await peer.receive("\n")).slice(1, STAMP_LENGTH - 2) + " UTC");
  assert(time > before - 2_000 && time < Date.now() + 2_000);
});

programTest("all 256 bytes pass through unchanged", async () => {
  await using server = startServer();
  const port = await portOf(server);
  using peer = await Peer.connect(port);
  const bytes = Uint8Array.from({ length: 256 }, (_, i) => i);
  await peer.send(bytes);
  await peer.closeWrite();
  assertEquals((await peer.receiveAll()).subarray(STAMP_LENGTH), bytes);
});

programTest("a client that half-closes is answered first", async () => {
  await using server = startServer();
  const port = await portOf(server);
  using peer = await Peer.connect(port);
  await peer.send("bye");
  await peer.closeWrite();
  assertMatch(new TextDecoder().decode(await peer.receiveAll()), stamped("bye"));
});

// --- Lines --------------------------------------------------------------------

const LINES = [
  { name: "a line that arrives in many segments", segments: ["h", "e", "l", "l", "o", "\n"], lines: ["hello\n"] },
  { name: "two lines of one segment", segments: ["one\ntwo\n"], lines: ["one\n", "two\n"] },
  { name: "a line end of two characters", segments: ["one\r", "\ntwo\r\n"], lines: ["one\r\n", "two\r\n"] },
  { name: "an empty line", segments: ["\n"], lines: ["\n"] },
  { name: "a character cut in two", segments: [[0xe4, 0xbd], [0xa0, 0x0a]], lines: ["你\n"] },
  { name: "a last line without an end", segments: ["one\ntw", "o"], lines: ["one\n", "two"] },
];

programTest("with --lines each line has one stamp", async (t) => {
  await using server = startServer(["--lines"]);
  const port = await portOf(server);
  for (const { name, segments, lines } of LINES) {
    await t.step(name, async () => {
      using peer = await Peer.connect(port);
      for (const segment of segments) await peer.send(typeof segment === "string" ? segment : new Uint8Array(segment));
      await peer.closeWrite();
      assertMatch(new TextDecoder().decode(await peer.receiveAll()), stamped(...lines));
    });
  }
});

programTest("with --lines a line over 64 KiB is answered by one line, ends its client, and no other", async () => {
  await using server = startServer(["--lines"]);
  const port = await portOf(server);
  using other = await Peer.connect(port);
  await other.send("before\n");
  await other.receive("\n");
  using peer = await Peer.connect(port);
  await peer.send("x".repeat(70_000));
  assertEquals(await peer.receive("\n"), "The line is too long, and nothing after it is read\n");
  await server.complained("\n");
  assertMatch(server.stderr, new RegExp(`^Error while serving 127\\.0\\.0\\.1:${peer.port}: .*65536.*\n$`));
  await other.send("after\n");
  assertMatch(await other.receive("\n"), stamped("after\n"));
});

// --- Flags --------------------------------------------------------------------

programTest("--hostname and --port say where to listen", async () => {
  const port = await freePort();
  await using server = startScript("server.ts", ["--hostname", "127.0.0.2", "--port", String(port)], {
    permissions: [`--allow-net=127.0.0.2:${port}`],
  });
  await server.printed(`waiting for connection... on 127.0.0.2:${port}\n`);
});

programTest("--max-connections 1 serves the second client once the first has left", async () => {
  await using server = startServer(["--max-connections", "1"]);
  const port = await portOf(server);
  using second = await (async () => {
    using first = await Peer.connect(port);
    await first.send("first\n");
    await first.receive("\n");
    const second = await Peer.connect(port);
    await second.send("second\n");
    await first.send("still first\n");
    assertMatch(await first.receive("\n"), stamped("still first\n"));
    assertEquals(server.stdout.match(/connected from/g)?.length, 1);
    return second;
  })();
  assertMatch(await second.receive("\n"), stamped("second\n"));
});

programTest("--idle-timeout closes a silent client and says nothing", async () => {
  await using server = startServer(["--idle-timeout", "50"]);
  const port = await portOf(server);
  using peer = await Peer.connect(port);
  assertEquals((await peer.receiveAll()).length, 0);
  assertEquals(server.stderr, "");
});

programTest("--quiet prints nothing", async () => {
  const port = await freePort();
  await using server = startScript("server.ts", ["--port", String(port), "--quiet"]);
  const client = await runScript("client.ts", ["--port", String(port), "--retries", "50", "hello"]);
  assertMatch(client.stdout, stamped("hello\n"));
  server.kill("SIGTERM");
  assertEquals(await server.ended(), { code: 0, stdout: "", stderr: "", bytes: new Uint8Array() });
});

// --- Failures -----------------------------------------------------------------

programTest("a port in use is one sentence and exit code 1", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  const outcome = await runScript("server.ts", ["--port", String(port)]);
  assertFailed(outcome, 1, new RegExp(`^server\\.ts: .*127\\.0\\.0\\.1:${port}.* in use.*\n$`));
  assertEquals(outcome.stdout, "");
});

programTest("an address of another machine is one sentence and exit code 1", async () => {
  const outcome = await runScript("server.ts", ["--hostname", "192.0.2.1", "--port", "0"], {
    permissions: ["--allow-net=192.0.2.1"],
  });
  assertFailed(outcome, 1, /192\.0\.2\.1:0: cannot assign requested address/);
});

programTest("a missing permission is named, and with exactly that flag the server runs", async () => {
  const port = await freePort();
  const args = ["--port", String(port)];
  const refused = await runScript("server.ts", args, { permissions: [] });
  assertFailed(refused, 1, /permission/);
  const permissions = permissionsIn(refused.stderr);
  assertEquals(permissions, [`--allow-net=127.0.0.1:${port}`]);
  await using server = startScript("server.ts", args, { permissions });
  await server.printed("waiting for connection...");
});

programTestIn(
  "the missing permissions of a Unix socket are named, and with exactly those the server runs",
  async (folder) => {
    const path = `${folder}/server.sock`;
    const refused = await runScript("server.ts", ["--unix", path], { permissions: [] });
    assertFailed(refused, 1, /permission/);
    const permissions = permissionsIn(refused.stderr);
    assertEquals(permissions, unixPermissions(path));
    await using server = startScript("server.ts", ["--unix", path], { permissions });
    await server.printed("waiting for connection...");
  },
);

programTest("the first line of server.ts asks for its default address only", async () => {
  const script = new URL("../../server.ts", import.meta.url);
  const [first] = (await Deno.readTextFile(script)).split("\n");
  assertEquals(first, "#!/usr/bin/env -S deno run --allow-net=127.0.0.1:8009");
  const { mode } = await Deno.stat(script);
  assertEquals((mode ?? 0) & 0o111, 0o111);
  const refused = await runScript("server.ts", [], { permissions: [] });
  assertEquals(permissionsIn(refused.stderr), ["--allow-net=127.0.0.1:8009"]);
});

programTest("a reader that leaves does no harm", async () => {
  await using server = startScript("server.ts", ["--port", "0"]);
  const port = await portOf(server);
  await server.leaveOutput();
  using peer = await Peer.connect(port);
  await peer.send("hello\n");
  assertMatch(await peer.receive("\n"), stamped("hello\n"));
  server.kill("SIGTERM");
  const { code, stderr } = await server.ended();
  assertEquals([code, stderr], [0, ""]);
});

// --- Colours ------------------------------------------------------------------

const COLOUR = "\x1b[36m";

for (
  const [name, env, isColoured] of [["in colours", { NO_COLOR: "" }, true], ["not with NO_COLOR", {}, false]] as const
) {
  peerTest(["python3"], `on a terminal addresses stand out, ${name}`, async () => {
    await using server = new Terminal(["--port", String(await freePort())], { script: "server.ts", env });
    await server.showsLike(/waiting for connection\.\.\. on 127\.0\.0\.1:\d+/);
    assertEquals(server.output.includes(COLOUR), isColoured);
  });
}

programTest("in a pipe there are no colours", async () => {
  await using server = startServer([], { env: { NO_COLOR: "" } });
  await portOf(server);
  // deno-lint-ignore no-control-regex
  assert(!/\x1b/.test(server.stdout));
});

// --- Unix sockets ---------------------------------------------------------------

programTestIn("a socket file that a dead server has left is replaced", async (folder) => {
  const path = `${folder}/server.sock`;
  await using dead = await startUnixServer(path);
  dead.kill("SIGKILL");
  await dead.ended();
  assert((await Deno.lstat(path)).isSocket);
  await using _server = await startUnixServer(path);
  using peer = await Peer.connectUnix(path);
  await peer.send("hello\n");
  assertMatch(await peer.receive("\n"), stamped("hello\n"));
});

programTestIn("a live server's socket is left alone, and said to be in use", async (folder) => {
  const path = `${folder}/server.sock`;
  await using _server = await startUnixServer(path);
  const outcome = await runScript("server.ts", ["--unix", path], { permissions: unixPermissions(path) });
  assertFailed(outcome, 1, /address already in use/);
  using peer = await Peer.connectUnix(path);
  await peer.send("hello\n");
  assertMatch(await peer.receive("\n"), stamped("hello\n"));
});

programTestIn("a file that is no socket is left alone, and said to be one", async (folder) => {
  const path = `${folder}/notes.txt`;
  await Deno.writeTextFile(path, "precious");
  const outcome = await runScript("server.ts", ["--unix", path], { permissions: unixPermissions(path) });
  assertFailed(outcome, 1, /notes\.txt.*socket/);
  assertEquals(await Deno.readTextFile(path), "precious");
});

programTestIn("the socket file is gone when the server has ended", async (folder) => {
  const path = `${folder}/server.sock`;
  await using server = await startUnixServer(path);
  server.kill("SIGTERM");
  assertEquals((await server.ended()).code, 0);
  assertEquals(await Array.fromAsync(Deno.readDir(folder)), []);
});

// --- Signals --------------------------------------------------------------------

/** Tells `server`, one of lines, to end while `client` is in the middle of its second line. */
async function beginDraining(server: Program, client: Peer, signal: Deno.Signal): Promise<void> {
  await client.send("one\ntw");
  await client.receive("\n");
  using idle = await Peer.connect(await portOf(server));
  await idle.send("1\n");
  await idle.receive("\n");
  server.kill(signal);
  assertEquals((await idle.receiveAll()).length, 0); // The server has no more time for it.
}

for (const signal of ["SIGINT", "SIGTERM"] as const) {
  programTest(`${signal} ends a server that has nothing to do, with a summary and exit code 0`, async () => {
    await using server = startServer();
    await portOf(server);
    server.kill(signal);
    const { code, stdout, stderr } = await server.ended();
    assertEquals([code, stderr], [0, ""]);
    assertMatch(stdout, /\nclients: 0, cut off: 0, bytes in: 0, bytes out: 0\n$/);
  });

  programTest(`${signal} lets a client finish the line that it has begun`, async () => {
    await using server = startServer(["--lines"]);
    using client = await Peer.connect(await portOf(server));
    await beginDraining(server, client, signal);
    await client.send("o\n");
    assertMatch(new TextDecoder().decode(await client.receiveAll()), stamped("two\n"));
    const { code, stdout, stderr } = await server.ended();
    assertEquals([code, stderr], [0, ""]);
    assertMatch(stdout, /\nclients: 2, cut off: 0, bytes in: 10, bytes out: 91\n$/);
  });

  for (const second of ["SIGINT", "SIGTERM"] as const) {
    programTest(`${second} after ${signal} cuts a client that holds on`, async () => {
      await using server = startServer(["--lines"]);
      using client = await Peer.connect(await portOf(server));
      await beginDraining(server, client, signal);
      const begun = performance.now();
      server.kill(second);
      const { code, stdout, stderr } = await server.ended();
      assert(performance.now() - begun < 5_000);
      assertEquals([code, stderr], [0, ""]);
      assertMatch(stdout, /\nclients: 2, cut off: 1, bytes in: 8, bytes out: 60\n$/);
    });
  }
}

programTest("a second signal is heard however soon it comes", async () => {
  await using server = startServer(["--lines", "--max-connections", "1"]);
  const port = await portOf(server);
  using peer = await Peer.connect(port);
  await peer.send("one\ntw");
  await peer.receive("\n");
  const begun = performance.now();
  server.kill("SIGINT");
  server.kill("SIGTERM");
  const { code, stdout } = await server.ended();
  assert(performance.now() - begun < 5_000);
  assertEquals(code, 0);
  assertMatch(stdout, /\nclients: 1, cut off: 1, /);
});
