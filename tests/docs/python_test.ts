/** The two programs of docs/python.md do the same. */

import { assert, assertEquals } from "../../deps.ts";
import { freePort, Peer, Program } from "../programs.ts";
import { project, readProject } from "./pages.ts";
import { peerTest } from "../testing.ts";

/** The first program of `language` on the page, for another port. */
async function programIn(language: string, port: number): Promise<string> {
  const [, program] = new RegExp(`^\`\`\`${language}[^\\n]*\\n([^]*?)^\`\`\``, "m").exec(
    await readProject("docs/python.md"),
  ) ?? [];
  assert(
    program !== undefined && program.includes("8010"),
    `docs/python.md has no program in ${language} on port 8010`,
  );
  return program.replace("8010", String(port)).replace("./mod.ts", new URL("mod.ts", project).href);
}

/** The programs print nothing when they listen. */
async function dial(port: number): Promise<Peer> {
  for (const deadline = performance.now() + 10_000;;) {
    try {
      return await Peer.connect(port);
    } catch (error) {
      if (!(error instanceof Deno.errors.ConnectionRefused) || performance.now() > deadline) throw error;
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  }
}

peerTest(
  ["python3"],
  "the two programs of docs/python.md, in Python and here, give the same answers",
  async (folder) => {
    const answers = [];
    for (
      const [language, command, args] of [["py", "python3", []], ["ts", Deno.execPath(), [
        "run",
        "--allow-net",
      ]]] as const
    ) {
      const port = await freePort();
      const file = `${folder}/server.${language}`;
      await Deno.writeTextFile(file, await programIn(language, port));
      await using _server = Program.start(command, [...args, file]);
      using client = await dial(port);
      await client.send("one\r\ntwo\n\nlast");
      await client.closeWrite();
      answers.push(new TextDecoder().decode(await client.receiveAll()));
    }
    assertEquals(answers, ["ONE\nTWO\n\nLAST\n", "ONE\nTWO\n\nLAST\n"]);
  },
);
