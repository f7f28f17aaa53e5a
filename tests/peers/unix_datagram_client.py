#!/usr/bin/env python3
"""A client of Unix datagrams: unix_datagram_client.py WAY SERVER LOCAL

Sends each line of standard input and prints the answer. WAY is how: "sendto" from
a socket that is bound to LOCAL, "connect" from one that is connected besides, "anonymous"
from one that is bound to nothing and cannot be answered. With "deaf-" in front it
never reads an answer, and prints "sent". A "?" of LOCAL stands for a byte that is no UTF-8.
"""
import os
import socket
import sys

way, server, local = sys.argv[1:]
deaf = way.startswith("deaf-")
way = way.removeprefix("deaf-")

client = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
client.settimeout(10)
if way != "anonymous":
    client.bind(os.fsencode(local).replace(b"?", b"\xff"))
if way == "connect":
    client.connect(server)

for line in sys.stdin:
    data = line.rstrip("\n").encode()
    if way == "connect":
        client.send(data)
    else:
        client.sendto(data, server)
    if deaf or way == "anonymous":
        print("sent", flush=True)
    else:
        print(client.recv(65536).decode(), flush=True)
