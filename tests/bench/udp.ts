/**
 * `deno task bench:udp`: UDP echo, `UdpServer` against the loop written by hand,
 * side by side in one run. The load comes from a C program (`cc`), as one that is
 * written in JavaScript would be the slower part.
 *
 * @module
 */

const SERVERS = ["UdpServer", "bare", "one array", "one array, copied"];
const ROUNDS = 5;
const SECONDS = 2;
const SOCKETS = 50;
const BYTES = 64;

const folder = await Deno.makeTempDir();
const load = `${folder}/udp_load`;
const source = new URL("udp_load.c", import.meta.url).pathname;
const built = await new Deno.Command("cc", { args: ["-O2", "-o", load, source] }).output();
if (!built.success) throw new TypeError(new TextDecoder().decode(built.stderr));

async function start(kind: string): Promise<{ process: Deno.ChildProcess; port: string }> {
  const server = new URL("udp_server.ts", import.meta.url).pathname;
  const args = ["run", "--unstable-net", "--allow-net=127.0.0.1", server, kind];
  const process = new Deno.Command(Deno.execPath(), { args, stdout: "piped" }).spawn();
  const { value } = await process.stdout.getReader().read();
  return { process, port: new TextDecoder().decode(value).trim() };
}

async function measure(port: string): Promise<number> {
  const args = [port, SOCKETS, BYTES, SECONDS].map(String);
  const { stdout } = await new Deno.Command(load, { args }).output();
  return Number(new TextDecoder().decode(stdout).split(" ")[0]);
}

function median(numbers: number[]): number {
  return numbers.toSorted((one, other) => one - other)[numbers.length >> 1] ?? NaN;
}

const servers = await Promise.all(SERVERS.map(start));
const rates: number[][] = SERVERS.map(() => []);
for (let round = 0; round < ROUNDS; round++) {
  for (const [index, { port }] of servers.entries()) rates[index]?.push(await measure(port));
}
for (const { process } of servers) process.kill();
await Deno.remove(folder, { recursive: true });

const ours = median(rates[0] ?? []);
console.log(`UDP echo, ${SOCKETS} sockets, ${BYTES} bytes; median of ${ROUNDS} rounds`);
for (const [index, kind] of SERVERS.entries()) {
  const rate = median(rates[index] ?? []);
  console.log(
    `${kind.padEnd(20)} ${String(Math.round(rate)).padStart(8)}/s   UdpServer has ${(ours / rate).toFixed(2)} of it`,
  );
}
