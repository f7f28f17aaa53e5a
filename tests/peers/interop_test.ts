/** server.ts and client.ts with the programs that the world has: the tutorial's own, nc, socat. */

import { assert, assertEquals, assertMatch } from "../../deps.ts";
import { portOf, Program, runScript, startScript, startServer, startUnixServer, unixPermissions } from "../programs.ts";
import { startPython } from "./python.ts";
import { STAMP, stamped, TIME } from "../scripts/kit.ts";
import { peerTest, programTest, programTestIn, rejectionOf } from "../testing.ts";

peerTest(["python3"], "the tutorial's client talks to server.ts as it does to the tutorial's server", async () => {
  await using server = startServer();
  const port = await portOf(server);
  await using client = startPython("client.py", ["127.0.0.1", String(port)]);
  for (const line of ["hello python", "你好", "hello pythontab"]) {
    await client.write(`${line}\n`);
    await client.printed(new RegExp(`>>> ${STAMP}${line}\n`));
  }
  await client.write("\n");
  assertEquals((await client.ended()).code, 0);
  await server.printed(/^waiting for connection\.\.\..*\n\.\.\.connected from: 127\.0\.0\.1:\d+\n$/);
});

peerTest(["python3"], "two of the tutorial's clients are served by server.ts at the same time", async () => {
  await using server = startServer();
  const port = await portOf(server);
  await using first = startPython("client.py", ["127.0.0.1", String(port)]);
  await first.write("one\n");
  await first.printed("] one\n");
  await using second = startPython("client.py", ["127.0.0.1", String(port)]);
  await second.write("two\n");
  await second.printed("] two\n");
  await first.write("three\n");
  await first.printed("] three\n");
});

const PYTHON_SERVERS = [
  { file: "socket_server.py", opening: "\\[", closing: "\\]" },
  { file: "socketserver_server.py", opening: "", closing: "" },
];

const LINE_ENDS = [
  { flags: [], shown: String.raw`\\n` },
  { flags: ["--no-newline"], shown: "" },
];

for (const { file, opening, closing } of PYTHON_SERVERS) {
  for (const { flags, shown } of LINE_ENDS) {
    const answer = (line: string) => `${opening}${TIME}${closing} b'${line}${shown}'`;

    peerTest(["python3"], `client.ts ${flags.join("")} is answered by the tutorial's ${file}`, async () => {
      await using server = startPython(file, ["0"]);
      const port = await portOf(server);
      await server.printed("waiting for connection...\n");
      await using client = startScript("client.ts", ["--port", String(port), "--timeout", "1000", ...flags]);
      for (const line of ["hello python", "hello pythontab"]) {
        await client.write(`${line}\n`);
        await client.printed(new RegExp(answer(line)));
      }
      await server.printed(/\.\.\.connected from: \('127\.0\.0\.1', \d+\)\n/);
      await client.closeInput();
      const { code, stdout } = await client.ended();
      assertEquals(code, 0);
      assertMatch(stdout, new RegExp(`^${answer("hello python")}${answer("hello pythontab")}$`));
    });
  }
}

peerTest(["python3"], "client.ts says so when the tutorial's plain server does not close its end", async () => {
  await using server = startPython("socket_server.py", ["0"]);
  const port = await portOf(server);
  const { code, stderr } = await runScript("client.ts", ["--port", String(port), "--timeout", "300", "hello"]);
  assertEquals([code, stderr], [0, "client.ts: the server has answered everything, but keeps the connection open\n"]);
});

peerTest(["nc"], "nc talks to server.ts", async () => {
  await using server = startServer();
  const port = await portOf(server);
  await using nc = Program.start("nc", ["-N", "127.0.0.1", String(port)]);
  await nc.write("hello\n");
  await nc.printed(stamped("hello\n"));
  await nc.closeInput();
  assertEquals((await nc.ended()).code, 0);
});

peerTest(["nc"], "nc -U talks to server.ts --unix", async (folder) => {
  const path = `${folder}/server.sock`;
  await using _server = await startUnixServer(path);
  await using nc = Program.start("nc", ["-N", "-U", path]);
  await nc.write("hello\n");
  await nc.printed(stamped("hello\n"));
  await nc.closeInput();
  assertEquals((await nc.ended()).code, 0);
});

programTestIn("client.ts --unix talks to server.ts --unix", async (folder) => {
  const path = `${folder}/server.sock`;
  await using server = await startUnixServer(path);
  const { code, stdout } = await runScript("client.ts", ["--unix", path, "hello"], {
    permissions: unixPermissions(path),
  });
  assertEquals(code, 0);
  assertMatch(stdout, stamped("hello\n"));
  assert(server.stdout.includes("...connected from: (unnamed Unix socket)\n"));
});

peerTest(["socat"], "socat talks to server.ts", async () => {
  await using server = startServer();
  const port = await portOf(server);
  await using socat = Program.start("socat", ["-", `TCP:127.0.0.1:${port}`]);
  await socat.write("hello\n");
  await socat.printed(stamped("hello\n"));
  await socat.closeInput();
  assertEquals((await socat.ended()).code, 0);
});

peerTest(["nc"], "client.ts talks to nc, which knows nothing of answers", async () => {
  await using nc = Program.start("nc", ["-v", "-N", "-l", "127.0.0.1", "0"]);
  const [, port] = await nc.complained(/ (\d+)\n/);
  await using client = startScript("client.ts", ["--port", String(port)]);
  await client.write("ping\n");
  await nc.printed("ping\n");
  await nc.write("pong\n");
  await client.printed("pong\n");
  await client.closeInput();
  await nc.closeInput();
  assertEquals((await client.ended()).code, 0);
  assertEquals((await nc.ended()).code, 0);
});

programTest("a program that is missing fails its test, which names the package to install", async () => {
  const error = await rejectionOf(Promise.try(() => Program.start("no-such-program")));
  assertEquals(error.message, "no-such-program is missing: install the package no-such-program");
});
