import { assertEquals } from "../deps.ts";
import { Echo } from "./testing.ts";
import { Peer, programTestIn } from "./programs.ts";
import { startHaproxy, startNginx } from "./balancers.ts";
import { TcpServer } from "../mod.ts";

for (const name of ["HAProxy", "nginx"]) {
  programTestIn(`${name} relays`, async (folder) => {
    await using server = new TcpServer({ port: 0 }, Echo);
    const { port } = server.listen();
    server.serveForever();
    await using balancer = name === "nginx"
      ? await startNginx(
        folder,
        (claim) => `stream { server { listen 127.0.0.1:${claim("front")}; proxy_pass 127.0.0.1:${port}; } }`,
      )
      : await startHaproxy(folder, (claim) => `
defaults
  mode tcp
  timeout connect 5s
  timeout client 30s
  timeout server 30s
listen front
  bind 127.0.0.1:${claim("front")}
  server one 127.0.0.1:${port}
`);
    using peer = await Peer.connect(balancer.port("front"));
    await peer.send("hello\n");
    assertEquals(await peer.receive("\n"), "hello\n");
  });
}
