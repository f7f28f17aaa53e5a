/**
 * Reads the pages of the documentation, and runs the programs in them.
 *
 * @module
 */

import { assert } from "../../deps.ts";
import { freePort, Program } from "../programs.ts";

/** The folder of the project. */
export const project = new URL("../../", import.meta.url);

export function readProject(path: string): Promise<string> {
  return Deno.readTextFile(new URL(path, project));
}

/** A test that reads files of the project. */
export function readTest(name: string, fn: () => Promise<void>): void {
  const ignore = Deno.permissions.querySync({ name: "read" }).state !== "granted";
  Deno.test({ name, fn, ignore, ...(ignore ? {} : { permissions: { read: true } }) });
}

/** The paths of all files under `folder`, such as "docs/guide.md". */
export function filesUnder(folder: string): string[] {
  const entries = [...Deno.readDirSync(new URL(`${folder}/`, project))];
  return entries.flatMap(({ name, isDirectory }) => {
    const path = `${folder}/${name}`;
    return isDirectory ? filesUnder(path) : [path];
  });
}

/** The text of the program on `page` whose first line is a comment with its `name`. */
export async function programOf(page: string, name: string): Promise<string> {
  const text = await readProject(page);
  const [, program] = new RegExp(`^\`\`\`ts(?: ignore)?\\n// ${name}\\n(.*?)^\`\`\``, "ms").exec(text) ?? [];
  assert(program !== undefined, `${page} has no ${name}`);
  return program;
}

/** Copies what the pages' programs import: they are saved beside it. */
export async function copyLibrary(folder: string): Promise<void> {
  await Deno.mkdir(`${folder}/extras`);
  const extras = [...Deno.readDirSync(new URL("extras/", project))].map(({ name }) => `extras/${name}`);
  for (const file of ["mod.ts", "deno.json", ...extras]) {
    await Deno.copyFile(new URL(file, project), `${folder}/${file}`);
  }
}

/** Programs of a page, saved in a folder of their own, with free ports in the place of theirs. */
export class Programs implements AsyncDisposable {
  readonly #folder: string;
  /** The free port for each port of the page. */
  readonly #ports = new Map<string, number>();

  private constructor(folder: string) {
    this.#folder = folder;
  }

  static async of(page: string, names: string[], files: Record<string, string> = {}): Promise<Programs> {
    const folder = await Deno.makeTempDir({ prefix: "socketserver-" });
    await copyLibrary(folder);
    const programs = new Programs(folder);
    for (const name of names) {
      const program = await programOf(page, name);
      for (const [, port = ""] of program.matchAll(/port: (\d+)/g)) {
        if (!programs.#ports.has(port)) programs.#ports.set(port, await freePort());
      }
      const moved = program.replace(/(?<=port: )\d+/g, (port) => String(programs.#ports.get(port)));
      await Deno.writeTextFile(`${folder}/${name}`, moved);
    }
    for (const [file, text] of Object.entries(files)) await Deno.writeTextFile(`${folder}/${file}`, text);
    return programs;
  }

  /** The ports of the programs, in the order of the page. */
  get ports(): number[] {
    return [...this.#ports.values()];
  }

  /** The only port, or the first one. */
  get port(): number {
    const [port] = this.ports;
    assert(port !== undefined, "the programs have no port");
    return port;
  }

  /** The arguments that run a program as its page says, without the project's configuration. */
  args(name: string, flags: string[] = []): string[] {
    return ["run", "--no-config", "--no-prompt", "--allow-net=127.0.0.1", ...flags, name];
  }

  start(name: string, flags: string[] = []): Program {
    return Program.start(Deno.execPath(), this.args(name, flags), { cwd: this.#folder });
  }

  /** Starts a program on a terminal, for one that asks a person. */
  startOnTerminal(name: string): Program {
    const command = [Deno.execPath(), ...this.args(name)].join(" ");
    return Program.start("script", ["--quiet", "--return", "--command", command, "/dev/null"], { cwd: this.#folder });
  }

  /** Checks the types of all programs; returns what is wrong. */
  async check(names: string[]): Promise<string> {
    await using check = Program.start(Deno.execPath(), ["check", ...names], { cwd: this.#folder });
    const { code, stderr } = await check.ended();
    return code === 0 ? "" : stderr;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.#folder, { recursive: true });
  }
}
