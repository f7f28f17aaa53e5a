/**
 * The files of docs/running/, for tests that run them as they are written.
 *
 * @module
 */

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
