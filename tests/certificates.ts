/**
 * Certificates for the tests, made with `openssl` when they run: keys that are
 * kept somewhere are found and reported by every scanner, and expire.
 *
 * @module
 */

import { Program } from "./programs.ts";

/** A certificate with its key, as text and as files. */
export interface Identity {
  cert: string;
  key: string;
  certFile: string;
  keyFile: string;
}

export interface Certificates {
  /** The authority that all are vouched for by, unless they say otherwise. */
  ca: Identity;
  /** For `localhost`, 127.0.0.1 and ::1. */
  server: Identity;
  /** Another one for the same names. */
  renewed: Identity;
  /** Of a client that is called alice. */
  alice: Identity;
  /** Of a client, by an authority of its own that has the name of the real one. */
  rogue: Identity;
  /** Of a client, over since yesterday. */
  expired: Identity;
  /** An authority between the real one and `chained`. */
  intermediate: Identity;
  /** For `localhost` and 127.0.0.1, by `intermediate`. */
  chained: Identity;
  /** Of a client, but for servers only. */
  serverOnly: Identity;
  /** For `localhost`, of version 1. */
  versionOne: Identity;
  /** For `localhost`, of version 1, with the authority's name and somebody else's signature. */
  forged: Identity;
}

const NAMES = "subjectAltName=DNS:localhost,IP:127.0.0.1,IP:::1";
const LEAF = "basicConstraints=critical,CA:FALSE";
/** As most authorities add. */
const USAGE = "keyUsage=critical,digitalSignature";

let made: Promise<Certificates> | undefined;

/** The certificates, made once for a file of tests; they need none of their files later. */
export async function withCertificates(test: (certificates: Certificates) => Promise<void>): Promise<void> {
  const folder = await Deno.makeTempDir({ prefix: "socketserver-" });
  try {
    const certificates = await (made ??= makeAll(folder));
    await test(await writtenTo(folder, certificates));
  } finally {
    await Deno.remove(folder, { recursive: true });
  }
}

async function writtenTo(folder: string, certificates: Certificates): Promise<Certificates> {
  const write = async (name: string, { cert, key }: Identity): Promise<Identity> => {
    const [certFile, keyFile] = [`${folder}/${name}.pem`, `${folder}/${name}.key`];
    await Deno.writeTextFile(certFile, cert);
    await Deno.writeTextFile(keyFile, key);
    return { cert, key, certFile, keyFile };
  };
  const written = (name: keyof Certificates) => write(name, certificates[name]);
  return {
    ca: await written("ca"),
    server: await written("server"),
    renewed: await written("renewed"),
    alice: await written("alice"),
    rogue: await written("rogue"),
    expired: await written("expired"),
    versionOne: await written("versionOne"),
    forged: await written("forged"),
    intermediate: await written("intermediate"),
    chained: await written("chained"),
    serverOnly: await written("serverOnly"),
  };
}

async function makeAll(folder: string): Promise<Certificates> {
  const ca = await makeAuthority(folder, "ca");
  const impostor = await makeAuthority(folder, "impostor");
  const [server, renewed, alice, rogue, expired, versionOne, forged, intermediate, serverOnly] = await Promise.all([
    issue(folder, ca, "server", { extensions: [LEAF, NAMES, USAGE, "extendedKeyUsage=serverAuth"] }),
    issue(folder, ca, "renewed", { extensions: [LEAF, NAMES] }),
    issue(folder, ca, "alice", { extensions: [LEAF, USAGE, "extendedKeyUsage=clientAuth"] }),
    issue(folder, impostor, "rogue", { extensions: [LEAF] }),
    issue(folder, ca, "expired", { extensions: [LEAF, NAMES], days: -1 }),
    issue(folder, ca, "localhost", { extensions: [] }),
    issue(await subfolder(folder), impostor, "localhost", { extensions: [] }),
    issue(folder, ca, "intermediate", { extensions: ["basicConstraints=critical,CA:TRUE"] }),
    issue(folder, ca, "serverOnly", { extensions: [LEAF, "extendedKeyUsage=serverAuth"] }),
  ]);
  const chained = await issue(folder, intermediate, "chained", { extensions: [LEAF, NAMES] });
  return { ca, server, renewed, alice, rogue, expired, versionOne, forged, intermediate, chained, serverOnly };
}

async function makeAuthority(folder: string, name: string): Promise<Identity> {
  const [certFile, keyFile] = [`${folder}/${name}.pem`, `${folder}/${name}.key`];
  await openssl("req", "-x509", ...NEW_KEY, "-keyout", keyFile, "-out", certFile, "-subj", "/CN=Test authority");
  return await read(certFile, keyFile);
}

async function subfolder(folder: string): Promise<string> {
  return await Deno.makeTempDir({ dir: folder });
}

const NEW_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];

async function issue(
  folder: string,
  authority: Identity,
  name: string,
  { extensions, days = 30 }: { extensions: string[]; days?: number },
): Promise<Identity> {
  const path = `${folder}/${name}`;
  const [certFile, keyFile] = [`${path}.pem`, `${path}.key`];
  await Deno.writeTextFile(`${path}.ext`, extensions.join("\n"));
  await openssl("req", ...NEW_KEY, "-keyout", keyFile, "-out", `${path}.csr`, "-subj", `/CN=${name}`);
  const authorityArgs = ["-CA", authority.certFile, "-CAkey", authority.keyFile, "-set_serial", String(serial++)];
  // Without extensions it becomes a certificate of version 1.
  const extensionArgs = extensions.length === 0 ? [] : ["-extfile", `${path}.ext`];
  const args = ["-req", "-in", `${path}.csr`, "-out", certFile, "-days", String(days)];
  await openssl("x509", ...args, ...authorityArgs, ...extensionArgs);
  return await read(certFile, keyFile);
}

let serial = 1;

async function read(certFile: string, keyFile: string): Promise<Identity> {
  return { cert: await Deno.readTextFile(certFile), key: await Deno.readTextFile(keyFile), certFile, keyFile };
}

/** What `openssl` prints. */
export async function openssl(...args: string[]): Promise<string> {
  await using program = Program.start("openssl", args);
  const { code, stdout, stderr } = await program.ended();
  if (code !== 0) throw new Error(`openssl ${args[0]} failed: ${stderr}`);
  return stdout;
}

/** A self-signed certificate for `localhost` with `key`, and that key. */
export async function selfSigned(folder: string, key: string): Promise<{ cert: string; key: string }> {
  const keyFile = `${folder}/own.key`;
  await Deno.writeTextFile(keyFile, key);
  const names = ["-subj", "/CN=own", "-addext", NAMES, "-addext", LEAF];
  return { cert: await openssl("req", "-x509", "-key", keyFile, "-days", "3", ...names), key };
}
