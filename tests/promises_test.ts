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
    const [, file, name] = /^`([\w/]+_test\.ts)`: "(.+)"$/.exec(shown) ?? [];
    assert(file !== undefined && name !== undefined, `${promise}: ${shown}`);
    assert(pattern(name).test(await readProject(`tests/${file}`)), `${file} has no test "${name}"`);
  }
});

/** The defaults that the documentation of the options tells, such as `timeout: Infinity`. */
function documented(source: string): string[] {
  const tags = source.matchAll(/@default \{(.+)\}\n\s*\*\/\n\s*(\w+)\?:/g);
  return [...tags].map(([, value, name]) => `${name}: ${value}`);
}

programTest(
  "every default of the README is the one that the option is documented with, wherever there is one of its name",
  async () => {
    const defaults = documented(await readProject("mod.ts"));
    for (const [promise, told = ""] of await promises()) {
      const option = /^`(\w+: .+)`$/.exec(told)?.[1];
      if (option === undefined) continue;
      const named = defaults.filter((other) => other.startsWith(`${option.split(": ")[0]}: `));
      assertEquals(new Set(named), new Set([option]), promise);
    }
  },
);

/** What the table `name` of the code has, such as `"STREAM"`, with what it takes over from others. */
function taken(source: string, name: string): Map<string, string> {
  const [, table = ""] = new RegExp(`^const ${name}_DEFAULTS\\b[^=]*= \\{([^]*?)\\};$`, "m").exec(source) ?? [];
  assert(table !== "", `There is no table ${name}_DEFAULTS`);
  const inherited = [...table.matchAll(/\.\.\.(\w+)_DEFAULTS\b/g)].flatMap((
    [, other = ""],
  ) => [...taken(source, other)]);
  const own = [...table.matchAll(/\b(\w+): (\[\]|"[^"]*"|\w+)/g)].map(([, key = "", value = ""]) => {
    return [key, /^[A-Z_]+$/.test(value) ? constant(source, value) : value] as const;
  });
  return new Map([...inherited, ...own]);
}

/** The value of a constant that a table names. */
function constant(source: string, name: string): string {
  return new RegExp(`^const ${name} = (.+);$`, "m").exec(source)?.[1] ?? name;
}

/** The interfaces of options, and the tables that have their defaults. */
const TABLES = {
  StreamOptions: "STREAM",
  ServerOptions: "SERVER",
  DatagramServerOptions: "DATAGRAM_SERVER",
  DialOptions: "DIAL",
  FrameOptions: "FRAME",
  TcpServerAddress: "TCP",
};

programTest("every default that an option is documented with is the one that the code takes", async () => {
  const source = await readProject("mod.ts");
  const tables = [...source.matchAll(/^const (\w+)_DEFAULTS\b/gm)].map(([, table]) => table);
  assertEquals(new Set(tables), new Set(Object.values(TABLES)));
  for (const [name, table] of Object.entries(TABLES)) {
    const [options = ""] = new RegExp(`^export interface ${name}\\b[^]*?^}`, "m").exec(source) ?? [];
    const defaults = taken(source, table);
    const told = documented(options);
    assert(told.length >= 2, `${name} tells ${told.length} defaults`);
    for (const option of told) {
      const [key = "", value] = option.split(": ");
      assertEquals(value, defaults.get(key), `${key} of ${name}`);
    }
  }
});

programTest("upgrade() has the handshakeTimeout of servers, as it is documented", async () => {
  const source = await readProject("mod.ts");
  const [upgrade = ""] = /\n {3}\* @param options `handshakeTimeout`[^]*?async upgrade\(/.exec(source) ?? [];
  assertEquals(
    /Default: ([\d,]+)/.exec(upgrade)?.[1]?.replace(",", "_"),
    taken(source, "SERVER").get("handshakeTimeout"),
  );
});
