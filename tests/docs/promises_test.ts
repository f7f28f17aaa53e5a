/** docs/promises.md names a test for each promise, and the default of each option: both must exist. */

import { assert, assertEquals } from "../../deps.ts";
import { filesUnder, readProject, readTest } from "./pages.ts";

/** The rows of the page's tables: promise, default, test. */
async function promises(): Promise<string[][]> {
  const rows = (await readProject("docs/promises.md")).split("\n").filter((line) => /^\| (?!promise|-)/.test(line));
  return rows.map((row) => row.split("|").slice(1, -1).map((cell) => cell.trim()));
}

readTest("each promise of docs/promises.md names a part of the name of a test", async () => {
  const rows = await promises();
  assert(rows.length > 20, `${rows.length} promises`);
  const tests = filesUnder("tests").filter((path) => path.endsWith("_test.ts") && !path.startsWith("tests/docs/"));
  const sources = (await Promise.all(tests.map(readProject))).join("\n");
  for (const [promise, , shown = ""] of rows) {
    const [, name] = /^"(.+)"$/.exec(shown) ?? [];
    assert(name !== undefined && sources.includes(name), `${promise}: there is no test ${shown}`);
  }
});

/** The defaults in the documentation of the options, such as `timeout: Infinity`. */
function documented(source: string): string[] {
  const tags = source.matchAll(/@default \{(.+)\}\n\s*\*\/\n\s*(\w+)\?:/g);
  return [...tags].map(([, value, name]) => `${name}: ${value}`);
}

readTest("each default of docs/promises.md is the one in the option's documentation", async () => {
  const defaults = documented(await readProject("mod.ts"));
  for (const [promise, told = ""] of await promises()) {
    const option = /^`(\w+: .+)`$/.exec(told)?.[1];
    if (option === undefined) continue;
    const named = defaults.filter((other) => other.startsWith(`${option.split(": ")[0]}: `));
    assertEquals(new Set(named), new Set([option]), promise);
  }
});

/** The entries of a table of the code, such as `"STREAM"`, with those of the tables that it spreads. */
function entriesOf(source: string, name: string): Map<string, string> {
  const [, table] = new RegExp(`^const ${name}_DEFAULTS\\b[^=]*= \\{([^]*?)\\};$`, "m").exec(source) ?? [];
  assert(table !== undefined, `There is no table ${name}_DEFAULTS`);
  const parts = table.replace(/\/\/.*/g, "").split(/,\s/).map((part) => part.trim());
  return new Map(parts.flatMap((part) => {
    const [, other] = /^\.\.\.(\w+)_DEFAULTS$/.exec(part) ?? [];
    if (other !== undefined) return [...entriesOf(source, other)];
    const [, key, value] = /^(\w+): (.+)$/.exec(part) ?? [];
    return key === undefined || value === undefined ? [] : [[key, constantOf(source, value)] as const];
  }));
}

/** The value of a constant, such as `"TCP_BACKLOG"`; any other text as it is. */
function constantOf(source: string, text: string): string {
  if (!/^[A-Z_]+$/.test(text)) return text;
  return new RegExp(`^const ${text} = (.+);$`, "m").exec(source)?.[1] ?? text;
}

/** The interfaces of options, and the tables of their defaults. */
const TABLES = {
  StreamOptions: "STREAM",
  ServerOptions: "SERVER",
  DatagramServerOptions: "DATAGRAM_SERVER",
  DialOptions: "DIAL",
  FrameOptions: "FRAME",
  TcpServerAddress: "TCP",
};

readTest("each default in the documentation of an option is the one of the code", async () => {
  const source = await readProject("mod.ts");
  const tables = [...source.matchAll(/^const (\w+)_DEFAULTS\b/gm)].map(([, table]) => table);
  assertEquals(new Set(tables), new Set(Object.values(TABLES)));
  for (const [name, table] of Object.entries(TABLES)) {
    const [options = ""] = new RegExp(`^export interface ${name}\\b[^]*?^}`, "m").exec(source) ?? [];
    const defaults = entriesOf(source, table);
    const told = documented(options);
    assert(told.length >= 2, `${name} documents ${told.length} defaults`);
    for (const option of told) {
      const [key = "", value] = option.split(": ");
      if (defaults.has(key)) assertEquals(value, defaults.get(key), `${key} of ${name}`);
    }
  }
});

readTest("upgrade() has the handshakeTimeout of servers by default", async () => {
  const source = await readProject("mod.ts");
  const { handshakeTimeout = "" } = Object.fromEntries(entriesOf(source, "SERVER"));
  assert(documented(source).includes(`handshakeTimeout: ${handshakeTimeout}`));
  assert(source.includes("{ handshakeTimeout: SERVER_DEFAULTS.handshakeTimeout }"));
});
