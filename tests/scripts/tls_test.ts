/** server.ts --cert --key and client.ts --tls, with each other and with other programs. */

import { assertEquals, assertMatch } from "../../deps.ts";
import { type Certificates, withCertificates } from "../certificates.ts";
import { assertFailed, permissionsIn, portOf, Program, runScript, startScript } from "../programs.ts";
import { programTest } from "../testing.ts";

const STAMP = String.raw`\[[^\]]+\] `;

function scriptTest(name: string, test: (certificates: Certificates) => Promise<void>): void {
  programTest(name, () => withCertificates(test));
}

function startTlsServer({ server: { certFile, keyFile } }: Certificates): Program {
  const permissions = ["--allow-net=127.0.0.1", `--allow-read=${certFile},${keyFile}`];
  return startScript("server.ts", ["--port", "0", "--cert", certFile, "--key", keyFile], { permissions });
}

scriptTest("the two scripts talk to each other over TLS", async (certificates) => {
  await using server = startTlsServer(certificates);
  const port = await portOf(server);
  const { certFile } = certificates.ca;
  const permissions = ["--allow-net=127.0.0.1", `--allow-read=${certFile}`];
  for (const extra of [[], ["--server-name", "localhost"]]) {
    const args = ["--port", String(port), "--tls", "--ca", certFile, ...extra, "hello", "again"];
    const { code, stdout, stderr } = await runScript("client.ts", args, { permissions });
    assertEquals([code, stderr], [0, ""]);
    assertMatch(stdout, new RegExp(`^${STAMP}hello\n${STAMP}again\n$`));
  }
  server.kill("SIGTERM");
  const { code, stdout } = await server.ended();
  assertEquals(code, 0);
  assertMatch(stdout, /clients: 2, cut off: 0, /);
});

scriptTest("with --client-ca only clients with a certificate of that authority are served", async (certificates) => {
  const { server: identity, ca, alice, rogue } = certificates;
  const permissions = ["--allow-net=127.0.0.1", "--allow-read"];
  const args = ["--port", "0", "--cert", identity.certFile, "--key", identity.keyFile, "--client-ca", ca.certFile];
  await using server = startScript("server.ts", args, { permissions });
  const target = ["--port", String(await portOf(server)), "--tls", "--ca", ca.certFile];
  const run = (...args: string[]) => runScript("client.ts", [...target, ...args, "hello"], { permissions });
  const known = await run("--cert", alice.certFile, "--key", alice.keyFile);
  assertEquals([known.code, known.stderr], [0, ""]);
  assertMatch(known.stdout, new RegExp(`^${STAMP}hello\n$`));
  assertFailed(await run("--cert", rogue.certFile, "--key", rogue.keyFile), 1, /accepts? .*certificate/);
});

scriptTest("workers share a port over TLS, too", async ({ ca, server: { certFile, keyFile } }) => {
  const files = ["server.ts", "mod.ts", "deps.ts"].map((file) => new URL(`../${file}`, import.meta.url).pathname);
  const permissions = ["--allow-net=127.0.0.1", `--allow-read=${[...files, certFile, keyFile]}`];
  const args = ["--port", "0", "--cert", certFile, "--key", keyFile, "--workers", "2"];
  await using server = startScript("server.ts", args, { permissions });
  const port = await portOf(server);
  const flags = ["--port", String(port), "--tls", "--ca", ca.certFile];
  const reading = ["--allow-net=127.0.0.1", `--allow-read=${ca.certFile}`];
  const { code, stdout, stderr } = await runScript("client.ts", [...flags, "hello"], { permissions: reading });
  assertEquals([code, stderr], [0, ""]);
  assertMatch(stdout, new RegExp(`^${STAMP}hello\n$`));
  server.kill("SIGTERM");
  assertMatch((await server.ended()).stdout, /clients: 1, cut off: 0, /);
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

scriptTest("the client says in one sentence why it trusts a server not", async (certificates) => {
  await using server = startTlsServer(certificates);
  const port = await portOf(server);
  const { certFile } = certificates.ca;
  const permissions = ["--allow-net=127.0.0.1", `--allow-read=${certFile}`];
  const target = ["--port", String(port), "--tls"];
  assertFailed(await runScript("client.ts", [...target, "hello"]), 1, /nobody who is trusted has vouched/);
  const misnamed = [...target, "--ca", certFile, "--server-name", "example.org", "hello"];
  assertFailed(await runScript("client.ts", misnamed, { permissions }), 1, /is for another name/);
});

scriptTest("wrong flags are told in one sentence", async ({ server: { certFile, keyFile }, renewed, ca }) => {
  const permissions = ["--allow-net=127.0.0.1", "--allow-read"];
  const run = (script: "server.ts" | "client.ts", ...args: string[]) => runScript(script, args, { permissions });
  assertFailed(await run("server.ts", "--cert", certFile), 2, /--cert and --key must be given together; --help/);
  assertFailed(await run("server.ts", "--cert", "/nowhere", "--key", keyFile), 2, /--cert: cannot read \/nowhere/);
  assertFailed(
    await run("server.ts", "--cert", certFile, "--key", keyFile, "--unix", "/x"),
    2,
    /--cert is not for --unix/,
  );
  const mixed = ["--port", "0", "--cert", certFile, "--key", renewed.keyFile];
  assertFailed(
    await run("server.ts", ...mixed),
    2,
    /--key is not the key of --cert; give the two that were made together; --help/,
  );
  assertFailed(await run("client.ts", "--ca", ca.certFile, "hello"), 2, /--ca is for --tls/);
  assertFailed(await run("client.ts", "--tls", "--ca", "/nowhere", "hello"), 2, /--ca: cannot read \/nowhere/);
});

scriptTest("the sentence about a missing permission names what to run with", async (certificates) => {
  const { certFile, keyFile } = certificates.server;
  const outcome = await runScript("server.ts", ["--port", "0", "--cert", certFile, "--key", keyFile]);
  assertFailed(outcome, 2, /--cert: permission is missing/);
  assertEquals(permissionsIn(outcome.stderr.replace(/;[^;]*$/, "")), [`--allow-read=${certFile}`]);
});
