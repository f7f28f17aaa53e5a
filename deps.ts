/**
 * All code from outside that the scripts and the tests use. It is all carried by
 * Deno itself, so nothing is downloaded. The assertions have the names, and are
 * used only in the ways, that `@std/assert` has too: `deno task test:std` runs the
 * tests with those.
 *
 * @module
 */

export {
  deepStrictEqual as assertEquals,
  fail,
  match as assertMatch,
  notDeepStrictEqual as assertNotEquals,
  ok as assert,
  rejects as assertRejects,
  strictEqual as assertStrictEquals,
  throws as assertThrows,
} from "node:assert/strict";
export { createHash } from "node:crypto";
export { stdin, stdout } from "node:process";
export { clearScreenDown, cursorTo, moveCursor } from "node:readline";
export { createInterface, type Interface } from "node:readline/promises";
export { parseArgs } from "node:util";
