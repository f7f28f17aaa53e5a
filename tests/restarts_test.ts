/** Ends and restarts under load, and chaos: random faults for as long as one likes. */

import { assert, assertEquals } from "../deps.ts";
import { connect, type SocketStream, StreamRequestHandler, TcpServer } from "../mod.ts";
import { assertSameBytes, bytesOf, randomNumbers } from "./fake_conn.ts";
import { listenAgain, networkTest, programTest, scaled } from "./testing.ts";
import { Siege } from "./faults/siege.ts";
import { freePort } from "./programs.ts";

const SHUTDOWNS = scaled(6, 200);
const CHAOS_SECONDS = scaled(4, 600);
const CLIENTS = 20;

/** A failure tells it; put that here to play it again. */
const SEED = Math.floor(Math.random() * 1e6);

function isGone(error: unknown): boolean {
  const { ConnectionReset, BrokenPipe, BadResource, ConnectionRefused } = Deno.errors;
  // A dial that was reset before the runtime could ask for the peer's address (ENOTCONN) has neither a class nor a code.
  const wasReset = error instanceof Error && error.message.endsWith("(os error 107)");
  return wasReset ||
    [ConnectionReset, BrokenPipe, BadResource, ConnectionRefused].some((Kind) => error instanceof Kind);
}

// Shutdown under load

/** Answers each line once, some of them after a while. */
class Answers extends StreamRequestHandler {
  override async handle() {
    for await (const line of this.request.lines()) {
      if (line.endsWith("0")) await new Promise((resolve) => setTimeout(resolve, 1));
      await this.request.write(`answer to ${line}\n`);
    }
  }
}

/** Asks without a pause, a few questions at a time, until the server ends. */
class Asker {
  /** How many questions have left. */
  asked = 0;
  answered = 0;
  readonly #stream: SocketStream;
  readonly #random: () => number;
  /** Resolves with the next answer. */
  #answer = Promise.withResolvers<void>();

  constructor(stream: SocketStream, random: () => number) {
    this.#stream = stream;
    this.#random = random;
  }

  async askUntilTheEnd(): Promise<void> {
    try {
      await Promise.all([this.#ask(), this.#hear()]);
    } finally {
      this.#stream.close();
    }
  }

  async #ask(): Promise<void> {
    try {
      for (;;) {
        const count = 1 + Math.floor(this.#random() * 5);
        const questions = Array.from({ length: count }, (_, index) => `question ${this.asked + index}\n`);
        await this.#stream.send(questions.join(""));
        this.asked += count;
        // The next ones are asked when most of these are answered, so that the server and not the network is busy.
        while (this.answered < this.asked - 1) await this.#answer.promise;
      }
    } catch (error) {
      if (!isGone(error)) throw error;
    }
  }

  async #hear(): Promise<void> {
    const ended = new Deno.errors.BrokenPipe("The server has ended");
    try {
      for await (const line of this.#stream.lines()) {
        assertEquals(line, `answer to question ${this.answered++}`); // In order, each once.
        this.#answer.resolve();
        this.#answer = Promise.withResolvers();
      }
    } catch (error) {
      if (!isGone(error)) throw error;
    } finally {
      this.#answer.promise.catch(() => {}); // Nobody may be waiting.
      this.#answer.reject(ended);
    }
  }
}

networkTest(
  `a storm of ${SHUTDOWNS} shutdowns under load: what was asked is answered, once, and the port is free at once`,
  async () => {
    const random = randomNumbers(SEED);
    const port = await freePort();
    for (let round = 0; round < SHUTDOWNS; round++) {
      const server = new TcpServer({ port }, Answers);
      await listenAgain(() => server.listen());
      const serving = server.serveForever();
      const askers: Asker[] = [];
      for (let count = 0; count < CLIENTS; count++) askers.push(new Asker(await connect({ port }), random));
      const over = Promise.all(askers.map((asker) => asker.askUntilTheEnd()));
      const load = random() * 400;
      while (askers.reduce((sum, { answered }) => sum + answered, 0) < load) {
        await new Promise((resolve) => setTimeout(resolve, 1));
      }
      const askedBefore = askers.map(({ asked }) => asked);
      const { cut } = await server.shutdown();
      await serving;
      await over;
      assertEquals(cut, [], `round ${round} of seed ${SEED}`);
      for (const [index, { answered }] of askers.entries()) {
        const asked = askedBefore[index] ?? 0;
        assert(answered >= asked, `${asked} questions, ${answered} answers; round ${round} of seed ${SEED}`);
      }
    }
  },
);

// Chaos

/** Bytes of which every part is unlike the others. */
function noise(random: () => number, length: number): Uint8Array<ArrayBuffer> {
  return Uint8Array.from({ length }, () => random() * 256);
}

/** A client of the echo of which no byte may be wrong, whatever becomes of the connection. */
class ChaoticClient {
  readonly #random: () => number;
  readonly #conn: Deno.Conn;
  readonly #sent: Uint8Array;
  #received = 0;

  constructor(conn: Deno.Conn, random: () => number) {
    this.#conn = conn;
    this.#random = random;
    this.#sent = noise(random, 1 + Math.floor(random() ** 3 * 300_000));
  }

  /** Does one random thing, and leaves. Resolves to what it was. */
  async misbehave(timeout: number): Promise<string> {
    const faults = ["none", "none", "half-close", "reset", "leave", "stall", "silence", "garbage"] as const;
    const fault = faults[Math.floor(this.#random() * faults.length)] ?? "none";
    try {
      await this.#do(fault, timeout);
    } catch (error) {
      if (!isGone(error)) throw error;
    } finally {
      this.#conn.close();
    }
    return fault;
  }

  async #do(fault: string, timeout: number): Promise<void> {
    if (fault === "garbage") return void await this.#conn.write(noise(this.#random, 500)); // In place of a command.
    await this.#send(bytesOf("echo\n"));
    const sending = this.#send(this.#sent);
    sending.catch(() => {}); // It ends with the connection, which the reads below tell about.
    const { length } = this.#sent;
    if (fault === "none") return await this.#receive(length);
    const part = Math.floor(this.#random() * length);
    await this.#receive(part);
    switch (fault) {
      case "half-close":
        await this.#receive(length);
        await this.#conn.closeWrite();
        return await this.#receiveEnd();
      case "stall":
        await new Promise((resolve) => setTimeout(resolve, this.#random() * timeout));
        return await this.#receive(length);
      case "silence":
        await this.#receive(length);
        return await this.#receiveEnd();
      // To leave with bytes unread is a reset; "leave" has read all.
      // The server gives it up.
      case "leave":
        return await this.#receive(length);
    }
  }

  async #send(bytes: Uint8Array): Promise<void> {
    for (let at = 0; at < bytes.length;) at += await this.#conn.write(bytes.subarray(at, at + 50_000));
  }

  /** Reads until `count` bytes have come back in all. */
  async #receive(count: number): Promise<void> {
    const into = new Uint8Array(20_000);
    while (this.#received < count) {
      const came = await this.#conn.read(into);
      if (came === null) throw new Deno.errors.BrokenPipe("The server has ended"); // By a restart, or a deadline.
      const expected = this.#sent.subarray(this.#received, this.#received + came);
      assertSameBytes(into.subarray(0, came), expected, `at ${this.#received} of an echo`);
      this.#received += came;
    }
  }

  async #receiveEnd(): Promise<void> {
    assertEquals(await this.#conn.read(new Uint8Array(1)), null);
  }
}

programTest(
  `chaos for ${CHAOS_SECONDS} s: every byte that is echoed is right, and nothing is left behind`,
  async () => {
    const timeout = 300;
    await using siege = new Siege({ timeout, grace: 500 });
    const port = await siege.port();
    const deadline = performance.now() + CHAOS_SECONDS * 1_000;
    const counts: Record<string, number> = {};
    async function misbehaveUntil(end: number, random: () => number): Promise<void> {
      while (performance.now() < end) {
        const conn = await Deno.connect({ hostname: "127.0.0.1", port }).catch((error) => {
          if (!isGone(error)) throw error;
        });
        const fault = conn === undefined ? "refused" : await new ChaoticClient(conn, random).misbehave(timeout);
        counts[fault] = (counts[fault] ?? 0) + 1;
        await new Promise((resolve) => setTimeout(resolve, random() * 50)); // The machine has others to serve, too.
      }
    }
    async function restartUntil(end: number, random: () => number): Promise<void> {
      while (performance.now() < end) {
        await new Promise((resolve) => setTimeout(resolve, 200 + random() * 1_500));
        await siege.restart();
        counts.restarts = (counts.restarts ?? 0) + 1;
      }
    }
    async function chaosUntil(end: number, seed: number): Promise<void> {
      const clients = Array.from({ length: CLIENTS }, (_, index) => misbehaveUntil(end, randomNumbers(seed + index)));
      await Promise.all([...clients, restartUntil(end, randomNumbers(seed - 1))]);
    }
    try {
      // What it makes once, it has made by then: the process takes half a minute to come to its size.
      await chaosUntil(performance.now() + CHAOS_SECONDS * 100, SEED);
      const before = await siege.holdingsWith(0);
      await chaosUntil(deadline, SEED + 1_000);
      await siege.assertServes();
      await siege.assertAsBefore(before);
    } catch (error) {
      throw new Error(`Seed ${SEED}, ${JSON.stringify(counts)}: ${error}`, { cause: error });
    }
    assert((counts.none ?? 0) > 10 && (counts.restarts ?? 0) > 0, JSON.stringify(counts));
  },
);
