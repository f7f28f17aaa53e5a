/** server.ts --cert --key and client.ts --tls, with each other and with other programs. */

import { assertEquals, assertMatch } from "../../deps.ts";
import { type Certificates, withCertificates } from "../certificates.ts";
import { assertFailed, permissionsIn, portOf, Program, runScript, startScript } from "../programs.ts";
import { peerTest } from "../testing.ts";
import { STAMP, stamped } from "./kit.ts";

function scriptTest(name: string, test: (certificates: Certificates) => Promise<void>): void {
  peerTest(["openssl"], name, () => withCertificates(test));
}

function startTlsServer({ server: { certFile, keyFile } }: Certificates): Program {
  const permissions = ["--allow-net=127.0.0.1", `--allow-read=${certFile},${keyFile}`];
  return startScript("server.ts", ["--port", "0", "--cert", certFile, "--key", keyFile], { permissions });
}

scriptTest("the two scripts talk to each other over TLS", async (certificates) => {
  await using server = startTlsServer(certificates);
  const { certFile } = certificates.ca;
  const permissions = ["--allow-net=127.0.0.1", `--allow-read=${certFile}`];
  const args = ["--port", String(await portOf(server)), "--tls", "--ca", certFile, "hello", "again"];
  const { code, stdout, stderr } = await runScript("client.ts", args, { permissions });
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, stamped("hello\n", "again\n"));
  server.kill("SIGTERM");
  const ended = await server.ended();
  assertEquals(ended.code, 0);
  assertMatch(ended.stdout, /clients: 1, cut off: 0, /);
});

scriptTest("client.ts without --tls says that the server speaks TLS", async (certificates) => {
  await using server = startTlsServer(certificates);
  const outcome = await runScript("client.ts", ["--port", String(await portOf(server)), "hello"]);
  assertFailed(outcome, 1, /^client\.ts: the server speaks TLS; run again with --tls\n$/);
  assertEquals(outcome.stdout, "");
});

scriptTest("a piped line of 3 MB passes through an echo over TLS", async (certificates) => {
  await using server = startTlsServer(certificates);
  const { certFile } = certificates.ca;
  const permissions = ["--allow-net=127.0.0.1", `--allow-read=${certFile}`];
  const args = ["--port", String(await portOf(server)), "--tls", "--ca", certFile];
  const input = `${"x".repeat(3_000_000)}\n`;
  const { code, stdout } = await runScript("client.ts", args, { permissions, input });
  assertEquals([code, stdout.replaceAll(new RegExp(STAMP, "g"), "") === input], [0, true]);
});

scriptTest("openssl s_client talks to the server", async (certificates) => {
  await using server = startTlsServer(certificates);
  const port = await portOf(server);
  const args = ["-connect", `127.0.0.1:${port}`, "-CAfile", certificates.ca.certFile, "-verify_return_error", "-quiet"];
  await using program = Program.start("openssl", ["s_client", ...args]);
  await program.write("hello\n");
  await program.printed(new RegExp(`${STAMP}hello\n`));
  program.kill("SIGTERM");
  await program.ended();
});

scriptTest("the client says in one sentence, with the system's words, why it trusts a server not", async (all) => {
  await using server = startTlsServer(all);
  const target = ["--port", String(await portOf(server)), "--tls", "hello"];
  assertFailed(await runScript("client.ts", target), 1, /^client\.ts: .*invalid peer certificate: UnknownIssuer/);
  const permissions = ["--allow-net=127.0.0.1", `--allow-read=${all.alice.certFile}`];
  const mistrusting = await runScript("client.ts", [...target, "--ca", all.alice.certFile], { permissions });
  assertFailed(mistrusting, 1, /^client\.ts: .*invalid peer certificate/);
});

scriptTest("certificates and keys that cannot be used are one sentence", async ({ server, renewed }) => {
  const permissions = ["--allow-net=127.0.0.1", "--allow-read"];
  const cases = [
    { cert: server.certFile, key: renewed.keyFile, sentence: /key/ },
    { cert: server.keyFile, key: server.keyFile, sentence: /cert/ },
    { cert: "/nowhere", key: server.keyFile, sentence: /No such file or directory.*\/nowhere/ },
  ];
  for (const { cert, key, sentence } of cases) {
    const args = ["--port", "0", "--cert", cert, "--key", key];
    assertFailed(await runScript("server.ts", args, { permissions }), 1, sentence);
  }
  const client = await runScript("client.ts", ["--tls", "--ca", "/nowhere", "hello"], { permissions });
  assertFailed(client, 1, /No such file or directory.*\/nowhere/);
});

scriptTest(
  "a missing permission for a file is named, and with exactly that flag the server runs",
  async ({ server }) => {
    const { certFile, keyFile } = server;
    const args = ["--port", "0", "--cert", certFile, "--key", keyFile];
    const refused = await runScript("server.ts", args);
    assertFailed(refused, 1, /permission is missing/);
    assertEquals(permissionsIn(refused.stderr), [`--allow-read=${certFile}`]);
    const again = await runScript("server.ts", args, {
      permissions: ["--allow-net=127.0.0.1", ...permissionsIn(refused.stderr)],
    });
    assertEquals(permissionsIn(again.stderr), [`--allow-read=${keyFile}`]);
  },
);
