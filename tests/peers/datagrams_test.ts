/** Servers of datagrams with programs that are not ours: Python, socat; and a program without the flag. */

import { assert, assertEquals, assertMatch } from "../../deps.ts";
import { UdpServer, UnixDatagramServer } from "../../mod.ts";
import {
  ask,
  assertServes,
  decoded,
  EchoDatagram,
  echoExcept,
  handlerOf,
  RecordingUnixServer,
  withServer,
} from "../datagrams.ts";
import { Program } from "../programs.ts";
import { peerTest, printedBy, programTestIn, until } from "../testing.ts";
import { startPython } from "./python.ts";

/** A Python client, which sends the lines that it is given. */
function startUnixClient(way: string, folder: string, name = "client"): Program {
  return startPython("unix_datagram_client.py", [way, `${folder}/server.sock`, `${folder}/${name}.sock`]);
}

peerTest(["python3"], "a Python client that is bound is answered", async (folder) => {
  const path = `${folder}/server.sock`;
  await withServer(new UnixDatagramServer({ path }, EchoDatagram), async () => {
    await using client = startUnixClient("sendto", folder);
    for (const text of ["hello", "你好", "goodbye"]) {
      await client.write(`${text}\n`);
      await client.printed(`${text}\n`);
    }
    await client.closeInput();
    assertEquals((await client.ended()).code, 0);
  });
});

peerTest(["python3"], "a Python client is answered while the server receives", async (folder) => {
  const path = `${folder}/server.sock`;
  const exit = Promise.withResolvers<void>();
  await withServer(new UnixDatagramServer({ path }, echoExcept("slow", exit.promise)), async (server) => {
    await using client = startUnixClient("sendto", folder);
    await client.write("slow\n");
    await until(() => server.stats.active === 1);
    await assertServes(path); // Now nothing more comes, and the server waits.
    exit.resolve();
    await client.printed("slow\n");
  });
});

peerTest(["python3"], "a Python client that never reads holds up nobody else", async (folder) => {
  const path = `${folder}/server.sock`;
  const Generous = handlerOf(async (request) => {
    const isDeaf = decoded(request.data) === "deaf";
    await request.reply(isDeaf ? new Uint8Array(30_000) : request.data);
  });
  await withServer(new RecordingUnixServer({ path }, Generous), async (server) => {
    await using deaf = startUnixClient("deaf-sendto", folder, "deaf");
    await deaf.write("deaf\n".repeat(30));
    await until(() => server.errors.length > 0); // Its queue is full.
    await assertServes(path);
    await until(() => server.stats.active === 0);
    for (const error of server.errors) {
      assert(error instanceof Deno.errors.TimedOut);
      assertMatch(
        error.message,
        /^Cannot reply with 30000 bytes to [^\n]*deaf\.sock: the client (took nothing for 1000 ms|takes nothing)$/,
      );
    }
    await assertServes(path);
  });
});

/** Clients that cannot be answered, and what their reply says. */
const UNANSWERABLE = [
  {
    name: "is bound to nothing",
    way: "anonymous",
    words: /to \(unnamed Unix socket\): the client has bound its socket to no path, so it cannot be answered$/,
  },
  {
    name: "has connected its socket",
    way: "deaf-connect",
    words: /client\.sock: operation not permitted: the client has connected its socket, which must only be bound$/,
  },
];

for (const { name, way, words } of UNANSWERABLE) {
  peerTest(
    ["python3"],
    `a Python client that ${name} is aborted by its reply, and the server goes on`,
    async (folder) => {
      const path = `${folder}/server.sock`;
      await withServer(new RecordingUnixServer({ path }, EchoDatagram), async (server) => {
        await using client = startUnixClient(way, folder);
        await client.write("hello\n");
        await client.printed("sent\n");
        await until(() => server.errors.length > 0 && server.stats.active === 0);
        await assertServes(path);
        assertEquals([server.outcomes, server.stats.aborted, server.stats.errors], [["aborted"], 1, 0]);
        assertMatch(String(server.errors[0]), /: Cannot reply with 5 bytes to /);
        assertMatch(String(server.errors[0]), words);
      });
    },
  );
}

peerTest(["python3"], "of many clients that cannot be answered the server prints one line", async (folder) => {
  const path = `${folder}/server.sock`;
  const printed = await printedBy(() =>
    withServer(new UnixDatagramServer({ path }, EchoDatagram), async (server) => {
      await using client = startUnixClient("anonymous", folder);
      await client.write("hello\n".repeat(20));
      await until(() => server.stats.aborted === 20);
    })
  );
  const lines = printed.map(([format, line]) => `${format} ${line}`);
  assert(lines.length <= 2, lines.join("\n")); // A busy machine may take more than a second.
  assertMatch(lines[0] ?? "", /^%s Cannot reply with 5 bytes to \(unnamed Unix socket\): the client [^\n]*$/);
});

peerTest(
  ["python3"],
  "a Python client whose path is no UTF-8 is counted as lost, and the server goes on",
  async (folder) => {
    const path = `${folder}/server.sock`;
    await withServer(new RecordingUnixServer({ path }, EchoDatagram), async (server) => {
      await using client = startUnixClient("deaf-sendto", folder, "?");
      await client.write("hello\n");
      await client.printed("sent\n");
      await until(() => server.stats.lost === 1);
      await assertServes(path);
      assertEquals(server.errors, []);
    });
  },
);

peerTest(["python3"], "a client outlives a stranger whose path is no UTF-8", async (folder) => {
  const path = `${folder}/server.sock`;
  const echoPath = `${folder}/echo.sock`;
  await withServer(new UnixDatagramServer({ path: echoPath }, EchoDatagram), async (_server, _address, dial) => {
    const client = dial({ path: echoPath, localPath: path });
    assertEquals(await ask(client, "hello"), "hello");
    await using stranger = startUnixClient("deaf-sendto", folder, "?");
    await stranger.write("hello\n");
    await stranger.printed("sent\n");
    await client.send("question");
    await client.recv().catch(() => client.recv()); // The stranger's datagram may be told of, once.
    assertEquals(await ask(client, "again"), "again");
  });
});

peerTest(["socat"], "socat talks to a UDP server", async () => {
  await withServer(new UdpServer({ port: 0 }, EchoDatagram), async (_server, { port }) => {
    await assertTalks(["-", `UDP4:127.0.0.1:${port}`]);
  });
});

peerTest(["socat"], "socat talks to a server of Unix datagrams", async (folder) => {
  const path = `${folder}/server.sock`;
  await withServer(new UnixDatagramServer({ path }, EchoDatagram), async () => {
    await assertTalks(["-", `UNIX-SENDTO:${path},bind=${folder}/client.sock`]);
  });
});

async function assertTalks(args: string[]): Promise<void> {
  await using socat = Program.start("socat", args);
  for (const text of ["hello\n", "goodbye\n"]) {
    await socat.write(text);
    await socat.printed(text);
  }
  await socat.closeInput();
  assertEquals((await socat.ended()).code, 0);
}

const WITHOUT_FLAG = `
import { DatagramClient, DatagramRequestHandler, UdpServer, UnixDatagramServer } from "MOD";

class Silent extends DatagramRequestHandler {
  override handle() {}
}

const attempts = [
  () => new UdpServer({ port: 0 }, Silent).serveForever(),
  () => new UnixDatagramServer({ path: "server.sock" }, Silent).serveForever(),
  () => new DatagramClient({ port: 9 }).send("hello"),
  () => new DatagramClient({ path: "server.sock", localPath: "client.sock" }).recv(),
];
for (const attempt of attempts) await Promise.try(attempt).catch((error) => console.log(String(error)));
`;

programTestIn("without --unstable-net one sentence says so", async (folder) => {
  const source = WITHOUT_FLAG.replace("MOD", new URL("../../mod.ts", import.meta.url).href);
  await Deno.writeTextFile(`${folder}/main.ts`, source);
  const args = ["run", "--no-config", "--no-prompt", "--allow-net", "--allow-read", "--allow-write", "main.ts"];
  await using program = Program.start(Deno.execPath(), args, { cwd: folder });
  const { code, stdout, stderr } = await program.ended();
  const sentence =
    "TypeError: Cannot open a datagram socket: Deno has them behind a flag; run again with --unstable-net";
  assertEquals([code, stderr, stdout.trimEnd().split("\n")], [0, "", Array.from({ length: 4 }, () => sentence)]);
});

/** The least flags that each part of the documentation names. */
const LEAST = {
  "a UDP client": { flags: ["--allow-net=127.0.0.1"], code: 'new DatagramClient({ port: 9 }).send("hello")' },
  "a client that finds its server by name": {
    flags: ["--allow-net=localhost,127.0.0.1"],
    code: 'new DatagramClient({ hostname: "localhost", port: 9 }).send("hello")',
  },
};

for (const [name, { flags, code }] of Object.entries(LEAST)) {
  programTestIn(`${name} runs with ${flags.join(" ")}`, async (folder) => {
    const mod = new URL("../../mod.ts", import.meta.url).href;
    await Deno.writeTextFile(`${folder}/main.ts`, `import { DatagramClient } from "${mod}";\nawait ${code};\n`);
    const args = ["run", "--no-config", "--no-prompt", "--unstable-net", ...flags, "main.ts"];
    await using program = Program.start(Deno.execPath(), args, { cwd: folder });
    const outcome = await program.ended();
    assertEquals([outcome.code, outcome.stderr], [0, ""]);
  });
}
