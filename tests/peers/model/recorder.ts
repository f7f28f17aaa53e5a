/**
 * Tells what a server's hooks do, as events under Python's names.
 *
 * @module
 */

import { IncompleteReadError, LimitOverrunError, type SocketStream } from "../../../mod.ts";

/** What both sides call an error. */
export function nameOf(error: unknown): string {
  if (error instanceof LimitOverrunError || error instanceof IncompleteReadError) return error.name;
  if (error instanceof Deno.errors.ConnectionReset || error instanceof Deno.errors.BrokenPipe) {
    return "the peer is gone";
  }
  if (error instanceof Deno.errors.TimedOut) return "timed out";
  if (error instanceof Deno.errors.AddrInUse) return "EADDRINUSE";
  return error instanceof Error ? error.message : String(error);
}

/** What the servers of all kinds do alike: tell each call, and follow the scenario's quirk. */
export class Recorder {
  readonly number: number;
  readonly quirk: string;
  readonly aside: SocketStream[] = [];
  /** To see which of them are still in memory. */
  handlers: WeakRef<object>[] = [];
  isDropping = false;
  descriptors = 0;
  #count = 0;
  #services = 0;
  #hasBound = false;
  /** By request and, as `handleError()` has nothing else, by the client's address, which is one object for one request. */
  readonly #numbers = new WeakMap<object, number>();

  constructor(number: number, quirk: string) {
    this.number = number;
    this.quirk = quirk;
  }

  say(event: string, connection = 0, more: Record<string, string | number> = {}): void {
    console.log(JSON.stringify({ server: this.number, connection, event, ...more }));
  }

  tell(event: string, request: object, more: Record<string, string | number> = {}): void {
    this.say(event, this.#numbers.get(request) ?? 0, more);
  }

  /** The first `listen()` binds. */
  bind(): void {
    if (!this.#hasBound) this.say("server_bind");
    this.#hasBound = true;
  }

  tellServer(event: string): void {
    if (!this.isDropping) this.say(event);
  }

  getRequest(request: object, address: Deno.Addr): void {
    this.#numbers.set(request, ++this.#count).set(address, this.#count);
    this.tell("get_request", address, { peer: "port" in address ? address.port : 0 });
    if (this.quirk === "get_request throws") throw new TypeError("get_request fails");
  }

  verifyRequest(request: object): boolean {
    this.tell("verify_request", request);
    if (this.quirk === "verify_request throws") throw new TypeError("verify_request fails");
    return this.quirk !== "verify_request says no";
  }

  /** Whether to go on. */
  processRequest(request: object): boolean {
    this.tell("process_request", request);
    if (this.quirk === "process_request throws") throw new TypeError("process_request fails");
    return this.quirk !== "process_request puts aside";
  }

  handleError(error: unknown, address: Deno.Addr): void {
    this.tell("handle_error", address, { detail: nameOf(error) });
    if (this.quirk === "handle_error throws") throw new TypeError("handle_error fails");
  }

  serviceActions(): void {
    if (!this.quirk.startsWith("service_actions")) return;
    this.#services++;
    if (this.#services === 1) this.say("service_actions");
    if (this.quirk === "service_actions throws") throw new TypeError("service_actions fails");
  }

  async closeRequest(request: object, close: () => void | Promise<void>): Promise<void> {
    this.tell("shutdown_request", request);
    await close();
    this.tell("close_request", request);
  }
}
