"""What a process may lack without failing: characters of the terminal, a user with a name and a home."""

from __future__ import annotations

import io
import logging
import os
import pwd
import sys


def settle_in() -> None:
    """To be called once where a process of ours begins."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        pwd.getpwuid(os.getuid())
    except KeyError:
        # A container's user without a line in /etc/passwd: libraries ask for both; Docker itself takes "/".
        os.environ.setdefault("USER", f"uid{os.getuid()}")
        os.environ.setdefault("HOME", "/")
    # PEFT imports it where it is installed, and it says which kernels it lacks, whatever is being done.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
