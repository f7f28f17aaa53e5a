/**
 * A connection that does what a test tells it to, and what a test of a stream
 * needs besides: text of bytes, the end of a turn, whether a promise still waits,
 * the two ends of a real connection.
 *
 * @module
 */

import type { StreamConn } from "../mod.ts";
import { fail } from "../deps.ts";

/** What a read meets: bytes, a failure, or the end of the stream. */
type Arrival = Uint8Array | Error | null;

interface Reader {
  readonly into: Uint8Array;
  readonly settled: PromiseWithResolvers<number | null>;
}

const encoder = new TextEncoder();
const decoder = new TextDecoder();

/** `data` as bytes. */
export function bytesOf(data: Uint8Array | string): Uint8Array<ArrayBuffer> {
  return typeof data === "string" ? encoder.encode(data) : data.slice();
}

/** `bytes` as text; fails the test where there are none. */
export function textOf(bytes: Uint8Array | null): string {
  if (bytes === null) throw new TypeError("Expected bytes, got the end of the stream");
  return decoder.decode(bytes);
}

/** All `parts`, one behind the other. */
export function concat(parts: readonly Uint8Array[]): Uint8Array {
  const whole = new Uint8Array(parts.reduce((length, part) => length + part.length, 0));
  let at = 0;
  for (const part of parts) {
    whole.set(part, at);
    at += part.length;
  }
  return whole;
}

/** Fails the test unless the bytes are the same, and says where they differ: for more bytes than a person reads. */
export function assertSameBytes(actual: Uint8Array, expected: Uint8Array, context = ""): void {
  if (actual.length === expected.length && actual.every((byte, index) => byte === expected[index])) return;
  const at = actual.findIndex((byte, index) => byte !== expected[index]);
  const where = at < 0 ? "" : `; they differ at ${at}`;
  fail(`${actual.length} bytes came and not the ${expected.length} expected${where} ${context}`);
}

/** `length` bytes that tell where they lie. */
export function pattern(length: number, offset = 0): Uint8Array {
  return Uint8Array.from({ length }, (_, index) => (index + offset) * 31 % 251);
}

/** Resolves when this turn of the event loop, and what it has started, is over. */
export async function turnEnd(): Promise<void> {
  for (let turn = 0; turn < 2; turn++) await new Promise<void>((resolve) => setImmediate(resolve));
}

/** Whether `promise` has not settled by the end of the turn. */
export async function isPending(promise: Promise<unknown>): Promise<boolean> {
  let pending = true;
  const settle = () => {
    pending = false;
  };
  promise.then(settle, settle);
  await turnEnd();
  return pending;
}

/**
 * What `promise` settles to, while the event loop is kept alive, as it is by a
 * listening server: the timer of a deadline alone does not.
 */
export async function keptAlive<T>(promise: Promise<T>): Promise<T> {
  const timer = setInterval(() => {}, 1_000);
  try {
    return await promise;
  } finally {
    clearInterval(timer);
  }
}

/** Numbers from 0 to 1 that are the same for the same `seed`. */
export function randomNumbers(seed: number): () => number {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 15), state | 1);
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61);
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32;
  };
}

/**
 * A scripted connection. It gives out the chunks, the end and the failures it was
 * given, in this order; it keeps what was written to it. As with a `Deno.Conn`, a
 * read that waits keeps the event loop alive and cannot be cancelled. Two reads, or
 * two writes, at a time are a mistake of the stream.
 */
export class FakeConn implements StreamConn {
  readonly localAddr: Deno.Addr = { transport: "tcp", hostname: "127.0.0.1", port: 8009 };
  readonly remoteAddr: Deno.Addr = { transport: "tcp", hostname: "127.0.0.1", port: 50_000 };
  /** What was done to the connection, in order: `"write(3)"`, `"closeWrite()"`, `"close()"`. */
  readonly calls: string[] = [];
  /** What each write took. */
  readonly writes: Uint8Array[] = [];
  /** How many writes were begun. */
  writesBegun = 0;
  /** The most bytes that the next write takes. */
  takes: () => number = () => Infinity;

  readonly #arrivals: Arrival[] = [];
  #reader: Reader | undefined;
  #alive: ReturnType<typeof setInterval> | undefined;
  #isWriting = false;
  #held: PromiseWithResolvers<void> | undefined;
  #writeFailure: Error | undefined;
  readonly #wrote: (() => void)[] = [];
  readonly #closed = Promise.withResolvers<void>();
  #isClosed = false;

  /** Resolves when the connection is closed. */
  get whenClosed(): Promise<void> {
    return this.#closed.promise;
  }

  /** Whether the connection is closed. */
  get isClosed(): boolean {
    return this.#isClosed;
  }

  /** Whether a read waits. */
  get isReading(): boolean {
    return this.#reader !== undefined;
  }

  /** All that was written. */
  get written(): Uint8Array {
    return concat(this.writes);
  }

  /** Lets each of `chunks` answer a read; one that is larger than the read's array answers several. */
  give(...chunks: (Uint8Array | string)[]): this {
    this.#arrivals.push(...chunks.map(bytesOf).filter((chunk) => chunk.length > 0));
    this.#deliver();
    return this;
  }

  /** Ends the peer's side, behind what was given. */
  end(): this {
    this.#arrivals.push(null);
    this.#deliver();
    return this;
  }

  /** Lets reads reject, behind what was given. */
  failReads(error: Error): this {
    this.#arrivals.push(error);
    this.#deliver();
    return this;
  }

  /** Lets writes wait, as those to a peer that does not read. */
  holdWrites(): this {
    this.#held ??= gate();
    return this;
  }

  /** Ends the wait of writes, and lets later ones pass. */
  releaseWrites(): void {
    this.#held?.resolve();
    this.#held = undefined;
  }

  /** Lets the write that waits pass, and the next one wait. */
  releaseOneWrite(): void {
    this.#held?.resolve();
    this.#held = gate();
  }

  /** Lets the write that waits, and all later ones, reject. */
  failWrites(error: Error): this {
    this.#writeFailure = error;
    this.releaseWrites();
    return this;
  }

  /** Resolves when the next write was taken. */
  nextWrite(): Promise<void> {
    return new Promise((resolve) => this.#wrote.push(resolve));
  }

  // deno-lint-ignore require-await -- A closed connection rejects; it does not throw.
  async read(into: Uint8Array): Promise<number | null> {
    this.#checkOpen();
    if (this.#reader !== undefined) throw new TypeError("Two reads at the same time");
    this.#reader = { into, settled: Promise.withResolvers() };
    const { promise } = this.#reader.settled;
    this.#deliver();
    if (this.isReading) this.#alive = setInterval(() => {}, 1_000);
    return promise;
  }

  async write(data: Uint8Array): Promise<number> {
    this.writesBegun++;
    await this.#takeTurn();
    const taken = data.slice(0, Math.min(data.length, this.takes()));
    this.writes.push(taken);
    this.calls.push(`write(${taken.length})`);
    for (const wrote of this.#wrote.splice(0)) wrote();
    return taken.length;
  }

  async closeWrite(): Promise<void> {
    await this.#takeTurn();
    this.calls.push("closeWrite()");
  }

  close(): void {
    this.#checkOpen();
    this.#isClosed = true;
    this.calls.push("close()");
    this.#settle((settled) => settled.reject(interrupted()));
    this.#held?.reject(interrupted());
    this.#closed.resolve();
  }

  async #takeTurn(): Promise<void> {
    this.#checkOpen();
    if (this.#isWriting) throw new TypeError("Two writes at the same time");
    this.#isWriting = true;
    try {
      await this.#held?.promise;
      if (this.#writeFailure !== undefined) throw this.#writeFailure;
    } finally {
      this.#isWriting = false;
    }
  }

  #deliver(): void {
    const [arrival] = this.#arrivals;
    if (this.#reader === undefined || arrival === undefined) return;
    const { into } = this.#reader;
    if (arrival === null) return this.#settle((settled) => settled.resolve(null));
    this.#arrivals.shift();
    if (arrival instanceof Error) return this.#settle((settled) => settled.reject(arrival));
    const count = Math.min(into.length, arrival.length);
    into.set(arrival.subarray(0, count));
    if (count < arrival.length) this.#arrivals.unshift(arrival.subarray(count));
    this.#settle((settled) => settled.resolve(count));
  }

  #settle(how: (settled: PromiseWithResolvers<number | null>) => void): void {
    const reader = this.#reader;
    this.#reader = undefined;
    clearInterval(this.#alive);
    if (reader !== undefined) how(reader.settled);
  }

  #checkOpen(): void {
    if (this.#isClosed) throw new Deno.errors.BadResource("Bad resource ID");
  }
}

/** One that a listener can hand to a server. */
export class FakeTcpConn extends FakeConn implements Deno.TcpConn {
  declare readonly localAddr: Deno.NetAddr;
  declare readonly remoteAddr: Deno.NetAddr;

  get readable(): never {
    throw new TypeError("A stream reads with read()");
  }

  get writable(): never {
    throw new TypeError("A stream writes with write()");
  }

  setNoDelay(noDelay = true): void {
    this.calls.push(`setNoDelay(${noDelay})`);
  }

  setKeepAlive(): void {}
  ref(): void {}
  unref(): void {}

  [Symbol.dispose](): void {
    this.close();
  }
}

/** What writes wait for; nobody has to wait when it is closed. */
function gate(): PromiseWithResolvers<void> {
  const held = Promise.withResolvers<void>();
  held.promise.catch(() => {});
  return held;
}

function interrupted(): Error {
  return Object.assign(new Deno.errors.Interrupted("operation canceled"), { code: "EINTR" });
}

/** What a read or a write meets when the peer has reset the connection. */
export function connectionReset(): Error {
  return Object.assign(new Deno.errors.ConnectionReset("Connection reset by peer"), { code: "ECONNRESET" });
}

/** What a write meets when the peer is gone. */
export function brokenPipe(): Error {
  return Object.assign(new Deno.errors.BrokenPipe("Broken pipe"), { code: "EPIPE" });
}

/** The two ends of a TCP connection: who dialled, and who accepted. */
export async function tcpConns(): Promise<[Deno.Conn, Deno.Conn]> {
  using listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
  const { hostname, port } = listener.addr;
  return await Promise.all([Deno.connect({ hostname, port }), listener.accept()]);
}

/** The two ends of a Unix connection, whose socket lies in `folder`. */
export async function unixConns(folder: string): Promise<[Deno.Conn, Deno.Conn]> {
  const path = `${folder}/pair.sock`;
  using listener = Deno.listen({ transport: "unix", path });
  return await Promise.all([Deno.connect({ transport: "unix", path }), listener.accept()]);
}
