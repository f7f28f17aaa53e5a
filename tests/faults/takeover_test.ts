/** A new process takes the port over while the old one drains, with no balancer in front. */

import { assert, assertEquals } from "../../deps.ts";
import type { LoadReport } from "./load.ts";
import { Program } from "../programs.ts";
import { peerTest, scaled } from "../testing.ts";

const HANDOVERS = scaled(3, 100);

/** Starts the rest of its arguments in a network of its own; the first is what tcp_migrate_req is there. */
const IN_A_NETWORK = `exec unshare --map-root-user --net sh -c 'python3 -c "
import fcntl, socket, struct
SIOCSIFFLAGS, IFF_UP = 0x8914, 1
fcntl.ioctl(socket.socket(), SIOCSIFFLAGS, struct.pack(\\"16sh22x\\", b\\"lo\\", IFF_UP))
" && echo $0 > /proc/sys/net/ipv4/tcp_migrate_req && exec "$@"' "$@"`;

async function takeOver(migrates: 0 | 1): Promise<LoadReport & { bytesOut: number }> {
  const script = new URL("takeover.ts", import.meta.url).pathname;
  const permissions = ["--allow-net=127.0.0.1", "--allow-run", "--allow-read", "--allow-env"];
  const run = [Deno.execPath(), "run", "--quiet", ...permissions, script, `${HANDOVERS}`, "20", "5"];
  await using program = Program.start("sh", ["-c", IN_A_NETWORK, "sh", `${migrates}`, ...run]);
  for (let count = 1; count <= HANDOVERS; count++) await program.printed(`handover ${count}\n`);
  const { code, stdout, stderr } = await program.ended();
  assertEquals({ code, stderr }, { code: 0, stderr: "" });
  return JSON.parse(stdout.slice(stdout.indexOf("{")));
}

/** Whether this machine lets its user make a network. */
async function canMakeNetworks(): Promise<boolean> {
  try {
    const { success } = await new Deno.Command("unshare", { args: ["--map-root-user", "--net", "true"] }).output();
    return success;
  } catch (error) {
    if (error instanceof Deno.errors.NotFound) return false; // Not Linux.
    throw error;
  }
}

function takeOverTest(migrates: 0 | 1, outcome: string, check: (report: LoadReport) => void): void {
  peerTest(
    ["python3"],
    `${HANDOVERS} processes take a port over with tcp_migrate_req=${migrates}: ${outcome}`,
    async () => {
      if (!await canMakeNetworks()) {
        return console.log(
          "Left out: the test may not make a network of its own (unshare)",
        );
      }
      const { bytesOut, ...report } = await takeOver(migrates);
      assertEquals(bytesOut, report.bytes); // What was answered has arrived.
      check(report);
    },
  );
}

takeOverTest(1, "no exchange fails", ({ failures, answered }) => {
  assertEquals(failures, []);
  assert(answered > HANDOVERS * 100);
});

takeOverTest(0, "none fails but those that wait when the old one closes", ({ failures, answered }) => {
  // Each process has a queue of its own; what is in the old one's when it closes is reset.
  assertEquals(failures.filter((failure) => !failure.startsWith("ConnectionReset")), []);
  assert(failures.length < answered / 20, `${failures.length} of ${answered} were reset`);
});
