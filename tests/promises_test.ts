/**
 * The README's page "What it promises" names a test for each promise, and the
 * default of each option; both have to be there.
 */

import { assert, assertEquals } from "../deps.ts";
import { programTest } from "./testing.ts";

const project = new URL("..", import.meta.url);

function readProject(path: string): Promise<string> {
  return Deno.readTextFile(new URL(path, project));
}

/** The rows of the page's table: promise, default, test. */
async function promises(): Promise<string[][]> {
  const [, page = ""] = (await readProject("README.md")).split("\n## What it promises\n");
  const [table = ""] = page.split("\n\nWhat no test can promise");
  const rows = table.split("\n").filter((line) => line.startsWith("| "));
  return rows.slice(2).map((row) => row.split("|").slice(1, -1).map((cell) => cell.trim()));
}

/** A regular expression for `text`, in which "…" stands for anything. */
function pattern(text: string): RegExp {
  return new RegExp(text.split("…").map((part) => part.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&")).join(".*"));
}

programTest("every promise of the README names a test that there is", async () => {
  const rows = await promises();
  assert(rows.length > 20, `${rows.length} promises`);
  for (const [promise, , shown = ""] of rows) {
    const [, file, name] = /^`(\w+_test\.ts)`: "(.+)"$/.exec(shown) ?? [];
    assert(file !== undefined && name !== undefined, `${promise}: ${shown}`);
    assert(pattern(name).test(await readProject(`tests/${file}`)), `${file} has no test "${name}"`);
  }
});

/** The defaults that the documentation of the options tells, such as `timeout: Infinity`. */
function documented(source: string): Set<string> {
  const tags = source.matchAll(/@default \{(.+)\}\n\s*\*\/\n\s*(\w+)\?:/g);
  return new Set([...tags].map(([, value, name]) => `${name}: ${value}`));
}

programTest("every default of the README is the one that the option is documented with", async () => {
  const defaults = documented(await readProject("mod.ts"));
  for (const [promise, told = ""] of await promises()) {
    const option = /^`(\w+: .+)`$/.exec(told)?.[1];
    if (option !== undefined) assert(defaults.has(option), `${promise}: ${option}`);
  }
});

programTest("every default that an option is documented with is the one that the code takes", async () => {
  const source = await readProject("mod.ts");
  const tables = [...source.matchAll(/^const \w+_DEFAULTS\b[^]*?^};/gm)].join("\n");
  const taken = new Map([...tables.matchAll(/^ {2}(\w+): (.+),$/gm)].map(([, name, value]) => [name, value]));
  assert(taken.size > 10);
  for (const option of documented(source)) {
    const [name = "", value] = option.split(": ");
    if (taken.has(name)) assertEquals(value, taken.get(name), name);
  }
});
