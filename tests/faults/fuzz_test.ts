/**
 * Random bytes in random cuts, read in random ways, beside a model that needs no
 * buffer; and random writes. No network. A failure names the seed of its round:
 * one round is `FUZZ_ROUND`.
 *
 * @module
 */

import { type FrameOptions, IncompleteReadError, LimitOverrunError, socketPair, SocketStream } from "../../mod.ts";
import { assert, assertEquals } from "../../deps.ts";
import { assertSameBytes, bytesOf, concat, FakeConn, randomNumbers, turnEnd } from "../fake_conn.ts";
import { rejectionOf, scaled } from "../testing.ts";

/** Pieces in which each way to read gets its bytes; all ways together: 1,000,000 under `deno task soak`. */
const CUTS_OF_EACH = scaled(2_000, 60_000);
const CUTS_MIXED = scaled(20_000, 520_000);
const WRITES = scaled(5_000, 250_000);

const SEED = 20_260_802;

// --- Chance -------------------------------------------------------------------

/** Chance that is the same for the same seed. */
class Dice {
  readonly #random: () => number;

  constructor(seed: number) {
    this.#random = randomNumbers(seed);
  }

  chance(probability: number): boolean {
    return this.#random() < probability;
  }

  upTo(most: number): number {
    return Math.floor(this.#random() * (most + 1));
  }

  pick<T>(items: readonly T[]): T {
    const item = items[this.upTo(items.length - 1)];
    if (item === undefined) throw new TypeError("Expected an item");
    return item;
  }

  bytes(length: number): Uint8Array {
    return Uint8Array.from({ length }, () => this.upTo(255));
  }
}

/** Plays rounds until they have taken `steps` together; a round says how many it was. */
async function playRounds(steps: number, play: (dice: Dice) => Promise<number>): Promise<void> {
  for (let round = 0, done = 0; done < steps; round++) {
    try {
      done += await play(new Dice(SEED + round));
    } catch (error) {
      throw new Error(`Round ${round} of seed ${SEED} failed: ${error}`, { cause: error });
    }
  }
}

// --- What is read ---------------------------------------------------------------

/** Bytes that make up a round: text with many delimiters, lines with few, any bytes at all. */
const ALPHABETS = ["ab\n\r", "abc\n\r\r\n", "abcdefghijklmnop\n", "aé€😀\n", ""];

/** What lines are made of, beside ASCII. The last ones are no UTF-8: cut short, too long, of no character at all. */
const ODD_PARTS = [
  "é",
  "€",
  "😀",
  "\ufeff",
  "\0",
  "\r",
  "\r\r",
  [0xff],
  [0xe2, 0x82],
  [0xf0, 0x9f, 0x98],
  [0xc0, 0x80],
  [0xed, 0xa0, 0x80],
  [0x80],
];

const LIMITS = [1, 2, 10, 300, 300, 300, 4_095, 4_096, 4_097, 65_536, Infinity];

/** Lines of text, some of them at their limit and some with odd parts. */
function linesOf(dice: Dice, limit: number): Uint8Array {
  const parts: Uint8Array[] = [];
  const oddity = dice.pick([0, 0, 0.02, 0.3]);
  for (let count = dice.upTo(dice.chance(0.2) ? 400 : 20); count > 0; count--) {
    const isAtLimit = limit < 10_000 && dice.chance(0.1);
    const length = isAtLimit ? limit - 2 + dice.upTo(4) : dice.upTo(dice.chance(0.02) ? 9_000 : 40);
    parts.push(bytesOf("abcdefghijklmnop".repeat(Math.ceil(Math.max(0, length) / 16)).slice(0, Math.max(0, length))));
    if (dice.chance(oddity)) {
      const odd = dice.pick(ODD_PARTS);
      parts.push(typeof odd === "string" ? bytesOf(odd) : new Uint8Array(odd));
    }
    if (count > 1 || dice.chance(0.5)) parts.push(bytesOf(dice.pick(["\n", "\r\n"])));
  }
  return concat(parts);
}

function inputOf(dice: Dice, limit: number): Uint8Array {
  if (dice.chance(0.5)) return linesOf(dice, limit);
  const alphabet = bytesOf(dice.pick(ALPHABETS));
  const length = dice.upTo(dice.chance(0.01) ? 100_000 : dice.chance(0.1) ? 3_000 : 100);
  return dice.bytes(length).map((byte) => alphabet[byte % alphabet.length] ?? byte);
}

/** One stream, and beside it what it has to answer. */
class Game {
  readonly dice: Dice;
  readonly limit: number;
  readonly stream: SocketStream;
  /** What is still to be read. */
  left: Uint8Array;
  cuts = 0;
  readonly #conn = new FakeConn();
  readonly #kept: [Uint8Array, Uint8Array][] = [];
  readonly #lines: AsyncIterator<string>[] = [];
  readonly #chunks: AsyncIterator<Uint8Array>;
  readonly #frames = new Map<string, AsyncIterator<Uint8Array>>();
  readonly #sent: Uint8Array[] = [];
  #goesOn = Promise.withResolvers<void>();

  constructor(dice: Dice) {
    this.dice = dice;
    this.limit = dice.pick(LIMITS);
    this.stream = new SocketStream(this.#conn, { limit: this.limit });
    this.left = inputOf(dice, this.limit);
    this.#lines.push(this.stream.lines(), this.stream.lines());
    this.#chunks = this.stream[Symbol.asyncIterator]();
    this.#goesOn.resolve();
    if (dice.chance(0.2)) this.#conn.takes = () => 1 + dice.upTo(100);
  }

  /** Lets all that there is to read come bit by bit. */
  async feed(): Promise<void> {
    const bytes = this.left;
    const dice = new Dice(bytes.length); // One of its own, as it comes between the reads.
    const longest = Math.max(20, bytes.length / dice.pick([1, 3, 20]));
    const isSmall = dice.pick([0, 0.1, 0.5]);
    for (let at = 0; at < bytes.length; this.cuts++) {
      const size = 1 + dice.upTo(dice.chance(isSmall) ? 3 : longest);
      this.#conn.give(bytes.slice(at, at + size));
      at += size;
      for (let pause = dice.upTo(4); pause > 0; pause--) await Promise.resolve();
      await this.#goesOn.promise;
    }
    this.#conn.end();
  }

  /** Reads with a timeout, while nothing comes: what is answered is right, and what is not has lost nothing. */
  async readInVain(read: ModelRead): Promise<void> {
    this.#goesOn = Promise.withResolvers();
    this.stream.timeout = 1;
    try {
      await read(this);
    } catch (error) {
      if (!(error instanceof Deno.errors.TimedOut)) throw error;
    }
    this.stream.timeout = Infinity;
    this.#goesOn.resolve();
  }

  /** Writes something between two reads. */
  async write(): Promise<void> {
    const { dice, stream } = this;
    const data = dice.chance(0.7) ? dice.pick(["", "x", "answer\n", "é€😀", "long".repeat(2_000)]) : dice.bytes(9);
    this.#sent.push(bytesOf(data));
    const written = dice.chance(0.3) ? stream.send(data) : stream.write(data);
    if (dice.chance(0.3)) await written;
  }

  lines(): AsyncIterator<string> {
    return this.dice.chance(0.1) ? this.stream.lines() : this.dice.pick(this.#lines);
  }

  chunks(): AsyncIterator<Uint8Array> {
    return this.#chunks;
  }

  frames(options: FrameOptions): AsyncIterator<Uint8Array> {
    const key = JSON.stringify(options);
    const frames = this.#frames.get(key) ?? this.stream.frames(options);
    this.#frames.set(key, frames);
    return frames;
  }

  /** Checks that `chunk` is what comes next, or is the end. */
  takeChunk(chunk: Uint8Array | null, most: number): void {
    if (chunk === null) return assertEquals(this.left.length, 0);
    assert(chunk.length > 0 && chunk.length <= most, `a chunk of ${chunk.length} bytes`);
    this.takeExactly(chunk, chunk.length);
  }

  /** Checks that `chunk` is the next `count` bytes; its caller keeps it, or uses it for something else. */
  takeExactly(chunk: Uint8Array, count: number): void {
    assertSameBytes(chunk, this.left.subarray(0, count));
    this.left = this.left.subarray(count);
    if (this.dice.chance(0.2)) chunk.fill(0x2a);
    this.keep(chunk);
  }

  /** `bytes` may not change from now on. */
  keep(bytes: Uint8Array): void {
    if (this.#kept.length < 1_000) this.#kept.push([bytes, bytes.slice()]);
  }

  /** Checks that the read was refused, and skips what the error says can be skipped. */
  async skipOver(error: unknown, farthest: number): Promise<void> {
    assert(error instanceof LimitOverrunError, `${error}`);
    assertEquals(error.limit, this.limit);
    assert(error.consumed > 0 && error.consumed <= farthest, `${error.consumed} bytes are said to be skippable`);
    this.takeExactly(await this.stream.readExactly(error.consumed), error.consumed);
  }

  /** Checks that the stream has ended inside of what was asked for, and has given out what came. */
  async takeIncomplete(read: Promise<unknown>, expected: number | null): Promise<void> {
    const error = await refusalOf(read);
    assert(error instanceof IncompleteReadError, `${error}`);
    assertEquals(error.expected, expected);
    this.takeExactly(error.partial, this.left.length);
  }

  async finish(length: number): Promise<void> {
    for (const [chunk, copy] of this.#kept) assertSameBytes(chunk, copy, "in a chunk that was given out before");
    assertEquals(this.stream.bytesRead, length);
    await this.stream.flush();
    assertSameBytes(this.#conn.written, concat(this.#sent), "of what was written between the reads");
    this.stream.close();
  }
}

/** What `read` is refused with; a timeout of it is the round's to see. */
async function refusalOf(read: Promise<unknown>): Promise<Error> {
  const error = await rejectionOf(read);
  if (error instanceof Deno.errors.TimedOut) throw error;
  return error;
}

/** One read, which takes from the game what it has read. */
type ModelRead = (game: Game) => Promise<void>;

const modelReads: Record<string, ModelRead> = {
  "recv()": async (game) => {
    const { stream, dice } = game;
    const maxBytes = dice.chance(0.5) ? Infinity : 1 + dice.upTo(dice.chance(0.1) ? 5_000 : 20);
    game.takeChunk(await stream.recv(maxBytes), maxBytes);
  },

  "for await": async (game) => {
    const { value } = await game.chunks().next();
    game.takeChunk(value ?? null, Infinity);
  },

  "read()": async (game) => {
    const { stream, dice } = game;
    const into = new Uint8Array(1 + dice.upTo(dice.chance(0.1) ? 5_000 : 20)).fill(7);
    const count = await stream.read(into).catch((error) => {
      game.keep(into);
      throw error;
    });
    assert(into.subarray(count ?? 0).every((byte) => byte === 7));
    game.takeChunk(count === null ? null : into.subarray(0, count), into.length);
  },

  "readExactly()": async (game) => {
    const { stream, dice, left } = game;
    const count = dice.upTo(dice.chance(0.1) ? left.length : 20);
    if (count <= left.length) return game.takeExactly(await stream.readExactly(count), count);
    await game.takeIncomplete(stream.readExactly(count), count);
  },

  "readUntil()": async (game) => {
    const { stream, dice, left } = game;
    const delimiter = bytesOf(dice.pick(["\n", "a", "ab", "aab", "\r\n", "\r\n\r\n", "abcab"]));
    const at = indexOf(left, delimiter);
    // Half a delimiter at the end could still become a whole one, until the stream ends.
    const farthest = at < 0 ? left.length - delimiter.length + 1 : at;
    if (farthest > game.limit) return await game.skipOver(await refusalOf(stream.readUntil(delimiter)), farthest);
    if (at >= 0) return game.takeExactly(await stream.readUntil(delimiter) ?? left, at + delimiter.length);
    if (left.length > 0) return await game.takeIncomplete(stream.readUntil(delimiter), null);
    assertEquals(await stream.readUntil(delimiter), null);
  },

  "readLine()": (game) => takeLine(game, () => game.stream.readLine()),

  "lines()": (game) => takeLine(game, async () => (await game.lines().next()).value ?? null),

  "readLine(), several at once": async (game) => {
    const reads = Array.from({ length: 1 + game.dice.upTo(6) }, () => game.stream.readLine());
    const outcomes = await Promise.allSettled(reads);
    let waited = false;
    for (const outcome of outcomes) {
      if (outcome.status === "rejected" && outcome.reason instanceof Deno.errors.Busy) {
        waited = true; // The one before has to wait for what has not come yet.
        continue;
      }
      assert(!waited, "a line was read before the one that waited for its turn");
      const next = nextLine(game.left, game.limit);
      if (outcome.status === "fulfilled") {
        assertEquals(outcome.value, next.text);
        assert(next.farthest === undefined, "a line over the limit was read");
        game.left = game.left.subarray(next.length);
      } else if (!(outcome.reason instanceof Deno.errors.TimedOut)) {
        assert(outcome.reason instanceof LimitOverrunError && next.farthest !== undefined, `${outcome.reason}`);
      }
    }
    if (game.left.length > 0 && nextLine(game.left, game.limit).farthest !== undefined) await takeLine(game);
  },

  "frames()": async (game) => {
    const { dice, left } = game;
    const lengthBytes = dice.chance(0.9) ? 1 : 2;
    const littleEndian = dice.chance(0.5);
    const read = async () => (await game.frames({ lengthBytes, littleEndian }).next()).value ?? null;
    if (left.length === 0) return assertEquals(await read(), null);
    const [first = 0, second = 0] = left;
    const length = lengthBytes === 1 ? first : littleEndian ? second << 8 | first : first << 8 | second;
    const hasPrefix = left.length >= lengthBytes;
    if (hasPrefix && length > game.limit) return await game.skipOver(await refusalOf(read()), lengthBytes);
    if (!hasPrefix || left.length < lengthBytes + length) {
      return await game.takeIncomplete(read(), hasPrefix ? lengthBytes + length : lengthBytes);
    }
    const frame = await read() ?? left;
    game.left = left.subarray(lengthBytes);
    game.takeExactly(frame, length);
  },
};

/** What the next line has to be; `farthest`, if it is over the limit, is the most that can be skipped. */
function nextLine(left: Uint8Array, limit: number): { text: string | null; length: number; farthest?: number } {
  if (left.length === 0) return { text: null, length: 0 };
  const at = left.indexOf(0x0a);
  const end = at < 0 ? left.length : at > 0 && left[at - 1] === 0x0d ? at - 1 : at;
  const text = new TextDecoder("utf-8", { ignoreBOM: true }).decode(left.subarray(0, end));
  const length = at < 0 ? left.length : at + 1;
  return end > limit ? { text, length, farthest: at < 0 ? left.length : at } : { text, length };
}

async function takeLine(game: Game, read: () => Promise<string | null> = () => game.stream.readLine()): Promise<void> {
  const { text, length, farthest } = nextLine(game.left, game.limit);
  if (farthest !== undefined) return await game.skipOver(await refusalOf(read()), farthest);
  assertEquals(await read(), text);
  game.left = game.left.subarray(length);
}

function indexOf(bytes: Uint8Array, part: Uint8Array): number {
  for (let at = bytes.indexOf(part[0] ?? 0); at >= 0; at = bytes.indexOf(part[0] ?? 0, at + 1)) {
    if (part.every((byte, index) => bytes[at + index] === byte)) return at;
  }
  return -1;
}

/** Reads one random stream to its end with the reads that `choose` gives; resolves to the pieces in which it came. */
async function playReads(dice: Dice, choose: (dice: Dice) => ModelRead): Promise<number> {
  const game = new Game(dice);
  const { length } = game.left;
  const feeding = game.feed();
  const writes = dice.chance(0.3) ? 0.1 : 0;
  const vain = dice.chance(0.02) ? 0.2 : 0; // It takes some milliseconds each time.
  while (game.left.length > 0) {
    if (dice.chance(writes)) await game.write();
    if (dice.chance(vain)) await game.readInVain(choose(dice));
    else await choose(dice)(game);
  }
  await choose(dice)(game);
  await feeding;
  await game.finish(length);
  return Math.max(1, game.cuts);
}

for (const [name, read] of Object.entries(modelReads)) {
  Deno.test(`fuzz: ${name} of random bytes in random cuts agrees with a model`, async () => {
    await playRounds(CUTS_OF_EACH, (dice) => playReads(dice, () => read));
  });
}

Deno.test("fuzz: all ways to read random bytes in random cuts, mixed, agree with a model", async () => {
  const all = Object.values(modelReads);
  await playRounds(CUTS_MIXED, (dice) => {
    const some = Array.from({ length: 1 + dice.upTo(4) }, () => dice.pick(all));
    return playReads(dice, (dice) => dice.pick(some));
  });
});

const FORMATS: FrameOptions[] = [
  ...([1, 2, 4] as const).flatMap((lengthBytes) => [{ lengthBytes }, { lengthBytes, littleEndian: true }]),
  {},
];

Deno.test("fuzz: random frames of every format in random cuts are the same frames", async () => {
  await playRounds(CUTS_OF_EACH, async (dice) => {
    const format = dice.pick(FORMATS);
    const records = Array.from({ length: dice.upTo(8) }, () => dice.bytes(dice.upTo(dice.chance(0.1) ? 255 : 10)));
    const [ours, theirs] = socketPair();
    const sending = (async () => {
      for (const record of records) {
        await theirs.writeFrame(record, format);
        if (dice.chance(0.3)) await theirs.flush();
      }
      await theirs.closeWrite();
    })();
    const came = await Array.fromAsync(ours.frames(format));
    await sending;
    assertEquals(came, records);
    ours.close();
    theirs.close();
    return records.length + 1;
  });
});

// --- What is written --------------------------------------------------------------

/** Sizes around those at which text is encoded, blocks are full, and writes wait. */
const WRITE_SIZES = [0, 1, 10, 100, 1_000, 1_365, 1_366, 4_095, 4_096, 4_097, 5_461, 5_462, 16_383, 16_384, 70_000];

const TEXT_PARTS = ["a", "line\n", "é", "€", "😀"];

function dataOf(dice: Dice): Uint8Array | string {
  const size = dice.upTo(dice.chance(0.2) ? dice.pick(WRITE_SIZES) : 30);
  if (dice.chance(0.3)) return dice.bytes(Math.min(size, 20_000));
  const part = dice.pick(TEXT_PARTS);
  return part.repeat(Math.ceil(size / part.length));
}

const HIGH_WATER_MARKS = [0, 1, 10, 1_000, 4_096, 65_536, 65_536, Infinity];

/** Writes random data in random ways; resolves to the number of writes. */
async function playWrites(dice: Dice): Promise<number> {
  const conn = new FakeConn();
  const highWaterMark = dice.pick(HIGH_WATER_MARKS);
  const stream = new SocketStream(conn, { highWaterMark });
  if (dice.chance(0.5)) conn.takes = () => 1 + dice.upTo(dice.chance(0.5) ? 20_000 : 3_000);
  const expected: Uint8Array[] = [];
  let length = 0;
  let reads = 0;
  const begun: Promise<void>[] = [];
  const unsettled = new Set<{ bytes: number }>();
  const tooEarly: string[] = [];
  const count = 1 + dice.upTo(40);
  for (let step = 0; step < count; step++) {
    if (dice.chance(0.05)) conn.holdWrites();
    else if (dice.chance(0.3)) conn.releaseWrites();
    const data = dataOf(dice);
    const bytes = bytesOf(data);
    const how = dice.pick(["write", "write", "write", "send", "writeFrame", "flush", "read"] as const);
    const before = length;
    let done: Promise<void>;
    if (how === "flush") done = stream.flush();
    else if (how === "read") {
      conn.give("x");
      await stream.recv(1);
      reads++;
      continue;
    } else if (how === "writeFrame") {
      const prefix = new Uint8Array(4);
      new DataView(prefix.buffer).setUint32(0, bytes.length);
      expected.push(prefix, bytes);
      length += 4 + bytes.length;
      done = stream.writeFrame(data);
    } else {
      expected.push(bytes);
      length += bytes.length;
      done = stream[how](data);
    }
    const upTo = length;
    const waiting = { bytes: how === "flush" ? 0 : length - before };
    unsettled.add(waiting);
    const settle = () => {
      unsettled.delete(waiting);
      // No more bytes wait than was allowed, but for those of calls that nobody waited for.
      const others = [...unsettled].reduce((sum, { bytes }) => sum + bytes, 0);
      const allowed = how === "send" || how === "flush" ? 0 : highWaterMark + others;
      const left = upTo - sizeOf(conn);
      if (left > allowed) tooEarly.push(`${how}(${Deno.inspect(data).slice(0, 10)}) with ${left} > ${allowed} to send`);
    };
    begun.push(done.then(settle));
    if (dice.chance(0.2)) conn.releaseWrites();
    if (dice.chance(0.2)) await turnEnd();
  }
  conn.releaseWrites();
  await (dice.chance(0.5) ? stream.closeWrite() : stream.flush());
  await Promise.all(begun);
  assertEquals(tooEarly, []);
  assertSameBytes(conn.written, concat(expected));
  assertEquals([stream.bytesWritten, stream.bytesRead], [length, reads]);
  stream.close();
  return count;
}

function sizeOf({ writes }: FakeConn): number {
  return writes.reduce((length, { length: more }) => length + more, 0);
}

Deno.test("fuzz: random writes come out whole, in order, and no earlier than they say", async () => {
  await playRounds(WRITES, playWrites);
});
