/**
 * Time that stands still until a test advances it: what takes minutes is tested in
 * milliseconds, and to the millisecond.
 *
 * @module
 */

import { assertEquals } from "../deps.ts";
import { turnEnd } from "./fake_conn.ts";

interface Timer {
  at: number;
  readonly callback: () => void;
  /** Of a timer that repeats. */
  readonly interval: number | undefined;
}

/** Far from the ids of the runtime, and never the same in two tests: a timer of one may be cleared in the next. */
let nextId = 2 ** 40;

/** The time of a test. */
export class FakeTime {
  readonly #timers = new Map<number, Timer>();
  readonly #begun = Math.ceil(performance.now());
  #now = this.#begun;

  /** Milliseconds that have passed. */
  get passed(): number {
    return this.#now - this.#begun;
  }

  /** The timers that wait. */
  get timers(): number {
    return this.#timers.size;
  }

  now(): number {
    return this.#now;
  }

  set(callback: () => void, ms: number, interval?: number): number {
    if (ms >= 2 ** 31) throw new RangeError(`The runtime would fire a timer of ${ms} ms at once`);
    this.#timers.set(nextId, { at: this.#now + Math.max(ms, 0), callback, interval });
    return nextId++;
  }

  /** Whether `id` was one of these timers. */
  clear(id: number): boolean {
    return this.#timers.delete(id);
  }

  /** Hands the timers over to the runtime, as they may be those of a test that has failed. */
  release(): void {
    for (const { callback } of this.#timers.values()) setTimeout(callback, 0);
  }

  /** Lets `ms` pass: each timer fires in its time, and the event loop turns between two of them. */
  async advance(ms: number): Promise<void> {
    const end = this.#now + ms;
    await turnEnd();
    for (let next = this.#nextUntil(end); next !== undefined; next = this.#nextUntil(end)) {
      const [id, timer] = next;
      this.#now = Math.max(this.#now, timer.at);
      if (timer.interval === undefined) this.#timers.delete(id);
      else timer.at = this.#now + Math.max(timer.interval, 1);
      timer.callback();
      await turnEnd();
    }
    this.#now = end;
  }

  /** Lets time pass until `promise` settles, `most` milliseconds at most. */
  async advanceUntil<T>(promise: Promise<T>, most = 3_600_000): Promise<T> {
    let isSettled = false;
    const settle = () => void (isSettled = true);
    promise.then(settle, settle);
    await turnEnd();
    for (const end = this.#now + most; !isSettled;) {
      const next = this.#nextUntil(end);
      if (next === undefined) throw new Deno.errors.TimedOut(`Nothing happened within ${most} ms`);
      await this.advance(Math.max(next[1].at - this.#now, 0));
    }
    return await promise;
  }

  #nextUntil(end: number): [number, Timer] | undefined {
    const due = [...this.#timers].filter(([, { at }]) => at <= end);
    return due.sort(([, one], [, other]) => one.at - other.at)[0];
  }
}

/** Runs `test` in a time of its own, and fails it if a timer is left behind. */
export async function withFakeTime(test: (time: FakeTime) => Promise<void>): Promise<void> {
  const { setTimeout, clearTimeout, setInterval, clearInterval } = globalThis;
  const { now } = performance;
  const time = new FakeTime();
  const clear = (id: Parameters<typeof clearTimeout>[0]) => {
    if (typeof id !== "number" || !time.clear(id)) clearTimeout(id); // One from before.
  };
  performance.now = () => time.now();
  globalThis.setTimeout = Object.assign((callback: () => void, ms = 0) => time.set(callback, ms), setTimeout);
  globalThis.setInterval = Object.assign((callback: () => void, ms = 0) => time.set(callback, ms, ms), setInterval);
  globalThis.clearTimeout = globalThis.clearInterval = clear;
  try {
    await test(time);
  } finally {
    Object.assign(globalThis, { setTimeout, clearTimeout, setInterval, clearInterval });
    performance.now = now;
    time.release();
  }
  assertEquals(time.timers, 0, "a timer was left behind");
}
