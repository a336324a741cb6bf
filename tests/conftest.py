"""What every test is shielded from."""

import atexit
import os
import shutil
import tempfile

# A profile of whoever runs the tests would change every figure of the planner; the processes that
# tests start inherit this.
os.environ["MEGAGPT_PROFILES"] = tempfile.mkdtemp(prefix="megagpt-profiles-")
atexit.register(shutil.rmtree, os.environ["MEGAGPT_PROFILES"], ignore_errors=True)
