import { assert, assertEquals, assertMatch, assertRejects, assertThrows } from "../deps.ts";
import { connect, perHost, StreamRequestHandler, UnixServer } from "../mod.ts";

import { Echo, peerTest, programTestIn, rejectionOf, unixTest } from "./testing.ts";

/** Leaves a socket file that nobody answers on, as a killed server does. */
function leaveStaleSocket(path: string): void {
  const listener = Deno.listen({ transport: "unix", path: `${path}.moved` });
  Deno.renameSync(`${path}.moved`, path); // So that closing does not remove it.
  listener.close();
}

async function assertServes(path: string): Promise<void> {
  await using client = await connect({ path });
  await client.send("hello\n");
  assertEquals(await client.readLine(), "hello");
}

function exists(path: string): boolean {
  try {
    Deno.lstatSync(path);
    return true;
  } catch {
    return false; // Whatever it is, it is not there.
  }
}

unixTest("UnixServer serves, and removes its file when it ends", async (folder) => {
  const path = `${folder}/echo.sock`;
  {
    await using server = new UnixServer({ path }, Echo);
    assertEquals(await server.listen(), { transport: "unix", path });
    assertEquals(await server.listen(), server.address);
    server.serveForever();
    await assertServes(path);
  }
  assert(!exists(path));
});

unixTest("UnixServer removes its file when it is closed, and when it never served", async (folder) => {
  const path = `${folder}/echo.sock`;
  const server = new UnixServer({ path }, Echo);
  await server.listen();
  server.close();
  await server.serveForever();
  assert(!exists(path));
});

unixTest("UnixServer replaces a socket file that nobody answers on", async (folder) => {
  const path = `${folder}/echo.sock`;
  leaveStaleSocket(path);
  await using server = new UnixServer({ path }, Echo);
  await server.listen();
  server.serveForever();
  await assertServes(path);
});

unixTest("UnixServer leaves a server that is alive alone", async (folder) => {
  const path = `${folder}/echo.sock`;
  await using first = new UnixServer({ path }, Echo);
  await first.listen();
  first.serveForever();
  const second = new UnixServer({ path }, Echo);
  const error = await rejectionOf(second.serveForever());
  assert(error instanceof Deno.errors.AddrInUse);
  assertMatch(error.message, /echo\.sock: address already in use; stop the program/);
  await assertServes(path);
});

unixTest("UnixServer leaves a file alone that is no socket", async (folder) => {
  const path = `${folder}/notes.txt`;
  Deno.writeTextFileSync(path, "precious");
  await assertRejects(() => new UnixServer({ path }, Echo).serveForever(), Deno.errors.AddrInUse);
  assertEquals(Deno.readTextFileSync(path), "precious");
});

unixTest("UnixServer.listen() gives the same address until the server ends, and then rejects", async (folder) => {
  const path = `${folder}/echo.sock`;
  const server = new UnixServer({ path }, Echo);
  const address = await server.listen();
  assertEquals(await Promise.all([server.listen(), server.listen()]), [address, address]);
  await server.shutdown();
  await assertRejects(() => server.listen(), TypeError);
  assert(!exists(path));
});

unixTest("UnixServer can be tried again after it could not listen", async (folder) => {
  const path = `${folder}/echo.sock`;
  Deno.writeTextFileSync(path, "in the way");
  await using server = new UnixServer({ path }, Echo);
  await assertRejects(() => server.listen(), Deno.errors.AddrInUse);
  Deno.removeSync(path);
  await server.listen();
  server.serveForever();
  await assertServes(path);
});

unixTest("UnixServer does not remove a file that has become another's", async (folder) => {
  const path = `${folder}/echo.sock`;
  const first = new UnixServer({ path }, Echo);
  await first.listen();
  const serving = first.serveForever();
  Deno.removeSync(path);
  await using second = new UnixServer({ path }, Echo);
  await second.listen();
  second.serveForever();
  await first.shutdown();
  await serving;
  await assertServes(path);
  assertEquals([...Deno.readDirSync(folder)].length, 1);
});

unixTest("UnixServer does not remove the file of its successor in the same process", async (folder) => {
  const path = `${folder}/a.sock`;
  // A file system may give the number of a file that is gone to the next one.
  for (let round = 0; round < 10; round++) {
    const [first, second] = [new UnixServer({ path }, Echo), new UnixServer({ path }, Echo)];
    await first.listen();
    const served = first.serveForever();
    first.close();
    await second.listen();
    await served;
    const serving = second.serveForever();
    await assertServes(path);
    await second.shutdown({ grace: 0 });
    await serving;
  }
});

unixTest("UnixServer waits with its file until the one that is closing at its path has gone", async (folder) => {
  const path = `${folder}/a.sock`;
  const first = new UnixServer({ path }, Echo);
  await first.listen();
  const served = first.serveForever();
  await assertServes(path);
  await new Promise((resolve) => setTimeout(resolve)); // Now it waits for the next one.
  first.close();
  Deno.removeSync(path); // The runtime removes what is there later, once the accept has let go of the socket.
  await using second = new UnixServer({ path }, Echo);
  await second.listen();
  await served;
  second.serveForever();
  await assertServes(path);
});

unixTest("UnixServer that cannot give its file the mode leaves no socket behind", async (folder) => {
  const path = `${folder}/a.sock`;
  await using server = new UnixServer({ path, mode: 0o600 }, Echo);
  const { chmodSync } = Deno;
  Reflect.set(Deno, "chmodSync", () => {
    throw new Deno.errors.PermissionDenied("Operation not permitted");
  });
  try {
    await assertRejects(() => server.listen(), Deno.errors.PermissionDenied);
  } finally {
    Reflect.set(Deno, "chmodSync", chmodSync);
  }
  await server.listen();
  server.serveForever();
  await assertServes(path);
});

unixTest("of two UnixServers that start at once on a path that nobody answers on, one listens", async (folder) => {
  const path = `${folder}/a.sock`;
  leaveStaleSocket(path);
  const servers = [new UnixServer({ path }, Echo), new UnixServer({ path }, Echo)];
  const outcomes = await Promise.allSettled(servers.map((server) => server.listen()));
  const reasons = outcomes.filter((outcome) => outcome.status === "rejected").map(({ reason }) => reason);
  assertEquals(reasons.length, 1);
  assert(reasons[0] instanceof Deno.errors.AddrInUse, reasons[0]);
  for (const server of servers) await server.shutdown();
});

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

unixTest("UnixServer gives its file the mode", async (folder) => {
  const path = `${folder}/echo.sock`;
  await using server = new UnixServer({ path, mode: 0o600 }, Echo);
  await server.listen();
  assertEquals((Deno.lstatSync(path).mode ?? 0) & 0o777, 0o600);
});

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
      const printed: unknown[][] = [];
      const print = console.error;
      console.error = (...args) => void printed.push(args);
      try {
        await using server = new UnixServer({ path: `\0${name}` }, Faulty);
        await server.listen();
        server.serveForever();
        const python = new Deno.Command("python3", { args: ["-c", NAMED_CLIENT, name, clientName], stderr: "inherit" });
        assert((await python.output()).success);
      } finally {
        console.error = print;
      }
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
