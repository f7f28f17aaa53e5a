"""Python's ThreadingTCPServer: threads.py SERVICE prints its port when it listens."""

import resource
import socket
import socketserver
import sys

BUFFER_BYTES = 65_536


class Echo(socketserver.BaseRequestHandler):
    def handle(self):
        try:
            while data := self.request.recv(BUFFER_BYTES):
                self.request.sendall(data)
        except ConnectionError:
            pass  # The load has ended in the middle of a message.


class Lines(socketserver.StreamRequestHandler):
    def handle(self):
        try:
            for line in self.rfile:
                self.wfile.write(line)
        except ConnectionError:
            pass


class Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    request_queue_size = 4_096

    def get_request(self):
        request, address = super().get_request()
        request.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return request, address


_, limit = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
with Server(("127.0.0.1", 0), Lines if sys.argv[1:] == ["lines"] else Echo) as server:
    print(server.server_address[1], flush=True)
    server.serve_forever()
