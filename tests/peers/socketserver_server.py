#!/usr/bin/env python3
# The tutorial's second server. Other than there, the port comes from the command
# line and the one that was bound is printed, and bytes() is told the encoding, as
# Python 3 wants it.
import socketserver
import sys
import time

HOST = '127.0.0.1'
PORT = int(sys.argv[1])
ADDR = (HOST, PORT)
BUF_SIZE = 1024

class Myserver(socketserver.BaseRequestHandler):
    def handle(self):
        while True:
            print("...connected from:", self.client_address, flush=True)
            data = self.request.recv(BUF_SIZE)
            if not data: break
            self.request.send(bytes("%s %s" % (time.ctime(), data), encoding='utf-8'))

server = socketserver.ThreadingTCPServer(ADDR, Myserver)
print("listening on %s:%d" % server.server_address, flush=True)
print("waiting for connection...", flush=True)
server.serve_forever()
