"""What every test is shielded from."""

import atexit
import os
import shutil
import signal
import tempfile

# What a shell's `&` makes a process ignore, its children ignore too: tests of Ctrl-C begin as from
# a terminal.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A profile of whoever runs the tests would change every figure of the planner; the processes that
# tests start inherit this.
os.environ["MEGAGPT_PROFILES"] = tempfile.mkdtemp(prefix="megagpt-profiles-")
atexit.register(shutil.rmtree, os.environ["MEGAGPT_PROFILES"], ignore_errors=True)
