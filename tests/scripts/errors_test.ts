/** Every error that whoever runs the two scripts can cause: what they are told, word for word, and the exit code. */

import { assertEquals } from "../../deps.ts";
import { withCertificates } from "../certificates.ts";
import { FakeServer, freePort, portOf, runScript, startScript, TalkingServer } from "../programs.ts";
import { programTest } from "../testing.ts";

/** A mistake, in words in which `{...}` stands for what {@linkcode withPlaces} has found or made. */
interface Mistake {
  readonly args: string[];
  readonly input?: string;
  /** All that are needed and more, if nothing else is said. */
  readonly permissions?: string[];
  /** Without the script's name in front, and what `--help` adds to mistakes of the command line. */
  readonly told: string;
}

/** Of the command line itself; exit code 2. */
const MISUSES: Record<"server.ts" | "client.ts", Mistake[]> = {
  "server.ts": [
    { args: ["--nope"], told: "Unknown option '--nope'" },
    { args: ["--host", "x"], told: "Unknown option '--host'" },
    { args: ["8009"], told: "Unexpected argument '8009'" },
    { args: ["--quiet=yes"], told: "Option '--quiet' does not take an argument" },
    { args: ["--port"], told: "Option '--port <value>' argument missing" },
    {
      args: ["--unix", "--quiet"],
      told: "Option '--unix' argument is missing; one with a dash in front is written --unix=VALUE",
    },
    { args: ["--port", "http"], told: '--port must be a whole number from 0 to 65535: it is "http"' },
    { args: ["--port", ""], told: '--port must be a whole number from 0 to 65535: it is ""' },
    { args: ["--port", "-1"], told: '--port must be a whole number from 0 to 65535: it is "-1"' },
    { args: ["--port=-1"], told: '--port must be a whole number from 0 to 65535: it is "-1"' },
    { args: ["--port", "1e3"], told: '--port must be a whole number from 0 to 65535: it is "1e3"' },
    { args: ["--port", "65536"], told: '--port must be a whole number from 0 to 65535: it is "65536"' },
    { args: ["--port", "Infinity"], told: '--port must be a whole number from 0 to 65535: it is "Infinity"' },
    ...["--max-connections", "--max-connections-per-host", "--idle-timeout", "--max-lifetime"].flatMap((flag) =>
      ["0", "-1", "1.5", "soon"].map((value) => ({
        args: [flag, value],
        told: `${flag} must be a whole number, 1 or more, or Infinity: it is "${value}"`,
      }))
    ),
    {
      args: ["--hostname", ""],
      told: '--hostname must not be empty: "127.0.0.1" is this machine, "0.0.0.0" all its IPv4 addresses',
    },
    { args: ["--unix", ""], told: "--unix must not be empty: name the file that clients will connect to" },
    { args: ["--port", "0", "--unix", "/tmp/a.sock"], told: "choose one of --port and --unix" },
    ...[["--lines"], ["--max-connections", "5"], ["--idle-timeout", "5"], ["--cert", "c", "--key", "k"]].map((
      args,
    ) => ({
      args: ["--udp", ...args],
      told: `${args[0]} is for connections, and --udp has none`,
    })),
    { args: ["--workers", "0"], told: '--workers must be a whole number from 1 to 1024: it is "0"' },
    { args: ["--workers", "many"], told: '--workers must be a whole number from 1 to 1024: it is "many"' },
    { args: ["--workers", "2", "--unix", "/tmp/a.sock"], told: "--workers is not for --unix" },
    { args: ["--udp", "--workers", "2"], told: "--workers is for connections, and --udp has none" },
    { args: ["--hostname", "::1", "--unix", "/tmp/a.sock"], told: "choose one of --hostname and --unix" },
    { args: ["--udp", "--proxy-from", "127.0.0.1"], told: "--proxy-from is for connections, and --udp has none" },
    {
      args: ["--proxy-from", "10.0.0.1/8"],
      told: '--proxy-from has "10.0.0.1/8", which is an address inside of 10.0.0.0/8: name one of the two',
    },
    {
      args: ["--unix", "/tmp/a.sock", "--proxy-from", "127.0.0.1"],
      told: 'The peers of a Unix socket have no address: --proxy-from must list "unix"',
    },
    { args: ["--cert", "{cert}"], told: "--cert and --key must be given together" },
    { args: ["--key", "{key}"], told: "--cert and --key must be given together" },
    { args: ["--cert", "{cert}", "--key", "{key}", "--unix", "/x"], told: "--cert is not for --unix" },
    { args: ["--client-ca", "{ca}"], told: "--client-ca is for TLS; it needs --cert and --key too" },
    {
      args: ["--cert", "/nowhere", "--key", "{key}"],
      told: "--cert: cannot read /nowhere: there is no such file; check the path",
    },
    {
      args: ["--cert", "{cert}", "--key", "/"],
      told: "--key: cannot read /: it is no file that this user may read; check the path",
    },
    {
      args: ["--cert", "{cert}", "--key", "{key}"],
      permissions: ["--allow-net"],
      told: "--cert: permission is missing; run again with --allow-read={cert}",
    },
    {
      args: ["--port", "0", "--cert", "{key}", "--key", "{key}"],
      told: "--cert holds no certificate in PEM form; give it the certificate's file",
    },
    {
      args: ["--port", "0", "--cert", "{cert}", "--key", "{cert}"],
      told: "--key holds no private key in PEM form, or an encrypted one; give it the key's file",
    },
    {
      args: ["--port", "0", "--cert", "{cert}", "--key", "{otherKey}"],
      told: "--key is not the key of --cert; give the two that were made together",
    },
    {
      args: ["--port", "0", "--cert", "{cert}", "--key", "{key}", "--client-ca", "{key}"],
      told: "--client-ca must hold certificates in PEM form; give it the authority's certificate file",
    },
  ],
  "client.ts": [
    { args: ["--nope"], told: "Unknown option '--nope'" },
    { args: ["-x"], told: "Unknown option '-x'" },
    { args: ["--keep-open=yes"], told: "Option '--keep-open' does not take an argument" },
    { args: ["--port"], told: "Option '--port <value>' argument missing" },
    {
      args: ["--unix", "--keep-open"],
      told: "Option '--unix' argument is missing; one with a dash in front is written --unix=VALUE",
    },
    ...["http", "0", "-1", "65536", "Infinity"].map((value) => ({
      args: ["--port", value],
      told: `--port must be a whole number from 1 to 65535: it is "${value}"`,
    })),
    ...["0", "-1", "1s"].map((value) => ({
      args: ["--timeout", value],
      told: `--timeout must be a whole number, 1 or more, or Infinity: it is "${value}"`,
    })),
    ...["-1", "many"].map((value) => ({
      args: ["--retries", value],
      told: `--retries must be a whole number, 0 or more, or Infinity: it is "${value}"`,
    })),
    { args: ["--hostname", ""], told: "--hostname must not be empty: name the server, or leave the flag out" },
    ...["http://x", "127.0.0.1:8009", "[::1]:8009"].map((value) => ({
      args: ["--hostname", value],
      told: `--hostname takes a name or an address only; the port goes to --port: it is "${value}"`,
    })),
    { args: ["--unix", ""], told: "--unix must not be empty: name the server's socket, or leave the flag out" },
    { args: ["--port", "1", "--unix", "/tmp/a.sock"], told: "choose one of --port and --unix" },
    ...[["--retries", "1"], ["--tls"], ["--reconnect"]].map((args) => ({
      args: ["--udp", ...args],
      told: `${args[0]} is for connections, and --udp has none`,
    })),
    ...["--ca", "--server-name", "--cert", "--key"].map((flag) => ({
      args: [flag, "{ca}"],
      told: `${flag} is for --tls; give that too`,
    })),
    { args: ["--tls", "--cert", "{cert}"], told: "--cert and --key must be given together" },
    {
      args: ["--tls", "--server-name", "", "hello"],
      told: "--server-name must not be empty: name whom the certificate must be for",
    },
    {
      args: ["--tls", "--ca", "/nowhere", "hello"],
      told: "--ca: cannot read /nowhere: there is no such file; check the path",
    },
    {
      args: ["--tls", "--ca", "{key}", "hello"],
      told: "--ca must hold certificates in PEM form; give it the authority's certificate file",
    },
    {
      args: ["--tls", "--cert", "{cert}", "--key", "{otherKey}", "hello"],
      told: "--key is not the key of --cert; give the two that were made together",
    },
    {
      args: ["--hex", "68 6"],
      told: '"6" is not in hexadecimal; write two digits for each byte, such as 68 65 6c 6c 6f',
    },
  ],
};

/** Of what they find, or do not; exit code 1. */
const FAILURES: Record<"server.ts" | "client.ts", Mistake[]> = {
  "server.ts": [
    {
      args: ["--port", "{talking}"],
      told: "Cannot listen on 127.0.0.1:{talking}: the address is in use; " +
        "stop the program that has it or choose another",
    },
    {
      args: ["--hostname", "192.0.2.1", "--port", "0"],
      told: "Cannot listen on 192.0.2.1:0: this machine has no such address; choose one of its own",
    },
    {
      args: ["--hostname", "no-such-host.invalid", "--port", "0"],
      told: "Cannot listen on no-such-host.invalid:0: the name cannot be resolved; check its spelling",
    },
    {
      args: ["--port", "{nobody}"],
      permissions: [],
      told: "Cannot listen on 127.0.0.1:{nobody}: permission is missing; run again with --allow-net=127.0.0.1:{nobody}",
    },
    {
      args: ["--unix", "/no-such-folder/server.sock"],
      told: "Cannot listen on /no-such-folder/server.sock: its folder does not exist; make it first",
    },
    {
      args: ["--unix", "{cert}"],
      told: "Cannot listen on {cert}: there is a file that is no socket; choose another path",
    },
    {
      args: ["--udp", "--port", "0"],
      permissions: ["--no-config", "--allow-net"],
      told: "Cannot open a datagram socket: Deno has them behind a flag; run again with --unstable-net",
    },
  ],
  "client.ts": [
    {
      args: ["--port", "{nobody}", "hello"],
      told: "Cannot connect to 127.0.0.1:{nobody}: nobody listens there; start the server or check the address",
    },
    {
      args: ["--port", "{nobody}", "--retries", "1", "hello"],
      told: "Cannot connect to 127.0.0.1:{nobody} after 2 tries: nobody listens there; " +
        "start the server or check the address",
    },
    {
      args: ["--hostname", "no-such-host.invalid", "hello"],
      told: "Cannot connect to no-such-host.invalid:8009: the name cannot be resolved; check its spelling",
    },
    {
      args: ["--unix", "/no-such-folder/server.sock", "hello"],
      told: "Cannot connect to /no-such-folder/server.sock: no such file; start the server or check the path",
    },
    {
      args: ["--port", "{nobody}", "hello"],
      permissions: [],
      told:
        "Cannot connect to 127.0.0.1:{nobody}: permission is missing; run again with --allow-net=127.0.0.1:{nobody}",
    },
    {
      args: ["--port", "{talking}", "--timeout", "100", "hello"],
      told: "the server did not answer within 100 ms; try a longer --timeout",
    },
    {
      args: ["--port", "{nobody}", "--udp", "--timeout", "100", "hello"],
      told: "no answer from 127.0.0.1:{nobody} within 100 ms; try a longer --timeout",
    },
    { args: ["--port", "{leaving}", "hello"], told: "the server has left in the middle; start it again" },
    {
      args: ["--port", "{leaving}", "--tls", "hello"],
      told: "Cannot connect to 127.0.0.1:{leaving}: the peer has left during the TLS handshake; " +
        "check that it speaks TLS there, or leave --tls out",
    },
    { args: ["--port", "{tls}", "hello"], told: "the server speaks TLS there; run again with --tls" },
    {
      args: ["--port", "{echo}", "--tls", "hello"],
      told: "Cannot connect to 127.0.0.1:{echo}: the peer does not speak TLS there; " +
        "check the port, or leave --tls out",
    },
    {
      args: ["--port", "{tls}", "--tls", "hello"],
      told: "Cannot connect to 127.0.0.1:{tls}: nobody who is trusted has vouched for the server's certificate; " +
        "name its authority with --ca",
    },
    {
      args: ["--port", "{mutual}", "--tls", "--ca", "{ca}", "hello"],
      told: "the server asks for a certificate; give it one with --cert and --key",
    },
    {
      args: ["--port", "{echo}", "--hex"],
      input: "68 0a\nhello\n",
      told: 'line 2 and what follows is not sent: "hello" is not in hexadecimal; ' +
        "write two digits for each byte, such as 68 65 6c 6c 6f",
    },
    {
      args: ["--udp", "--port", "{nobody}", "hello"],
      permissions: ["--no-config", "--allow-net"],
      told: "Cannot open a datagram socket: Deno has them behind a flag; run again with --unstable-net",
    },
  ],
};

type Places = Record<string, string>;

/** Runs `test` with servers of all kinds, and files. */
async function withPlaces(test: (places: Places) => Promise<void>): Promise<void> {
  await withCertificates(async ({ server, renewed, ca }) => {
    await using talking = new TalkingServer();
    await using leaving = new FakeServer(async (peer) => void await peer.receiveChunk());
    await using echo = new FakeServer(async (peer) => {
      for (let chunk; (chunk = await peer.receiveChunk()) !== "";) await peer.send(chunk);
    });
    const permissions = ["--allow-net=127.0.0.1", "--allow-read"];
    const args = ["--port", "0", "--cert", server.certFile, "--key", server.keyFile];
    await using tls = startScript("server.ts", args, { permissions });
    await using mutual = startScript("server.ts", [...args, "--client-ca", ca.certFile], { permissions });
    await test({
      cert: server.certFile,
      key: server.keyFile,
      otherKey: renewed.keyFile,
      ca: ca.certFile,
      talking: String(talking.port),
      leaving: String(leaving.port),
      echo: String(echo.port),
      tls: String(await portOf(tls)),
      mutual: String(await portOf(mutual)),
      nobody: String(freePort()),
    });
  });
}

/** `text` with what its `{...}` stand for. */
function filled(text: string, places: Places): string {
  return text.replace(/\{(\w+)\}/g, (whole, name) => places[name] ?? whole);
}

const ALL_PERMISSIONS = ["--allow-net", "--allow-read", "--allow-write"];

for (const script of ["server.ts", "client.ts"] as const) {
  for (const [table, code, help] of [[MISUSES, 2, "; --help lists the flags"], [FAILURES, 1, ""]] as const) {
    const whose = code === 2 ? "of the command line" : "of what it finds";
    programTest(`each error ${whose} is one sentence of ${script} and exit code ${code}`, async (t) => {
      await withPlaces(async (places) => {
        for (const { args, input = "", permissions = ALL_PERMISSIONS, told } of table[script]) {
          await t.step(args.join(" "), async () => {
            const outcome = await runScript(script, args.map((arg) => filled(arg, places)), { input, permissions });
            assertEquals(outcome.stderr, `${script}: ${filled(told, places)}${help}\n`);
            assertEquals(outcome.code, code);
          });
        }
      });
    });
  }
}
