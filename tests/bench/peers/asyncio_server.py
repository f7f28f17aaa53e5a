"""Python's asyncio, a BufferedProtocol for echo and streams for lines: asyncio_server.py SERVICE prints its port when it listens."""

import asyncio
import resource
import sys

BACKLOG = 4_096
BUFFER_BYTES = 65_536


class Echo(asyncio.BufferedProtocol):
    # One for all connections, as its bytes have left it before another one is read. A
    # Protocol is given new bytes each time, which malloc can make three times as slow.
    buffer = memoryview(bytearray(BUFFER_BYTES))

    def connection_made(self, transport):
        self.transport = transport

    def get_buffer(self, sizehint):
        return self.buffer

    def buffer_updated(self, count):
        self.transport.write(bytes(self.buffer[:count]))

    # A client that reads slower than it writes must not fill the memory.
    def pause_writing(self):
        self.transport.pause_reading()

    def resume_writing(self):
        self.transport.resume_reading()


async def echo_lines(reader, writer):
    try:
        while line := await reader.readline():
            writer.write(line)
            await writer.drain()
        writer.close()
    except ConnectionError:
        pass  # The load has ended in the middle of a message.


async def serve(service):
    if service == "lines":
        server = await asyncio.start_server(echo_lines, "127.0.0.1", 0, backlog=BACKLOG)
    else:
        server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", 0, backlog=BACKLOG)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


_, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
asyncio.run(serve(sys.argv[1] if len(sys.argv) > 1 else "echo"))
