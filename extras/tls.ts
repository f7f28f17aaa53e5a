/**
 * TLS for servers and streams. {@linkcode TlsServer} and the filters {@linkcode tls} and {@linkcode tlsClient} have
 * client certificates and STARTTLS, over `node:tls`. {@linkcode NativeTlsServer} is faster, for networks you trust. A
 * client that only wants TLS uses `connect({ tls: true })`, without this module.
 *
 * @module
 */

import {
  type ConnectionFilter,
  type FilterContext,
  inetPton,
  printable,
  type ServerOptions,
  type SocketStream,
  type StreamConn,
  type StreamRequestHandlerClass,
  TcpServer,
  type TcpServerAddress,
} from "../mod.ts";

// --- Options ----------------------------------------------------------------

/** A certificate and its private key. */
export interface TlsCertificate {
  /** The certificate in PEM form, followed by those between it and its authority's. Other text and keys are skipped. */
  cert: string;
  /** The private key in PEM form, not encrypted: RSA of 2048 bits or more, P-256, P-384, P-521 or Ed25519. */
  key: string;
}

/** Options of {@linkcode tls}. */
export interface TlsOptions extends TlsCertificate {
  /** Authorities in PEM form. A client needs a valid certificate from one of them; by default it needs none. */
  clientCa?: string | string[] | undefined;
  /** Protocols to offer by ALPN, the best first; none by default. A client that asks only for others is turned away. */
  alpnProtocols?: string[] | undefined;
}

/** Options of {@linkcode tlsClient}; `cert` and `key` are the client's own. The server's is always checked. */
export interface TlsClientOptions extends Partial<TlsCertificate> {
  /** Authorities to trust, in PEM form; by default those that the runtime trusts. */
  caCerts?: string[] | undefined;
  /** The name or IP address that the server's certificate must have; by default the `hostname` of `connect()`. */
  serverName?: string | undefined;
  /** Protocols to ask for by ALPN, the best first; none by default. */
  alpnProtocols?: string[] | undefined;
}

/** The server's side of TLS, made by {@linkcode tls}: a filter for `filters` and `upgrade()`. */
export interface TlsFilter extends ConnectionFilter {
  /** Replaces the certificate for later connections; throws `InvalidData` if it is bad, and keeps the old one. */
  setCertificate(certificate: TlsCertificate): void;
}

/** A certificate of the peer, verified. */
export interface PeerCertificate {
  /** The common name of its subject; "" unless there is exactly one. */
  readonly commonName: string;
  /** Its alternative names, such as `DNS:example.org, IP Address:192.0.2.1`; "" if there are none. */
  readonly altNames: string;
  /** All parts of its subject, one a line. */
  readonly subject: string;
  /** All parts of its issuer's name, one a line. */
  readonly issuer: string;
  /** Its serial number, in hexadecimal. */
  readonly serialNumber: string;
  /** The SHA-256 hash of the certificate, in hexadecimal with colons. */
  readonly fingerprint256: string;
  /** The start of its validity. */
  readonly validFrom: Date;
  /** The end of its validity. */
  readonly validTo: Date;
  /** The certificate in DER form. */
  readonly raw: Uint8Array;
}

/** The result of a handshake; see {@linkcode tlsSessionOf}. */
export interface TlsSession {
  /** The version, such as `"TLSv1.3"`. */
  readonly protocol: string;
  /** The cipher suite, such as `"TLS_AES_256_GCM_SHA384"`. */
  readonly cipher: string;
  /** The protocol agreed on by ALPN; `undefined` if one side offers none. */
  readonly alpnProtocol: string | undefined;
  /** The name that the client asks for (SNI); `undefined` if it asks for none, or for an IP address. */
  readonly serverName: string | undefined;
  /** The peer's certificate, always a verified one: a server has it only with `clientCa`. */
  readonly peerCertificate: PeerCertificate | undefined;
  /** Whether the peer's side ended without TLS's close_notify, as many do: an attacker may have cut the data short. */
  readonly truncated: boolean;
}

/** Throws for an option that does not exist: a misspelt `clientCa` would let everybody in. */
function checkNames(call: string, options: object, names: readonly string[]): void {
  const unknown = Object.keys(options).find((name) => !names.includes(name));
  if (unknown !== undefined) throw new TypeError(`${call} has no option "${unknown}"; it has ${names.join(", ")}`);
}

// --- Failures ---------------------------------------------------------------

/** Why a handshake fails, by the runtime's code and words, and what to do. The first match counts. */
const REASONS: readonly [pattern: RegExp, why: string, advice?: string][] = [
  [/alert: CertificateRequired/, "the server requires a client certificate", "give cert and key"],
  [/alert: (UnknownCA|\w*Certificate\w*)/, "the peer does not accept this side's certificate"],
  [/NoApplicationProtocol|NO_APPLICATION_PROTOCOL/, "the two sides have no ALPN protocol in common"],
  [/alert: ProtocolVersion|incompatible/, "the two sides have no TLS version or cipher in common"],
  [/received fatal alert/, "the peer has refused with an alert"],
  [/ALTNAME_INVALID/, "the server's certificate is for another name", "set serverName to one that it has"],
  [/CERT_HAS_EXPIRED/, "the peer's certificate has expired", "renew it"],
  [/CERT_NOT_YET_VALID/, "the peer's certificate is not valid yet", "check the clocks of both machines"],
  [
    /SELF_SIGNED|UNABLE_TO|INVALID_PURPOSE/, // The runtime also says so of a certificate for another purpose (2.9.6).
    "the peer's certificate is from no trusted authority, or not for this purpose",
    "add its authority to caCerts or clientCa",
  ],
  [/NOT_RETURN_A_CERTIFICATE/, "the client has no certificate", "give it one from an authority of clientCa"],
  [/corrupt message/, "the peer does not speak TLS", "check the port, and whether a balancer ends TLS itself"],
  [/ECONNRESET|EPIPE/, "the peer has closed the connection"],
];

/** The failure of a handshake in one sentence, with the runtime's words and code. */
function handshakeError(error: unknown): Error {
  const words = error instanceof Error ? error.message : String(error);
  let code = error instanceof Error && "code" in error ? String(error.code) : "";
  if (error instanceof Deno.errors.UnexpectedEof) code = "ECONNRESET";
  const [, why, advice] = REASONS.find(([pattern]) => pattern.test(`${code} ${words}`)) ?? [];
  const sentence = why === undefined ? words : `${why} (${words})${advice === undefined ? "" : `; ${advice}`}`;
  const Failure = /ECONNRESET|EPIPE/.test(code) ? Deno.errors.ConnectionReset : Deno.errors.InvalidData;
  const failure = new Failure(`Cannot begin TLS: ${printable(sentence)}`, { cause: error });
  return code === "" ? failure : Object.assign(failure, { code });
}

function invalid(message: string, cause?: unknown): Error {
  return new Deno.errors.InvalidData(message, { cause });
}

function attempt<T>(action: () => T, message: string): T {
  try {
    return action();
  } catch (error) {
    throw invalid(`${message} (${error instanceof Error ? error.message : error})`, error);
  }
}

// --- Certificates -----------------------------------------------------------

type Certificate = import("node:crypto").X509Certificate;

/** Certificates between a peer's and an authority's; real chains have three at most. */
const MAX_CHAIN_LENGTH = 8;

/** The PEM blocks of `text` whose label fits. */
function pemBlocks(text: string, label: RegExp): string[] {
  const blocks = text.matchAll(/-----BEGIN ([A-Z0-9 ]+)-----[^]*?-----END \1-----/g);
  return Array.from(blocks).filter(([, found = ""]) => label.test(found)).map(([block]) => block);
}

/** All certificates of `text`, also of the kinds that Python and OpenSSL take and the runtime skips (2.9.6). */
function certificatesIn(name: string, text: string): Certificate[] {
  const { X509Certificate } = process.getBuiltinModule("node:crypto");
  const parse = (block: string) => {
    const der = Uint8Array.fromBase64(block.replace(/-----[^-]+-----/g, ""));
    const start = contentStart(der, 0);
    const length = der.subarray(2, start).reduce((length, byte) => length * 256 + byte, 0);
    return new X509Certificate(der.subarray(0, start + length)); // Behind it are OpenSSL's own notes, if it is TRUSTED.
  };
  const blocks = pemBlocks(text, /^(X509 |TRUSTED )?CERTIFICATE$/);
  const found = attempt(() => blocks.map(parse), `${name} holds a damaged certificate; export it again`);
  if (found.length > 0) return found;
  throw invalid(`${name} holds no certificate in PEM form; give it the text of a certificate's file, not of a key's`);
}

/** `certificate` with nothing in it that the runtime does not take; throws the reason if a server cannot use it. */
function readCertificate(certificate: TlsCertificate): TlsCertificate {
  const chain = certificatesIn("cert", certificate.cert);
  const [key] = pemBlocks(certificate.key, /PRIVATE KEY$/);
  if (key === undefined) throw invalid("key holds no private key in PEM form; give it the text of the key's file");
  if (key.includes("ENCRYPTED")) {
    throw invalid('key is encrypted; decrypt it first, for example with "openssl pkey -in key.pem -out plain.pem"');
  }
  const { createPrivateKey } = process.getBuiltinModule("node:crypto");
  const parsed = attempt(() => createPrivateKey(key), "key holds a damaged private key; export it again");
  const own = chain.findIndex((link) => link.checkPrivateKey(parsed));
  if (own > 0) throw invalid("cert begins with another certificate than key's; put the server's own first");
  if (own < 0) throw invalid("key is not the key of cert; give the two that were made together");
  // node:tls reads the stack of an error of ours. The runtime opens this file's source map for the first one, and panics
  // if no descriptor is left then (2.9.6).
  void new TypeError("unused").stack;
  const plain = { cert: chain.join("\n"), key };
  attempt(
    () => tryToServe(plain),
    "key is of a kind that the runtime's TLS does not take; use RSA of 2048 bits or more, P-256 or Ed25519",
  );
  return plain;
}

/** Builds the very thing that serves, over a connection that leads nowhere; throws if that fails. */
function tryToServe(identity: TlsCertificate): void {
  const { Duplex } = process.getBuiltinModule("node:stream");
  const nowhere = new Duplex({ read() {} });
  const failures: unknown[] = [];
  beginHandshake({ identity }, nowhere, () => {}, (error) => failures.push(error));
  nowhere.destroy();
  if (failures.length > 0) throw failures[0];
}

function readAuthorities(name: string, texts: string | string[] | undefined): Certificate[] | undefined {
  if (texts === undefined) return undefined;
  const certificates = [texts].flat().flatMap((text) => certificatesIn(name, text));
  // `node:tls` takes an empty list for no list at all.
  if (certificates.length === 0) throw invalid(`${name} holds no certificate; leave it out to have none`);
  return certificates;
}

/** The certificates that the peer has sent, its own first. */
function chainOf(socket: NodeSocket): Certificate[] {
  const { X509Certificate } = process.getBuiltinModule("node:crypto");
  const chain: Certificate[] = [];
  let link: import("node:tls").DetailedPeerCertificate | undefined = socket.getPeerCertificate(true);
  while (link?.raw !== undefined && chain.length <= MAX_CHAIN_LENGTH) {
    chain.push(new X509Certificate(link.raw));
    link = link.issuerCertificate === link ? undefined : link.issuerCertificate;
  }
  return chain;
}

/**
 * Whether one of `authorities` vouches for the first of a chain. `node:tls` does not always check that (2.9.6): for a
 * server's certificate of version 1 or with an odd encoding it compares names and no signatures.
 */
function isVouchedFor([first, ...others]: Certificate[], authorities: Certificate[]): boolean {
  if (first === undefined || !isInForce(first)) return false;
  const hasIssuedIt = (issuer: Certificate) => first.checkIssued(issuer) && first.verify(issuer.publicKey);
  const isFirst = ({ fingerprint256 }: Certificate) => fingerprint256 === first.fingerprint256;
  if (authorities.some((authority) => isFirst(authority) || hasIssuedIt(authority))) return true;
  const next = others.find((link) => link.ca && hasIssuedIt(link)); // Peers may send them in any order.
  return next !== undefined && isVouchedFor([next, ...others.filter((link) => link !== next)], authorities);
}

/** Whether a certificate is of version 3 (RFC 5280, 4.1) and now is within its validity. */
function isInForce({ raw, validFrom, validTo }: Certificate): boolean {
  const start = contentStart(raw, contentStart(raw, 0));
  return raw[start] === 0xa0 && Date.parse(validFrom) <= Date.now() && Date.now() <= Date.parse(validTo);
}

/** The offset of the content of the DER element at `at`, behind its tag and its length. */
function contentStart(der: Uint8Array, at: number): number {
  const length = der[at + 1] ?? 0;
  return at + 2 + (length & 0x80 ? length & 0x7f : 0);
}

// --- Handshakes -------------------------------------------------------------

type NodeSocket = import("node:tls").TLSSocket;
type Duplex = import("node:stream").Duplex;

/** The checked options of one handshake. */
interface Settings {
  readonly identity?: TlsCertificate | undefined;
  /** Those that vouch for peers. */
  readonly authorities?: Certificate[] | undefined;
  readonly alpnProtocols?: string[] | undefined;
  /** The name that the server must have; `undefined` on the server's side. */
  readonly serverName?: string;
  /** The certificates that this server has admitted last, by their fingerprints. */
  readonly admitted?: Set<string>;
}

/** Begins a handshake over `transport`; later calls `secured`, or `failed` at least once. */
function beginHandshake(
  { identity, authorities, alpnProtocols, serverName }: Settings,
  transport: Duplex,
  secured: (socket: NodeSocket) => void,
  failed: (error: unknown) => void,
): void {
  const tls = process.getBuiltinModule("node:tls");
  // An environment variable could say otherwise of rejectUnauthorized.
  const options = { ...identity, ca: authorities?.map(String), ALPNProtocols: alpnProtocols, rejectUnauthorized: true };
  if (serverName !== undefined) {
    const servername = inetPton(serverName) === undefined ? serverName : undefined;
    const socket = tls.connect({ ...options, socket: transport, host: serverName, servername });
    socket.on("error", failed);
    socket.on("secureConnect", () => secured(socket));
    return;
  }
  // Only a server's events say which handshake is over, so each handshake has its own server.
  // The filter's signal ends it: a timer of the runtime's would keep the 13 KB of a failed handshake until it fires.
  const server = tls.createServer({ ...options, requestCert: authorities !== undefined, handshakeTimeout: -1 });
  server.on("secureConnection", secured);
  server.on("tlsClientError", (error, socket) => failed(rejectionOf(socket) ?? error));
  server.emit("connection", transport);
}

/** Why the runtime rejects a client's certificate: its error is only "socket hang up" (2.9.6). */
function rejectionOf(socket: NodeSocket): Error | undefined {
  const code: unknown = socket.authorizationError; // A string, against its type.
  return typeof code === "string" ? Object.assign(new Error(code), { code }) : undefined;
}

/**
 * Throws unless the peer of a finished handshake has the certificate that it needs. `node:tls` does not ask a client
 * again that resumes a session, even if the session is another server's, or its certificate was turned away (2.9.6).
 */
function judgePeer(
  socket: NodeSocket,
  { authorities, serverName, admitted }: Settings,
): Certificate | undefined {
  if (authorities === undefined && serverName === undefined) return undefined;
  const chain = chainOf(socket);
  const [own] = chain;
  const isTrusted = authorities === undefined || isVouchedFor(chain, authorities);
  const isUnasked = socket.isSessionReused() && admitted?.has(own?.fingerprint256 ?? "") === false;
  if (own === undefined || !socket.authorized || !isTrusted || isUnasked) {
    throw invalid("Cannot begin TLS: the peer's certificate is not valid, or from no trusted authority");
  }
  if (admitted !== undefined) remember(admitted, own.fingerprint256);
  return own;
}

/** Client certificates that may resume a session; older ones do a whole handshake again. */
const MAX_ADMITTED = 10_000;

function remember(admitted: Set<string>, fingerprint: string): void {
  admitted.add(fingerprint);
  const [oldest = ""] = admitted;
  if (admitted.size > MAX_ADMITTED) admitted.delete(oldest);
}

function describeSession(socket: NodeSocket, peer: Certificate | undefined): TlsSession {
  const serverName = "servername" in socket ? socket.servername : undefined;
  return {
    protocol: socket.getProtocol() ?? "",
    cipher: socket.getCipher().name,
    alpnProtocol: socket.alpnProtocol || undefined,
    serverName: typeof serverName === "string" && serverName !== "" ? serverName : undefined,
    peerCertificate: peer === undefined ? undefined : describeCertificate(socket, peer),
    truncated: false,
  };
}

function describeCertificate(socket: NodeSocket, certificate: Certificate): PeerCertificate {
  const commonName: unknown = socket.getPeerCertificate().subject?.CN;
  const { subjectAltName, subject, issuer, serialNumber, fingerprint256, validFrom, validTo, raw } = certificate;
  return {
    ...{ subject, issuer, serialNumber, fingerprint256 },
    commonName: typeof commonName === "string" ? commonName : "",
    altNames: subjectAltName ?? "",
    validFrom: new Date(validFrom),
    validTo: new Date(validTo),
    raw: new Uint8Array(raw),
  };
}

// --- Connections ------------------------------------------------------------

/** The most bytes to encrypt at once, so that a stalled peer is noticed in the middle of a large write. */
const WRITE_BYTES = 65_536;

/** The arrays that an idle connection reads into, which a client's hello fits, and a busy one: four whole records. */
const [MIN_ROOM_BYTES, MAX_ROOM_BYTES] = [2_048, 66_560];

/** Reads in a row that leave most of the array empty before it becomes small again. */
const SMALL_READS_BEFORE_SHRINKING = 16;

const NO_BYTES: Uint8Array<ArrayBuffer> = new Uint8Array(0);

/** Resolves at the end of this turn of the event loop. */
function turn(): Promise<void> {
  return new Promise((resolve) => void setImmediate(resolve));
}

/**
 * A connection with TLS over it. `close()` frees its descriptor whatever the peer does.
 *
 * `node:tls` sees `under` as a `Duplex` with only the methods that it calls: the buffers of a whole one cost a third of
 * the throughput, and lose the alert that tells a peer why its handshake failed. If paused, the runtime would keep all
 * that arrives; so it never is, and nothing is read from `under` unless a reader waits.
 */
class TlsConn implements StreamConn {
  readonly localAddr: Deno.Addr;
  readonly remoteAddr: Deno.Addr;
  session: TlsSession & { truncated: boolean } | undefined;
  readonly #transport: Duplex;
  /** Settles when the handshake is over. */
  readonly #secured = Promise.withResolvers<NodeSocket>();
  #socket: NodeSocket | undefined;
  #room = new Uint8Array(MIN_ROOM_BYTES);
  #smallReads = 0;
  #isReading = false;
  /** Decrypted, and not read yet. */
  #received = NO_BYTES;
  #reader: { readonly into: Uint8Array; readonly settled: PromiseWithResolvers<number | null> } | undefined;
  #writer: PromiseWithResolvers<number> | undefined;
  /** Settles when the encrypted bytes that are under way have left. */
  #sending: Promise<void> | undefined;
  /** The peer's side is over, with or without a close_notify. */
  #hasEnded = false;
  /** Rejects with the first failure. */
  #failure: Promise<never> | undefined;

  private constructor(readonly under: StreamConn) {
    this.localAddr = under.localAddr;
    this.remoteAddr = under.remoteAddr;
    const { Duplex } = process.getBuiltinModule("node:stream");
    const transport = new Duplex();
    this.#transport = Object.assign(transport, {
      pause: () => transport,
      resume: () => transport,
      write: (bytes: Uint8Array, done: () => void) => this.#send(bytes, done),
      destroy: () => transport.emit("close"),
    });
  }

  /** Does a handshake over `conn`, and closes it if that fails or `signal` aborts. */
  static async open(conn: StreamConn, settings: Settings, signal: AbortSignal): Promise<TlsConn> {
    if (lookUnder(conn) !== undefined) throw new TypeError("Cannot begin TLS: the connection has TLS already");
    const tls = new TlsConn(conn);
    const giveUp = () => tls.#fail(signal.reason);
    signal.addEventListener("abort", giveUp);
    try {
      signal.throwIfAborted();
      const failed = (error: unknown) => tls.#fail(handshakeError(error));
      beginHandshake(settings, tls.#transport, (socket) => tls.#take(socket), failed);
      tls.#readOn();
      const socket = await tls.#secured.promise;
      await tls.#failure;
      tls.session = describeSession(socket, judgePeer(socket, settings));
      return tls;
    } catch (error) {
      await turn(); // The alert that tells the peer why is on its way.
      tls.#drop();
      throw error;
    } finally {
      signal.removeEventListener("abort", giveUp);
    }
  }

  read(into: Uint8Array): Promise<number | null> {
    if (this.#received.length > 0) return Promise.resolve(this.#takeInto(into));
    if (this.#failure !== undefined) return this.#failure;
    if (this.#hasEnded) return Promise.resolve(null);
    const settled = Promise.withResolvers<number | null>();
    this.#reader = { into, settled };
    this.#readOn();
    return settled.promise;
  }

  write(data: Uint8Array): Promise<number> {
    if (this.#failure !== undefined) return this.#failure;
    const part = data.subarray(0, WRITE_BYTES);
    const writer = this.#writer = Promise.withResolvers<number>();
    this.#socket?.write(part, (error) => error ? writer.reject(error) : writer.resolve(part.length));
    return writer.promise;
  }

  /** Sends the close_notify; the connection stays open for what the peer still sends. */
  async closeWrite(): Promise<void> {
    await this.#failure;
    await new Promise<void>((resolve) => void this.#socket?.end(resolve));
    await turn(); // By now it is encrypted and on its way.
    while (this.#sending !== undefined) await this.#sending;
    await this.#failure;
  }

  close(): void {
    this.#fail(Object.assign(new Deno.errors.Interrupted("operation canceled"), { code: "EINTR" }));
    this.#socket?.end(); // A peer that takes it at once gets a close_notify.
    setImmediate(() => this.#drop());
  }

  /** The handshake is over; from now on what arrives is the reader's. */
  #take(socket: NodeSocket): void {
    this.#socket = socket;
    socket.on("data", (bytes: Uint8Array<ArrayBuffer>) => this.#receive(bytes));
    socket.on("end", () => this.#receive(null));
    socket.on("error", (error) => this.#fail(invalid(`TLS failed: ${printable(error.message)}`, error)));
    this.#secured.resolve(socket);
  }

  #readOn(): void {
    if (this.#isReading) return;
    this.#isReading = true;
    this.under.read(this.#room).then(this.#onRead, this.#onFailure);
  }

  readonly #onRead = (count: number | null): void => {
    this.#isReading = false;
    if (count === null) return void this.#noteEnd();
    this.#transport.emit("data", this.#room.subarray(0, count)); // The runtime copies it at once.
    this.#fitRoom(count);
    if (this.#failure === undefined && (this.#socket === undefined || this.#reader !== undefined)) this.#readOn();
  };

  readonly #onFailure = (error: unknown): void => {
    if (this.#socket !== undefined) return this.#fail(error);
    turn().then(() => this.#fail(handshakeError(error))); // An alert that came before goes first, and takes a moment.
  };

  #fitRoom(count: number): void {
    const { length } = this.#room;
    this.#smallReads = count > length / 8 || length === MIN_ROOM_BYTES ? 0 : this.#smallReads + 1;
    const isFull = count === length && length < MAX_ROOM_BYTES;
    if (isFull) this.#room = new Uint8Array(Math.min(length * 8, MAX_ROOM_BYTES));
    else if (this.#smallReads > SMALL_READS_BEFORE_SHRINKING) this.#room = new Uint8Array(MIN_ROOM_BYTES);
  }

  /** Notes the end of `under`; a close_notify that came before it shows in this turn. */
  async #noteEnd(): Promise<void> {
    if (this.#socket === undefined) return this.#onFailure(new Deno.errors.UnexpectedEof("unexpected end of file"));
    await turn();
    if (this.session !== undefined) this.session.truncated = !this.#hasEnded;
    this.#receive(null);
  }

  #receive(bytes: Uint8Array<ArrayBuffer> | null): void {
    if (bytes === null) this.#hasEnded = true;
    else this.#received = this.#received.length === 0 ? bytes : join(this.#received, bytes);
    const reader = this.#reader;
    this.#reader = undefined;
    reader?.settled.resolve(bytes === null ? null : this.#takeInto(reader.into));
  }

  #takeInto(into: Uint8Array): number {
    const part = this.#received.subarray(0, into.length);
    into.set(part);
    this.#received = this.#received.subarray(part.length);
    return part.length;
  }

  /** Writes encrypted bytes; the runtime waits for `done` before it gives more. */
  #send(bytes: Uint8Array, done: () => void): true {
    this.#sending = this.under.write(bytes).then((count) => {
      if (count < bytes.length) return void this.#send(bytes.subarray(count), done);
      this.#sending = undefined;
      done();
    }, (error) => {
      this.#sending = undefined;
      this.#onFailure(error);
      done();
    });
    return true;
  }

  /** Rejects whatever waits; the first failure counts. */
  #fail(error: unknown): void {
    if (this.#failure !== undefined) return;
    this.#failure = Promise.reject(error);
    for (const waiting of [this.#secured, this.#reader?.settled, this.#writer]) {
      waiting?.promise.catch(() => {}); // Nobody may wait for it any more.
      waiting?.reject(error);
    }
    this.#failure.catch(() => {});
    this.#reader = undefined;
  }

  #drop(): void {
    this.#socket?.destroy();
    this.#transport.destroy();
    try {
      this.under.close();
    } catch {
      // It is closed already.
    }
  }
}

function join(first: Uint8Array, second: Uint8Array): Uint8Array<ArrayBuffer> {
  return process.getBuiltinModule("node:buffer").Buffer.concat([first, second]);
}

/** The first connection with TLS from `conn` downwards. */
function lookUnder(conn: StreamConn | undefined): TlsConn | undefined {
  return conn === undefined || conn instanceof TlsConn ? conn : lookUnder(conn.under);
}

// --- Filters ----------------------------------------------------------------

/**
 * Makes the server's side of TLS, a filter for a server's `filters` and for `upgrade()`; put `proxyProtocol()` and
 * `perHost()` in front of it. Rejects with one sentence on why a handshake fails: `Deno.errors.InvalidData`, or
 * `ConnectionReset` if the client left.
 *
 * @throws {Deno.errors.InvalidData} If a certificate or a key cannot be used.
 * @throws {TypeError} If an option does not exist.
 *
 * @example STARTTLS
 * ```ts
 * import { StreamRequestHandler } from "@socketserver/socketserver";
 * import { tls, type TlsCertificate } from "@socketserver/socketserver/tls";
 *
 * function mailHandler(certificate: TlsCertificate) {
 *   const startTls = tls(certificate);
 *   return class extends StreamRequestHandler {
 *     override async handle() {
 *       if (await this.request.readLine() !== "STARTTLS") return;
 *       await this.request.send("220 go ahead\r\n");
 *       await this.request.upgrade(startTls);
 *     }
 *   };
 * }
 * ```
 */
export function tls(options: TlsOptions): TlsFilter {
  checkNames("tls()", options, ["cert", "key", "clientCa", "alpnProtocols"]);
  const { clientCa, alpnProtocols } = options;
  const authorities = readAuthorities("clientCa", clientCa);
  const admitted = new Set<string>();
  let identity = readCertificate(options);
  const filter = (conn: StreamConn, { signal }: FilterContext) =>
    TlsConn.open(conn, { identity, authorities, alpnProtocols, admitted }, signal);
  return Object.assign(filter, {
    setCertificate(certificate: TlsCertificate) {
      identity = readCertificate(certificate);
    },
  });
}

/**
 * Makes the client's side of TLS, a filter for the `filters` of `connect()` and for `upgrade()`. It throws and fails
 * as {@linkcode tls} does, and fails with `TypeError` if there is no name to check.
 *
 * @example A client with a certificate
 * ```ts
 * import { connect } from "@socketserver/socketserver";
 * import { tlsClient } from "@socketserver/socketserver/tls";
 *
 * const dial = (cert: string, key: string) =>
 *   connect({ hostname: "db.example.org", port: 8443, filters: [tlsClient({ cert, key })] });
 * ```
 */
export function tlsClient(options: TlsClientOptions = {}): ConnectionFilter {
  checkNames("tlsClient()", options, ["caCerts", "serverName", "alpnProtocols", "cert", "key"]);
  const { caCerts, serverName, alpnProtocols, cert, key } = options;
  const authorities = readAuthorities("caCerts", caCerts);
  const identity = cert ?? key ? readCertificate({ cert: cert ?? "", key: key ?? "" }) : undefined;
  return (conn, { signal, hostname }) => {
    const name = serverName ?? hostname;
    if (!name) throw new TypeError("Cannot begin TLS: set serverName to the name that the certificate must have");
    return TlsConn.open(conn, { identity, authorities, alpnProtocols, serverName: name }, signal);
  };
}

/** The result of a stream's TLS handshake; `undefined` without TLS, and for the runtime's own, which tells nothing. */
export function tlsSessionOf(request: SocketStream): TlsSession | undefined {
  return lookUnder(request.under)?.session;
}

// --- Servers ----------------------------------------------------------------

/** Where a {@linkcode TlsServer} listens, and its certificates. */
export interface TlsServerAddress extends TcpServerAddress, TlsOptions {}

/**
 * A `TcpServer` with {@linkcode tls} behind the `filters` of its options. A client in its handshake counts as one of
 * `maxConnections`, for `handshakeTimeout` at most.
 *
 * @example A server that knows its clients by their certificates
 * ```ts
 * import { StreamRequestHandler } from "@socketserver/socketserver";
 * import { TlsServer, tlsSessionOf } from "@socketserver/socketserver/tls";
 *
 * class Greeter extends StreamRequestHandler {
 *   override handle() {
 *     return this.request.send(`hello ${tlsSessionOf(this.request)?.peerCertificate?.commonName}\n`);
 *   }
 * }
 *
 * const serve = (cert: string, key: string, clientCa: string) =>
 *   new TlsServer({ port: 8443, cert, key, clientCa }, Greeter).serveForever();
 * ```
 */
export class TlsServer extends TcpServer {
  readonly #filter: TlsFilter;

  /** Opens nothing. Throws `Deno.errors.InvalidData` if a certificate or a key cannot be used. */
  constructor(address: TlsServerAddress, Handler: StreamRequestHandlerClass, options: ServerOptions = {}) {
    const { cert, key, clientCa, alpnProtocols, ...tcp } = address;
    const filter = tls({ cert, key, clientCa, alpnProtocols });
    super(tcp, Handler, { ...options, filters: [...options.filters ?? [], filter] });
    this.#filter = filter;
  }

  /** Replaces the certificate; see {@linkcode TlsFilter.setCertificate}. */
  setCertificate(certificate: TlsCertificate): void {
    this.#filter.setCertificate(certificate);
  }
}

/** Where a {@linkcode NativeTlsServer} listens, and its certificate. */
export interface NativeTlsServerAddress extends Omit<TcpServerAddress, "loadBalanced">, TlsCertificate {}

/**
 * A `TcpServer` with the runtime's own TLS (`Deno.listenTls`), for networks that you trust, or behind a balancer.
 *
 * Its limits are the runtime's (2.9.6). A peer that stalls or does not read keeps its descriptor until it leaves,
 * although the server has closed the connection: hostile peers can use up all descriptors. There are no client
 * certificates, no STARTTLS, no ALPN, no new certificate without a restart, no `noDelay`, no filter in front of the
 * handshake (`filters` run behind it), and {@linkcode tlsSessionOf} tells nothing. A {@linkcode TlsServer} has none of
 * these limits.
 */
export class NativeTlsServer extends TcpServer {
  readonly #identity: TlsCertificate;

  /** Opens nothing. Throws `Deno.errors.InvalidData` if the certificate or the key cannot be used. */
  constructor(address: NativeTlsServerAddress, Handler: StreamRequestHandlerClass, options: ServerOptions = {}) {
    const { cert, key, ...tcp } = address;
    super(tcp, Handler, { ...options, filters: [nativeHandshake, ...options.filters ?? []] });
    this.#identity = readCertificate({ cert, key });
  }

  /** Opens the port for TLS. */
  protected override openListener(address: Deno.TcpListenOptions): Deno.TlsListener {
    return Deno.listenTls({ ...address, ...this.#identity });
  }
}

/** Does the handshake of a connection from `Deno.listenTls`, outside of the accept loop. */
async function nativeHandshake(conn: StreamConn): Promise<StreamConn> {
  try {
    if (isNative(conn)) await conn.handshake();
    return conn;
  } catch (error) {
    throw handshakeError(error);
  }
}

function isNative(conn: StreamConn): conn is Deno.TlsConn {
  return "handshake" in conn;
}
