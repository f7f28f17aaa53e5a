/** No link of the documentation is dead: those of the pages, and those of the documentation comments. */

import { assert, assertEquals } from "../../deps.ts";
import { filesUnder, project, readProject, readTest } from "./pages.ts";

/** The pages: all Markdown of the project. */
function pages(): string[] {
  const own = [...Deno.readDirSync(project)].filter(({ isFile }) => isFile).map(({ name }) => name);
  const others = ["docs", "tests", "extras"].flatMap(filesUnder);
  return [...own, ...others].filter((path) => path.endsWith(".md"));
}

/** The files whose documentation comments people read. */
function sources(): string[] {
  return [
    "mod.ts",
    "server.ts",
    "client.ts",
    "deps.ts",
    ...filesUnder("extras").filter((path) => path.endsWith(".ts")),
  ];
}

/** `text` without its blocks of code. */
function prose(text: string): string {
  return text.replace(/^( *)(`{3,})[^]*?^\1\2$/gm, "");
}

/** The anchor of a heading as GitHub makes it. */
function anchorOf(heading: string): string {
  const text = heading.replace(/\[([^\]]*)\]\([^)]*\)/g, "$1").replace(/[`*]/g, "");
  return text.trim().toLowerCase().replace(/[^\p{L}\p{N}\s_-]/gu, "").replace(/\s/g, "-");
}

/** The anchors of a page; of several equal ones the later ones have a number. */
function anchorsOf(text: string): Set<string> {
  const counts = new Map<string, number>();
  return new Set([...prose(text).matchAll(/^#+ (.+)$/gm)].map(([, heading = ""]) => {
    const anchor = anchorOf(heading);
    const count = counts.get(anchor) ?? 0;
    counts.set(anchor, count + 1);
    return count === 0 ? anchor : `${anchor}-${count}`;
  }));
}

/** The targets of the links of a page, images included. */
function linksOf(text: string): string[] {
  const plain = prose(text).replace(/`[^`\n]*`/g, (code) => code.replace(/[[\]()]/g, " "));
  return [...plain.matchAll(/\]\(([^)\s]+)\)/g)].map(([, target = ""]) => target);
}

async function exists(path: string): Promise<boolean> {
  return await Deno.stat(new URL(path, project)).then(() => true, () => false);
}

/** Why the link of `page` to `target` is dead; "" if it is not. */
async function whyDead(page: string, target: string): Promise<string> {
  if (/^[a-z]+:/.test(target)) return target.startsWith("https://") ? "" : `${page}: ${target} is no https link`;
  const [path = "", anchor] = target.split("#");
  const file = path === "" ? page : new URL(path, new URL(page, project)).href.slice(project.href.length);
  if (!await exists(file)) return `${page}: ${target}: there is no ${file}`;
  if (anchor === undefined || anchorsOf(await readProject(file)).has(anchor)) return "";
  return `${page}: ${target}: ${file} has no such heading`;
}

readTest("no page has a dead link or anchor", async () => {
  const dead: string[] = [];
  for (const page of pages()) {
    for (const target of linksOf(await readProject(page))) dead.push(await whyDead(page, target));
  }
  assertEquals(dead.filter((why) => why !== ""), []);
});

readTest("every file that a page names in code exists", async () => {
  const missing: string[] = [];
  for (const page of pages().filter((path) => path !== "CHANGELOG.md")) {
    for (const [, path = ""] of prose(await readProject(page)).matchAll(/`((?:docs|tests|extras)\/[\w./-]+\.\w+)`/g)) {
      if (!await exists(path)) missing.push(`${page}: ${path}`);
    }
  }
  assertEquals(missing, []);
});

readTest("every page can be reached from the README", async () => {
  const reached = new Set<string>();
  const open = ["README.md"];
  for (let page; (page = open.pop()) !== undefined;) {
    if (reached.has(page)) continue;
    reached.add(page);
    for (const target of linksOf(await readProject(page))) {
      const [path = ""] = target.split("#");
      const file = new URL(path, new URL(page, project)).href.slice(project.href.length);
      if (!/^[a-z]+:/.test(target) && file.endsWith(".md")) open.push(file);
    }
  }
  assertEquals(pages().filter((page) => page.startsWith("docs/") && !reached.has(page)), []);
});

/** The names that `{@linkcode}` may link to: exported ones, and their members, such as "SocketStream.recv". */
function namesIn(source: string): Set<string> {
  const names = new Set<string>();
  let owner = "";
  for (const line of source.split("\n")) {
    const [, name] = /^(?:export )?(?:abstract |async )*(?:class|interface|function|type|const) (\w+)/.exec(line) ?? [];
    if (name !== undefined) owner = name;
    const member = /^ {2}(?:(?:static|readonly|override|protected|abstract|async|get|set|declare) )*(\w+)[?(:<]/;
    const [, own] = member.exec(line) ?? [];
    if (line.startsWith("export ") && name !== undefined) names.add(name);
    if (own !== undefined) names.add(`${owner}.${own}`);
  }
  return names;
}

readTest("no {@linkcode} or {@link} of a documentation comment is dead", async () => {
  const dead: string[] = [];
  for (const path of sources()) {
    const source = await readProject(path);
    const names = namesIn(source);
    const links = [...source.matchAll(/\{@link(?:code|plain)? ([^}]+)\}/g)].map(([, link = ""]) => link);
    for (const link of links) {
      const [target = ""] = link.split(/[\s|]/);
      if (!target.startsWith("https://") && !names.has(target)) dead.push(`${path}: ${link}`);
    }
  }
  assertEquals(dead, []);
});

Deno.test("the link checker finds what is dead", async () => {
  assertEquals(linksOf("[a](b.md#c) `[x](y)` ![d](e.svg)\n```md\n[f](g)\n```\n"), ["b.md#c", "e.svg"]);
  assertEquals([...anchorsOf('# Use `every` core\n## What\'s "lost"?\n## Use every core\n')], [
    "use-every-core",
    "whats-lost",
    "use-every-core-1",
  ]);
  assert(namesIn("export class A {\n  get b(): number {\n").has("A.b"));
  assert(/is no https link/.test(await whyDead("README.md", "http://example.org")));
});
