/**
 * What the tests of the TLS extra share: servers and clients with the test's certificates, handlers that are named by
 * what they do, and a count of sockets.
 *
 * @module
 */

import { connect, type ServerOptions, type SocketStream, StreamRequestHandler, type TcpServer } from "../../mod.ts";
import type { StreamRequestHandlerClass } from "../../mod.ts";
import { NativeTlsServer, tlsClient, type TlsClientOptions, TlsServer, tlsSessionOf } from "../../extras/tls.ts";
import type { TlsServerAddress } from "../../extras/tls.ts";
import { type Certificates, withCertificates } from "../certificates.ts";
import { peerTest } from "../testing.ts";

/** A test with certificates, which take openssl to make, and with other `programs`. */
export function tlsTest(
  name: string,
  test: (certificates: Certificates) => Promise<void>,
  ...programs: string[]
): void {
  peerTest(["openssl", ...programs], name, () => withCertificates(test));
}

export interface Setup extends ServerOptions {
  address?: Partial<TlsServerAddress>;
}

/** A server that keeps what `handleError()` is given and prints nothing. */
export class QuietTlsServer extends TlsServer {
  readonly errors: Error[] = [];

  override handleError(error: unknown) {
    if (error instanceof Error) this.errors.push(error);
  }
}

/** The same with the runtime's TLS. */
export class QuietNativeServer extends NativeTlsServer {
  readonly errors: Error[] = [];

  override handleError(error: unknown) {
    if (error instanceof Error) this.errors.push(error);
  }
}

/** Serves until `test` is over. */
export function serving(
  { server: { cert, key } }: Certificates,
  Handler: StreamRequestHandlerClass,
  test: (server: QuietTlsServer, port: number) => Promise<void>,
  { address = {}, ...options }: Setup = {},
): Promise<void> {
  return running(new QuietTlsServer({ port: 0, cert, key, ...address }, Handler, options), test);
}

/** The same with a server of the runtime's TLS. */
export function servingNatively(
  { server: { cert, key } }: Certificates,
  Handler: StreamRequestHandlerClass,
  test: (server: QuietNativeServer, port: number) => Promise<void>,
  options: ServerOptions = {},
): Promise<void> {
  return running(new QuietNativeServer({ port: 0, cert, key }, Handler, options), test);
}

async function running<Server extends TcpServer>(
  server: Server,
  test: (server: Server, port: number) => Promise<void>,
): Promise<void> {
  const { port } = server.listen();
  const over = server.serveForever();
  try {
    await test(server, port);
  } finally {
    await server.shutdown();
    await over;
  }
}

/** A client that trusts the test's authority. */
export function dial(
  { ca }: Certificates,
  port: number,
  options: TlsClientOptions = {},
  hostname = "127.0.0.1",
): Promise<SocketStream> {
  return connect({ hostname, port, timeout: 10_000, filters: [tlsClient({ caCerts: [ca.cert], ...options })] });
}

/** Sends what it is sent, and says how its stream has ended. */
export class Watched extends StreamRequestHandler {
  static seen: SocketStream[] = [];
  static ends: string[] = [];

  static forget(): void {
    Watched.seen = [];
    Watched.ends = [];
  }

  override async handle() {
    Watched.seen.push(this.request);
    try {
      for await (const data of this.request) await this.request.send(data);
      Watched.ends.push(tlsSessionOf(this.request)?.truncated ? "truncated" : "ended");
      await this.request.send("goodbye\n");
    } catch (error) {
      Watched.ends.push(error instanceof Error ? error.name : "unknown");
    }
  }
}

/** Says the name in the client's certificate. */
export class Who extends StreamRequestHandler {
  static handlers = 0;

  override async handle() {
    Who.handlers++;
    await this.request.send(`${tlsSessionOf(this.request)?.peerCertificate?.commonName}\n`);
  }
}

/** The start of a Python client that does not check the certificate: `raw` is its socket, `tls` the one over it. */
export function pythonClient(port: number): string {
  return `
import socket, ssl, struct, sys
raw = socket.create_connection(("127.0.0.1", ${port}))
tls = ssl._create_unverified_context().wrap_socket(raw, suppress_ragged_eofs=False)
`;
}
