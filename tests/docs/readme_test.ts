/** The README's server and its recorded session, run again. */

import { assert, assertEquals } from "../../deps.ts";
import { connect } from "../../mod.ts";
import { freePort, portOf, Program, screen, startServer, Terminal } from "../programs.ts";

import { copyLibrary, readProject } from "./pages.ts";
import { peerTest, programTestIn } from "../testing.ts";

/** The blocks of code of the README in `language`. */
async function blocks(language: string): Promise<string[]> {
  const readme = await readProject("README.md");
  return [...readme.matchAll(new RegExp(`^\`\`\`${language}[^\\n]*\\n([^]*?)^\`\`\``, "gm"))].map(([, text = ""]) =>
    text
  );
}

programTestIn("the README's server has eight lines, and answers", async (folder) => {
  const [program = ""] = await blocks("ts");
  assertEquals(program.trim().split("\n").length, 8);
  await copyLibrary(folder);
  const port = await freePort();
  await Deno.writeTextFile(`${folder}/upper.ts`, program.replace("8009", String(port)));
  const args = ["run", "--no-config", "--no-prompt", `--allow-net=127.0.0.1:${port}`, "upper.ts"];
  await using _server = Program.start(Deno.execPath(), args, { cwd: folder });
  await using client = await connect({ port, retries: 100, timeout: 10_000 });
  await client.send("hello\n");
  assertEquals(await client.readLine(), "HELLO");
});

/** What a session shows, without what differs each time. */
function withoutTimesAndPorts(text: string): string {
  return text.replace(/\[\w{3} \w{3} [ \d]\d \d\d:\d\d:\d\d \d{4}\]/g, "[TIME]").replace(
    /127\.0\.0\.1:\d+/g,
    "ADDRESS",
  );
}

peerTest(["python3", "nc"], "server.ts and client.ts show what the README's session shows", async () => {
  const [printed = "", session = ""] = await blocks("console");
  await using server = startServer();
  const port = String(await portOf(server));
  const shown: string[] = [];
  for (const part of session.split(/^\$ /m).slice(1)) {
    const [command = "", ...lines] = part.split("\n");
    const typed = lines.filter((line) => line.startsWith(">>>")).map((line) => line.slice(4));
    shown.push(`$ ${command}\n${await run(command, typed, port)}`);
  }
  assertEquals(withoutTimesAndPorts(shown.join("")), withoutTimesAndPorts(session));
  server.kill("SIGINT");
  const { stdout } = await server.ended();
  const [, ...recorded] = printed.replace("^C", "").split("\n");
  assertEquals(withoutTimesAndPorts(stdout), withoutTimesAndPorts(recorded.join("\n")));
});

/** Runs a command of the session against another port; returns what it shows. */
async function run(command: string, typed: string[], port: string): Promise<string> {
  const [, script, words = ""] = /^deno run --allow-net=127\.0\.0\.1:8009 (client\.ts)(.*)$/.exec(command) ?? [];
  if (typed.length > 0) {
    assert(script === "client.ts", command);
    await using terminal = new Terminal(["--port", port]);
    let answers = 0;
    for (const line of typed) {
      await terminal.showsLike(new RegExp(`^(>>> .+\\n\\[.*\\n){${answers++}}>>>$`));
      await terminal.type(`${line}\r`);
    }
    await terminal.ended();
    return `${screen(terminal.output).join("\n").trimEnd()}\n`;
  }
  const line = script === undefined
    ? command.replace("8009", port)
    : `"$0" run --allow-net client.ts --port ${port}${words}`;
  await using program = Program.start("sh", ["-c", line, Deno.execPath()]);
  return (await program.ended()).stdout;
}
