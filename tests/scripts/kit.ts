/**
 * What the tests of the two scripts share: the stamp of server.ts, the keys of a
 * terminal, and a server of datagrams that is not the library's.
 *
 * @module
 */

/** A pattern for the time as server.ts tells it. */
export const TIME = String.raw`[A-Z][a-z]{2} [A-Z][a-z]{2} [ \d]\d \d\d:\d\d:\d\d \d{4}`;

/** A pattern for what it puts before an answer. */
export const STAMP = String.raw`\[${TIME}\] `;

export const STAMP_LENGTH = "[Thu Sep 15 22:29:12 2016] ".length;

/** A pattern for `chunks`, each behind its stamp, and for nothing else. */
export function stamped(...chunks: string[]): RegExp {
  return new RegExp(`^${chunks.map((chunk) => STAMP + chunk).join("")}$`);
}

export const ENTER = "\r";
export const CTRL_D = "\x04";

/** How a script ends that leaves its terminal as it should. */
export const SANE = "exit code 0, terminal as it was";

/** A server of the test's own, without the library, which answers with what `answer` makes of each datagram. */
export class PlainServer implements AsyncDisposable {
  readonly received: string[] = [];
  readonly #socket = Deno.listenDatagram({ transport: "udp", hostname: "127.0.0.1", port: 0 });
  readonly #answer: (text: string) => string[];
  readonly #over: Promise<void>;

  constructor(answer: (text: string) => string[]) {
    this.#answer = answer;
    this.#over = this.#serve();
  }

  get port(): number {
    const { addr } = this.#socket;
    return addr.transport === "udp" ? addr.port : NaN;
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.#socket.close();
    await this.#over;
  }

  async #serve(): Promise<void> {
    for await (const [data, from] of this.#socket) {
      const text = new TextDecoder().decode(data);
      this.received.push(text);
      for (const answer of this.#answer(text)) await this.#socket.send(new TextEncoder().encode(answer), from);
    }
  }
}
