/** Mistakes of whoever runs the two scripts: what they are told, and the exit code. */

import { assertEquals } from "../../deps.ts";
import { assertFailed, FakeServer, freePort, runScript, TalkingServer } from "../programs.ts";
import { programTest } from "../testing.ts";

type Script = "server.ts" | "client.ts";

/** Wrong command lines and all that is said of them; a `{...}` stands for what {@linkcode withPlaces} has made. */
const MISUSES: Record<Script, [args: string[], sentence: string][]> = {
  "server.ts": [
    [["--nope"], "unknown option '--nope'"],
    [["--host", "x"], "unknown option '--host'"],
    [["-q"], "unknown option '-q'"],
    [["8009"], "unexpected argument 8009"],
    [["--", "--quiet"], "unexpected argument --quiet"],
    [["--quiet=yes"], "option '--quiet' does not take an argument"],
    [["--port"], "option '--port <value>' argument missing"],
    [["--unix", "--quiet"], "option '--unix' argument is missing, or begins with a dash"],
    [["--unix", ""], "--unix needs a value, PATH"],
    [["--hostname="], "--hostname needs a value, HOST"],
    ...["http", "1e3", "65536", "Infinity"].map((value): [string[], string] => [
      ["--port", value],
      `--port must be a whole number from 0 to 65535: it is "${value}"`,
    ]),
    [["--port", "-1"], "option '--port' argument is missing, or begins with a dash"],
    [["--port=-1"], '--port must be a whole number from 0 to 65535: it is "-1"'],
    ...["--max-connections", "--idle-timeout"].flatMap((flag) =>
      ["0", "1.5", "soon"].map((value): [string[], string] => [
        [flag, value],
        `${flag} must be a whole number from 1 to Infinity: it is "${value}"`,
      ])
    ),
    [["--port", "0", "--unix", "/tmp/a.sock"], "--port is not for --unix"],
    [["--hostname", "::1", "--unix", "/tmp/a.sock"], "--hostname is not for --unix"],
    [["--cert", "c", "--key", "k", "--unix", "/tmp/a.sock"], "--cert is not for --unix"],
    [["--udp", "--lines"], "--lines is not for --udp"],
    [["--udp", "--max-connections", "5"], "--max-connections is not for --udp"],
    [["--udp", "--idle-timeout", "5"], "--idle-timeout is not for --udp"],
    [["--udp", "--cert", "c", "--key", "k"], "--cert is not for --udp"],
    [["--cert", "c"], "--cert and --key must be given together"],
    [["--key", "k"], "--cert and --key must be given together"],
  ],
  "client.ts": [
    [["--nope"], "unknown option '--nope'"],
    [["-x"], "unknown option '-x'"],
    [["--keep-open=yes"], "option '--keep-open' does not take an argument"],
    [["--port"], "option '--port <value>' argument missing"],
    [["--unix", "--keep-open"], "option '--unix' argument is missing, or begins with a dash"],
    [["--hostname", ""], "--hostname needs a value, HOST"],
    ...["http", "0", "65536", "Infinity"].map((value): [string[], string] => [
      ["--port", value],
      `--port must be a whole number from 1 to 65535: it is "${value}"`,
    ]),
    ...["0", "1s"].map((value): [string[], string] => [
      ["--timeout", value],
      `--timeout must be a whole number from 1 to Infinity: it is "${value}"`,
    ]),
    ...["0.5", "many"].map((value): [string[], string] => [
      ["--retries", value],
      `--retries must be a whole number from 0 to Infinity: it is "${value}"`,
    ]),
    [["--port", "1", "--unix", "/tmp/a.sock"], "--port is not for --unix"],
    [["--hostname", "x", "--unix", "/tmp/a.sock"], "--hostname is not for --unix"],
    [["--udp", "--retries", "1"], "--retries is not for --udp"],
    [["--udp", "--tls"], "--tls is not for --udp"],
    [["--ca", "x"], "--ca is for --tls; give that too"],
  ],
};

const LONG_PATH = `/tmp/${"x".repeat(103)}`;

/** What goes wrong, and what must be in the sentence: the system's own words, and what it is about. */
const FAILURES: Record<Script, [args: string[], words: string[]][]> = {
  "server.ts": [
    [["--port", "{talking}"], ["127.0.0.1:{talking}", "address already in use"]],
    [["--hostname", "192.0.2.1", "--port", "0"], ["192.0.2.1:0", "cannot assign requested address"]],
    [["--hostname", "no-such-host.invalid", "--port", "0"], ["no-such-host.invalid:0", "name"]],
    [["--unix", "/no-such-folder/server.sock"], ["/no-such-folder/server.sock", "folder does not exist"]],
    [["--unix", LONG_PATH], [LONG_PATH, "108 bytes", "107"]],
    [["--udp", "--unix", LONG_PATH], [LONG_PATH, "108 bytes", "107"]],
  ],
  "client.ts": [
    [["--port", "{nobody}", "hello"], ["127.0.0.1:{nobody}", "connection refused"]],
    [["--port", "{nobody}", "--retries", "1", "hello"], ["after 2 tries", "connection refused"]],
    [["--hostname", "no-such-host.invalid", "hello"], ["no-such-host.invalid:8009", "name"]],
    [["--unix", "/no-such-folder/server.sock", "x"], ["/no-such-folder/server.sock", "no such file or directory"]],
    [["--unix", LONG_PATH, "hello"], [LONG_PATH, "108 bytes", "107"]],
    [["--udp", "--unix", LONG_PATH, "hello"], [LONG_PATH, "bytes", "107"]],
    [["--port", "{talking}", "--timeout", "100", "hello"], ["no answer came within --timeout"]],
    [["--port", "{nobody}", "--udp", "--timeout", "100", "hello"], ["no answer came within --timeout"]],
    [["--port", "{leaving}", "hello"], ["the server closed the connection before it answered"]],
    [["--port", "{leaving}", "--tls", "hello"], ["127.0.0.1:{leaving}", "unexpected end of file"]],
    [["--port", "{echo}", "--tls", "hello"], ["127.0.0.1:{echo}", "received corrupt message"]],
  ],
};

/** Missing permissions: what must be named is what {@linkcode runScript} then needs. */
const DENIALS: Record<Script, [args: string[], permissions: string[], flag: string][]> = {
  "server.ts": [
    [["--port", "{nobody}"], [], "--allow-net=127.0.0.1:{nobody}"],
    [["--unix", "/tmp/a.sock"], [], "--allow-read=/tmp/a.sock --allow-write=/tmp/a.sock --allow-net=unix:/tmp/a.sock"],
    [["--cert", "/c", "--key", "/k"], ["--allow-net"], "--allow-read=/c"],
    [["--udp", "--port", "0"], ["--no-config", "--allow-net"], "--unstable-net"],
  ],
  "client.ts": [
    [["--port", "{nobody}", "hello"], [], "--allow-net=127.0.0.1:{nobody}"],
    [["--tls", "--ca", "/c", "hello"], ["--allow-net"], "--allow-read=/c"],
    [["--udp", "--port", "{nobody}", "hello"], ["--no-config", "--allow-net"], "--unstable-net"],
  ],
};

type Places = Record<string, string>;

/** Runs `test` with servers of all kinds. */
async function withPlaces(test: (places: Places) => Promise<void>): Promise<void> {
  await using talking = new TalkingServer();
  await using leaving = new FakeServer(async (peer) => void await peer.receiveChunk());
  await using echo = new FakeServer(async (peer) => {
    for (let chunk; (chunk = await peer.receiveChunk()) !== "";) await peer.send(chunk);
  });
  const [talkingPort, leavingPort, echoPort] = [talking, leaving, echo].map(({ port }) => String(port));
  await test({
    talking: talkingPort ?? "",
    leaving: leavingPort ?? "",
    echo: echoPort ?? "",
    nobody: String(await freePort()),
  });
}

/** `text` with what its `{...}` stand for. */
function filled(text: string, places: Places): string {
  return text.replace(/\{(\w+)\}/g, (whole, name) => places[name] ?? whole);
}

/** A pattern for one line with `words` in this order. */
function sentenceWith(words: string[]): RegExp {
  return new RegExp(words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join(".*"));
}

const ALL = ["--allow-net", "--allow-read", "--allow-write"];

for (const script of ["server.ts", "client.ts"] as const) {
  programTest(`each wrong command line of ${script} is one sentence, and exit code 2`, async (t) => {
    for (const [args, sentence] of MISUSES[script]) {
      await t.step(args.join(" "), async () => {
        const { code, stderr } = await runScript(script, args, { permissions: ALL });
        assertEquals([code, stderr], [2, `${script}: ${sentence}; --help lists the flags\n`]);
      });
    }
  });

  programTest(`each failure of ${script} is one sentence with the system's words, and exit code 1`, async (t) => {
    await withPlaces(async (places) => {
      for (const [args, words] of FAILURES[script]) {
        await t.step(args.join(" "), async () => {
          const outcome = await runScript(script, args.map((arg) => filled(arg, places)), { permissions: ALL });
          assertFailed(outcome, 1, sentenceWith(words.map((word) => filled(word, places))));
        });
      }
    });
  });

  programTest(`each missing permission of ${script} is named as the flag that gives it`, async (t) => {
    await withPlaces(async (places) => {
      for (const [args, permissions, flag] of DENIALS[script]) {
        await t.step(args.join(" "), async () => {
          const outcome = await runScript(script, args.map((arg) => filled(arg, places)), { permissions });
          assertFailed(outcome, 1, new RegExp(`run again with ${filled(flag, places)}\n$`));
        });
      }
    });
  });
}
