/** mod.ts as strangers meet it: one file, from any address, with no configuration. */

import { assertEquals } from "../deps.ts";
import { Program } from "./programs.ts";
import { programTest, programTestIn } from "./testing.ts";

const project = new URL("../", import.meta.url);

/** A file server for mod.ts, as any host could be. */
function serveModule(source: string): Deno.HttpServer<Deno.NetAddr> {
  return Deno.serve(
    { hostname: "127.0.0.1", port: 0, onListen: () => {} },
    ({ url }) =>
      new URL(url).pathname === "/mod.ts"
        ? new Response(source, { headers: { "content-type": "text/typescript" } })
        : new Response(null, { status: 404 }),
  );
}

const MAIN = (host: string) => `
import { connect, StreamRequestHandler, TcpServer } from "http://${host}/mod.ts";

class Echo extends StreamRequestHandler {
  override async handle() {
    for await (const data of this.request) await this.request.send(data);
  }
}

await using server = new TcpServer({ hostname: "127.0.0.1", port: 0 }, Echo);
const { port } = server.listen();
server.serveForever();
await using client = await connect({ port });
await client.send("hello\\n");
console.log(await client.readLine());
`;

for (const check of [[], ["--check"]]) {
  programTestIn(`a program imports mod.ts by its address and runs ${check.join("")}`, async (folder) => {
    await using http = serveModule(await Deno.readTextFile(new URL("mod.ts", project)));
    const host = `127.0.0.1:${http.addr.port}`;
    await Deno.writeTextFile(`${folder}/main.ts`, MAIN(host));
    const args = ["--no-config", "--no-prompt", `--allow-import=${host}`, "--allow-net=127.0.0.1", "main.ts"];
    await using program = Program.start(Deno.execPath(), ["run", ...check, ...args], {
      cwd: folder,
      env: { DENO_DIR: `${folder}/cache` },
    });
    const { code, stdout } = await program.ended();
    assertEquals([code, stdout], [0, "hello\n"]);
    const files = (await Array.fromAsync(Deno.readDir(folder))).map(({ name }) => name);
    assertEquals(files.sort(), ["cache", "main.ts"]);
  });
}

programTest("mod.ts depends on nothing but what the runtime carries", async () => {
  const args = ["info", "--json", "--no-config", new URL("mod.ts", project).href];
  await using deno = Program.start(Deno.execPath(), args);
  const { modules } = JSON.parse((await deno.ended()).stdout);
  const names = modules.map(({ specifier }: { specifier: string }) => specifier.replace(project.href, ""));
  assertEquals(names.filter((name: string) => !name.startsWith("node:")), ["mod.ts"]);
});

programTest("mod.ts has no static import", async () => {
  const lines = (await Deno.readTextFile(new URL("mod.ts", project))).split("\n");
  assertEquals(lines.filter((line) => /^(import\b|export\b.*\bfrom\b)/.test(line)), []);
});

/** The hosts of registries, which this file does not name either. */
const REGISTRIES = [["jsr", "io"], ["deno", "land"], ["esm", "sh"], ["npmjs", "com"], ["npmjs", "org"], [
  "unpkg",
  "com",
]]
  .map((labels) => labels.join("."));

/** Every text file of the project. */
async function* projectFiles(folder = project): AsyncGenerator<URL> {
  for await (const { name, isDirectory } of Deno.readDir(folder)) {
    if (name === ".git" || name === "node_modules" || name === "coverage") continue;
    if (isDirectory) yield* projectFiles(new URL(`${name}/`, folder));
    else yield new URL(name, folder);
  }
}

programTest("nothing in the project names the host of a registry", async () => {
  const named: string[] = [];
  for await (const file of projectFiles()) {
    const text = await Deno.readTextFile(file);
    for (const host of REGISTRIES) if (text.includes(host)) named.push(`${host} in ${file.href}`);
  }
  assertEquals(named, []);
});

programTestIn("a copy of mod.ts passes the type check in a folder with no configuration", async (folder) => {
  await Deno.copyFile(new URL("mod.ts", project), `${folder}/mod.ts`);
  await using check = Program.start(Deno.execPath(), ["check", "--no-config", `${folder}/mod.ts`]);
  const { code, stderr } = await check.ended();
  assertEquals(code, 0, stderr);
});
