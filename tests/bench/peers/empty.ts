/**
 * Listens, prints its port, and does nothing else: what the start of Deno itself takes.
 *
 * @module
 */

const listener = Deno.listen({ hostname: "127.0.0.1", port: 0 });
console.log(listener.addr.port);
await listener.accept();
