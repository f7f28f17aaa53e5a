/** Servers of Unix datagrams, and their clients. The servers' files are in socket_files_test.ts. */

import { assert, assertEquals, assertMatch, assertRejects } from "../deps.ts";
import { DatagramClient, UnixDatagramServer } from "../mod.ts";
import {
  ask,
  assertServes,
  decoded,
  EchoDatagram,
  echoExcept,
  handlerOf,
  PATIENCE_MS,
  PlainSocket,
  RecordingUnixServer,
  withServer,
} from "./datagrams.ts";
import { permissionsIn } from "./programs.ts";
import { exists, rejectionOf, unixTest, until, withDeno } from "./testing.ts";

// --- Requests and replies ----------------------------------------------------------

unixTest("a Unix datagram of any length arrives whole, both ways", async (folder) => {
  const path = `${folder}/server.sock`;
  await withServer(new UnixDatagramServer({ path }, EchoDatagram), async (_server, _address, dial) => {
    const client = dial({ path, localPath: `${folder}/client.sock` });
    for (const length of [0, 1, 1_472, 65_507]) {
      const bytes = Uint8Array.from({ length }, (_, i) => i * 31);
      await client.send(bytes);
      assertEquals(await client.recv(), bytes);
    }
  });
});

unixTest("a Unix datagram that was cut is counted, and not handed on", async (folder) => {
  const path = `${folder}/server.sock`;
  await withServer(new UnixDatagramServer({ path }, EchoDatagram), async (server, _address, dial) => {
    const client = dial({ path, localPath: `${folder}/client.sock` });
    await client.send(new Uint8Array(70_000));
    assertEquals(await ask(client, "fine"), "fine");
    assertEquals([server.stats.lost, server.stats.accepted], [1, 1]);
  });
});

unixTest("Unix replies go out while a receive is pending", async (folder) => {
  const path = `${folder}/server.sock`;
  const exit = Promise.withResolvers<void>();
  const server = new UnixDatagramServer({ path }, echoExcept("slow", exit.promise));
  await withServer(server, async (_server, _address, dial) => {
    const client = dial({ path, localPath: `${folder}/client.sock` });
    await client.send("slow");
    assertEquals(await ask(client, "fast"), "fast"); // Now nothing more comes, and the server waits.
    exit.resolve();
    assertEquals(decoded(await client.recv()), "slow");
  });
});

unixTest("Unix replies to one client leave in the order of their calls", async (folder) => {
  const path = `${folder}/server.sock`;
  const texts = Array.from({ length: 8 }, (_, i) => `part ${i}`);
  const Burst = handlerOf(async (request) => void await Promise.all(texts.map((text) => request.reply(text))));
  await withServer(new UnixDatagramServer({ path }, Burst), async (_server, _address, dial) => {
    const client = dial({ path, localPath: `${folder}/client.sock` });
    await client.send("go");
    const heard: string[] = [];
    for (const _ of texts) heard.push(decoded(await client.recv()));
    assertEquals(heard, texts);
  });
});

unixTest("a Unix reply closes the socket that it leaves by, whether it arrives or not", async (folder) => {
  const path = `${folder}/server.sock`;
  const { listenDatagram } = Deno;
  let open = 0;
  await withServer(new RecordingUnixServer({ path }, EchoDatagram), async (server, _address, dial) => {
    const client = dial({ path, localPath: `${folder}/client.sock` });
    assertEquals(await ask(client, "hello"), "hello");
    const counting = (options: Deno.UnixListenOptions & { transport: "unixpacket" }) => {
      const socket = listenDatagram(options);
      const { close } = socket;
      open++;
      return Object.assign(socket, { close: () => void (open--, close.call(socket)) });
    };
    await withDeno("listenDatagram", counting, async () => {
      assertEquals(await ask(client, "hello again"), "hello again");
      await client.send("and goodbye");
      client.close();
      await until(() => server.stats.accepted === 3 && server.stats.active === 0);
      assertEquals(open, 0);
    });
  });
});

unixTest("close() ends a Unix datagram server now, and a reply behind it rejects and is no error", async (folder) => {
  const path = `${folder}/server.sock`;
  const exit = Promise.withResolvers<void>();
  const failures: unknown[] = [];
  const Late = handlerOf(async (request) => {
    await exit.promise;
    await request.reply("too late").catch((error) => {
      failures.push(error);
      throw error;
    });
  });
  await withServer(new RecordingUnixServer({ path }, Late), async (server, _address, dial) => {
    await dial({ path, localPath: `${folder}/client.sock` }).send("hello");
    await until(() => server.stats.active === 1);
    server.close();
    exit.resolve();
    await until(() => server.stats.active === 0);
    assert(failures[0] instanceof Deno.errors.BadResource, String(failures[0]));
    assertEquals([server.errors, server.stats.errors, server.stats.aborted], [[], 0, 0]);
  });
});

unixTest("a Unix client that has left is aborted, and the server goes on", async (folder) => {
  const path = `${folder}/server.sock`;
  const exit = Promise.withResolvers<void>();
  const Late = echoExcept("late", exit.promise);
  await withServer(new RecordingUnixServer({ path }, Late), async (server, _address, dial) => {
    const leaving = dial({ path, localPath: `${folder}/leaving.sock` });
    await leaving.send("late");
    await until(() => server.stats.active === 1);
    leaving.close();
    exit.resolve();
    await until(() => server.errors.length === 1);
    assertMatch(
      String(server.errors[0]),
      /: Cannot reply with 4 bytes to [^\n]*leaving\.sock: no such file or directory$/,
    );
    await assertServes(path);
    assertEquals([server.outcomes, server.stats.aborted, server.stats.errors], [["aborted"], 1, 0]);
  });
});

unixTest("a Unix client that does not read is given up after a second, and holds up no other", async (folder) => {
  const path = `${folder}/server.sock`;
  const localPath = `${folder}/deaf.sock`;
  const Generous = handlerOf((request) => {
    return request.reply(decoded(request.data) === "deaf" ? new Uint8Array(30_000) : request.data);
  });
  await withServer(new RecordingUnixServer({ path }, Generous), async (server) => {
    using deaf = new PlainSocket(localPath);
    for (let count = 0; count < 30; count++) await deaf.send("deaf", { transport: "unixpacket", path });
    await until(() => server.stats.accepted === 30);
    await assertServes(path);
    await until(() => server.stats.active === 0);
    assertEquals([server.stats.aborted, server.stats.errors], [server.errors.length, 0]);
    const messages = server.errors.map((error) => {
      assert(error instanceof Deno.errors.TimedOut);
      return error.message.replace(/^Cannot reply with 30000 bytes to .*deaf\.sock: the client /, "");
    });
    assertEquals(messages[0], "took nothing for 1000 ms");
    assertEquals(new Set(messages.slice(1)), new Set(["takes nothing"])); // Only the first has waited.
    for (let count = 30 - messages.length; count >= 0; count--) await deaf.receive(); // Now there is room again.
    await deaf.send("hello", { transport: "unixpacket", path });
    assertEquals(await deaf.receive(), "hello");
  });
});

unixTest("a Unix reply that the end of the server overtakes still settles", async (folder) => {
  const path = `${folder}/server.sock`;
  using client = new PlainSocket(`${folder}/client.sock`);
  for (let turns = 0; turns < 12; turns++) {
    let hasSettled = false;
    const settle = () => void (hasSettled = true);
    const Replying = handlerOf(async (request, { signal }) => {
      request.reply("").then(settle, settle);
      await new Promise((resolve) => signal.addEventListener("abort", resolve));
    });
    await withServer(new UnixDatagramServer({ path }, Replying), async (server) => {
      await client.send("hello", { transport: "unixpacket", path });
      await until(() => server.stats.accepted === 1);
      for (let i = 0; i < turns; i++) await new Promise<void>((resolve) => setImmediate(resolve));
      server.close();
      await until(() => hasSettled);
    });
  }
});

// --- The server's file -------------------------------------------------------------

unixTest("a Unix client removes its file when it is closed", async (folder) => {
  const path = `${folder}/server.sock`;
  const localPath = `${folder}/client.sock`;
  await withServer(new UnixDatagramServer({ path }, EchoDatagram), async (server, address, dial) => {
    assertEquals([address.path, server.address], [path, address]);
    assertEquals(await server.listen(), address);
    const client = dial({ path, localPath });
    assertEquals(await ask(client, "hello"), "hello");
    client.close();
    assert(!exists(localPath));
  });
  assert(!exists(path));
});

Deno.test("UnixDatagramServer without the permissions names the least flags", {
  permissions: { net: false, read: false, write: false },
}, async () => {
  const error = await rejectionOf(new UnixDatagramServer({ path: "/tmp/a.sock" }, EchoDatagram).serveForever());
  assertMatch(error.message, /^Cannot listen on \/tmp\/a\.sock: permission is missing; run again with /);
  assertEquals(permissionsIn(error.message), ["--allow-read=/tmp/", "--allow-write=/tmp/", "--allow-net"]);
});

// --- Clients -----------------------------------------------------------------------

unixTest("a Unix stranger's datagram is not taken for the server's", async (folder) => {
  const path = `${folder}/server.sock`;
  const localPath = `${folder}/client.sock`;
  await withServer(new UnixDatagramServer({ path }, EchoDatagram), async (_server, _address, dial) => {
    const client = dial({ path, localPath });
    assertEquals(await ask(client, "hello"), "hello");
    using stranger = new PlainSocket(`${folder}/stranger.sock`);
    await stranger.send("from a stranger", { transport: "unixpacket", path: localPath });
    assertEquals(await ask(client, "from the server"), "from the server");
  });
});

unixTest("a Unix client takes what its server sends from its own socket", async (folder) => {
  using server = new PlainSocket(`${folder}/server.sock`);
  const localPath = `${folder}/client.sock`;
  using client = new DatagramClient({ path: `${folder}/server.sock`, localPath, timeout: PATIENCE_MS });
  await client.send("hello");
  assertEquals(await server.receive(), "hello");
  await server.send("from its path", { transport: "unixpacket", path: localPath });
  assertEquals(decoded(await client.recv()), "from its path");
});

unixTest("a Unix server that is not there is one sentence", async (folder) => {
  using client = new DatagramClient({ path: `${folder}/server.sock`, localPath: `${folder}/client.sock` });
  const error = await rejectionOf(client.send("hello"));
  assert(error instanceof Deno.errors.NotFound);
  assertMatch(
    error.message,
    /^Cannot send 5 bytes to [^\n]*server\.sock: no such file or directory; start the server or check the path$/,
  );
});

unixTest("a Unix client does not remove a file that is not its own, and can be tried again", async (folder) => {
  const [path, localPath] = [`${folder}/server.sock`, `${folder}/client.sock`];
  await withServer(new UnixDatagramServer({ path }, EchoDatagram), async () => {
    const stranger = new DatagramClient({ path: `${folder}/other.sock`, localPath: path });
    const error = await rejectionOf(stranger.send("hello"));
    assert(error instanceof Deno.errors.AddrInUse);
    assertMatch(error.message, /^Cannot open a socket on [^\n]*server\.sock: address already in use; /);
    stranger.close();
    await assertServes(path);
    using patient = new DatagramClient({ path, localPath, timeout: PATIENCE_MS });
    Deno.writeTextFileSync(localPath, "in the way");
    await assertRejects(() => patient.send("hello"), Deno.errors.AddrInUse);
    Deno.removeSync(localPath);
    assertEquals(await ask(patient, "hello"), "hello");
  });
});

unixTest("a Unix client that is closed again leaves the file of the next one alone", async (folder) => {
  const [path, localPath] = [`${folder}/server.sock`, `${folder}/client.sock`];
  await withServer(new UnixDatagramServer({ path }, EchoDatagram), async (_server, _address, dial) => {
    const first = dial({ path, localPath });
    assertEquals(await ask(first, "hello"), "hello");
    first.close();
    const second = dial({ path, localPath });
    assertEquals(await ask(second, "hello"), "hello");
    first.close();
    assert(exists(localPath));
    assertEquals(await ask(second, "hello again"), "hello again");
  });
});

unixTest("a Unix client's file that has become another's stays", async (folder) => {
  const [path, localPath] = [`${folder}/server.sock`, `${folder}/client.sock`];
  const client = new DatagramClient({ path, localPath });
  await assertRejects(() => client.send("hello"), Deno.errors.NotFound);
  Deno.removeSync(localPath);
  Deno.writeTextFileSync(localPath, "another's");
  client.close();
  await new Promise((resolve) => setTimeout(resolve));
  assertEquals(Deno.readTextFileSync(localPath), "another's");
});

unixTest("a Unix client that is closed while it opens leaves no file", async (folder) => {
  const localPath = `${folder}/client.sock`;
  const client = new DatagramClient({ path: `${folder}/server.sock`, localPath });
  const received = rejectionOf(client.recv());
  client.close();
  assert(await received instanceof Deno.errors.BadResource);
  await until(() => !exists(localPath));
});

unixTest("a Unix path over 107 bytes says so, in a server and in a client", async (folder) => {
  const path = `${folder}/${"x".repeat(107 - folder.length - 1)}`;
  await withServer(new UnixDatagramServer({ path }, EchoDatagram), async (_server, _address, dial) => {
    assertEquals(await ask(dial({ path, localPath: `${folder}/client.sock` }), "107 bytes"), "107 bytes");
  });
  const long = `${path.slice(0, -1)}é`;
  const words = /: the path has 108 bytes; a Unix socket's path has at most 107$/;
  assertMatch((await rejectionOf(new UnixDatagramServer({ path: long }, EchoDatagram).serveForever())).message, words);
  using client = new DatagramClient({ path: long, localPath: `${folder}/client.sock` });
  assertMatch((await rejectionOf(client.send("hello"))).message, words);
  using other = new DatagramClient({ path, localPath: long });
  assertMatch((await rejectionOf(other.send("hello"))).message, words);
});
