/**
 * A server for production, to copy and to change: an echo by line with a log in JSON, health, metrics, the PROXY
 * protocol, and restarts that lose nothing. `../running.md` says how to run it.
 */

import { parseArgs } from "node:util";
import { proxyProtocol } from "../../extras/proxy_protocol.ts";
import { type ConnectionReport, type ErrorOutcome, formatAddress, perHost, printable } from "../../mod.ts";
import {
  type ServerStats,
  type SocketStream,
  StreamRequestHandler,
  TcpServer,
  type TcpServerAddress,
} from "../../mod.ts";

// --- The service -------------------------------------------------------------------

class Stamp extends StreamRequestHandler {
  override async handle() {
    for await (const line of this.request.lines()) await this.request.write(`[${new Date().toISOString()}] ${line}\n`);
  }
}

/** A server that logs what happens. */
class Service extends TcpServer {
  override handleOpen(_request: SocketStream, client: Deno.Addr) {
    log("opened", { client: formatAddress(client) });
  }

  override handleClose(report: ConnectionReport, client: Deno.Addr) {
    log("closed", { client: formatAddress(client), ...report });
  }

  override handleRefuse(client: Deno.Addr) {
    log("refused", { client: formatAddress(client) });
  }

  override handleError(error: unknown, client: Deno.Addr, outcome: ErrorOutcome) {
    log("error", { client: formatAddress(client), outcome, message: messageOf(error) });
  }

  override handleOverload(error: unknown) {
    log("overload", { message: messageOf(error) });
  }
}

function log(event: string, fields: Record<string, unknown>) {
  console.log("%s", JSON.stringify({ time: new Date().toISOString(), event, ...fields }));
}

function messageOf(error: unknown): string {
  return printable(error instanceof Error ? error.message : String(error));
}

// --- For operators: health and metrics ---------------------------------------------

const METRICS: [key: keyof ServerStats, type: "counter" | "gauge", help: string][] = [
  ["accepted", "counter", "Connections that were accepted."],
  ["active", "gauge", "Connections that are open."],
  ["aborted", "counter", "Connections whose client vanished."],
  ["timedOut", "counter", "Connections that a deadline ended."],
  ["errors", "counter", "Errors of handlers and hooks."],
  ["refused", "counter", "Connections of a host that has as many as it may."],
  ["handshakeFailures", "counter", "Connections without a valid PROXY header."],
  ["overloads", "counter", "Times that descriptors or memory ran out."],
  ["bytesRead", "counter", "Bytes that were received."],
  ["bytesWritten", "counter", "Bytes that were sent."],
];

const METRICS_HEADERS = { "content-type": "text/plain; version=0.0.4" };

/** The counts in the text format of Prometheus. */
function metricsOf(stats: ServerStats): string {
  return METRICS.map(([key, type, help]) => {
    const words = key.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
    const name = `socketserver_${words}${type === "counter" ? "_total" : ""}`;
    return `# HELP ${name} ${help}\n# TYPE ${name} ${type}\n${name} ${stats[key]}\n`;
  }).join("");
}

function serveOperators(server: { readonly stats: ServerStats }, isDraining: () => boolean): void {
  const { hostname, port } = new URL(`tcp://${flags["ops-port"].replace(/^\d+$/, "127.0.0.1:$&")}`);
  const onListen = (address: Deno.NetAddr) => log("operators", { address: formatAddress(address) });
  Deno.serve({ hostname, port: Number(port), onListen }, ({ url }) => {
    const { pathname } = new URL(url);
    if (pathname === "/metrics") return new Response(metricsOf(server.stats), { headers: METRICS_HEADERS });
    if (pathname !== "/healthz") return new Response("see /healthz and /metrics\n", { status: 404 });
    return isDraining() ? new Response("draining\n", { status: 503 }) : new Response("ok\n");
  });
}

// --- From start to end -------------------------------------------------------------

const FLAGS = {
  hostname: { type: "string", default: "127.0.0.1" },
  port: { type: "string", default: "8009" },
  "ops-port": { type: "string", default: "8010" }, // [HOST:]PORT; HOST is 127.0.0.1.
  "drain-delay": { type: "string", default: "3000" }, // Milliseconds: longer than a balancer takes to notice.
  "proxy-from": { type: "string" }, // Addresses and ranges, with commas between.
  "max-connections": { type: "string", default: "10000" },
  "max-connections-per-host": { type: "string", default: "Infinity" },
  "idle-timeout": { type: "string", default: "Infinity" }, // Milliseconds.
  workers: { type: "string", default: "0" }, // Threads, each with these limits; 0: the main thread serves.
} as const;

let flags: ReturnType<typeof parseArgs<{ options: typeof FLAGS }>>["values"];

function number(name: keyof typeof FLAGS): number {
  const value = Number(flags[name]);
  if (value >= 0) return value;
  throw new RangeError(`--${name} must be a number, 0 or more: it is "${flags[name]}"`);
}

function makeServer(address: TcpServerAddress): Service {
  const from = flags["proxy-from"]?.split(",");
  const filters = from === undefined ? [] : [proxyProtocol({ from })];
  filters.push(perHost(number("max-connections-per-host"))); // Behind the header: it counts clients, not balancers.
  const limits = { maxConnections: number("max-connections"), idleTimeout: number("idle-timeout") };
  return new Service(address, Stamp, { filters, ...limits });
}

async function main(): Promise<void> {
  flags = parseArgs({ options: FLAGS }).values;
  const address = { hostname: flags.hostname, port: number("port") };
  const workers = number("workers");
  const Pool = workers > 0 ? (await import("../../extras/worker_pool.ts")).WorkerPool : undefined;
  const server = Pool ? new Pool(import.meta.url, makeServer, { ...address, workers }) : makeServer(address);
  if ("isWorker" in server && server.isWorker) return await server.serveForever().catch(() => {});
  const drainDelay = number("drain-delay");
  let isDraining = false;
  const end = () => {
    if (isDraining) return void server.close(); // The second signal: somebody is in a hurry.
    isDraining = true;
    setTimeout(() => server.shutdown(), drainDelay);
  };
  for (const signal of ["SIGINT", "SIGTERM"] as const) Deno.addSignalListener(signal, end);
  log("listening", { address: formatAddress(await server.listen()) });
  serveOperators(server, () => isDraining);
  await server.serveForever();
  const { cut, finished, duration } = await server.shutdown(); // It is over: this is its report.
  log("stopped", { finished, cut: cut.map(formatAddress), duration, ...server.stats });
  Deno.exit(0);
}

await main().catch((error) => {
  const flags = error instanceof TypeError ? `; the flags are --${Object.keys(FLAGS).join(" --")}` : "";
  console.error("service.ts: %s%s", messageOf(error), flags);
  Deno.exit(1);
});
