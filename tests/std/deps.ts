/**
 * What stands in for `deps.ts` in `deno task test:std`: the assertions of Deno's
 * own standard library, over JSR, instead of those that Deno carries.
 *
 * @module
 */

export * from "../../deps.ts";
// What is named goes before what is starred.
export {
  assert,
  assertEquals,
  assertMatch,
  assertNotEquals,
  assertRejects,
  assertStrictEquals,
  assertThrows,
  fail,
} from "jsr:@std/assert@1";
