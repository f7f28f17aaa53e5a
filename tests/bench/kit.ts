/**
 * What the benchmark works with: the programs of the machine, and what is built
 * from the sources next to this file.
 *
 * @module
 */

/** The programs that are looked for, and how each tells its version. */
const VERSION_ARGUMENTS = {
  deno: "--version",
  cc: "--version",
  taskset: "--version",
  openssl: "version",
  node: "--version",
  python3: "--version",
  bun: "--version",
  go: "version",
};

export type ProgramName = keyof typeof VERSION_ARGUMENTS;

const PROGRAMS = Object.keys(VERSION_ARGUMENTS).filter(isProgramName);

/** What a program is called where its name alone says too little. */
const PROGRAM_TITLES: Partial<Record<ProgramName, string>> = { node: "Node", bun: "Bun" };

export const SERVER_CORE = 0;
export const LOAD_CORE = 1;

/** Nobody asks the internet for anything: Deno not whether there is a newer one, and Go not for modules. */
const ENVIRONMENT = { DENO_NO_UPDATE_CHECK: "1", NO_COLOR: "1", GOPROXY: "off", GOTOOLCHAIN: "local" };

export class Kit implements AsyncDisposable {
  /** Temporary: for what is built, and for Unix sockets. */
  readonly folder: string;
  readonly #versions: Map<ProgramName, string>;
  readonly #built = new Map<string, Promise<string>>();
  #canTls = false;

  private constructor(folder: string, versions: Map<ProgramName, string>) {
    this.folder = folder;
    this.#versions = versions;
  }

  /** Looks for the programs and builds the load generator; throws if that cannot be. */
  static async make(): Promise<Kit> {
    const versions = new Map<ProgramName, string>();
    for (const name of PROGRAMS) {
      const version = await findVersion(name);
      if (version !== undefined) versions.set(name, version);
    }
    if (!versions.has("cc")) throw new TypeError("The load generator needs a C compiler: there is no cc on the PATH");
    await using cleanUp = new AsyncDisposableStack();
    const kit = cleanUp.use(new Kit(await Deno.makeTempDir({ prefix: "bench-" }), versions));
    await kit.#buildLoad();
    cleanUp.move();
    return kit;
  }

  /** What there is, and in which version. */
  get versions(): string[] {
    return [...this.#versions].map(([name, version]) => titled(name, version));
  }

  /** What is not there; what needs it is left out. */
  get missing(): string[] {
    const names = PROGRAMS.filter((name) => !this.has(name));
    return this.#canTls ? names : [...names, "what TLS needs (libssl-dev, openssl)"];
  }

  has(program: ProgramName): boolean {
    return this.#versions.has(program);
  }

  /** Whether there is all that TLS needs: the headers of OpenSSL, and the program to make a certificate with. */
  get canTls(): boolean {
    return this.#canTls;
  }

  /** Whether the servers and the load each have a core of their own. */
  get canPin(): boolean {
    return this.has("taskset") && navigator.hardwareConcurrency > Math.max(SERVER_CORE, LOAD_CORE);
  }

  get load(): string {
    return `${this.folder}/load`;
  }

  get certificate(): [cert: string, key: string] {
    return [`${this.folder}/cert.pem`, `${this.folder}/key.pem`];
  }

  /** The command, on a core of its own, or on both for threads that share it with the load, if that can be. What it prints as an error goes to ours. */
  command(command: string[], ...cores: number[]): Deno.Command {
    const [program = "", ...args] = this.canPin ? ["taskset", "-c", cores.join(), ...command] : command;
    return new Deno.Command(program, { args, env: ENVIRONMENT, stdin: "null", stdout: "piped", stderr: "inherit" });
  }

  /** Builds a program of one file, if it is not built yet, and returns its path. */
  build(program: "cc" | "go", source: string): Promise<string> {
    const building = this.#built.get(source) ?? this.#build(program, source);
    this.#built.set(source, building);
    return building;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Deno.remove(this.folder, { recursive: true });
  }

  async #build(program: "cc" | "go", source: string): Promise<string> {
    const built = `${this.folder}/${program}`;
    await run(program, [...(program === "go" ? ["build"] : ["-O2"]), "-o", built, source]);
    return built;
  }

  async #buildLoad(): Promise<void> {
    const folder = new URL("load/", import.meta.url).pathname;
    const sources = [...Deno.readDirSync(folder)].filter(({ name }) => name.endsWith(".c"));
    const args = ["-O2", "-o", this.load, ...sources.map(({ name }) => folder + name)];
    const [cert, key] = this.certificate;
    try {
      await run("cc", ["-DWITH_TLS", ...args, "-lm", "-lssl", "-lcrypto"]);
      await run("openssl", [...SELF_SIGNED, "-keyout", key, "-out", cert]);
      this.#canTls = true;
    } catch {
      // The headers of OpenSSL or its program are missing: the works over TLS are left out, and the tables say so.
      await run("cc", [...args, "-lm"]);
    }
  }
}

const SELF_SIGNED =
  "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost -addext subjectAltName=IP:127.0.0.1"
    .split(" ");

function isProgramName(name: string): name is ProgramName {
  return name in VERSION_ARGUMENTS;
}

export function commandOf(program: ProgramName): string {
  return program === "deno" ? Deno.execPath() : program;
}

async function findVersion(program: ProgramName): Promise<string | undefined> {
  try {
    const printed = await run(commandOf(program), [VERSION_ARGUMENTS[program]]);
    return printed.split("\n")[0];
  } catch (error) {
    if (error instanceof Deno.errors.NotFound || error instanceof TypeError) return undefined;
    throw error;
  }
}

function titled(name: ProgramName, version: string): string {
  const title = PROGRAM_TITLES[name];
  return title === undefined ? version : `${title} ${version}`;
}

async function run(program: string, args: string[]): Promise<string> {
  const { success, stdout, stderr } = await new Deno.Command(program, { args, env: ENVIRONMENT }).output();
  if (!success) throw new TypeError(`${program} failed: ${new TextDecoder().decode(stderr)}`);
  return new TextDecoder().decode(stdout);
}
