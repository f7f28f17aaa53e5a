/**
 * Names from outside, all carried by Deno so that nothing is downloaded, and the command line of the two scripts.
 * Use the assertions as `@std/assert` has them: `deno task test:std` runs the tests with those.
 *
 * @module
 */

export { deepStrictEqual as assertEquals, fail, match as assertMatch, ok as assert } from "node:assert/strict";
export { notDeepStrictEqual as assertNotEquals, rejects as assertRejects } from "node:assert/strict";
export { strictEqual as assertStrictEquals, throws as assertThrows } from "node:assert/strict";
export { parseArgs } from "node:util";

/** A mistake in the command line; its message is one sentence. */
export class UsageError extends Error {}

/** For each flag the name of its value, "" if it takes none, and what it does. */
export type FlagTable<Flag extends string> = Readonly<Record<Flag, readonly [value: string, help: string]>>;

/** The lines of `--help` about the flags. */
export function usageOf(table: FlagTable<string>): string {
  return Object.entries(table).map(([name, [value, help]]) => `  ${`--${name} ${value}`.padEnd(22)}${help}`).join("\n");
}

/** The values of the flags in `args`, "" for one that takes none, and the other arguments. */
export function parseFlags<Flag extends string>(args: readonly string[], table: FlagTable<Flag>) {
  const isFlag = (name: string): name is Flag => Object.hasOwn(table, name);
  const flags = new Map<Flag, string>();
  const others: string[] = [];
  const rest = [...args];
  for (let arg; (arg = rest.shift()) !== undefined && arg !== "--";) {
    const [isDashed, name = "", assigned] = /^-(?:-([^=]+)(?:=(.*))?|.+)$/s.exec(arg) ?? [];
    if (isDashed && !isFlag(name)) throw new UsageError(`unknown flag ${arg}`);
    if (!isFlag(name)) {
      others.push(arg);
      continue;
    }
    const placeholder = table[name][0];
    const value = assigned ?? (placeholder && !rest[0]?.startsWith("--") ? rest.shift() : "");
    if (!placeholder === Boolean(value)) {
      throw new UsageError(`--${name} ${placeholder ? `needs a value, ${placeholder}` : "takes no value"}`);
    }
    flags.set(name, value ?? "");
  }
  return { flags, others: [...others, ...rest] };
}

/** The whole number that `text` is, or `Infinity` where there is no `most`. */
export function wholeNumber(flag: string, text: string, least: number, most = Infinity): number {
  const value = /^(\d+|Infinity)$/.test(text) ? Number(text) : NaN;
  if (value >= least && value <= most) return value;
  throw new UsageError(`${flag} must be a whole number from ${least} to ${most}: it is "${text}"`);
}

/** The text of a file; a missing permission is named as the flag that gives it. */
export function readFile(path: string): string {
  if (Deno.permissions.querySync({ name: "read", path }).state === "granted") return Deno.readTextFileSync(path);
  throw new Deno.errors.NotCapable(`Cannot read ${path}: permission is missing; run again with --allow-read=${path}`);
}

/** Runs a script. An error becomes one sentence, and the exit code 2 for a wrong command line, 1 for any other. */
export async function runScript(name: string, main: (args: string[]) => Promise<void>): Promise<void> {
  try {
    await main(Deno.args);
  } catch (error) {
    const isMisuse = error instanceof UsageError;
    const message = error instanceof Error ? error.message : error;
    console.error("%c%s", "color: red", `${name}: ${message}${isMisuse ? "; --help lists the flags" : ""}`);
    Deno.exit(isMisuse ? 2 : 1);
  }
}
