import { assert, assertEquals } from "../deps.ts";
import {
  socketPair,
  type SocketStream,
  StreamRequestHandler,
  type StreamRequestHandlerClass,
  TcpServer,
} from "../mod.ts";
import { rejectionOf } from "./testing.ts";

/** Runs a handler over a pair, with no network, and gives back what its client sees. */
async function run(Handler: StreamRequestHandlerClass, ...lines: string[]): Promise<string[]> {
  const [client, request] = socketPair();
  for (const line of lines) await client.write(`${line}\n`);
  await client.closeWrite();
  const server = new TcpServer({ port: 0 }, Handler);
  try {
    await server.finishRequest(request, request.remoteAddress);
  } finally {
    await request[Symbol.asyncDispose]();
  }
  const seen = await Array.fromAsync(client.lines());
  client.close();
  return seen;
}

/** Writes down what runs; fails where it is told to. */
function recorder(...failing: string[]): { calls: string[]; Handler: StreamRequestHandlerClass } {
  const calls: string[] = [];
  function step(name: string): void {
    calls.push(name);
    if (failing.includes(name)) throw new TypeError(`${name} failed`);
  }
  class Handler extends StreamRequestHandler {
    override setup() {
      step("setup");
    }
    override handle() {
      step("handle");
    }
    override finish() {
      step("finish");
    }
  }
  return { calls, Handler };
}

Deno.test("a handler runs setup(), handle() and finish(), in this order", async () => {
  const { calls, Handler } = recorder();
  await run(Handler);
  assertEquals(calls, ["setup", "handle", "finish"]);
});

Deno.test("finish() runs although handle() throws, and the error comes out", async () => {
  const { calls, Handler } = recorder("handle");
  assertEquals((await rejectionOf(run(Handler))).message, "handle failed");
  assertEquals(calls, ["setup", "handle", "finish"]);
});

Deno.test("neither handle() nor finish() runs if setup() throws", async () => {
  const { calls, Handler } = recorder("setup");
  assertEquals((await rejectionOf(run(Handler))).message, "setup failed");
  assertEquals(calls, ["setup"]);
});

Deno.test("if handle() and finish() both throw, neither error is lost", async () => {
  const { Handler } = recorder("handle", "finish");
  const error = await rejectionOf(run(Handler));
  assert(error instanceof SuppressedError);
  assertEquals(error.suppressed.message, "handle failed");
  assertEquals(error.error.message, "finish failed");
});

Deno.test("a handler knows its request, its client and its server, also in its fields", async () => {
  const seen: unknown[] = [];
  class Fields extends StreamRequestHandler {
    readonly first: Promise<string | null> = this.request.readLine();
    override async handle() {
      seen.push(await this.first, this.clientAddress.transport, this.server instanceof TcpServer, this.signal.aborted);
    }
  }
  await run(Fields, "hello");
  assertEquals(seen, ["hello", "unix", true, false]);
});

Deno.test("a handler's server can have a type of its own", async () => {
  class Counting extends TcpServer {
    count = 0;
  }
  class Counter extends StreamRequestHandler {
    declare readonly server: Counting;
    override handle() {
      this.server.count++;
    }
  }
  const server = new Counting({ port: 0 }, Counter);
  const [client, request]: SocketStream[] = socketPair();
  assert(client !== undefined && request !== undefined);
  await server.finishRequest(request, request.remoteAddress);
  assertEquals(server.count, 1);
  client.close();
  request.close();
});

Deno.test("what a handler writes without waiting for it is sent in order", async () => {
  class Counting extends StreamRequestHandler {
    override async handle() {
      for await (const line of this.request.lines()) {
        for (let number = 1; number <= Number(line); number++) this.request.write(`${number}\n`);
      }
    }
  }
  assertEquals(await run(Counting, "3", "2"), ["1", "2", "3", "1", "2"]);
});
