/** Starts the Python programs of this folder. */

import { Program } from "../programs.ts";

/** Starts `file` of this folder with Python. */
export function startPython(file: string, args: string[] = []): Program {
  return Program.start("python3", [new URL(file, import.meta.url).pathname, ...args]);
}
