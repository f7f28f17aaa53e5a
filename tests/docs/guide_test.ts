/** The programs of docs/guide.md run as they are written; `deno task test:doc` runs its other samples. */

import { assert, assertEquals } from "../../deps.ts";
import { connect } from "../../mod.ts";
import { programTest } from "../testing.ts";
import { Programs } from "./pages.ts";

const PAGE = "docs/guide.md";

for (const signal of ["SIGINT", "SIGTERM"] as const) {
  programTest(`two_servers.ts drains both servers on ${signal}, and ends`, async () => {
    await using programs = await Programs.of(PAGE, ["two_servers.ts"]);
    await using program = programs.start("two_servers.ts");
    const clients = await Promise.all(programs.ports.map((port) => connect({ port, retries: 100, timeout: 10_000 })));
    assertEquals(clients.length, 2);
    for (const client of clients) {
      await client.send("hello\n");
      assertEquals(await client.readLine(), "hello");
    }
    program.kill(signal);
    for (const client of clients) {
      assertEquals(await client.readLine(), null);
      client.close();
    }
    const { code, stderr } = await program.ended();
    assertEquals({ code, stderr }, { code: 0, stderr: "" });
  });
}

programTest("hash_server.ts answers with the hash from its workers, and ends on SIGTERM", async () => {
  await using programs = await Programs.of(PAGE, ["hash_server.ts"]);
  const files = "hash_server.ts,mod.ts,extras/worker_pool.ts";
  await using program = programs.start("hash_server.ts", [`--allow-read=${files}`]);
  const client = await connect({ port: programs.port, retries: 100, timeout: 10_000 });
  await client.writeFrame("hello");
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", new TextEncoder().encode("hello")));
  assertEquals(await client.readLine(), digest.toHex());
  program.kill("SIGTERM");
  const { code, stderr } = await program.ended();
  client.close();
  assertEquals({ code, stderr }, { code: 0, stderr: "" });
});

programTest("the programs of docs/guide.md have the right types", async () => {
  const names = ["two_servers.ts", "hash_server.ts"];
  await using programs = await Programs.of(PAGE, names);
  assert(await programs.check(names) === "");
});
