"""Measures what idle connections cost: python3 tests/bench/idle.py [--tls] 1000 5000 10000

For each number, server.ts gets so many clients that have exchanged 64 bytes with it and are
silent. Prints what the server has resident, what the kernel has for both ends of them, and
the processor time that it took the server to accept one and to answer it.
"""

import os
import socket
import ssl
import subprocess
import sys
import tempfile
import time

MESSAGE = b"x" * 63 + b"\n"


def resident(pid):
    """Bytes that the process has in memory."""
    with open(f"/proc/{pid}/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def kernel():
    """Bytes of the kernel's own objects, such as sockets and descriptors."""
    with open("/proc/meminfo") as memory:
        return next(int(line.split()[1]) * 1024 for line in memory if line.startswith("Slab"))


def processor(pid):
    """Seconds that the process has computed, all threads together."""
    with open(f"/proc/{pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def certificate(folder):
    """A certificate for 127.0.0.1 and its key, with the curve that most servers have."""
    files = [f"{folder}/cert.pem", f"{folder}/key.pem"]
    new = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /CN=bench -days 1"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-addext", "basicConstraints=critical,CA:FALSE"]
    subprocess.run(["openssl", *new.split(), *names, "-out", files[0], "-keyout", files[1]], check=True, stderr=-3)
    return files


def start(tls):
    """Starts server.ts on a port that is free; returns both when it listens."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--cert", tls[0], "--key", tls[1]] if tls else []
    command = ["deno", "run", "--allow-net=127.0.0.1", "--allow-read", "server.ts", "--quiet", "--port", str(port)]
    server = subprocess.Popen([*command, *flags], env={**os.environ, "DENO_NO_UPDATE_CHECK": "1"})
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return server, port
        except ConnectionRefusedError:
            time.sleep(0.1)


def measure(count, tls):
    server, port = start(tls)
    context = ssl._create_unverified_context() if tls else None
    time.sleep(1)
    begun = (resident(server.pid), kernel(), processor(server.pid))
    clients = []
    for _ in range(count):
        client = socket.create_connection(("127.0.0.1", port))
        if context:
            client = context.wrap_socket(client)
        client.sendall(MESSAGE)
        received = b""
        while not received.endswith(b"\n"):
            received += client.recv(256)
        clients.append(client)
    computed = processor(server.pid) - begun[2]
    time.sleep(3)
    ended = (resident(server.pid), kernel())
    each = [(after - before) / count / 1024 for before, after in zip(begun, ended)]
    print(
        f"{count:7,} {'TLS ' if tls else ''}connections: {ended[0] / 2**20:6.1f} MiB resident, {each[0]:5.1f} KiB each;"
        f" kernel {each[1]:5.1f} KiB each, both ends; {computed / count * 1e6:6.1f} us each",
        flush=True,
    )
    for client in clients:
        client.close()
    server.kill()
    server.wait()


with tempfile.TemporaryDirectory() as folder:
    arguments = sys.argv[1:]
    tls = certificate(folder) if "--tls" in arguments else None
    for count in map(int, [argument for argument in arguments if argument != "--tls"]):
        measure(count, tls)
