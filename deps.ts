// Names from outside, all carried by Deno, and the command line of both scripts. "deno task test:std" swaps the assertions.

export { deepStrictEqual as assertEquals, fail, match as assertMatch, ok as assert } from "node:assert/strict";
export { notDeepStrictEqual as assertNotEquals, rejects as assertRejects } from "node:assert/strict";
export { strictEqual as assertStrictEquals, throws as assertThrows } from "node:assert/strict";
import { parseArgs, type ParseArgsConfig } from "node:util";

/** A mistake in the command line; its message is one sentence. */
export class UsageError extends Error {}

/** Each flag with the name of its value, "" if it takes none, and what it does. */
export type FlagTable<Flag extends string> = readonly (readonly [flag: Flag, value: string, help: string])[];

/** The values of the flags in `args`, "" for one that takes none, and the other arguments. */
function parseFlags<Flag extends string>(args: string[], table: FlagTable<Flag>) {
  const kinds = table.map(([flag, value]) => [flag, { type: value === "" ? "boolean" : "string" }] as const);
  const options: ParseArgsConfig["options"] = { ...Object.fromEntries(kinds), help: { type: "boolean", short: "h" } };
  const flags = new Map<Flag, string>();
  try {
    const { values, positionals } = parseArgs({ args, options, allowPositionals: true });
    for (const [flag, placeholder] of table) {
      const value = values[flag];
      if (value === "") throw new UsageError(`--${flag} needs a value, ${placeholder}`);
      if (value !== undefined) flags.set(flag, value === true ? "" : String(value));
    }
    return { flags, others: positionals };
  } catch (error) {
    if (!(error instanceof TypeError)) throw error;
    const [sentence = ""] = error.message.split(/\. To specify a positional|\.\nDid you forget/);
    const plain = sentence.replace("is ambiguous", "is missing, or begins with a dash");
    throw new UsageError(plain.charAt(0).toLowerCase() + plain.slice(1));
  }
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

/** Runs a script. `usage` has `%s` for the flags. An error becomes one sentence and exit code 1, or 2 for a misuse. */
export async function runScript<Flag extends string>(
  name: string,
  usage: string,
  table: FlagTable<Flag>,
  main: (flags: ReadonlyMap<Flag, string>, others: string[]) => Promise<void>,
): Promise<void> {
  try {
    const { flags, others } = parseFlags(Deno.args, table);
    const asked: ReadonlyMap<string, string> = flags;
    const rows = table.map(([flag, value, help]) => `  ${`--${flag} ${value}`.padEnd(22)}${help}`);
    if (asked.has("help")) console.log(usage, rows.join("\n"));
    else if (asked.has("version")) console.log(`${name} 0.2.0`);
    else await main(flags, others);
  } catch (error) {
    const isMisuse = error instanceof UsageError;
    const message = error instanceof Error ? error.message : error;
    const left = error instanceof Deno.errors.BrokenPipe ? "the other side has left: " : "";
    console.error("%c%s", "color: red", `${name}: ${left}${message}${isMisuse ? "; --help lists the flags" : ""}`);
    Deno.exit(isMisuse ? 2 : 1);
  }
}
