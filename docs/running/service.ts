/**
 * A server for production, to copy and to change: an echo by line with a log in JSON, health, metrics, the PROXY
 * protocol, and restarts that lose nothing. `../running.md` says how to run it.
 */

import { parseArgs } from "node:util";
import { proxyProtocol } from "../../extras/proxy_protocol.ts";
import { formatAddress, perHost, printable, StreamRequestHandler, TcpServer } from "../../mod.ts";
import type { ConnectionReport, ErrorOutcome, ServerStats, SocketStream, TcpServerAddress } from "../../mod.ts";

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
    log("closed", { client: formatAddress(client), ...report, duration: Math.round(report.duration) });
  }

  override handleRefuse(client: Deno.Addr) {
    log("refused", { client: formatAddress(client) });
  }

  override handleError(error: unknown, client: Deno.Addr, outcome: ErrorOutcome) {
    if (outcome === "aborted" || outcome === "timedOut") return; // "closed" says so.
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
  return printable(String(error instanceof Error ? error.message : error).replace(/\n[^]*/, ""));
}

// --- For operators: health and metrics ---------------------------------------------

const METRICS: [key: keyof ServerStats, type: "counter" | "gauge", help: string][] = [
  ["accepted", "counter", "Connections that were accepted."],
  ["active", "gauge", "Connections that are open."],
  ["aborted", "counter", "Connections whose client vanished."],
  ["timedOut", "counter", "Connections that a deadline ended."],
  ["errors", "counter", "Errors of handlers and hooks."],
  ["lost", "counter", "Connections that were over before they were accepted, and health checks."],
  ["refused", "counter", "Connections that a filter refused: a host has too many, or is none of the proxies."],
  ["handshakeFailures", "counter", "Connections that failed in a filter, such as by their PROXY header."],
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

function serveOperators(server: { readonly stats: ServerStats }, health: () => string): void {
  const place = flags["ops-port"];
  const [, hostname = "127.0.0.1", port] = /^(?:(.+):)?(\d{1,5})$/.exec(place) ?? [];
  if (port === undefined) throw new RangeError(`--ops-port must be [HOST:]PORT: it is "${place}"`);
  const onListen = (address: Deno.NetAddr) => log("operators", { address: formatAddress(address) });
  Deno.serve({ hostname, port: Number(port), onListen }, ({ url }) => {
    const { pathname } = new URL(url);
    if (pathname === "/metrics") return new Response(metricsOf(server.stats), { headers: METRICS_HEADERS });
    if (pathname !== "/healthz") return new Response("see /healthz and /metrics\n", { status: 404 });
    return new Response(`${health()}\n`, { status: health() === "ok" ? 200 : 503 });
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

function number(name: keyof typeof FLAGS, least = 0): number {
  const value = flags[name] === "" ? NaN : Number(flags[name]);
  if (value >= least) return value;
  throw new RangeError(`--${name} must be a number, ${least} or more: it is "${flags[name]}"`);
}

function makeServer(address: TcpServerAddress): Service {
  const from = flags["proxy-from"]?.split(/[,\s]+/);
  const filters = from === undefined ? [] : [proxyProtocol({ from })];
  filters.push(perHost(number("max-connections-per-host", 1))); // Behind the header: it counts clients, not balancers.
  const limits = { maxConnections: number("max-connections", 1), idleTimeout: number("idle-timeout", 1) };
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
  let health = "starting";
  const end = () => {
    if (health === "draining") return void server.close(); // The second signal: somebody is in a hurry.
    health = "draining";
    log("draining", { delay: drainDelay, active: server.stats.active });
    setTimeout(() => server.shutdown(), drainDelay);
  };
  serveOperators(server, () => health);
  for (const signal of ["SIGINT", "SIGTERM"] as const) Deno.addSignalListener(signal, end);
  log("listening", { address: formatAddress(await server.listen()) });
  if (health === "starting") health = "ok";
  await server.serveForever();
  const { cut, finished, duration } = await server.shutdown(); // It is over: this is its report.
  log("stopped", { finished, cut: cut.map(formatAddress), duration, ...server.stats });
  Deno.exit(0);
}

await main().catch((error) => {
  const help = /^ERR_PARSE/.test(error?.code) ? `; the flags are --${Object.keys(FLAGS).join(" --")}` : "";
  console.error("service.ts: %s%s", messageOf(error), help);
  Deno.exit(error instanceof TypeError || error instanceof RangeError ? 2 : 1);
});
