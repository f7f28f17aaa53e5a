/**
 * Clients that ask a server of lines, such as `server.ts --lines`, without a
 * pause, and know what became of each question.
 *
 * @module
 */

import { connect, IncompleteReadError, type SocketStream } from "../../mod.ts";

/** Nobody who is served waits that long. */
const TIMEOUT_MS = 20_000;

/** Milliseconds between two exchanges of a lasting connection, at most. */
const PAUSE_MS = 20;

/** How many clients there are, and what they do. */
export interface LoadOptions {
  brief: number;
  lasting: number;
  /**
   * Exchanges of a brief client.
   *
   * @default {1}
   */
  exchanges?: number;
}

/** What a load has seen. */
export interface LoadReport {
  /** Questions that were answered, rightly. */
  answered: number;
  /** Bytes of the answers. */
  bytes: number;
  /** Connections that the server ended while nothing was under way. */
  ended: number;
  /** Questions that crossed the end of a lasting connection: not a byte came back, and they were asked again. */
  crossed: number;
  /** What went wrong in any other way. */
  failures: string[];
}

/**
 * A crowd of clients. A brief one connects, makes its exchanges and closes; whatever happens to it but right answers is a failure. A lasting one
 * exchanges until the server ends the connection, and connects again.
 *
 * A question of a lasting one may cross the end: it leaves when the server has
 * closed already. It is counted as `crossed` if no byte of an answer came, and is
 * asked again. Nobody can avoid that who talks without saying goodbye; that no
 * such question was served is for the caller to compare with the server's count.
 */
export class Load {
  readonly report: LoadReport = { answered: 0, bytes: 0, ended: 0, crossed: 0, failures: [] };
  readonly #port: number;
  readonly #exchanges: number;
  readonly #over: Promise<unknown>;
  #isOver = false;
  #asked = 0;

  constructor(port: number, { brief, lasting, exchanges = 1 }: LoadOptions) {
    this.#port = port;
    this.#exchanges = exchanges;
    this.#over = Promise.all([
      ...Array.from({ length: brief }, () => this.#repeat(() => this.#visit())),
      ...Array.from({ length: lasting }, () => this.#repeat(() => this.#stay())),
    ]);
  }

  /** Lets everyone finish what they have begun. */
  async end(): Promise<LoadReport> {
    this.#isOver = true;
    await this.#over;
    return this.report;
  }

  async #repeat(come: () => Promise<void>): Promise<void> {
    while (!this.#isOver) {
      try {
        await come();
      } catch (error) {
        this.report.failures.push(String(error));
      }
    }
  }

  async #visit(): Promise<void> {
    await using stream = await connect({ port: this.#port, timeout: TIMEOUT_MS });
    for (let count = 0; count < this.#exchanges; count++) {
      const question = this.#nextQuestion();
      await stream.send(`${question}\n`);
      this.#check(question, await stream.readLine());
    }
  }

  async #stay(): Promise<void> {
    let question = this.#nextQuestion();
    using stream = await connect({ port: this.#port, timeout: TIMEOUT_MS });
    while (!this.#isOver) {
      // One that listens all the time sees the end when it comes.
      const answer = stream.readLine();
      if (await hasSettledWithin(answer, Math.random() * PAUSE_MS)) {
        const early = await answer.catch(nullIfGone);
        if (early !== null) throw new Error(`"${early}" answers nothing`);
        this.report.ended++;
        return;
      }
      if (!await this.#ask(stream, question, answer)) return;
      question = this.#nextQuestion();
    }
  }

  /** Whether `question` was answered; `false` if it has crossed the end. */
  async #ask(stream: SocketStream, question: string, answer: Promise<string | null>): Promise<boolean> {
    const { bytesRead } = stream;
    const [, line] = await Promise.all([
      stream.send(`${question}\n`).catch(nullIfGone),
      answer.catch(nullIfGone),
    ]);
    if (line === null && stream.bytesRead === bytesRead) {
      this.report.crossed++;
      return false;
    }
    this.#check(question, line);
    return true;
  }

  #nextQuestion(): string {
    return `question ${this.#asked++}`;
  }

  #check(question: string, answer: string | null): void {
    if (!answer?.endsWith(`] ${question}`)) throw new Error(`"${question}" was answered with ${Deno.inspect(answer)}`);
    this.report.answered++;
    this.report.bytes += answer.length + 1;
  }
}

/** Whether `promise` settles within `ms`. */
async function hasSettledWithin(promise: Promise<unknown>, ms: number): Promise<boolean> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<boolean>((resolve) => timer = setTimeout(() => resolve(false), ms));
  try {
    return await Promise.race([late, promise.then(() => true, () => true)]);
  } finally {
    clearTimeout(timer);
  }
}

/** A connection that is gone answers nothing; whatever else went wrong is thrown. */
function nullIfGone(error: unknown): null {
  const { ConnectionReset, BrokenPipe } = Deno.errors;
  const isGone = error instanceof ConnectionReset || error instanceof BrokenPipe;
  if (isGone && !(error instanceof IncompleteReadError)) return null;
  throw error;
}
