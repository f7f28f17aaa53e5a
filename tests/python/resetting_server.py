#!/usr/bin/env python3
"""Listens on a free port, prints it, and resets each connection when something arrives on it."""
import socket
import struct

server = socket.socket()
server.bind(('127.0.0.1', 0))
server.listen(5)
print("listening on %s:%d" % server.getsockname(), flush=True)

while True:
    conn, _ = server.accept()
    conn.recv(1024)
    conn.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
    conn.close()
