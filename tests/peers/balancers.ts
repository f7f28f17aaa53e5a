/**
 * Real load balancers for the tests: HAProxy and nginx, in the foreground, with a
 * configuration of the test's own in a folder of its own.
 *
 * @module
 */

import { Program } from "../programs.ts";

/** Gives a port that is free, and the same one again for the same name. */
export type ClaimPort = (name: string) => number;

/** Ports are claimed before the program binds them, so that somebody may come first. */
const TRIES = 5;

/** Debian's package libnginx-mod-stream has it. */
const NGINX_STREAM_MODULE = "/usr/lib/nginx/modules/ngx_stream_module.so";

/** A balancer that accepts connections; `await using` ends it and waits until it is gone. */
export class Balancer implements AsyncDisposable {
  /** Its first process, which takes signals: SIGUSR2 (HAProxy) and SIGHUP (nginx) read the configuration again. */
  readonly program: Program;
  /** The file of its configuration. */
  readonly configFile: string;
  readonly #ports: ReadonlyMap<string, number>;

  constructor(program: Program, configFile: string, ports: ReadonlyMap<string, number>) {
    this.program = program;
    this.configFile = configFile;
    this.#ports = ports;
  }

  /** The port that was claimed as `name`. */
  port(name: string): number {
    const port = this.#ports.get(name);
    if (port === undefined) throw new TypeError(`No port was claimed as "${name}"`);
    return port;
  }

  /** What it has logged so far. */
  get log(): string {
    return this.program.stderr + this.program.stdout;
  }

  /** Waits until it has logged `pattern` to its standard error. */
  logged(pattern: RegExp | string): Promise<RegExpMatchArray> {
    return this.program.complained(pattern);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await endProgram(this.program);
  }
}

/**
 * Starts HAProxy in master-worker mode. Resolves when its ports accept; nobody has connected to them by then.
 *
 * @param folder Where its files go.
 * @param config The configuration, with `claim("front")` and the like for its ports; it needs no `global` section.
 */
export function startHaproxy(folder: string, config: (claim: ClaimPort) => string): Promise<Balancer> {
  const configFile = `${folder}/haproxy.cfg`;
  // Its ports are bound before it starts its worker, which it tells.
  return start(configFile, config, () => Program.start("haproxy", ["-W", "-db", "-f", configFile]), "Loading success");
}

/**
 * Starts nginx. Resolves when its ports accept; nobody has connected to them by then.
 *
 * @param folder Where its files go.
 * @param config Its `stream` block, with `claim("front")` and the like for its ports.
 */
export function startNginx(folder: string, config: (claim: ClaimPort) => string): Promise<Balancer> {
  const configFile = `${folder}/nginx.conf`;
  const whole = (claim: ClaimPort) =>
    `load_module ${NGINX_STREAM_MODULE};
daemon off;
worker_processes 1;
pid ${folder}/nginx.pid;
error_log stderr notice;
events { worker_connections 256; }
${config(claim)}
`;
  // Before the first line of its configuration is read it would log to a folder of the system.
  const run = () => Program.start("nginx", ["-p", folder, "-e", "stderr", "-c", configFile]);
  return start(configFile, whole, run, /start worker process \d+/);
}

async function start(
  configFile: string,
  config: (claim: ClaimPort) => string,
  run: () => Program,
  started: RegExp | string,
): Promise<Balancer> {
  for (let tries = 1;; tries++) {
    const ports = await writeConfig(configFile, config);
    const program = run();
    try {
      await program.complained(started);
      return new Balancer(program, configFile, ports);
    } catch (error) {
      await endProgram(program);
      const isTaken = /Address already in use|cannot bind/i.test(program.stderr);
      if (!isTaken || tries === TRIES) throw error;
    }
  }
}

/** Writes the configuration with ports that are free, all of them different. */
async function writeConfig(
  configFile: string,
  config: (claim: ClaimPort) => string,
): Promise<ReadonlyMap<string, number>> {
  const held = new Map<string, Deno.TcpListener>();
  const claim = (name: string) => {
    const listener = held.get(name) ?? Deno.listen({ hostname: "127.0.0.1", port: 0 });
    held.set(name, listener);
    return listener.addr.port;
  };
  try {
    await Deno.writeTextFile(configFile, config(claim));
    return new Map([...held].map(([name, { addr }]) => [name, addr.port]));
  } finally {
    for (const listener of held.values()) listener.close();
  }
}

/** Ends a program with the processes that it has started, which it does itself on SIGTERM. */
async function endProgram(program: Program): Promise<void> {
  try {
    program.kill("SIGTERM");
    await program.ended();
  } catch (error) {
    if (!(error instanceof TypeError)) throw error; // It has ended already.
  } finally {
    await program[Symbol.asyncDispose]();
  }
}
