"""Clients that mean no good. Reads commands, one a line, and answers each with a line.

usage: peers.py PORT
"""

import resource
import selectors
import socket
import struct
import sys
import time

PORT = int(sys.argv[1])
BATCH = 25
held = []


def connect(receives=None):
    client = socket.socket()
    if receives is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
    client.connect(("127.0.0.1", PORT))
    return client


def reset(client):
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def reset_before_accept(count):
    for _ in range(count):
        reset(connect())


def reset_in_read(count):
    for done in range(0, count, BATCH):
        clients = [connect() for _ in range(min(BATCH, count - done))]
        for client in clients:
            client.sendall(b"echo\nx")
        for client in clients:
            client.recv(1)  # The handler waits for more by now, or soon.
            reset(client)


def reset_in_write(count):
    for done in range(0, count, BATCH):
        clients = [connect(4096) for _ in range(min(BATCH, count - done))]
        for client in clients:
            client.sendall(b"gigabyte\n")
        for client in clients:
            client.recv(1)
            reset(client)


def hold(count):
    """Clients that stay; the backlog keeps those that the server cannot accept."""
    for _ in range(count):
        held.append(connect())
        held[-1].sendall(b"echo\n")


def leave(_count):
    while held:
        held.pop().close()


def deaf(count):
    """Ask for a gigabyte and never read."""
    for _ in range(count):
        held.append(connect(4096))
        held[-1].sendall(b"gigabyte\n")


def drip(count):
    """A byte every now and then, of a line that never ends; answers with the longest that one has lasted."""
    selector = selectors.DefaultSelector()
    begun = {}
    for _ in range(count):
        client = connect()
        begun[client] = time.monotonic()
        selector.register(client, selectors.EVENT_READ)
    longest = 0
    while begun:
        for key, _ in selector.select(0):
            longest = max(longest, time.monotonic() - begun.pop(key.fileobj))
            selector.unregister(key.fileobj)
            key.fileobj.close()
        for client in list(begun):
            try:
                client.send(b"x")
            except OSError:
                pass  # The server has closed it: the next look finds that.
        time.sleep(0.2)
    return f"{longest:.3f}"


_, most = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
for line in sys.stdin:
    command, count = line.split()
    print("done", globals()[command](int(count)), flush=True)
