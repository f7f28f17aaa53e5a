/**
 * A server whose clients are fakes, in a time that the test advances.
 *
 * @module
 */

import type { ConnectionReport, ErrorOutcome, Outcome, ServerOptions, StreamRequestHandlerClass } from "../mod.ts";
import { FakeTcpConn, turnEnd } from "./fake_conn.ts";
import { type FakeTime, withFakeTime } from "./fake_time.ts";
import { FakeListener, FakeServer } from "./testing.ts";

/** Keeps how its connections ended, and the outcomes that handleError() got. */
export class Witness extends FakeServer {
  readonly outcomes: Outcome[] = [];
  readonly errors: ErrorOutcome[] = [];
  override handleClose({ outcome }: ConnectionReport) {
    this.outcomes.push(outcome);
  }
  override handleError(_error: unknown, _clientAddress: Deno.Addr, outcome: ErrorOutcome) {
    this.errors.push(outcome);
  }
}

export interface Stage {
  readonly server: Witness;
  readonly listener: FakeListener;
  readonly time: FakeTime;
  /** Resolves when the server has ended. */
  readonly serving: Promise<void>;
  /** Lets a client connect. */
  accept(conn?: FakeTcpConn): Promise<FakeTcpConn>;
}

/** Runs `test` with a server that serves fake clients. */
export async function onStage(
  Handler: StreamRequestHandlerClass,
  options: ServerOptions,
  test: (stage: Stage) => Promise<void>,
): Promise<void> {
  await withFakeTime(async (time) => {
    const listener = new FakeListener([]);
    const server = new Witness(listener, Handler, options);
    const serving = server.serveForever();
    await listener.drained;
    const accept = async (conn = new FakeTcpConn()) => {
      listener.give(conn);
      await turnEnd();
      return conn;
    };
    await test({ server, listener, time, serving, accept });
    server.close();
    await time.advanceUntil(serving);
  });
}
