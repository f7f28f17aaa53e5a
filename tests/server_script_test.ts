/** server.ts as a person runs it: its flags, its signals, what it says. */

import { assert, assertEquals, assertMatch } from "../deps.ts";
import {
  assertFailed,
  freePort,
  Peer,
  permissionsIn,
  portOf,
  Program,
  programTestIn,
  runScript,
  startScript,
  startServer,
  startUnixServer,
  Terminal,
  unixPermissions,
} from "./programs.ts";
import { programTest } from "./testing.ts";

const STAMP = String.raw`\[[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4}\] `;
const STAMP_LENGTH = "[Thu Sep 15 22:29:12 2016] ".length;

/** A pattern for `chunks`, each behind its stamp, and for nothing else. */
function stamped(...chunks: string[]): RegExp {
  return new RegExp(`^${chunks.map((chunk) => STAMP + chunk).join("")}$`);
}

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

programTestIn("the time is written as Python's time.ctime() writes it", async (folder) => {
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

programTest("with --lines a line over 64 KiB ends its client, in one sentence, and no other", async () => {
  await using server = startServer(["--lines"]);
  const port = await portOf(server);
  using other = await Peer.connect(port);
  await other.send("before\n");
  await other.receive("\n");
  using peer = await Peer.connect(port);
  await peer.send("x".repeat(70_000));
  await server.complained("\n");
  assertMatch(server.stderr, new RegExp(`^Error while serving 127\\.0\\.0\\.1:${peer.port}: .*65536.*\n$`));
  await other.send("after\n");
  assertMatch(await other.receive("\n"), stamped("after\n"));
});

// --- Flags --------------------------------------------------------------------

programTest("--hostname and --port say where to listen", async () => {
  const port = freePort();
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

programTest("--max-lifetime closes a client that is not silent, and says nothing", async () => {
  await using server = startServer(["--max-lifetime", "50"]);
  using peer = await Peer.connect(await portOf(server));
  await peer.send("hello\n");
  assertMatch(new TextDecoder().decode(await peer.receiveAll()), stamped("hello\n"));
  assertEquals(server.stderr, "");
});

programTest("--proxy-from names the client whom a proxy names, and refuses others", async () => {
  await using server = startServer(["--proxy-from", "192.0.2.0/24,127.0.0.1"]);
  using peer = await Peer.connect(await portOf(server));
  await peer.send("PROXY TCP4 203.0.113.7 198.51.100.2 50000 443\r\nhello");
  assertMatch(await peer.receive("hello"), stamped("hello"));
  await server.printed("...connected from: 203.0.113.7:50000\n");
  await using strict = startServer(["--proxy-from", "192.0.2.0/24"]);
  using refused = await Peer.connect(await portOf(strict));
  assertEquals((await refused.receiveAll()).length, 0);
});

programTest("--max-connections-per-host 1 closes the second client at once", async () => {
  await using server = startServer(["--max-connections-per-host", "1"]);
  const port = await portOf(server);
  using first = await Peer.connect(port);
  await first.send("first\n");
  assertMatch(await first.receive("\n"), stamped("first\n"));
  using second = await Peer.connect(port);
  assertEquals((await second.receiveAll()).length, 0);
  assertEquals(server.stdout.match(/connected from/g)?.length, 1);
});

programTest("--quiet prints nothing", async () => {
  const port = freePort();
  await using server = startScript("server.ts", ["--port", String(port), "--quiet"]);
  const client = await runScript("client.ts", ["--port", String(port), "--retries", "50", "hello"]);
  assertMatch(client.stdout, stamped("hello\n"));
  server.kill("SIGTERM");
  assertEquals(await server.ended(), { code: 0, stdout: "", stderr: "", bytes: new Uint8Array() });
});

const TOLD = [
  { flag: "--help", told: /^Answers what .*\n\nUsage: .*--hostname HOST.*--port PORT.*--unix PATH/s },
  { flag: "--version", told: /^server\.ts \d+\.\d+\.\d+\n$/ },
];

for (const { flag, told } of TOLD) {
  programTest(`server.ts ${flag} needs no permission and ends with 0`, async () => {
    const { code, stdout, stderr } = await runScript("server.ts", [flag], { permissions: [] });
    assertEquals([code, stderr], [0, ""]);
    assertMatch(stdout, told);
  });
}

// --- Failures -----------------------------------------------------------------

programTest("a port in use is one sentence and exit code 1", async () => {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { port } = listener.addr;
  const outcome = await runScript("server.ts", ["--port", String(port)]);
  assertFailed(outcome, 1, new RegExp(`^server\\.ts: .*127\\.0\\.0\\.1:${port}.* in use; .*\n$`));
  assertEquals(outcome.stdout, "");
});

programTest("an address of another machine is one sentence and exit code 1", async () => {
  const outcome = await runScript("server.ts", ["--hostname", "192.0.2.1", "--port", "0"], {
    permissions: ["--allow-net=192.0.2.1"],
  });
  assertFailed(outcome, 1, /192\.0\.2\.1:0.* no such address; /);
});

programTest("a missing permission is named, and with exactly that flag the server runs", async () => {
  const port = freePort();
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
  const script = new URL("../server.ts", import.meta.url);
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

// --- Status ---------------------------------------------------------------------

const IDLE = "messages/s: 0, bytes/s in: 0, bytes/s out: 0";

if (Deno.build.os !== "windows") {
  for (const flags of [[], ["--quiet"]]) {
    programTest(`SIGUSR2 prints how the server is doing ${flags.join()}`, async () => {
      const port = freePort();
      await using server = startServer(["--port", String(port), ...flags]);
      const client = await runScript("client.ts", ["--port", String(port), "--retries", "50", "hello"]);
      assertMatch(client.stdout, stamped("hello\n"));
      server.kill("SIGUSR2");
      const [, messages, bytesIn, bytesOut] = await server.printed(
        /connections: \d, messages\/s: (\d+), bytes\/s in: (\d+), bytes\/s out: (\d+)\n/,
      );
      const rates = [messages, bytesIn, bytesOut].map(Number);
      assert(rates.every((rate) => rate >= 0) && Number(bytesIn) <= Number(bytesOut));
    });
  }
}

programTest("on a terminal the last line says how the server is doing, and is gone at the end", async () => {
  const port = freePort();
  await using server = new Terminal(["--port", String(port)], 80, "server.ts");
  const waiting = `waiting for connection... on 127.0.0.1:${port}`;
  await server.shows(waiting, `connections: 0, ${IDLE}`);
  using peer = await Peer.connect(port);
  const connected = `...connected from: 127.0.0.1:${peer.port}`;
  await server.shows(waiting, connected, `connections: 1, ${IDLE}`);
  await peer.send("hello\n");
  await peer.receive("\n");
  await peer.closeWrite();
  await server.shows(waiting, connected, `connections: 0, ${IDLE}`);
  await server.type("\x03");
  const { how, screen } = await server.ended();
  assertMatch(how, /exit code 0, terminal as it was/);
  assertEquals(screen, [waiting, connected, "clients: 1, cut off: 0, bytes in: 6, bytes out: 33", ""]);
});

programTest("on a narrow terminal the last line is cut, and with --quiet there is none", async () => {
  const port = freePort();
  await using server = new Terminal(["--port", String(port)], 50, "server.ts");
  const waiting = `waiting for connection... on 127.0.0.1:${port}`;
  await server.shows(waiting, `connections: 0, ${IDLE}`.slice(0, 49));
  await server.type("\x03");
  await server.ended();
  await using quiet = new Terminal(["--port", String(port), "--quiet"], 80, "server.ts");
  await runScript("client.ts", ["--port", String(port), "--retries", "50", "hello"]);
  await quiet.type("\x03");
  assertEquals((await quiet.ended()).screen, ["^C"]);
});

// --- JSON and colours -------------------------------------------------------------

/** The events of `output`, without their times and what differs from run to run. */
function eventsIn(output: string): Record<string, unknown>[] {
  return output.trimEnd().split("\n").map((line) => {
    const { time, duration, ...fields } = JSON.parse(line);
    assertMatch(time, /^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$/);
    assert(duration === undefined || duration >= 0);
    return fields;
  });
}

const NO_INCIDENTS = {
  rejected: 0,
  aborted: 0,
  timedOut: 0,
  errors: 0,
  lost: 0,
  refused: 0,
  handshakeFailures: 0,
  dropped: 0,
  overloads: 0,
};

programTest("--json tells of everything in lines of JSON, and of nothing else", async () => {
  await using server = startServer(["--json", "--lines"]);
  const [, portText] = await server.printed(/127\.0\.0\.1:(\d+)"\}\n/);
  const port = Number(portText);
  using peer = await Peer.connect(port);
  const client = `127.0.0.1:${peer.port}`;
  await peer.send("hello\n");
  await peer.receive("\n");
  await peer.closeWrite();
  await peer.receiveAll();
  await server.printed('"closed"');
  using long = await Peer.connect(port);
  const longClient = `127.0.0.1:${long.port}`;
  await long.send("x".repeat(70_000));
  await server.printed(/"closed"[^]*"closed"/);
  server.kill("SIGTERM");
  const { code, stdout, stderr } = await server.ended();
  assertEquals([code, stderr], [0, ""]);
  const [listening, opened, closed, reopened, error, reclosed, stopped] = eventsIn(stdout);
  assertEquals(listening, { event: "listening", address: `127.0.0.1:${port}` });
  assertEquals(opened, { event: "opened", client });
  assertEquals(closed, { event: "closed", client, reason: "finished", bytesRead: 6, bytesWritten: 33 });
  assertEquals(reopened, { event: "opened", client: longClient });
  const message = "Cannot read until the delimiter: it does not come within 65536 bytes";
  assertEquals({ ...error, message }, { event: "error", client: longClient, name: "LimitOverrunError", message });
  assertEquals([reclosed?.event, reclosed?.reason], ["closed", "error"]);
  const { bytesRead, ...others } = stopped ?? {};
  assert(Number(bytesRead) > 65_536);
  assertEquals(others, {
    event: "stopped",
    finished: 0,
    cut: [],
    ...NO_INCIDENTS,
    accepted: 2,
    active: 0,
    errors: 1,
    bytesWritten: 33,
  });
});

programTest("--json --udp tells of each datagram, and of an answer that cannot be sent", async () => {
  await using server = startServer(["--json", "--udp"]);
  const [, port = ""] = await server.printed(/127\.0\.0\.1:(\d+)"\}\n/);
  await runScript("client.ts", ["--udp", "--port", port, "hello"]);
  await runScript("client.ts", ["--udp", "--port", port, "--timeout", "1"], { input: "x".repeat(65_500) });
  await server.printed('"error"');
  server.kill("SIGTERM");
  const events = eventsIn((await server.ended()).stdout);
  assertEquals(events.map(({ event }) => event), ["listening", "datagram", "datagram", "error", "stopped"]);
  assertEquals(events.map(({ bytesRead }) => bytesRead), [undefined, 5, 65_500, undefined, 65_505]);
});

programTest("--json --quiet tells of errors, and of the rest when it is asked", async () => {
  const port = freePort();
  await using server = startServer(["--port", String(port), "--json", "--quiet", "--lines"]);
  const client = await runScript("client.ts", ["--port", String(port), "--retries", "50"], {
    input: "x".repeat(70_000) + "\n",
  });
  assertEquals(client.code, 1);
  await server.printed('"error"');
  if (Deno.build.os !== "windows") {
    server.kill("SIGUSR2");
    await server.printed('"status"');
  }
  server.kill("SIGTERM");
  const events = eventsIn((await server.ended()).stdout);
  assertEquals(events[0]?.event, "error");
  assert(events.slice(1).every(({ event }) => event === "status"));
});

programTestIn("--json escapes what a client has named, so that a line is a line", async (folder) => {
  const path = `${folder}/server.sock`;
  const permissions = [`--allow-read=${folder}`, `--allow-write=${folder}`, "--allow-net"];
  await using server = startScript("server.ts", ["--json", "--udp", "--unix", path], { permissions });
  await server.printed("listening");
  const name = `${folder}/"\n\x1b[2J\u202e`;
  const socket = Deno.listenDatagram({ transport: "unixpacket", path: name });
  try {
    await socket.send(new TextEncoder().encode("hello"), { transport: "unixpacket", path });
    await server.printed('"datagram"');
  } finally {
    socket.close();
  }
  server.kill("SIGTERM");
  const { stdout } = await server.ended();
  // deno-lint-ignore no-control-regex
  assert(!/[\x00-\x09\x0b-\x1f\u202e]/.test(stdout));
  assertEquals(eventsIn(stdout)[1], {
    event: "datagram",
    client: `${folder}/"\\n\\x1b[2J\\u202e`,
    bytesRead: 5,
  });
});

const COLOUR = "\x1b[36m";

for (
  const [name, env, isColoured] of [["in colours", { NO_COLOR: "" }, true], ["not with NO_COLOR", {}, false]] as const
) {
  programTest(`on a terminal addresses stand out, ${name}`, async () => {
    await using server = new Terminal(["--port", String(freePort())], 80, "server.ts", env);
    await server.showsLike(/waiting for connection\.\.\. on 127\.0\.0\.1:\d+\nconnections: 0/);
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
  assertFailed(outcome, 1, / in use; /);
  using peer = await Peer.connectUnix(path);
  await peer.send("hello\n");
  assertMatch(await peer.receive("\n"), stamped("hello\n"));
});

programTestIn("a file that is no socket is left alone, and said to be one", async (folder) => {
  const path = `${folder}/notes.txt`;
  await Deno.writeTextFile(path, "precious");
  const outcome = await runScript("server.ts", ["--unix", path], { permissions: unixPermissions(path) });
  assertFailed(outcome, 1, / no socket; /);
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

// --- Workers ------------------------------------------------------------------

const FILES = ["server.ts", "mod.ts", "deps.ts"].map((file) => new URL(`../${file}`, import.meta.url).pathname);

programTest("server.ts --workers counts what all of them have done, and names the flag that it needs", async () => {
  const args = ["--port", "0", "--workers", "2"];
  const permissions = ["--allow-net=127.0.0.1"];
  const refused = await runScript("server.ts", args, { permissions });
  const flag = `--allow-read=${FILES}`;
  assertFailed(refused, 1, new RegExp(`^server\\.ts: --workers: permission is missing; run again with ${flag}\n$`));

  await using server = startScript("server.ts", args, { permissions: [...permissions, flag] });
  const port = await portOf(server);
  for (let count = 0; count < 10; count++) {
    using peer = await Peer.connect(port);
    await peer.send("hello\n");
    assertMatch(await peer.receive("\n"), stamped("hello\n"));
    await peer.closeWrite();
    await peer.receiveAll();
  }
  server.kill("SIGUSR2");
  await server.printed(/^connections: \d+, messages\/s: \d+, /m);
  server.kill("SIGTERM");
  const { code, stdout, stderr } = await server.ended();
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, /^clients: 10, cut off: 0, bytes in: 60, bytes out: 330$/m);
});
