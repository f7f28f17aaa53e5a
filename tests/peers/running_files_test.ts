/**
 * The files of docs/running/ are run as they are written, but for addresses and
 * paths. HAProxy's is used by rolling_restart_test.ts, too.
 */

import { assert, assertEquals, assertMatch } from "../../deps.ts";
import { Load } from "../faults/load.ts";
import { freePort, type Outcome, Peer, Program, Service } from "../programs.ts";
import { runningFile, startRunningHaproxy } from "./running_files.ts";
import { peerTest } from "../testing.ts";

const ROOT = new URL("../..", import.meta.url).pathname;

/** How long `shutdown()` of the library waits for handlers, which service.ts leaves as it is. */
const GRACE_MS = 10_000;

async function run(command: string, ...args: string[]): Promise<Outcome> {
  await using program = Program.start(command, args);
  return await program.ended();
}

/** The values of a unit's setting, in their order. */
function settings(unit: string, name: string): string[] {
  return [...unit.matchAll(new RegExp(`^${name}=(.*)$`, "gm"))].map(([, value = ""]) => value);
}

/** The number after `flag` in a command line. */
function numberAfter(args: string[], flag: string): number {
  return Number(args[args.indexOf(flag) + 1]);
}

/** Sends a line and ends, as `nc -N` does; resolves to the whole answer. */
async function askAndEnd(port: number, header = ""): Promise<string> {
  using peer = await Peer.connect(port);
  await peer.send(`${header}hello\n`);
  await peer.closeWrite();
  return new TextDecoder().decode(await peer.receiveAll());
}

const isHello = /^\[.*\] hello\n$/;

peerTest(["haproxy"], "haproxy.cfg: HAProxy has nothing to say against it", async () => {
  const { code, stdout, stderr } = await run("haproxy", "-c", "-f", `${ROOT}docs/running/haproxy.cfg`);
  assertEquals({ code, stderr, stdout: stdout.trim() }, { code: 0, stderr: "", stdout: "Configuration file is valid" });
});

peerTest(["haproxy"], "haproxy.cfg: an answer reaches a client that has half-closed", async (folder) => {
  await using service = await Service.start(["--proxy-from", "127.0.0.1"]);
  await using haproxy = await startRunningHaproxy(folder, service, service);
  assertMatch(await askAndEnd(haproxy.port("front")), isHello);
});

peerTest(
  ["nginx"],
  "nginx.conf: a server that is marked down first is restarted under load, and no exchange fails",
  async (folder) => {
    const args = ["--proxy-from", "127.0.0.1", "--drain-delay", "0"];
    await using one = await Service.start(args);
    await using two = await Service.start(args);
    const front = await freePort();
    const text = (await runningFile("nginx.conf"))({
      "0.0.0.0:8000": `127.0.0.1:${front}`,
      "127.0.0.1:8009": `127.0.0.1:${one.port}`,
      "127.0.0.1:8019": `127.0.0.1:${two.port}`,
      "/run/nginx.pid": `${folder}/nginx.pid`,
      "/var/log/nginx/error.log": "stderr",
    });
    const file = `${folder}/nginx.conf`;
    await Deno.writeTextFile(file, text);
    const { code, stderr } = await run("nginx", "-t", "-e", "stderr", "-c", file);
    assertEquals(code, 0, stderr);

    await using nginx = new Nginx(folder, file);
    await nginx.started();
    assertMatch(await askAndEnd(front), isHello);
    const load = new Load(front, { brief: 10, lasting: 5, exchanges: 3 });
    await nginx.reload(text.replace(`127.0.0.1:${one.port} `, "$&down "));
    one.program.kill("SIGTERM");
    assertEquals((await one.program.ended()).code, 0);
    await using again = await Service.start(args, { port: one.port });
    await nginx.reload(text);
    await again.program.printed('"opened"');
    const { failures, answered } = await load.end();
    assertEquals(failures, []);
    assertEquals(one.events.at(-1)?.cut, []);
    assert(answered > 0);
  },
);

/** nginx in the foreground, whose workers are told apart by their log. */
class Nginx implements AsyncDisposable {
  readonly #program: Program;
  readonly #file: string;
  #reloads = 0;

  constructor(folder: string, file: string) {
    this.#file = file;
    this.#program = Program.start("nginx", ["-p", folder, "-e", "stderr", "-g", "daemon off;", "-c", file]);
  }

  /** The workers are there. */
  async started(): Promise<void> {
    await this.#program.complained(/start worker process \d+/);
  }

  /** Reads `text` as its configuration; resolves when new connections follow it. */
  async reload(text: string): Promise<void> {
    await Deno.writeTextFile(this.#file, text);
    this.#program.kill("SIGHUP");
    const workers = [...this.#program.stderr.matchAll(/start worker process \d+/g)].length / (1 + this.#reloads++);
    const stopped = `(?:[^]*gracefully shutting down){${workers * this.#reloads}}`;
    await this.#program.complained(new RegExp(stopped));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#program.kill("SIGTERM"); // It ends its workers, too.
    await this.#program.ended();
    await this.#program[Symbol.asyncDispose]();
  }
}

peerTest(["systemd-analyze"], "socketserver@.service: systemd takes it, and finds little exposed", async (folder) => {
  const unit = (await runningFile("socketserver@.service"))({ "/usr/local/bin/deno": Deno.execPath() });
  const file = `${folder}/socketserver@.service`;
  await Deno.writeTextFile(file, unit);
  assertEquals(await run("systemd-analyze", "verify", file).then(({ code, stderr }) => ({ code, stderr })), {
    code: 0,
    stderr: "",
  });
  // Its scale goes from 0 to 10 and is given in tenths; a unit without any of it has 9.6.
  const { code, stdout } = await run("systemd-analyze", "security", "--offline=true", "--threshold=20", file);
  assertEquals(code, 0, stdout);
});

peerTest(
  ["curl"],
  "socketserver@.service: its command lines start the server, probe it, and end it in time",
  async (folder) => {
    const [port, health] = [await freePort(), await freePort()];
    const unit = (await runningFile("socketserver@.service"))({
      "/usr/local/bin/deno": Deno.execPath(),
      "/opt/socketserver/": ROOT,
      "127.0.0.1:1%i": `127.0.0.1:${health}`,
      "/var/cache/socketserver-%i": folder,
      "%i": `${port}`,
    });
    const [start = ""] = settings(unit, "ExecStart");
    const env = Object.fromEntries(
      settings(unit, "Environment").flatMap((line) =>
        line.split(" ").map((pair) => {
          const [name = "", value = ""] = pair.split("=");
          return [name, value] as const;
        })
      ),
    );
    const [command = "", ...args] = start.split(" ");
    await using server = Program.start(command, args, { env });
    for (const line of settings(unit, "ExecStartPost")) {
      const [command = "", ...args] = line.split(" ");
      if (command === "/bin/sleep") continue; // The test has no balancer to wait for.
      assertEquals((await run(command, ...args)).code, 0, line);
    }
    // As a balancer on the same machine begins; who comes without it is refused.
    const fromBalancer = "PROXY TCP4 192.0.2.1 192.0.2.2 50000 8000\r\n";
    assertMatch(await askAndEnd(port, fromBalancer), isHello);
    server.kill("SIGTERM");
    assertEquals(await server.ended().then(({ code, stderr }) => ({ code, stderr })), { code: 0, stderr: "" });

    const stopMs = Number(settings(unit, "TimeoutStopSec")[0]) * 1_000;
    assert(numberAfter(args, "--drain-delay") + GRACE_MS < stopMs);
    assert(numberAfter(args, "--max-connections") < Number(settings(unit, "LimitNOFILE")[0]) * 7 / 8 - 32);
  },
);

/** What follows each `instruction` of a Dockerfile. */
function instructions(dockerfile: string, instruction: string): string[] {
  return [...dockerfile.matchAll(new RegExp(`^${instruction} (.*)$`, "gm"))].map(([, rest = ""]) => rest);
}

/** Builds what the Dockerfile builds, in a folder, without an image; starts the server with `args` or its own. */
async function startContainer(folder: string, places: Record<string, string>, args?: string[]): Promise<Program> {
  const dockerfile = (await runningFile("Dockerfile"))({ "0.0.0.0": "127.0.0.1", "/app": folder, ...places });
  for (const line of instructions(dockerfile, "COPY")) {
    const [target = "", ...files] = line.split(" ").reverse();
    await Deno.mkdir(`${folder}/${target}`, { recursive: true });
    for (const file of files) await Deno.copyFile(ROOT + file, `${folder}/${file}`);
  }
  const [variables = ""] = instructions(dockerfile, "ENV");
  const env = Object.fromEntries(variables.split(" ").map((pair) => pair.split("=")));
  const start = (line: string) => {
    const [_deno, ...rest] = JSON.parse(line);
    return Program.start(Deno.execPath(), rest, { cwd: folder, env });
  };
  for (const line of instructions(dockerfile, "RUN")) {
    await using program = start(line);
    assertEquals((await program.ended()).code, 0);
  }
  const [entrypoint = "", command = ""] = [
    ...instructions(dockerfile, "ENTRYPOINT"),
    ...instructions(dockerfile, "CMD"),
  ];
  return start(JSON.stringify([...JSON.parse(entrypoint), ...(args ?? JSON.parse(command))]));
}

async function assertServesAndEnds(server: Program, port: number, health: number): Promise<void> {
  assertEquals(
    (await run("curl", ..."--silent --fail --retry 10 --retry-connrefused".split(" "), `127.0.0.1:${health}/healthz`))
      .code,
    0,
  );
  assertMatch(await askAndEnd(port), isHello);
  server.kill("SIGTERM");
  assertEquals(await server.ended().then(({ code, stderr }) => ({ code, stderr })), { code: 0, stderr: "" });
}

peerTest(["curl"], "Dockerfile: the files that it copies are enough, and its command serves", async (folder) => {
  const [port, health] = [await freePort(), await freePort()];
  await using server = await startContainer(folder, {
    ":8009": `:${port}`,
    '"8009"': `"${port}"`,
    ":8010": `:${health}`,
  });
  await assertServesAndEnds(server, port, health);
});

peerTest(
  ["curl"],
  "kubernetes.yaml: its arguments serve in the container, and its times fit together",
  async (folder) => {
    const [port, health] = [await freePort(), await freePort()];
    const yaml = (await runningFile("kubernetes.yaml"))({
      "0.0.0.0": "127.0.0.1",
      '"8009"': `"${port}"`,
      ":8010": `:${health}`,
    });
    const [, list = ""] = /^ +args: (\[[^\]]*\])$/m.exec(yaml) ?? [];
    const args: string[] = JSON.parse(list.replace(/,\s*\]/, "]")); // YAML's may end in a comma.
    await using server = await startContainer(folder, { ":8009": `:${port}`, ":8010": `:${health}` }, args);
    await assertServesAndEnds(server, port, health);

    const number = (name: string) => Number(new RegExp(`\\b${name}: (\\d+)`).exec(yaml)?.[1]);
    assert(number("seconds") + GRACE_MS / 1_000 < number("terminationGracePeriodSeconds"));
    assertEquals(numberAfter(args, "--drain-delay"), 0); // preStop waits already.
    // preStop gives the readiness time to be seen elsewhere.
    const [readiness = ""] = /readinessProbe:[^]*?livenessProbe:/.exec(yaml) ?? [];
    assertEquals(/httpGet: \{ path: \/healthz, port: (\w+) \}/.exec(readiness)?.[1], "ops");
    assertEquals([number("containerPort"), /name: ops, containerPort: (\d+)/.exec(yaml)?.[1]], [8009, "8010"]);
    assert(number("replicas") > 1 && number("maxUnavailable") === 0);
  },
);
