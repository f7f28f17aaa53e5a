/** The socket files of both kinds of Unix servers: whose file is replaced, whose is removed, and whose stays. */

import { assert, assertEquals, assertMatch, assertRejects } from "../deps.ts";
import { connect, UnixDatagramServer, UnixServer } from "../mod.ts";
import { assertServes as assertAnswers, EchoDatagram } from "./datagrams.ts";
import { Echo, exists, rejectionOf, unixTest, untilRefused, withDeno } from "./testing.ts";

/** A kind of server. */
interface Kind {
  name: string;
  make: (path: string, mode?: number) => UnixServer | UnixDatagramServer;
  /** Opens a socket with a file at `path`. */
  open: (path: string) => { close(): void };
  assertServes: (path: string) => Promise<void>;
}

const KINDS: Kind[] = [{
  name: "UnixServer",
  make: (path, mode) => new UnixServer({ path, mode }, Echo),
  open: (path) => Deno.listen({ transport: "unix", path }),
  assertServes: async (path) => {
    await using client = await connect({ path });
    await client.send("hello\n");
    assertEquals(await client.readLine(), "hello");
  },
}, {
  name: "UnixDatagramServer",
  make: (path, mode) => new UnixDatagramServer({ path, mode }, EchoDatagram),
  open: (path) => Deno.listenDatagram({ transport: "unixpacket", path }),
  assertServes: assertAnswers,
}];

/** A server that serves until it goes out of scope. */
async function running(server: UnixServer | UnixDatagramServer) {
  await server.listen();
  const over = server.serveForever();
  const end = async () => {
    await server.shutdown();
    await over;
  };
  return { server, end, [Symbol.asyncDispose]: end };
}

/** Leaves a socket file that nobody answers on, as a killed server does. */
async function leaveStaleSocket(path: string, open: Kind["open"]): Promise<void> {
  const socket = open(`${path}.moved`);
  Deno.renameSync(`${path}.moved`, path); // So that closing does not remove it.
  socket.close();
  await untilRefused(() => Deno.connect({ transport: "unix", path }));
}

for (const { name, make, open, assertServes } of KINDS) {
  unixTest(`${name} serves, and removes its file when it ends`, async (folder) => {
    const path = `${folder}/a.sock`;
    {
      await using serving = await running(make(path));
      assertEquals(serving.server.address.path, path);
      await assertServes(path);
    }
    assert(!exists(path));
  });

  unixTest(`${name} removes its file when it is closed, and when it never served`, async (folder) => {
    const path = `${folder}/a.sock`;
    const server = make(path);
    await server.listen();
    server.close();
    await server.serveForever();
    assert(!exists(path));
  });

  unixTest(`${name}.listen() gives the same address until the server ends, and then rejects`, async (folder) => {
    const path = `${folder}/a.sock`;
    const server = make(path);
    const address = await server.listen();
    assertEquals(server.address, address);
    assertEquals(await Promise.all([server.listen(), server.listen()]), [address, address]);
    await server.shutdown();
    await assertRejects(async () => await server.listen(), TypeError);
    assert(!exists(path));
  });

  unixTest(`${name} replaces a socket file that nobody answers on`, async (folder) => {
    const path = `${folder}/a.sock`;
    await leaveStaleSocket(path, open);
    assert(exists(path));
    await using _serving = await running(make(path));
    await assertServes(path);
  });

  unixTest(`of two of ${name} that start at once on a path that nobody answers on, one listens`, async (folder) => {
    const path = `${folder}/a.sock`;
    await leaveStaleSocket(path, open);
    const servers = [make(path), make(path)];
    const outcomes = await Promise.allSettled(servers.map((server) => server.listen()));
    const reasons = outcomes.filter((outcome) => outcome.status === "rejected").map(({ reason }) => reason);
    assertEquals(reasons.length, 1);
    assert(reasons[0] instanceof Deno.errors.AddrInUse, reasons[0]);
    for (const server of servers) await server.shutdown();
  });

  unixTest(`${name} leaves a server that is alive alone`, async (folder) => {
    const path = `${folder}/a.sock`;
    await using _serving = await running(make(path));
    const error = await rejectionOf(make(path).serveForever());
    assert(error instanceof Deno.errors.AddrInUse);
    assertMatch(error.message, /a\.sock: address already in use; stop the program/);
    await assertServes(path);
  });

  unixTest(`${name} leaves a file alone that is no socket, and can be tried again`, async (folder) => {
    const path = `${folder}/a.sock`;
    Deno.writeTextFileSync(path, "precious");
    await using server = make(path);
    await assertRejects(() => server.serveForever(), Deno.errors.AddrInUse);
    assertEquals(Deno.readTextFileSync(path), "precious");
    Deno.removeSync(path);
    await server.listen();
    server.serveForever();
    await assertServes(path);
  });

  unixTest(`${name} gives its file the mode`, async (folder) => {
    const path = `${folder}/a.sock`;
    await using server = make(path, 0o600);
    await server.listen();
    assertEquals((Deno.lstatSync(path).mode ?? 0) & 0o777, 0o600);
  });

  unixTest(`${name} that cannot give its file the mode leaves no socket behind`, async (folder) => {
    const path = `${folder}/a.sock`;
    await using server = make(path, 0o600);
    const fail = () => {
      throw new Deno.errors.PermissionDenied("Operation not permitted");
    };
    await withDeno("chmodSync", fail, async () => {
      await assertRejects(async () => await server.listen(), Deno.errors.PermissionDenied);
    });
    await server.listen();
    server.serveForever();
    await assertServes(path);
  });

  unixTest(`${name} does not remove a file that has become another's`, async (folder) => {
    const path = `${folder}/a.sock`;
    const first = await running(make(path));
    Deno.removeSync(path);
    {
      await using _second = await running(make(path));
      await first.end();
      await assertServes(path);
      assertEquals([...Deno.readDirSync(folder)].length, 1);
    }
    assertEquals([...Deno.readDirSync(folder)].length, 0);
  });

  unixTest(`${name} does not remove the file of its successor in the same process`, async (folder) => {
    const path = `${folder}/a.sock`;
    // A file system may give the number of a file that is gone to the next one.
    for (let round = 0; round < 10; round++) {
      const { server: first } = await running(make(path));
      first.close();
      await using _second = await running(make(path));
      await assertServes(path);
    }
  });

  unixTest(`${name} waits with its file until the one that is closing at its path has gone`, async (folder) => {
    const path = `${folder}/a.sock`;
    const { server: first } = await running(make(path));
    await assertServes(path);
    await new Promise((resolve) => setTimeout(resolve)); // Now it waits for the next one.
    first.close();
    Deno.removeSync(path); // The runtime removes what is there later, once the accept has let go of the socket.
    await using _second = await running(make(path));
    await assertServes(path);
  });
}
