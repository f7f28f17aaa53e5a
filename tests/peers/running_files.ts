/**
 * The files of docs/running/, for tests that run them as they are written.
 *
 * @module
 */

import { type Balancer, startHaproxy } from "./balancers.ts";

/** Where a server of the test's own listens. */
interface Place {
  readonly port: number;
  readonly opsPort: number;
}

/**
 * Reads one of the files. What it returns gives its text with other addresses
 * and paths: each must stand in the file, and is replaced wherever it does.
 * Nothing else of the file is changed.
 */
export async function runningFile(name: string): Promise<(places: Record<string, string>) => string> {
  const text = await Deno.readTextFile(new URL(`../../docs/running/${name}`, import.meta.url));
  return (places) => {
    let changed = text;
    for (const [place, other] of Object.entries(places)) {
      if (!changed.includes(place)) throw new TypeError(`${name} has no ${place}`);
      changed = changed.replaceAll(place, other);
    }
    return changed;
  };
}

/** Starts HAProxy as haproxy.cfg says, in front of two servers of the test's own. */
export async function startRunningHaproxy(folder: string, one: Place, two: Place): Promise<Balancer> {
  const config = await runningFile("haproxy.cfg");
  return await startHaproxy(folder, (claim) =>
    config({
      "0.0.0.0:8000": `127.0.0.1:${claim("front")}`,
      "127.0.0.1:8009": `127.0.0.1:${one.port}`,
      "port 18009": `port ${one.opsPort}`,
      "127.0.0.1:8019": `127.0.0.1:${two.port}`,
      "port 18019": `port ${two.opsPort}`,
    }));
}
