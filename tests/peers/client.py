#!/usr/bin/env python3
# The tutorial's client. Other than there, the address comes from the command
# line, and the end of the input ends it.
import socket
import sys

HOST = sys.argv[1]
PORT = int(sys.argv[2])
BUF_SIZE = 1024
ADDR = (HOST, PORT)

client = socket.socket()
client.connect(ADDR)

while True:
    try:
        data = input(">>> ")
    except EOFError:
        break
    if not data: break
    client.send(bytes(data, encoding='utf-8'))
    recv_data = client.recv(BUF_SIZE)
    if not recv_data: break
    print(recv_data.decode(), flush=True)

client.close()
