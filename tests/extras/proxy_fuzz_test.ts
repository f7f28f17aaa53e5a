/** PROXY headers of any bytes at all. No network. */

import { encodeProxyHeader, parseProxyHeader } from "../../extras/proxy_protocol.ts";
import { assert, assertEquals, assertMatch } from "../../deps.ts";
import { concat, randomNumbers } from "../fake_conn.ts";
import { scaled } from "../testing.ts";
import { GOOD } from "./proxy_headers.ts";

/** Headers that are made of any bytes, and good ones with some bytes changed. */
const FUZZED = scaled(20_000, 1_000_000);

const SEED = 20_261_122;

/** `bytes` with one to four random changes. */
function mutated(bytes: Uint8Array, random: () => number): Uint8Array {
  const upTo = (most: number) => Math.floor(random() * (most + 1));
  let changed: Uint8Array = bytes.slice();
  for (let changes = 1 + upTo(3); changes > 0 && changed.length > 0; changes--) {
    const at = upTo(changed.length - 1);
    const [before, behind] = [changed.subarray(0, at), changed.subarray(at)];
    switch (upTo(4)) {
      case 0:
        changed = concat([before, behind.subarray(upTo(8))]);
        break;
      case 1:
        changed = concat([before, Uint8Array.from({ length: upTo(8) }, () => upTo(255)), behind]);
        break;
      case 2:
        changed = concat([changed, behind]);
        break;
      default:
        changed[at] = random() < 0.5 ? upTo(255) : (changed[at] ?? 0) ^ 1 << upTo(7);
    }
  }
  return changed;
}

type Outcome = { kind: "read"; length: number } | { kind: "refused" | "short" };

/** Parses `bytes`; checks that a header is read as the same when it is sent on. */
function outcomeOf(bytes: Uint8Array): Outcome {
  let parsed;
  try {
    parsed = parseProxyHeader(bytes);
  } catch (error) {
    if (!(error instanceof Deno.errors.InvalidData)) throw error;
    assertMatch(error.message, /^Cannot read the PROXY header: [ -~\xa0-\xff]+ \(PROXY 2(\.\d)*\)$/);
    return { kind: "refused" };
  }
  if (parsed === undefined) return { kind: "short" };
  const { header, length } = parsed;
  assert(length > 0 && length <= bytes.length && length <= 4_096);
  // U+FFFD in a path is longer than the byte that it replaces.
  const hasOddPath = Deno.inspect([header.source, header.destination]).includes("\ufffd");
  if (!hasOddPath) assertEquals(parseProxyHeader(encodeProxyHeader(header))?.header, header);
  return { kind: "read", length };
}

Deno.test(`fuzz: ${FUZZED} headers with mistakes are read, refused, or too short, however they are cut`, () => {
  const random = randomNumbers(SEED);
  const counts = { read: 0, refused: 0, short: 0 };
  for (let round = 0; round < FUZZED; round++) {
    const [, good] = GOOD[Math.floor(random() * GOOD.length)] ?? ["", new Uint8Array()];
    const bytes = random() < 0.1 ? Uint8Array.from({ length: 40 }, () => random() * 256) : mutated(good, random);
    const outcome = outcomeOf(bytes);
    counts[outcome.kind]++;
    // More bytes change neither what was read nor what was refused: fewer can only be too short.
    const earlier = outcomeOf(bytes.subarray(0, Math.floor(random() * bytes.length)));
    if (earlier.kind !== "short") assertEquals({ round, ...earlier }, { round, ...outcome });
  }
  assert(counts.read > 0 && counts.refused > 0 && counts.short > 0, Deno.inspect(counts));
});
