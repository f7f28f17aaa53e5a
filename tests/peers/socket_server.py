#!/usr/bin/env python3
# The tutorial's first server. Other than there, the port comes from the command
# line and the one that was bound is printed, conn and not tcp_server talks to
# the client, and what is sent is bytes, as Python 3 wants it.
import socket
import sys
import time

IP_PORT = ('127.0.0.1', int(sys.argv[1]))
BUF_SIZE = 1024

tcp_server = socket.socket()
tcp_server.bind(IP_PORT)
tcp_server.listen(5)
print("listening on %s:%d" % tcp_server.getsockname(), flush=True)

while True:
    print("waiting for connection...", flush=True)
    conn, addr = tcp_server.accept()
    print("...connected from:", addr, flush=True)
    while True:
        data = conn.recv(BUF_SIZE)
        if not data: break
        conn.send(bytes('[%s] %s' % (time.ctime(), data), encoding='utf-8'))

tcp_server.close()
