/**
 * The handlers of the model programs, as in server.py.
 *
 * @module
 */

import { Buffer } from "node:buffer";
import {
  DatagramRequestHandler,
  type DatagramRequestHandlerClass,
  type DatagramServer,
  StreamRequestHandler,
  type StreamRequestHandlerClass,
  type StreamServer,
} from "../../../mod.ts";
import type { Recorder } from "./recorder.ts";

/** A server that tells what it does. */
interface Recorded {
  readonly recorder: Recorder;
}

// --- Stream handlers

abstract class Handler extends StreamRequestHandler {
  declare readonly server: StreamServer & Recorded;

  override async setup() {
    this.server.recorder.tell("setup", this.request);
    this.server.recorder.handlers.push(new WeakRef(this));
    await this.prepare();
  }

  override async handle() {
    this.server.recorder.tell("handle", this.request);
    await this.serve();
  }

  override async finish() {
    this.server.recorder.tell("finish", this.request);
    await this.putAway();
  }

  prepare(): void {}
  serve(): void | Promise<void> {}
  putAway(): void | Promise<void> {}
}

export class Echo extends Handler {
  override async serve() {
    for await (const data of this.request) await this.request.send(data);
  }
}

class UpperLines extends Handler {
  override async serve() {
    for await (const line of this.request.lines()) await this.request.write(line.toUpperCase() + "\n");
  }
}

class RawLines extends Handler {
  override async serve() {
    for (let line; (line = await this.request.readUntil("\n")) !== null;) await this.request.write(line);
  }
}

class Greet extends Handler {
  override async serve() {
    await this.request.write("hello\n");
    for await (const _ of this.request);
  }
}

class GreetAndGo extends Handler {
  override async serve() {
    await this.request.write("hello\n");
  }
}

class GreetBuffered extends Handler {
  override serve() {
    this.request.write("hel");
    this.request.write("lo\n");
  }
}

class FourBytes extends Handler {
  override async serve() {
    for (;;) {
      await this.request.write(await this.request.readExactly(4));
      await this.request.write("\n");
    }
  }
}

class CountToTheEnd extends Handler {
  override async serve() {
    let count = 0;
    for await (const data of this.request) count += data.length;
    await this.request.write(`${count} bytes\n`);
  }
}

class AskTwice extends Handler {
  override async serve() {
    await this.request.write("your ");
    await this.request.write("name? ");
    const name = await this.request.readLine();
    await this.request.write(`hello ${name}\n`);
  }
}

class SetupAndFinish extends Handler {
  #name = "";

  override prepare() {
    this.#name = "prepared";
  }

  override async serve() {
    await this.request.write(`${this.#name}\n`);
  }

  override async putAway() {
    await this.request.write("put away\n");
  }
}

class ThrowsInSetup extends Handler {
  override prepare() {
    throw new TypeError("setup fails");
  }
}

class ThrowsInHandle extends Handler {
  override async serve() {
    await this.request.write("so far\n");
    throw new TypeError("handle fails");
  }
}

class ThrowsInFinish extends Handler {
  override putAway() {
    throw new TypeError("finish fails");
  }
}

class ThrowsInBoth extends Handler {
  override serve() {
    throw new TypeError("handle fails");
  }

  override putAway() {
    throw new TypeError("finish fails");
  }
}

class Exits extends Handler {
  override serve() {
    throw new Error("exit");
  }
}

class ClosesItself extends Handler {
  override async serve() {
    await this.request.write("bye\n");
    this.request.close();
  }
}

class ReadsPastTheEnd extends Handler {
  override async serve() {
    for await (const _ of this.request);
    await this.request.write(`again: ${(await this.request.recv())?.length ?? 0}\n`);
  }
}

class Impatient extends Handler {
  override prepare() {
    this.request.timeout = 20;
  }

  override async serve() {
    await this.request.readLine();
  }
}

class Big extends Handler {
  override async serve() {
    await this.request.write("x".repeat(4_194_304));
  }
}

class Flood extends Handler {
  override async serve() {
    await this.request.write("hello\n");
    await this.request.readLine();
    for (;;) await this.request.write("x".repeat(65_536));
  }
}

class TellsAddress extends Handler {
  override async serve() {
    const line = await this.request.readLine();
    const address = this.clientAddress;
    const isSame = address.transport !== "tcp" || line === `${address.hostname}:${address.port}`;
    await this.request.write(isSame ? "yes\n" : "no\n");
  }
}

class EveryType extends Handler {
  override async serve() {
    const bytes = new TextEncoder().encode("ab\n");
    const types: [string, Uint8Array | string][] = [
      ["bytes", bytes],
      ["bytearray", Buffer.from(bytes)],
      ["slice", new TextEncoder().encode("..ab\n").subarray(2)],
      ["empty", new Uint8Array()],
      ["read-only", new Uint8Array(new Uint8Array(bytes).buffer)],
      ["text", "ab\n"],
    ];
    for (const [name, data] of types) {
      await this.request.write(`${name}: `);
      await this.request.write(data);
    }
    // TypeScript refuses these, JavaScript does not.
    for (const [name, data] of [["16-bit numbers", Uint16Array.of(0x6261, 0x0a63)], ["number", 7]]) {
      await this.request.write(`${name}: `);
      try {
        await Reflect.apply(this.request.write, this.request, [data]);
      } catch (error) {
        await this.request.write(`${error instanceof Error ? error.name : error}\n`);
      }
    }
  }
}

class ShutsDown extends Handler {
  override async serve() {
    await this.request.readLine();
    void this.server.shutdown();
    await this.request.write("returned\n");
  }
}

export const HANDLERS: Record<string, StreamRequestHandlerClass> = {
  "echo": Echo,
  "upper lines": UpperLines,
  "raw lines": RawLines,
  "greet": Greet,
  "greet and go": GreetAndGo,
  "greet buffered": GreetBuffered,
  "four bytes": FourBytes,
  "count to the end": CountToTheEnd,
  "ask twice": AskTwice,
  "setup and finish": SetupAndFinish,
  "throws in setup": ThrowsInSetup,
  "throws in handle": ThrowsInHandle,
  "throws in finish": ThrowsInFinish,
  "throws in both": ThrowsInBoth,
  "exits": Exits,
  "closes itself": ClosesItself,
  "reads past the end": ReadsPastTheEnd,
  "impatient": Impatient,
  "big": Big,
  "flood": Flood,
  "tells address": TellsAddress,
  "every type": EveryType,
  "shuts down": ShutsDown,
};

// --- Datagram handlers

abstract class DatagramHandler extends DatagramRequestHandler {
  declare readonly server: DatagramServer & Recorded;

  override setup() {
    this.server.recorder.tell("setup", this.request);
  }

  override async handle() {
    this.server.recorder.tell("handle", this.request);
    await this.serve();
  }

  override finish() {
    this.server.recorder.tell("finish", this.request);
  }

  abstract serve(): void | Promise<void>;
}

export class DatagramEcho extends DatagramHandler {
  override async serve() {
    await this.request.reply(this.request.data);
  }
}

class DatagramUpper extends DatagramHandler {
  override async serve() {
    await this.request.reply(new TextDecoder().decode(this.request.data).toUpperCase());
  }
}

class DatagramThrows extends DatagramHandler {
  override serve() {
    throw new TypeError("handle fails");
  }
}

class DatagramLength extends DatagramHandler {
  override async serve() {
    await this.request.reply(`${this.request.data.length} bytes`);
  }
}

class DatagramSecret extends DatagramHandler {
  override async serve() {
    const text = new TextDecoder().decode(this.request.data);
    if (text !== "be quiet") await this.request.reply(text);
  }
}

export const DATAGRAM_HANDLERS: Record<string, DatagramRequestHandlerClass> = {
  "echo": DatagramEcho,
  "upper": DatagramUpper,
  "throws in handle": DatagramThrows,
  "length": DatagramLength,
  "secret": DatagramSecret,
};
