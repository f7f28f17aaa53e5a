/** The programs of docs/programs.md run as they are written, and the clients named there talk to them. */

import { assert, assertEquals, assertMatch } from "../../deps.ts";
import { connect, DatagramClient, type SocketStream } from "../../mod.ts";
import { withCertificates } from "../certificates.ts";
import { Program } from "../programs.ts";
import { peerTest, programTest } from "../testing.ts";
import { programOf, Programs } from "./pages.ts";

const PAGE = "docs/programs.md";

interface Setting {
  flags?: string[];
  files?: Record<string, string>;
  /** The errors that it may print. */
  printed?: RegExp;
}

/** Runs one of them. */
async function withProgram(
  name: string,
  test: (port: number) => Promise<void>,
  { flags = [], files = {}, printed = /^$/ }: Setting = {},
): Promise<void> {
  await using programs = await Programs.of(PAGE, [name], files);
  await using program = programs.start(name, flags);
  await test(programs.port);
  assertMatch(program.stderr, printed);
}

/** Waits for the program to start. */
function dial(port: number): Promise<SocketStream> {
  return connect({ port, retries: Infinity, timeout: 20_000 });
}

async function runClient(command: string, args: string[], input = ""): Promise<string> {
  await using program = Program.start(command, args);
  await program.write(input);
  await program.closeInput();
  return (await program.ended()).stdout;
}

programTest("each program of docs/programs.md has fewer than 30 lines and the right types", async () => {
  const names = ["chat", "store", "calculator", "time", "tls_echo"].map((name) => `${name}_server.ts`);
  for (const name of names) {
    const lines = (await programOf(PAGE, name)).trim().split("\n").length;
    assert(lines < 30, `${name} has ${lines} lines`);
  }
  await using programs = await Programs.of(PAGE, names);
  assertEquals(await programs.check(names), "");
});

programTest("chat_server.ts sends each line to the others, and says when a person joins and leaves", async () => {
  await withProgram("chat_server.ts", async (port) => {
    await using ann = await dial(port);
    assertEquals(await ann.readLine(), "What is your name?");
    await ann.send("Ann\n");
    await using bob = await dial(port);
    await bob.readLine();
    await bob.send("Bob\nhello\x1b[2J\n");
    for (const line of ["* Bob joined", "Bob: hello\\x1b[2J"]) assertEquals(await ann.readLine(), line);
    await ann.send("good morning\n");
    assertEquals(await bob.readLine(), "Ann: good morning");
    bob.close();
    assertEquals(await ann.readLine(), "* Bob left");
  });
});

programTest("chat_server.ts closes a client that does not read, and no other client waits for it", async () => {
  await withProgram("chat_server.ts", async (port) => {
    const clients = await Promise.all(["deaf", "ann", "bob"].map(async (name) => {
      const client = await dial(port);
      await client.send(`${name}\n`);
      return client;
    }));
    const [deaf, ann, bob] = clients;
    assert(deaf !== undefined && ann !== undefined && bob !== undefined);
    const line = "x".repeat(900);
    const isOut = (async () => {
      for await (const heard of bob.lines()) if (heard === "* deaf left") return;
    })();
    let isOver = false;
    isOut.then(() => isOver = true);
    while (!isOver) await ann.send(`${line}\n`.repeat(100));
    for (const client of clients) client.close();
  }, { printed: /^(Error while serving 127\.0\.0\.1:\d+: (BadResource: )?The stream is closed\n( {4}at .*\n)*)?$/ });
});

peerTest(["redis-cli", "nc"], "store_server.ts answers redis-cli, and a person with nc", async () => {
  await withProgram("store_server.ts", async (port) => {
    await (await dial(port))[Symbol.asyncDispose]();
    const redis = (...args: string[]) => runClient("redis-cli", ["-p", String(port), ...args]);
    assertEquals(await redis("set", "greeting", "hello\nworld"), "OK\n");
    assertEquals(await redis("get", "greeting"), "hello\nworld\n");
    assertEquals(await redis("get", "nothing"), "\n");
    assertMatch(await redis("del", "greeting"), /^ERR /);
    // Every word of a command is read, or the rest would be taken for the next one.
    const several = await runClient("redis-cli", ["-p", String(port)], "set b two words more\nget b\nget b\n");
    assertEquals(several, "OK\ntwo\ntwo\n");
    const typed = await runClient("nc", ["-N", "127.0.0.1", String(port)], "SET a 1\r\nget a\r\n");
    assertEquals(typed, "+OK\r\n$1\r\n1\r\n");
  });
});

peerTest(["python3"], "calculator_server.ts answers Python's struct", async () => {
  const python = `
import socket, struct, sys
with socket.create_connection(("127.0.0.1", int(sys.argv[1]))) as server:
    for method, a, b in [(0, 1, 2), (1, 1, 2), (2, 6, 7), (3, 1, 4)]:
        server.sendall(struct.pack(">IBdd", 17, method, a, b))
        length, answer = struct.unpack(">Id", server.recv(12, socket.MSG_WAITALL))
        print(length, answer)
`;
  await withProgram("calculator_server.ts", async (port) => {
    await (await dial(port))[Symbol.asyncDispose]();
    assertEquals(await runClient("python3", ["-c", python, String(port)]), "8 3.0\n8 -1.0\n8 42.0\n8 0.25\n");
  });
});

programTest("time_server.ts answers with the seconds since 1900", async () => {
  await withProgram("time_server.ts", async (port) => {
    using client = new DatagramClient({ port, timeout: 200 });
    let answer: Uint8Array | undefined;
    for (let tries = 0; answer === undefined && tries < 100; tries++) {
      await client.send("");
      answer = await client.recv().catch(() => undefined); // It is not there yet.
    }
    assert(answer?.length === 4);
    const seconds = new DataView(answer.buffer, answer.byteOffset).getUint32(0) - Date.UTC(1970, 0) / 1_000;
    assert(Math.abs(seconds - 2_208_988_800 - Date.now() / 1_000) < 60, `${seconds}`);
  }, { flags: ["--unstable-net"] });
});

peerTest(["openssl"], "tls_echo_server.ts answers openssl", async () => {
  await withCertificates(async ({ server: { cert, key } }) => {
    await withProgram("tls_echo_server.ts", async (port) => {
      await (await dial(port))[Symbol.asyncDispose]();
      await using client = Program.start("openssl", ["s_client", "-quiet", "-connect", `127.0.0.1:${port}`]);
      await client.write("hello over TLS\n");
      await client.printed("hello over TLS\n");
    }, {
      flags: ["--allow-read"],
      files: { "cert.pem": cert, "key.pem": key },
      printed: /^Handshake with 127\.0\.0\.1:\d+ failed: .*\n$/, // dial() did not speak TLS.
    });
  });
});
