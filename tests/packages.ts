/**
 * The programs of others that tests run. `deno run --allow-run tests/packages.ts` says which of them this machine lacks.
 *
 * @module
 */

/** The Debian package of each program. */
export const PACKAGES: Record<string, string> = {
  curl: "curl",
  haproxy: "haproxy",
  ip: "iproute2",
  nc: "netcat-openbsd",
  nginx: "nginx libnginx-mod-stream",
  openssl: "openssl",
  promtool: "prometheus",
  python3: "python3",
  "redis-cli": "redis-tools",
  socat: "socat",
  "systemd-analyze": "systemd",
};

const found = new Map<string, boolean>();

function isThere(program: string): boolean {
  const known = found.get(program);
  if (known !== undefined) return known;
  const look = new Deno.Command("sh", { args: ["-c", 'command -v "$0"', program], stdout: "null" });
  const { success } = look.outputSync();
  found.set(program, success);
  return success;
}

/** The packages of those `programs` that this machine lacks; none if programs may not be run at all. */
export function missingPackages(programs: readonly string[]): string[] {
  if (Deno.permissions.querySync({ name: "run" }).state !== "granted") return [];
  return programs.filter((program) => !isThere(program)).map((program) => PACKAGES[program] ?? program);
}

if (import.meta.main) {
  const packages = missingPackages(Object.keys(PACKAGES));
  if (packages.length > 0) {
    console.log(
      `Ignored were the tests of programs that this machine lacks. To run them, too: apt-get install ${
        packages.join(" ")
      }`,
    );
  }
}
