"""Imported before anything else by a program that was started, because `import torch` takes seconds.

Ctrl-C ends the program at once and silently until `cli.guard` takes over. Standard streams that were closed are opened
on the null device: otherwise Python has None in their place, and the next file that is opened gets their number. A
reader of stderr that ends does not end the program.
"""

import io
import os
import signal
import sys


class Diagnostics(io.FileIO):
    """A stream whose reader may end: what is written then is lost."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def text_stream(raw: io.FileIO) -> io.TextIOWrapper:
    buffer = io.BufferedReader(raw) if raw.readable() else io.BufferedWriter(raw)
    return io.TextIOWrapper(buffer, encoding="utf-8", errors="backslashreplace", line_buffering=True)


if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

for number, name in enumerate(("stdin", "stdout", "stderr")):
    if getattr(sys, name) is None:
        # the system gives the lowest number that is free, which is this one
        os.open(os.devnull, os.O_RDWR)
        setattr(sys, name, text_stream(io.FileIO(number, "r" if number == 0 else "w", closefd=False)))
sys.stderr = text_stream(Diagnostics(2, "w", closefd=False))
