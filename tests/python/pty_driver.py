#!/usr/bin/env python3
"""Runs a program on a terminal of its own: pty_driver.py COLUMNSxROWS PROGRAM [ARGUMENT...]

What comes in on standard input is typed, what the program shows goes to standard
output. When the program has ended, its exit code and whether it left the
terminal as it was go to standard error.
"""
import fcntl
import os
import pty
import selectors
import struct
import subprocess
import sys
import termios
import threading

(columns, rows), program = map(int, sys.argv[1].split("x")), sys.argv[2:]
master, slave = pty.openpty()
fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
before = termios.tcgetattr(slave)


def take_terminal():
    os.setsid()
    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)


child = subprocess.Popen(program, stdin=slave, stdout=slave, stderr=slave, preexec_fn=take_terminal)

# Ends the loop below when the program ends.
ended, has_ended = os.pipe()
threading.Thread(target=lambda: (child.wait(), os.write(has_ended, b".")), daemon=True).start()

selector = selectors.DefaultSelector()
for source in (0, master, ended):
    selector.register(source, selectors.EVENT_READ)


def show():
    data = os.read(master, 65536)
    while data:
        data = data[os.write(1, data):]


running = True
while running:
    ready = {key.fd for key, _ in selector.select()}
    if master in ready:
        show()
    elif ended in ready:
        running = False
    if 0 in ready:
        typed = os.read(0, 65536)
        if typed:
            os.write(master, typed)
        else:
            selector.unregister(0)

as_it_was = termios.tcgetattr(slave) == before

# The kernel hands on what a program shows some time later, even after its end; when nobody has the terminal any more,
# reading waits for that, and fails behind it.
os.close(slave)
try:
    while True:
        show()
except OSError:
    pass

print("exit code %d, terminal %s" % (child.returncode, "as it was" if as_it_was else "changed"), file=sys.stderr)
