import { connect, socketPair, type SocketStream, TcpServer, UnixServer } from "../../mod.ts";
import { createHash } from "node:crypto";
import { assert, assertEquals } from "../../deps.ts";
import { randomNumbers } from "../fake_conn.ts";
import { Echo, networkTest, unixTest } from "../testing.ts";

const TRANSFER_BYTES = 100_000_000;

/** The most that `crypto.getRandomValues()` fills at a time. */
const MAX_CHUNK_BYTES = 65_536;

networkTest("100 MB of random bytes come back over TCP as they went out", async () => {
  await using server = new TcpServer({ hostname: "127.0.0.1", port: 0 }, Echo);
  const address = server.listen();
  assert("port" in address);
  const serving = server.serveForever();
  await using stream = await connect({ port: address.port });
  await assertEchoes(stream);
  await server.shutdown();
  await serving;
});

unixTest("100 MB of random bytes come back over a Unix socket as they went out", async (folder) => {
  const path = `${folder}/echo.sock`;
  await using server = new UnixServer({ path }, Echo);
  await server.listen();
  const serving = server.serveForever();
  await using stream = await connect({ path });
  await assertEchoes(stream);
  await server.shutdown();
  await serving;
});

Deno.test({
  name: "100 MB of random bytes come back over a pair as they went out",
  permissions: "none",
  fn: async () => {
    const [stream, request] = socketPair();
    const server = new TcpServer({ port: 0 }, Echo);
    const served = Promise.try(() => server.finishRequest(request, request.remoteAddress)).then(() => request.close());
    await assertEchoes(stream);
    await served;
    stream.close();
  },
});

/** Sends random bytes in chunks of random sizes, and fails the test unless the same bytes come back. */
async function assertEchoes(stream: SocketStream): Promise<void> {
  const [sent, came] = await Promise.all([sendRandomBytes(stream), hashOf(stream)]);
  assertEquals(came, sent);
  assertEquals(stream.bytesWritten, TRANSFER_BYTES);
  assertEquals(stream.bytesRead, TRANSFER_BYTES);
}

/** Resolves to the hash of what was sent. */
async function sendRandomBytes(stream: SocketStream): Promise<string> {
  const random = randomNumbers(20_260_803);
  const hash = createHash("sha256");
  const chunk = new Uint8Array(MAX_CHUNK_BYTES);
  for (let left = TRANSFER_BYTES; left > 0;) {
    const size = Math.min(1 + Math.floor(random() * MAX_CHUNK_BYTES), left);
    const bytes = crypto.getRandomValues(chunk.subarray(0, size));
    hash.update(bytes);
    await stream.send(bytes);
    left -= size;
  }
  await stream.closeWrite();
  return hash.digest("hex");
}

/** Resolves to the hash of all that comes. */
async function hashOf(stream: SocketStream): Promise<string> {
  const hash = createHash("sha256");
  for await (const chunk of stream) hash.update(chunk);
  return hash.digest("hex");
}
