import { IncompleteReadError, LimitOverrunError, printable, socketPair } from "../mod.ts";
import { assert, assertEquals, assertMatch, assertStrictEquals } from "../deps.ts";
import { bytesOf } from "./fake_conn.ts";
import { rejectionOf } from "./testing.ts";

Deno.test("IncompleteReadError has its name, the bytes that came and the count that was asked for", () => {
  const partial = bytesOf("abc");
  const error = new IncompleteReadError(partial, 10);
  assert(error instanceof Error);
  assertEquals(error.name, "IncompleteReadError");
  assertStrictEquals(error.partial, partial);
  assertEquals(error.expected, 10);
  assertMatch(error.message, /\b10 bytes.*\b3$/);
});

Deno.test("IncompleteReadError of a delimiter expects no count", () => {
  const error = new IncompleteReadError(bytesOf("abc"), null);
  assertEquals(error.expected, null);
  assertMatch(error.message, /delimiter.*\b3 bytes$/);
});

Deno.test("LimitOverrunError has its name, the limit and the bytes that can be skipped", () => {
  const error = new LimitOverrunError("Too long", 16, 20);
  assert(error instanceof Error);
  assertEquals(error.name, "LimitOverrunError");
  assertEquals(error.message, "Too long");
  assertEquals(error.limit, 16);
  assertEquals(error.consumed, 20);
});

Deno.test("an error that names a limit says how large it is", async () => {
  const [ours, theirs] = socketPair({ limit: 7 });
  await theirs.send("far too long\n");
  for (const read of [() => ours.readLine(), () => ours.readUntil("\n"), () => ours.frames().next()]) {
    assertMatch((await rejectionOf(read())).message, /\blimit\b.*\b7\b/);
  }
  ours.close();
  theirs.close();
});

/** What a text holds, the text, and how it is printed. */
const texts: [string, string, string][] = [
  ["plain text", "GET /index.html 200", "GET /index.html 200"],
  ["letters of other scripts, and one above the BMP", "你好, żółw, שלום, 👍", "你好, żółw, שלום, 👍"],
  ["backslashes", "C:\\new\\x1b", "C:\\new\\x1b"],
  ["line ends and tabs", "a\r\nb\tc", "a\\r\\nb\\tc"],
  ["NUL and other controls", "\0\x07\x7f", "\\x00\\x07\\x7f"],
  ["sequences that a terminal obeys", "\x1b[2J\x1b]0;title\x07", "\\x1b[2J\\x1b]0;title\\x07"],
  ["C1 controls", "\x80\x85\x9b31m", "\\x80\\x85\\x9b31m"],
  ["marks of direction", "a\u202eb\u2066c\u200f\u061c", "a\\u202eb\\u2066c\\u200f\\u061c"],
  ["invisible characters", "a\u200bb\ufeffc\u00ad\u{e0041}", "a\\u200bb\\ufeffc\\xad\\u{e0041}"],
  ["line separators of Unicode", "a\u2028b\u2029c", "a\\u2028b\\u2029c"],
  ["halves of characters", "\ud83d and \udc4d", "\\ud83d and \\udc4d"],
];

for (const [what, text, expected] of texts) {
  Deno.test(`printable() of ${what}`, () => {
    assertEquals(printable(text), expected);
    assertEquals(printable(expected), expected);
  });
}
