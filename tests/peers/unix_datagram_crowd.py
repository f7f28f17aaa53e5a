#!/usr/bin/env python3
"""Many connected clients of Unix datagrams: unix_datagram_crowd.py SERVER FOLDER CLIENTS ROUNDS

In each round all send, then all receive; then it prints how many answers were right.
"""
import socket
import sys

server, folder, clients, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])

crowd = []
for i in range(clients):
    client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    client.settimeout(10)
    client.bind("%s/%d.sock" % (folder, i))
    client.connect(server)
    crowd.append(client)

right = 0
for r in range(rounds):
    for i, client in enumerate(crowd):
        client.send(b"%d in round %d" % (i, r))
    for i, client in enumerate(crowd):
        right += client.recv(65536) == b"%d in round %d" % (i, r)
print("right answers:", right, flush=True)
