#!/usr/bin/env python3
# Python's side of python_model_test.ts: socketserver itself. Commands come as lines
# of JSON; each call of a hook, and each command that returns, prints one.
import array
import errno
import gc
import json
import os
import socket
import socketserver
import struct
import sys
import threading
import time
import weakref

lock = threading.Lock()


def say(server, event, connection=0, **more):
    with lock:
        print(json.dumps({"server": server, "connection": connection, "event": event, **more}), flush=True)


def name_of(error):
    """What both sides call an error."""
    if isinstance(error, TimeoutError) and error.errno is None:
        return "timed out"
    if isinstance(error, OSError) and error.errno is not None:
        code = errno.errorcode[error.errno]
        return "the peer is gone" if code in ("EPIPE", "ECONNRESET") else code
    return str(error) or type(error).__name__


# --- Handlers


class Handler(socketserver.StreamRequestHandler):
    alive = weakref.WeakSet()

    def setup(self):
        self.server.tell("setup", self.request)
        self.alive.add(self)
        super().setup()
        self.prepare()

    def handle(self):
        self.server.tell("handle", self.request)
        self.serve()

    def finish(self):
        self.server.tell("finish", self.request)
        self.put_away()
        super().finish()

    def prepare(self): pass
    def serve(self): pass
    def put_away(self): pass


class Echo(Handler):
    def serve(self):
        while data := self.request.recv(65536):
            self.request.sendall(data)


class UpperLines(Handler):
    def serve(self):
        for line in self.rfile:
            self.wfile.write(line.rstrip(b"\r\n").upper() + b"\n")


class RawLines(Handler):
    def serve(self):
        while line := self.rfile.readline():
            self.wfile.write(line)


class Greet(Handler):
    def serve(self):
        self.wfile.write(b"hello\n")
        self.rfile.read()


class GreetAndGo(Handler):
    def serve(self):
        self.wfile.write(b"hello\n")


class GreetBuffered(Handler):
    wbufsize = -1

    def serve(self):
        self.wfile.write(b"hel")
        self.wfile.write(b"lo\n")


class FourBytes(Handler):
    def serve(self):
        while record := self.rfile.read(4):
            self.wfile.write(record + b"\n")


class CountToTheEnd(Handler):
    def serve(self):
        self.wfile.write(b"%d bytes\n" % len(self.rfile.read()))


class AskTwice(Handler):
    def serve(self):
        self.wfile.write(b"your ")
        self.wfile.write(b"name? ")
        name = self.rfile.readline().strip()
        self.wfile.write(b"hello " + name + b"\n")


class SetupAndFinish(Handler):
    def prepare(self):
        self.name = b"prepared"

    def serve(self):
        self.wfile.write(self.name + b"\n")

    def put_away(self):
        self.wfile.write(b"put away\n")


class ThrowsInSetup(Handler):
    def prepare(self):
        raise ValueError("setup fails")


class ThrowsInHandle(Handler):
    def serve(self):
        self.wfile.write(b"so far\n")
        raise ValueError("handle fails")


class ThrowsInFinish(Handler):
    def put_away(self):
        raise ValueError("finish fails")


class ThrowsInBoth(Handler):
    def serve(self):
        raise ValueError("handle fails")

    def put_away(self):
        raise ValueError("finish fails")


class Exits(Handler):
    def serve(self):
        raise SystemExit("exit")


class ClosesItself(Handler):
    def serve(self):
        self.wfile.write(b"bye\n")
        self.request.close()


class ReadsPastTheEnd(Handler):
    def serve(self):
        while self.request.recv(65536):
            pass
        self.wfile.write(b"again: %d\n" % len(self.request.recv(65536)))


class Impatient(Handler):
    timeout = 0.02

    def serve(self):
        self.rfile.readline()


class Big(Handler):
    def serve(self):
        self.wfile.write(b"x" * 4194304)


class Flood(Handler):
    def serve(self):
        self.wfile.write(b"hello\n")
        self.rfile.readline()
        while True:
            self.wfile.write(b"x" * 65536)


class TellsAddress(Handler):
    def serve(self):
        is_same = self.server.address_family != socket.AF_INET or "%s:%d" % self.client_address
        line = self.rfile.readline().strip().decode()
        self.wfile.write(b"yes\n" if is_same in (True, line) else b"no\n")


class EveryType(Handler):
    def serve(self):
        for name, data in (
            ("bytes", b"ab\n"),
            ("bytearray", bytearray(b"ab\n")),
            ("slice", memoryview(b"..ab\n")[2:]),
            ("empty", b""),
            ("read-only", memoryview(b"ab\n").toreadonly()),
            ("text", "ab\n"),
            ("16-bit numbers", array.array("H", b"abc\n")),
            ("number", 7),
        ):
            try:
                self.wfile.write(name.encode() + b": ")
                self.wfile.write(data)
            except TypeError:
                self.wfile.write(b"TypeError\n")


class ShutsDown(Handler):
    def serve(self):
        self.rfile.readline()
        # Waits in a thread of its own, so that a deadlock can be told.
        call = threading.Thread(target=self.server.shutdown)
        call.start()
        call.join(0.2)
        self.wfile.write(b"waits for ever\n" if call.is_alive() else b"returned\n")


HANDLERS = {
    "echo": Echo,
    "upper lines": UpperLines,
    "raw lines": RawLines,
    "greet": Greet,
    "greet and go": GreetAndGo,
    "greet buffered": GreetBuffered,
    "four bytes": FourBytes,
    "count to the end": CountToTheEnd,
    "ask twice": AskTwice,
    "setup and finish": SetupAndFinish,
    "throws in setup": ThrowsInSetup,
    "throws in handle": ThrowsInHandle,
    "throws in finish": ThrowsInFinish,
    "throws in both": ThrowsInBoth,
    "exits": Exits,
    "closes itself": ClosesItself,
    "reads past the end": ReadsPastTheEnd,
    "impatient": Impatient,
    "big": Big,
    "flood": Flood,
    "tells address": TellsAddress,
    "every type": EveryType,
    "shuts down": ShutsDown,
}


# --- Datagram handlers


class DatagramHandler(socketserver.DatagramRequestHandler):
    def setup(self):
        self.server.tell("setup", self.request)
        super().setup()

    def handle(self):
        self.server.tell("handle", self.request)
        self.serve()

    def finish(self):
        super().finish()
        self.server.tell("finish", self.request)

    def serve(self): pass


class DatagramEcho(DatagramHandler):
    def serve(self):
        self.wfile.write(self.rfile.read())


class DatagramUpper(DatagramHandler):
    def serve(self):
        data, sock = self.request
        sock.sendto(data.upper(), self.client_address)


class DatagramThrows(DatagramHandler):
    def serve(self):
        raise ValueError("handle fails")


class DatagramLength(DatagramHandler):
    def serve(self):
        self.wfile.write(b"%d bytes" % len(self.request[0]))


class DatagramSecret(DatagramHandler):
    def serve(self):
        data = self.rfile.read()
        if data != b"be quiet":
            self.wfile.write(data)


DATAGRAM_HANDLERS = {
    "echo": DatagramEcho,
    "upper": DatagramUpper,
    "throws in handle": DatagramThrows,
    "length": DatagramLength,
    "secret": DatagramSecret,
}


# --- Servers


class Hooks:
    """Tells each call of a hook; `quirk` is what the program's own hooks do."""

    allow_reuse_address = False

    def __init__(self, number, quirk, address, handler):
        self.number = number
        self.quirk = quirk
        self.count = 0
        self.numbers = weakref.WeakKeyDictionary()
        self.datagrams = {}
        self.aside = []
        self.services = 0
        self.dropping = False
        self.descriptors = None
        self.loop = None
        super().__init__(address, handler)

    def number_of(self, request):
        if isinstance(request, socket.socket):
            return self.numbers[request]
        return self.datagrams[id(request)][0]

    def tell(self, event, request, **more):
        say(self.number, event, self.number_of(request), **more)

    def server_bind(self):
        say(self.number, "server_bind")
        super().server_bind()

    def server_close(self):
        if not self.dropping:
            say(self.number, "server_close")
        super().server_close()

    def shutdown(self):
        if not self.dropping:
            say(self.number, "shutdown")
        super().shutdown()

    def get_request(self):
        request, client_address = super().get_request()
        self.count += 1
        if isinstance(request, socket.socket):
            self.numbers[request] = self.count
        else:
            self.datagrams[id(request)] = (self.count, request)
        peer = client_address[1] if isinstance(client_address, tuple) else 0
        self.tell("get_request", request, peer=peer)
        if self.quirk == "get_request throws":
            request.close()
            raise OSError(errno.ENOBUFS, "get_request fails")
        return request, client_address

    def verify_request(self, request, client_address):
        self.tell("verify_request", request)
        if self.quirk == "verify_request throws":
            raise ValueError("verify_request fails")
        return self.quirk != "verify_request says no"

    def process_request(self, request, client_address):
        if self.quirk == "process_request puts aside":
            self.aside.append(request)
        self.tell("process_request", request)
        if self.quirk == "process_request throws":
            raise ValueError("process_request fails")
        if self.quirk == "process_request puts aside":
            return
        super().process_request(request, client_address)

    def finish_request(self, request, client_address):
        self.tell("finish_request", request)
        super().finish_request(request, client_address)

    def shutdown_request(self, request):
        # For datagrams it does nothing, and neither does close_request.
        if isinstance(request, socket.socket):
            self.tell("shutdown_request", request)
        super().shutdown_request(request)

    def close_request(self, request):
        super().close_request(request)
        if isinstance(request, socket.socket):
            self.tell("close_request", request)

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        self.tell("handle_error", request, detail=name_of(error))
        if self.quirk == "handle_error throws":
            raise ValueError("handle_error fails")

    def handle_timeout(self):
        say(self.number, "handle_timeout")

    def service_actions(self):
        super().service_actions()
        if not self.quirk.startswith("service_actions"):
            return
        self.services += 1
        if self.services == 1:
            say(self.number, "service_actions")
        if self.quirk == "service_actions throws":
            raise ValueError("service_actions fails")


KINDS = {
    name: type(name, (Hooks, getattr(socketserver, name)), {})
    for name in (
        "TCPServer",
        "ThreadingTCPServer",
        "UnixStreamServer",
        "ThreadingUnixStreamServer",
        "UDPServer",
        "ThreadingUDPServer",
        "UnixDatagramServer",
        "ThreadingUnixDatagramServer",
    )
}

servers = {}


def make(number, kind, path="", port=0, handler="echo", quirk="", **_):
    handlers = DATAGRAM_HANDLERS if issubclass(KINDS[kind], socketserver.UDPServer) else HANDLERS
    return KINDS[kind](number, quirk, path or ("127.0.0.1", port), handlers[handler])


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def settle(condition):
    deadline = time.monotonic() + 5
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


def serve_forever(server):
    server.loop = threading.current_thread()
    server.serve_forever(poll_interval=0.005)


def run(number, call, more):
    server = servers.get(number)
    if call == "construct":
        servers[number] = make(number, **more)
    elif call == "listen":
        # The constructor did.
        say(number, "listening", peer=0 if more.get("path") else server.server_address[1])
    elif call == "serve_forever":
        serve_forever(server)
    elif call == "shutdown":
        server.shutdown()
    elif call == "server_close":
        server.server_close()
    elif call == "handle_request":
        server.timeout = more.get("timeout", 0) / 1000 or None
        server.handle_request()
    elif call == "with":
        with server:
            pass
    elif call == "aside":
        for request in server.aside:
            request.sendall(b"later\n")
            server.shutdown_request(request)
        server.aside.clear()
    elif call == "remember descriptors":
        server.descriptors = open_descriptors()
    elif call == "compare descriptors":
        is_same = settle(lambda: open_descriptors() <= server.descriptors)
        say(number, "descriptors are given back" if is_same else "descriptors are kept")
    elif call == "count handlers":
        gc.collect()
        is_none = settle(lambda: not len(Handler.alive))
        say(number, "handlers are given back" if is_none else "handlers are kept")
    elif call == "fail to bind":
        descriptors = open_descriptors()
        names = set()
        for _ in range(100):
            try:
                getattr(socketserver, more["kind"])(more.get("path") or ("127.0.0.1", more["port"]), Echo)
            except OSError as error:
                names.add(name_of(error))
        kept = open_descriptors() - descriptors
        say(number, "binding fails with %s, %d descriptors are kept" % (" ".join(sorted(names)), kept))
    elif call == "start and stop 20":
        many = [getattr(socketserver, more["kind"])(("127.0.0.1", 0), Echo) for _ in range(20)]
        threads = [threading.Thread(target=one.serve_forever, args=(0.005,)) for one in many]
        for thread, one in zip(threads, many):
            thread.start()
            one.shutdown()
        for thread, one in zip(threads, many):
            thread.join()
            one.server_close()
    elif call == "drop":
        server = servers.pop(number, None)
        if server is not None:
            server.dropping = True
            if server.loop is not None and server.loop.is_alive():
                server.shutdown()
            server.server_close()
        say(number, "dropped")
        return
    else:
        raise ValueError(call)
    if call != "serve_forever" or not server.dropping:
        say(number, call + " returned")


def obey(command):
    number, call = command.pop("server"), command.pop("call")
    try:
        run(number, call, command)
    except BaseException as error:
        say(number, "%s throws %s" % (call, name_of(error)))


def reset(host, port):
    """Connects, and resets the connection before anybody has accepted it."""
    with socket.create_connection((host, int(port))) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        print(client.getsockname()[1], flush=True)


def main():
    # Handlers that exit end their thread without a word; others complain on stderr.
    for line in sys.stdin:
        threading.Thread(target=obey, args=(json.loads(line),), daemon=True).start()


if len(sys.argv) == 4 and sys.argv[1] == "reset":
    reset(*sys.argv[2:])
else:
    main()
