/**
 * What the scripts and the tests depend on, besides `mod.ts`.
 *
 * First all code from outside: it is carried by Deno itself, so nothing is
 * downloaded. The assertions have the names, and are used only in the ways, that
 * `@std/assert` has too: `deno task test:std` runs the tests with those.
 *
 * Then the command line that `server.ts` and `client.ts` have in common.
 *
 * @module
 */

import { parseArgs, type ParseArgsOptionsConfig } from "node:util";

// --- From outside -------------------------------------------------------------

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
export { createInterface } from "node:readline/promises";
export { setTimeout as delay } from "node:timers/promises";
export { parseArgs } from "node:util";

// --- The command line of the scripts ------------------------------------------

/** A mistake of whoever has written the command line; its message is one sentence. */
export class UsageError extends Error {
  override readonly name = "UsageError";
}

/** What the flags of `args` say, as `node:util` reads them; throws `UsageError`. */
export function parseFlags<const T extends ParseArgsOptionsConfig>(args: string[], options: T) {
  return attempt(() => parseArgs({ args: withNegatives(args, options), options }));
}

/** The same, where there may be arguments besides the flags. */
export function parseFlagsAndMessages<const T extends ParseArgsOptionsConfig>(args: string[], options: T) {
  return attempt(() => parseArgs({ args: withNegatives(args, options), options, allowPositionals: true }));
}

function attempt<T>(parse: () => T): T {
  try {
    return parse();
  } catch (error) {
    throw error instanceof Error ? new UsageError(sentenceOf(error.message)) : error;
  }
}

/** The parser's message without its further sentences. */
function sentenceOf(message: string): string {
  return message
    .replace(
      / argument is ambiguous.*use '(--[^=]*)=.*/s,
      " argument is missing; one with a dash in front is written $1=VALUE",
    )
    .replace(/\.?\s+(To|This|Did) .*/s, "");
}

/** Writes `--port -1` as `--port=-1`, as the parser would take the number for a flag. */
function withNegatives(args: string[], options: ParseArgsOptionsConfig): string[] {
  const joined: string[] = [];
  for (const [index, arg] of args.entries()) {
    const takesValue = options[args[index - 1]?.replace(/^--/, "") ?? ""]?.type === "string";
    const isNumber = /^-\d/.test(arg) && takesValue && !args.slice(0, index).includes("--");
    joined.push(isNumber ? `${joined.pop()}=${arg}` : arg);
  }
  return joined;
}

/** The number that `flag` says; throws `UsageError` unless it is from `least` to `most`. */
export function wholeNumber(flag: string, text: string, least: number, most = Infinity): number {
  const value = /^(\d+|Infinity)$/.test(text) ? Number(text) : NaN;
  if (value >= least && value <= most) return value;
  const range = most === Infinity ? `, ${least} or more, or Infinity` : ` from ${least} to ${most}`;
  throw new UsageError(`${flag} must be a whole number${range}: it is "${text}"`);
}

/** The text of the file that `flag` names; throws `UsageError` if it cannot be read. */
export function readFileOf(flag: string, file: string): string {
  try {
    return Deno.readTextFileSync(file);
  } catch (error) {
    if (error instanceof Deno.errors.NotCapable) {
      throw new UsageError(`${flag}: permission is missing; run again with --allow-read=${file}`);
    }
    const why = error instanceof Deno.errors.NotFound
      ? "there is no such file"
      : "it is no file that this user may read";
    throw new UsageError(`${flag}: cannot read ${file}: ${why}; check the path`);
  }
}

/** The library's names for what the flags name as files. */
const FILE_FLAGS: Record<string, string> = { cert: "--cert", key: "--key", caCerts: "--ca", clientCa: "--client-ca" };

/** `error`; as a `UsageError` in terms of the flags if what they say, or a file that they name, is not what it should be. */
function inFlags(error: unknown): unknown {
  const isAboutProxies = error instanceof TypeError && error.message.includes('"proxyProtocol.from"');
  if (isAboutProxies) return new UsageError(error.message.replace(/(Option )?"proxyProtocol\.from"/, "--proxy-from"));
  if (!(error instanceof Deno.errors.InvalidData)) return error;
  const [, setting = "", rest = ""] = /^(\w+) ((?:holds no|is not the key of|must hold) .*)/.exec(error.message) ?? [];
  const flag = FILE_FLAGS[setting];
  if (flag === undefined) return error;
  return new UsageError(`${flag} ${rest.replace("of cert;", "of --cert;").replace("the text of ", "")}`);
}

/** The exit code of a script that could not do what it was asked to. */
const FAILED = 1;

/** The exit code of a script that was asked in the wrong way: as with most programs. */
const MISUSED = 2;

/** Runs a script; what it throws becomes one sentence and an exit code. */
export async function runScript(script: string, main: (args: string[]) => Promise<void>): Promise<void> {
  try {
    await main(Deno.args);
  } catch (thrown) {
    const error = inFlags(thrown);
    const help = error instanceof UsageError ? "; --help lists the flags" : "";
    console.error("%c%s", "color: red", `${script}: ${error instanceof Error ? error.message : error}${help}`);
    Deno.exit(error instanceof UsageError ? MISUSED : FAILED);
  }
}
