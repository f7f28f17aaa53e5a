/** docs/running/service.ts: what it logs, what it answers operators, and how it ends. */

import { assert, assertEquals, assertMatch } from "../../deps.ts";
import { assertFailed, Peer, Program, Service } from "../programs.ts";
import { peerTest, programTest } from "../testing.ts";

/** Sends one HTTP request; resolves to the whole answer. */
async function request(port: number, head: string): Promise<string> {
  using peer = await Peer.connect(port);
  await peer.send(`${head}\r\n\r\n`);
  return new TextDecoder().decode(await peer.receiveAll());
}

async function fetchText(port: number, path: string): Promise<{ status: number; type: string | null; text: string }> {
  const response = await fetch(`http://127.0.0.1:${port}${path}`);
  return { status: response.status, type: response.headers.get("content-type"), text: await response.text() };
}

/** Asks until the service has got the signal, which nobody is told. */
async function untilDraining(opsPort: number): Promise<void> {
  while ((await fetchText(opsPort, "/healthz")).status !== 503) { /* Each look is a whole exchange. */ }
}

/** Runs service.ts to its end. */
async function runService(...args: string[]) {
  const script = new URL("../../docs/running/service.ts", import.meta.url).pathname;
  await using program = Program.start(Deno.execPath(), [
    "run",
    "--no-prompt",
    "--allow-net=127.0.0.1",
    script,
    ...args,
  ]);
  return await program.ended();
}

const isHello = /^\[\d{4}-\d\d-\d\dT[\d:.]+Z\] hello\n$/;

programTest("the service echoes lines with a timestamp, and logs each event as one line of JSON", async () => {
  await using service = await Service.start();
  using peer = await Peer.connect(service.port);
  const client = `127.0.0.1:${peer.port}`;
  await peer.send("hello\n");
  assertMatch(await peer.receive("\n"), isHello);
  await peer.closeWrite();
  await peer.receiveAll();
  await service.program.printed('"closed"');
  using long = await Peer.connect(service.port);
  const longClient = `127.0.0.1:${long.port}`;
  await long.send("x".repeat(70_000));
  await service.program.printed(/"closed"[^]*"closed"/);
  service.program.kill("SIGTERM");
  service.program.kill("SIGTERM");
  const { code, stderr } = await service.program.ended();
  assertEquals([code, stderr], [0, ""]);
  const [operators, listening, opened, closed, reopened, error, reclosed, draining, stopped] = service.events;
  assertEquals(listening, { event: "listening", address: `127.0.0.1:${service.port}` });
  assertEquals(operators, { event: "operators", address: `127.0.0.1:${service.opsPort}` });
  assertEquals(opened, { event: "opened", client });
  const { duration, ...rest } = closed ?? {};
  assertEquals(rest, { event: "closed", client, outcome: "finished", bytesRead: 6, bytesWritten: 33 });
  assert(Number(duration) >= 0);
  assertEquals(reopened, { event: "opened", client: longClient });
  assertEquals([error?.event, error?.client, error?.outcome], ["error", longClient, "error"]);
  assertMatch(String(error?.message), /65536/);
  assertEquals([reclosed?.event, reclosed?.outcome], ["closed", "error"]);
  assertEquals(draining, { event: "draining", delay: 3_000, active: 0 });
  assertEquals([stopped?.event, stopped?.accepted, stopped?.errors, stopped?.cut], ["stopped", 2, 1, []]);
});

programTest("/healthz answers as HAProxy, curl and Kubernetes ask, and nothing else is there", async () => {
  await using service = await Service.start();
  for (
    const head of [
      "GET /healthz HTTP/1.0", // HAProxy, without fields.
      "GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: kube-probe/1.34\r\nAccept: */*\r\nConnection: close",
    ]
  ) {
    assertMatch(await request(service.opsPort, head), /^HTTP\/1\.[01] 200 OK\r\n[^]*\r\n\r\nok\n$/);
  }
  const healthy = await fetchText(service.opsPort, "/healthz");
  assertEquals([healthy.status, healthy.text], [200, "ok\n"]);
  assertEquals((await fetchText(service.opsPort, "/")).status, 404);
});

/** A parser of Prometheus' text format, as strict as the specification. */
function parseMetrics(text: string): Map<string, { type: string; help: string; value: number }> {
  assert(text.endsWith("\n"), "the last line must end, too");
  const metrics = new Map<string, { type: string; help: string; value: number }>();
  const lines = text.slice(0, -1).split("\n");
  while (lines.length > 0) {
    const [, name = "", help = ""] = /^# HELP ([a-z_:][a-z0-9_:]*) (\S.*)$/.exec(lines.shift() ?? "") ?? [];
    const [, typed, type = ""] = /^# TYPE (\S+) (counter|gauge)$/.exec(lines.shift() ?? "") ?? [];
    const [, valued, value] = /^(\S+) (\d+)$/.exec(lines.shift() ?? "") ?? [];
    assertEquals([typed, valued], [name, name]);
    assert(name !== "" && !metrics.has(name), `${name} comes twice, or has no name`);
    assertEquals(type === "counter", name.endsWith("_total"), name);
    metrics.set(name, { type, help, value: Number(value) });
  }
  return metrics;
}

programTest("/metrics counts what the server counts", async () => {
  await using service = await Service.start();
  using peer = await Peer.connect(service.port);
  await peer.send("hello\n");
  await peer.receive("\n");
  const { status, type, text } = await fetchText(service.opsPort, "/metrics");
  assertEquals([status, type], [200, "text/plain; version=0.0.4"]);
  const metrics = parseMetrics(text);
  const value = (name: string) => metrics.get(`socketserver_${name}`)?.value;
  assertEquals([value("accepted_total"), value("active"), value("errors_total")], [1, 1, 0]);
  assertEquals([value("bytes_read_total"), value("bytes_written_total")], [6, 33]);
  assertEquals([value("timed_out_total"), value("handshake_failures_total")], [0, 0]);
});

peerTest(["promtool"], "promtool has nothing to say against /metrics", async () => {
  await using service = await Service.start();
  const { text } = await fetchText(service.opsPort, "/metrics");
  await using promtool = Program.start("promtool", ["check", "metrics"]);
  await promtool.write(text);
  await promtool.closeInput();
  const { code, stdout, stderr } = await promtool.ended();
  assertEquals([code, stdout, stderr], [0, "", ""]);
});

programTest(
  "/healthz says 503 from SIGTERM on, while clients are accepted for --drain-delay and then drained",
  async () => {
    await using service = await Service.start(["--drain-delay", "1000"]);
    using early = await Peer.connect(service.port);
    await early.send("half of ");
    await service.program.printed('"opened"');
    service.program.kill("SIGTERM");
    await untilDraining(service.opsPort);
    using late = await Peer.connect(service.port);
    await late.send("hello\n");
    assertMatch(await late.receive("\n"), isHello);
    assertEquals(await late.receiveChunk(), ""); // It has drained.
    await early.send("a line\n");
    assertMatch(await early.receive("\n"), /half of a line\n$/);
    assertEquals((await service.program.ended()).code, 0);
    assertEquals(service.events.at(-1)?.cut, []);
  },
);

programTest("a second signal ends it at once, and cuts who is connected", async () => {
  await using service = await Service.start(["--drain-delay", "3600000"]);
  using peer = await Peer.connect(service.port);
  await peer.send("half");
  await service.program.printed('"opened"');
  service.program.kill("SIGTERM");
  await untilDraining(service.opsPort);
  service.program.kill("SIGINT");
  assertEquals((await service.program.ended()).code, 0);
  assertEquals(service.events.at(-1)?.cut, [`127.0.0.1:${peer.port}`]);
});

programTest("--proxy-from names the client whom a proxy names, and refuses others", async () => {
  await using service = await Service.start(["--proxy-from", "192.0.2.0/24,127.0.0.1"]);
  using peer = await Peer.connect(service.port);
  await peer.send("PROXY TCP4 203.0.113.7 198.51.100.2 50000 443\r\nhello\n");
  assertMatch(await peer.receive("\n"), isHello);
  await service.program.printed('"opened","client":"203.0.113.7:50000"');
  await using strict = await Service.start(["--proxy-from", "192.0.2.0/24"]);
  using refused = await Peer.connect(strict.port);
  assertEquals((await refused.receiveAll().catch(() => [])).length, 0);
});

programTest("--max-connections-per-host counts the clients that the proxy names", async () => {
  await using service = await Service.start(["--proxy-from", "127.0.0.1", "--max-connections-per-host", "1"]);
  const dial = async (client: string) => {
    const peer = await Peer.connect(service.port);
    await peer.send(`PROXY TCP4 ${client} 198.51.100.2 50000 443\r\nhello\n`);
    return peer;
  };
  using one = await dial("203.0.113.7");
  assertMatch(await one.receive("\n"), isHello);
  using same = await dial("203.0.113.7");
  assertEquals(await same.receive("\n").catch(() => ""), "");
  await service.program.printed('"refused","client":"203.0.113.7:50000"');
  using other = await dial("203.0.113.8");
  assertMatch(await other.receive("\n"), isHello);
});

programTest("--idle-timeout and --max-connections are the library's", async () => {
  await using service = await Service.start(["--idle-timeout", "50", "--max-connections", "1"]);
  using first = await Peer.connect(service.port);
  using second = await Peer.connect(service.port);
  await second.send("hello\n");
  assertEquals((await first.receiveAll()).length, 0);
  assertMatch(await second.receive("\n"), isHello);
  await service.program.printed(/"closed".*"outcome":"timedOut"/);
  assert(!service.program.stdout.includes('"error"'));
});

programTest("--workers serves with threads, and counts what all of them have done", async () => {
  const root = new URL("../..", import.meta.url).pathname;
  const permissions = ["--allow-net=127.0.0.1", `--allow-read=${root}`];
  await using service = await Service.start(["--workers", "2", "--drain-delay", "0"], { permissions });
  for (let count = 0; count < 10; count++) {
    using peer = await Peer.connect(service.port);
    await peer.send("hello\n");
    assertMatch(await peer.receive("\n"), isHello);
    await peer.closeWrite();
    await peer.receiveAll();
  }
  assertEquals(
    parseMetrics((await fetchText(service.opsPort, "/metrics")).text).has("socketserver_accepted_total"),
    true,
  );
  service.program.kill("SIGTERM");
  assertEquals((await service.program.ended()).code, 0);
  const last = service.events.at(-1);
  assertEquals([last?.event, last?.accepted, last?.bytesRead], ["stopped", 10, 60]);
});

const MISTAKES: [string[], RegExp, code?: number][] = [
  [["--nope"], /'--nope'/],
  [["--port", "http"], /--port must be a number, 0 or more: it is "http"/],
  [["--drain-delay", "-1"], /--drain-delay/],
  [["--idle-timeout", "soon"], /--idle-timeout must be a number/],
  [["--proxy-from", "10.0.0.1/8"], /10\.0\.0\.1\/8/],
  [["--hostname", "192.0.2.1"], /permission is missing; run again with --allow-net=192\.0\.2\.1:8009/, 1],
  [["--port", ""], /--port must be a number, 0 or more: it is ""/],
  [["--max-connections", "0"], /--max-connections must be a number, 1 or more: it is "0"/],
  ...["abc", "127.0.0.1:", "127.0.0.1:1/x"].map((place): [string[], RegExp] => [
    ["--ops-port", place],
    /--ops-port must be \[HOST:\]PORT: it is "/,
  ]),
];

for (const [args, sentence, code = 2] of MISTAKES) {
  programTest(`the service refuses ${args.join(" ")} with one sentence and exit code ${code}`, async () => {
    assertFailed(await runService(...args), code, sentence);
  });
}
