/** What the two scripts say of themselves. */

import { assertEquals, assertMatch } from "../../deps.ts";
import { runScript } from "../programs.ts";
import { programTest } from "../testing.ts";

for (const [script, verb] of [["server.ts", "Answers"], ["client.ts", "Sends"]] as const) {
  const told = {
    "--help": new RegExp(`^${verb} what .*\nUsage: .*--hostname HOST.*--port PORT.*--unix PATH`, "s"),
    "-h": new RegExp(`^${verb} what .*\nUsage: `),
    "--version": new RegExp(String.raw`^${script} \d+\.\d+\.\d+\n$`),
  };

  for (const [flag, words] of Object.entries(told)) {
    programTest(`${script} ${flag} needs no permission and ends with 0`, async () => {
      const { code, stdout, stderr } = await runScript(script, [flag], { permissions: [] });
      assertEquals([code, stderr], [0, ""]);
      assertMatch(stdout, words);
    });
  }

  programTest(`${script} --help tells of --udp and its flag`, async () => {
    const { stdout } = await runScript(script, ["--help"], { permissions: [] });
    assertMatch(stdout, /--udp.*\s.*--unstable-net/);
  });
}
