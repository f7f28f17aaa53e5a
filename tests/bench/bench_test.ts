import { plot, type Series } from "./plot.ts";
import {
  formatBytes,
  formatCount,
  formatRatio,
  formatReached,
  formatTarget,
  formatTime,
  type Goal,
  isMet,
  median,
  medianOf,
  type Outcome,
  parseReport,
  ratio,
  reached,
} from "./statistics.ts";
import { formatTable, goalTable, growthTable, peerTable } from "./table.ts";
import { allWorks, rivals } from "./works.ts";
import { assert, assertEquals, assertMatch, assertThrows } from "../../deps.ts";
import { rejectionOf } from "../testing.ts";

const HELD_TO_BARE: Goal = { figure: "rate", target: 0.95, against: "bare loop", by: "ratio" };

Deno.test("median() takes the middle, between two if there are two, and leaves out what is missing", () => {
  assertEquals(median([3, 1, 2]), 2);
  assertEquals(median([4, 1, 2, 3]), 2.5);
  assertEquals(median([NaN, 7, NaN]), 7);
  assertEquals(median([]), NaN);
});

Deno.test("medianOf() takes a figure from every round that has it", () => {
  assertEquals(medianOf("p50", [{ p50: 1 }, {}, { p50: 3, rate: 9 }]), 2);
});

Deno.test("ratio() is above 1 for what is better: a higher rate, a shorter time", () => {
  assertEquals(ratio("rate", { rate: 300 }, { rate: 100 }), 3);
  assertEquals(ratio("p999", { p999: 10 }, { p999: 50 }), 5);
  assertEquals(ratio("p999", {}, { p999: 50 }), NaN);
});

Deno.test("reached() compares within each round, and takes the median of that", () => {
  const [ours, theirs] = [[{ rate: 90 }, { rate: 10 }, { rate: 50 }], [{ rate: 100 }, { rate: 10 }, { rate: 100 }]];
  assertEquals(reached(HELD_TO_BARE, ours, theirs), 0.9);
  assertEquals(reached({ ...HELD_TO_BARE, by: "difference" }, ours, theirs), -10);
  assertEquals(reached({ figure: "rate", target: 1, by: "value" }, ours, []), 50);
  assertEquals(reached(HELD_TO_BARE, ours, []), NaN);
});

Deno.test("a target is a floor for a ratio and for what is better when there is more, and else a ceiling", () => {
  const jain: Goal = { figure: "jain", target: 0.99, by: "value" };
  const wait: Goal = { figure: "p999", target: 40_000, by: "value" };
  const start: Goal = { figure: "startUp", target: 20_000, against: "empty", by: "difference" };
  assertEquals([HELD_TO_BARE, jain, wait, start].map(formatTarget), ["≥ 0.95", "≥ 0.990", "≤ 40.0 ms", "≤ 20.0 ms"]);
  assert(isMet(HELD_TO_BARE, 0.95) && !isMet(HELD_TO_BARE, 0.94) && !isMet(HELD_TO_BARE, NaN));
  assert(isMet(jain, 0.995) && !isMet(jain, 0.98));
  assert(isMet(wait, 39_000) && !isMet(wait, 41_000));
  assert(isMet(start, -5) && !isMet(start, 20_001));
  assertEquals(formatReached(wait, 1_500), "1.50 ms");
});

Deno.test("numbers are written with the digits that matter", () => {
  assertEquals([0.95, 12.34, NaN].map(formatRatio), ["0.95", "12.3", "-"]);
  assertEquals([160_123.4, 7].map(formatCount), ["160,123", "7"]);
  assertEquals([0.5, 6.254, 43.21, 999, 1_000, 43_210, -2_000].map(formatTime), [
    "0.50 µs",
    "6.25 µs",
    "43.2 µs",
    "999 µs",
    "1.00 ms",
    "43.2 ms",
    "-2.00 ms",
  ]);
  assertEquals([2 ** 20, 101 * 2 ** 20].map(formatBytes), ["1.00 MiB", "101 MiB"]);
});

Deno.test("parseReport() takes the figures it knows, and throws what the load generator complains of", async () => {
  assertEquals(parseReport('{"rate":1.5e5,"p999":20,"losses":3}\n'), { rate: 150_000, p999: 20 });
  const error = await rejectionOf(Promise.try(() => parseReport('{"error":"send: Broken pipe"}')));
  assertEquals(error.message, "send: Broken pipe");
  assertThrows(() => parseReport(""), TypeError);
});

Deno.test("formatTable() makes every line as wide as the next", () => {
  const lines = formatTable([["work", "a"], ["echo", "12,345"], ["µ"]]).split("\n");
  assertEquals(lines, [
    "| work |      a |",
    "| ---- | -----: |",
    "| echo | 12,345 |",
    "| µ    |        |",
  ]);
});

const OUTCOME: Outcome = {
  topic: { id: "echo", title: "echo", unit: "replies/s", goals: [HELD_TO_BARE], figures: ["rate", "cpu"] },
  reports: new Map([
    ["ours", [{ rate: 100, cpu: 5, busy: 1 }, { rate: 120, cpu: 5, busy: 1 }]],
    ["bare loop", [{ rate: 100, cpu: 4, busy: 0.9 }, { rate: 100, cpu: 4, busy: 0.9 }]],
    ["Go", [{ rate: 200 }, {}]],
  ]),
  failures: [],
};

Deno.test("goalTable() says what is reached, and by how much", () => {
  const [, , row = ""] = goalTable([OUTCOME]).split("\n");
  assertMatch(
    row,
    /echo +\| +replies\/s \| +110 \| +100 \| +bare loop \| +1\.10 \| +≥ 0\.95 \| +yes \| +5\.00 µs \| +0\.80 \| +90 % \|/,
  );
});

Deno.test("goalTable() calls what was not measured by its name", () => {
  const [, , row = ""] = goalTable([{ ...OUTCOME, reports: new Map() }]).split("\n");
  assertMatch(row, /\| not measured \|/);
});

Deno.test("peerTable() has a column for everybody, and no row for what only the first two were in", () => {
  const table = peerTable([OUTCOME, { ...OUTCOME, reports: new Map([["ours", []], ["bare loop", []]]) }], [
    "ours",
    "bare loop",
    "Go",
    "Bun",
  ]).split("\n");
  assertEquals(table.length, 4);
  assertMatch(table[2] ?? "", /echo +\| +replies\/s \| +110 \| +100 \| +200 \| +- \|/);
});

Deno.test("growthTable() has a row for each server", () => {
  const { reports } = OUTCOME;
  const lines = growthTable("rate", [{ connections: 1, reports }, { connections: 5_000, reports }]).split("\n");
  assertEquals(lines.length, 5);
  assertMatch(lines[0] ?? "", /\| 5,000 \|$/);
  assertMatch(lines[4] ?? "", /^\| Go +\| +200 \| +200 \|$/);
});

const SERIES: Series[] = [
  {
    name: "ours",
    points: [{ connections: 1, rate: 10_000, p999: 90 }, { connections: 1_000, rate: 140_000, p999: 2e4 }],
  },
  {
    name: "C & co",
    points: [{ connections: 1, rate: 20_000, p999: 80 }, { connections: 1_000, rate: NaN, p999: NaN }],
  },
];

Deno.test("plot() draws each server in both panels, and names it", () => {
  const picture = plot(SERIES);
  assertMatch(picture, /^<svg [^>]+>/);
  assertEquals(picture.match(/<polyline/g)?.length, 4);
  assertEquals(picture.match(/class="series first"/g)?.length, 3); // Two lines and the key.
  assertMatch(picture, />C &amp; co</);
  assertMatch(picture, />100 ms</);
  assertMatch(picture, />150,000</);
});

Deno.test("plot() leaves out what was not measured", () => {
  const picture = plot(SERIES);
  assertEquals(picture.match(/<circle/g)?.length, 6);
  assert(!/NaN|Infinity|undefined/.test(picture));
});

Deno.test("plot() stays inside of its picture", () => {
  const places = [...plot(SERIES).matchAll(/<circle cx="([\d.]+)" cy="([\d.]+)"/g)].map((
    [, x, y],
  ) => [Number(x), Number(y)]);
  assert(places.every(([x = NaN, y = NaN]) => x >= 0 && x <= 960 && y >= 0 && y <= 460));
});

for (const isQuick of [false, true]) {
  Deno.test(`every work names whom ours is compared with${isQuick ? ", in a quick run too" : ""}`, () => {
    for (const work of allWorks(isQuick)) {
      const names = work.contenders.map(({ name }) => name);
      assertEquals(new Set(names).size, names.length);
      for (const { against } of work.goals) assert(against === undefined || names.includes(against), work.title);
      assert(names.length > 1 && rivals(work).has(names[0] ?? ""), work.title);
    }
  });
}
