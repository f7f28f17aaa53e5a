/** UnixServer: names, clients and permissions. Its socket file is in socket_files_test.ts. */

import { assert, assertEquals, assertThrows } from "../deps.ts";
import { connect, perHost, StreamRequestHandler, UnixServer } from "../mod.ts";
import { Echo, peerTest, printedBy, programTestIn, rejectionOf, unixTest } from "./testing.ts";

async function assertServes(path: string): Promise<void> {
  await using client = await connect({ path });
  await client.send("hello\n");
  assertEquals(await client.readLine(), "hello");
}

programTestIn(
  "UnixServer that may write to its file only says what it cannot keep, and does not ask",
  async (folder) => {
    const path = `${folder}/a.sock`;
    const program = `
    import { StreamRequestHandler, UnixServer } from ${JSON.stringify(import.meta.resolve("../mod.ts"))};
    class Idle extends StreamRequestHandler {
      override handle() {}
    }
    const path = ${JSON.stringify(path)};
    const server = new UnixServer({ path }, Idle);
    await server.listen();
    Deno.removeSync(path);
    Deno.writeTextFileSync(path, "another's");
    await server.shutdown();
  `;
    const file = `${folder}/main.ts`;
    await Deno.writeTextFile(file, program);
    const flags = [`--allow-net=unix:${path}`, `--allow-read=${path}`, `--allow-write=${path}`];
    const { code, stderr } = await new Deno.Command(Deno.execPath(), { args: ["run", "--no-config", ...flags, file] })
      .output();
    assertEquals(code, 0);
    const [sentence] = new TextDecoder().decode(stderr).split("\n");
    assertEquals(
      sentence,
      `Cannot tidy up the socket file ${path}: it is another server's by now, and takes --allow-read of its folder to keep`,
    );
  },
);

/** Connects to the abstract name, from the one that is given in hexadecimal, and reads to the end. */
const NAMED_CLIENT = `
import socket, sys
client = socket.socket(socket.AF_UNIX)
client.bind(bytes.fromhex(sys.argv[2]))
client.connect(chr(0) + sys.argv[1])
while client.recv(100): pass
`;

if (Deno.build.os === "linux") {
  peerTest(
    ["python3"],
    "what a client calls itself is printed without control characters, and is no format",
    async () => {
      class Faulty extends StreamRequestHandler {
        override handle() {
          throw "a bug";
        }
      }
      const name = `socketserver-${crypto.randomUUID()}`;
      const bytes = new TextEncoder().encode(`\0${name}%c\n\x1b[31m\u202e`);
      const clientName = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
      const printed = await printedBy(async () => {
        await using server = new UnixServer({ path: `\0${name}` }, Faulty);
        await server.listen();
        server.serveForever();
        const python = new Deno.Command("python3", { args: ["-c", NAMED_CLIENT, name, clientName], stderr: "inherit" });
        assert((await python.output()).success);
      });
      assertEquals(printed, [[String.raw`Error while serving @${name}%%c\n\x1b[31m\u202e:`, "a bug"]]);
    },
  );
}

unixTest("perHost() counts no client of a UnixServer, as it has no host", async (folder) => {
  const path = `${folder}/echo.sock`;
  await using server = new UnixServer({ path }, Echo, { filters: [perHost(1)] });
  await server.listen();
  server.serveForever();
  await using _client = await connect({ path });
  await assertServes(path);
  assertEquals(server.stats.refused, 0);
});

if (Deno.build.os === "linux") {
  unixTest("UnixServer listens on a name without a file", async () => {
    const path = `\0socketserver-${crypto.randomUUID()}`;
    await using server = new UnixServer({ path }, Echo);
    await server.listen();
    server.serveForever();
    await assertServes(path);
  });
}

for (const mode of [-1, 1.5, 660, Infinity]) {
  Deno.test(`UnixServer refuses mode ${mode}`, () => {
    assertThrows(() => new UnixServer({ path: "/tmp/a.sock", mode }, Echo), RangeError);
  });
}

Deno.test("UnixServer refuses an empty path", () => {
  assertThrows(() => new UnixServer({ path: "" }, Echo), TypeError);
});

Deno.test("UnixServer without the permissions names the least flags", {
  permissions: { net: false, read: false, write: false },
}, async () => {
  const error = await rejectionOf(new UnixServer({ path: "/tmp/a.sock" }, Echo).serveForever());
  assertEquals(
    error.message,
    "Cannot listen on /tmp/a.sock: permission is missing; run again with " +
      "--allow-read=/tmp/a.sock --allow-write=/tmp/a.sock --allow-net=unix:/tmp/a.sock",
  );
});
