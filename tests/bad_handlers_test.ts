/** Handlers with every kind of fault: each hurts its own connection only. */

import { assertEquals } from "../deps.ts";
import {
  connect,
  type ConnectionFilter,
  type Outcome,
  type ServerOptions,
  type SocketStream,
  StreamRequestHandler,
  type StreamRequestHandlerClass,
  TcpServer,
} from "../mod.ts";
import { textOf, turnEnd } from "./fake_conn.ts";
import { onStage } from "./stage.ts";
import { networkTest, printedBy, until } from "./testing.ts";

const boom = (where: string) => new TypeError(`boom in ${where}`);

/** Serves a client that says "echo" as it should; goes wrong with others. */
abstract class Sometimes extends StreamRequestHandler {
  protected abstract misbehave(): void | Promise<void>;

  override async handle() {
    const isBad = await this.request.readLine() === "misbehave";
    if (isBad) return await this.misbehave();
    for await (const data of this.request) await this.request.send(data);
  }
}

class Throws extends StreamRequestHandler {
  override handle() {
    throw boom("handle()");
  }
}

class Rejects extends Sometimes {
  protected override misbehave() {
    return Promise.reject(boom("handle()"));
  }
}

class RejectsLater extends Sometimes {
  protected override async misbehave() {
    await turnEnd();
    throw boom("handle()");
  }
}

class ThrowsNothing extends Sometimes {
  protected override misbehave() {
    return Promise.reject(undefined);
  }
}

class ThrowsWhatCannotBePrinted extends Sometimes {
  protected override misbehave() {
    return Promise.reject({
      toString() {
        throw boom("toString()");
      },
    });
  }
}

class ThrowsInConstructor extends StreamRequestHandler {
  constructor(...args: ConstructorParameters<typeof StreamRequestHandler>) {
    super(...args);
    throw boom("the constructor");
  }
  override handle() {}
}

class ThrowsInSetup extends StreamRequestHandler {
  override setup() {
    throw boom("setup()");
  }
  override handle() {}
}

class RejectsInSetup extends StreamRequestHandler {
  override async setup() {
    await turnEnd();
    throw boom("setup()");
  }
  override handle() {}
}

class ThrowsInFinish extends Sometimes {
  protected override misbehave() {}
  override finish() {
    throw boom("finish()");
  }
}

class ThrowsInBoth extends Sometimes {
  protected override misbehave() {
    return Promise.reject(boom("handle()"));
  }
  override async finish() {
    await turnEnd();
    throw boom("finish()");
  }
}

class ClosesTwice extends Sometimes {
  protected override misbehave() {
    this.request.close();
    this.request.close();
  }
}

class ClosesAndReads extends Sometimes {
  protected override async misbehave() {
    this.request.close();
    await this.request.recv();
  }
}

class LeavesPromises extends Sometimes {
  // deno-lint-ignore require-await -- What it leaves behind is what this is about.
  protected override async misbehave() {
    this.request.write("a");
    this.request.send(new Uint8Array(5_000_000));
    this.request.flush();
    this.request.recv();
    this.request.recv();
    this.request.closeWrite();
    this.request.send("too late");
    this.request.close();
    this.request.readLine();
    this.request.write("far too late");
  }
}

class LeavesAReadBehind extends Sometimes {
  protected override misbehave() {
    this.request.readExactly(1_000);
  }
}

class ClosesAnotherOnesStream extends Sometimes {
  protected override async misbehave() {
    await using own = await connect({ port: (this.server as TcpServer).address.port });
    await own.send("echo\n");
    own.close();
    await own.recv();
  }
}

class AnswersAfterItsEnd extends Sometimes {
  protected override misbehave() {
    const { request } = this;
    setTimeout(() => request.send("late"), 1);
    return request.send("in time");
  }
}

/** What goes wrong, how many errors handleError() gets, and whether every client meets it. */
const BAD: [StreamRequestHandlerClass & { readonly name: string }, number, "all" | "some"][] = [
  [Throws, 1, "all"],
  [Rejects, 1, "some"],
  [RejectsLater, 1, "some"],
  [ThrowsNothing, 1, "some"],
  [ThrowsWhatCannotBePrinted, 1, "some"],
  [ThrowsInConstructor, 1, "all"],
  [ThrowsInSetup, 1, "all"],
  [RejectsInSetup, 1, "all"],
  [ThrowsInFinish, 1, "some"],
  [ThrowsInBoth, 2, "some"],
  [ClosesTwice, 0, "some"],
  [ClosesAndReads, 1, "some"],
  [LeavesPromises, 0, "some"],
  [LeavesAReadBehind, 0, "some"],
  [ClosesAnotherOnesStream, 1, "some"],
  [AnswersAfterItsEnd, 0, "some"],
];

/** Keeps its errors, and may go wrong itself. */
class Telling extends TcpServer {
  readonly told: unknown[] = [];
  goesWrong: "not" | "throws" | "rejects" = "not";

  override async handleError(error: unknown) {
    this.told.push(error);
    if (this.goesWrong === "throws") throw boom("handleError()");
    await turnEnd();
    if (this.goesWrong === "rejects") throw boom("handleError()");
  }
}

async function echoes(client: SocketStream, text: string): Promise<void> {
  await client.send(text);
  assertEquals(textOf(await client.readExactly(text.length)), text);
}

/** Reads to the end, or to the reset that leaving unread bytes behind is. */
async function readToEnd(client: SocketStream): Promise<void> {
  try {
    while (await client.recv() !== null);
  } catch (error) {
    if (!(error instanceof Deno.errors.ConnectionReset || error instanceof Deno.errors.BrokenPipe)) throw error;
  }
}

async function misbehave(port: number): Promise<void> {
  await using client = await connect({ port });
  await client.send("misbehave\n").catch(() => {}); // It may be closed by then.
  await readToEnd(client);
}

for (const [Bad, errors, who] of BAD) {
  for (const goesWrong of errors === 0 ? ["not"] as const : ["not", "throws", "rejects"] as const) {
    const also = goesWrong === "not" ? "" : ` and handleError() ${goesWrong}`;
    networkTest(`a handler that ${wordsOf(Bad.name)}${also} hurts its own connection only`, async () => {
      const server = new Telling({ port: 0 }, Bad);
      server.goesWrong = goesWrong;
      await printedBy(() => serveBad(server, errors, who));
      await turnEnd();
    });
  }
}

/** Lets three clients meet the handler's fault beside three that do not. */
async function serveBad(server: Telling, errors: number, who: "all" | "some"): Promise<void> {
  const { port } = server.listen();
  const serving = server.serveForever();
  try {
    const bystanders: SocketStream[] = [];
    for (let count = 0; count < 3 && who === "some"; count++) {
      const bystander = await connect({ port });
      await bystander.send("echo\n");
      await echoes(bystander, "before");
      bystanders.push(bystander);
    }
    for (let count = 0; count < 3; count++) await misbehave(port);
    await until(() => server.stats.active <= bystanders.length);
    for (const bystander of bystanders) await echoes(bystander, "after");
    const stats = server.stats;
    assertEquals([server.told.length, stats.errors], [3 * errors, 3 * errors * (server.goesWrong === "not" ? 1 : 2)]);
    for (const bystander of bystanders) bystander.close();
  } finally {
    const { cut } = await server.shutdown();
    await serving;
    assertEquals(cut, []);
  }
}

/** `"ThrowsInSetup"` as words. */
function wordsOf(name: string): string {
  return name.replace(/[A-Z]/g, (letter) => ` ${letter.toLowerCase()}`).trim();
}

class NeverEnds extends Sometimes {
  protected override misbehave() {
    return new Promise<void>(() => {});
  }
}

networkTest(
  "a handler that never ends keeps no other client from being served, and the shutdown cuts only its own",
  async () => {
    const server = new TcpServer({ port: 0 }, NeverEnds, { grace: 100 });
    const { port } = server.listen();
    const serving = server.serveForever();
    await using stuck = await connect({ port });
    await stuck.send("misbehave\n");
    await until(() => server.stats.bytesRead === 10);
    await using bystander = await connect({ port });
    await bystander.send("echo\n");
    await echoes(bystander, "served");
    const shutdown = server.shutdown();
    await readToEnd(bystander);
    bystander.close();
    const { cut, finished } = await shutdown;
    assertEquals([cut, finished], [[stuck.localAddress], 1]);
    await serving;
  },
);

// Filters whose release functions throw

class EndsAtOnce extends StreamRequestHandler {
  override handle() {}
}

class EndsLater extends StreamRequestHandler {
  override async handle() {
    await this.request.recv();
  }
}

const throwing: ConnectionFilter = (conn, { onEnd }) => {
  onEnd(() => {
    throw boom("onEnd()");
  });
  return conn;
};

/** Upgrades to a connection whose release function throws, and waits for its client. */
class Upgrades extends StreamRequestHandler {
  override async handle() {
    await this.request.upgrade(throwing);
    await this.request.recv();
  }
}

/** Who serves, over what, how the first client ends, and the outcome of it. */
const RELEASES: [string, StreamRequestHandlerClass, ServerOptions, number, Outcome][] = [
  ["a handler that ends at once", EndsAtOnce, { filters: [throwing] }, 0, "finished"],
  ["a handler that ends later", EndsLater, { filters: [throwing] }, 0, "finished"],
  ["a deadline", EndsLater, { filters: [throwing], idleTimeout: 1_000 }, 2_000, "timedOut"],
  ["a deadline after upgrade()", Upgrades, { idleTimeout: 1_000 }, 2_000, "timedOut"],
  ["a handler that ends after upgrade()", Upgrades, {}, 0, "finished"],
];

for (const [what, Handler, options, ms, outcome] of RELEASES) {
  Deno.test(`a release function that throws behind ${what} is printed once, and hurts nobody`, async () => {
    const printed = await printedBy(() =>
      onStage(Handler, options, async ({ server, time, accept }) => {
        const first = await accept();
        if (ms === 0) first.end();
        await time.advance(ms);
        assertEquals([first.isClosed, server.outcomes], [true, [outcome]]);
        const second = await accept();
        second.end();
        await turnEnd();
        assertEquals([second.isClosed, server.outcomes], [true, [outcome, "finished"]]);
        assertEquals([server.stats.active, server.stats.errors], [0, 0]);
        const { cut } = await time.advanceUntil(server.shutdown());
        assertEquals(cut, []);
      })
    );
    const error = ["Error in onEnd() of a filter:", "boom in onEnd()"];
    assertEquals(printed.map(([head, error]) => [head, error instanceof Error ? error.message : error]), [
      error,
      error,
    ]);
  });
}

Deno.test("a log whose disk is full costs the line, and nothing else", async () => {
  const { error } = console;
  let lines = 0;
  console.error = () => {
    lines++;
    throw Object.assign(new Error("No space left on device (os error 28)"), { code: "ENOSPC" });
  };
  try {
    await onStage(EndsAtOnce, { filters: [throwing] }, async ({ server, accept }) => {
      for (let served = 1; served <= 2; served++) {
        const conn = await accept();
        conn.end();
        await turnEnd();
        assertEquals([conn.isClosed, lines, server.outcomes.length, server.stats.active], [true, served, served, 0]);
      }
    });
  } finally {
    console.error = error;
  }
});
