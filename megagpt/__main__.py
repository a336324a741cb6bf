"""python -m megagpt is the `megagpt` command."""

import sys

from megagpt.cli import main

code = main()
if "megagpt.cluster.process" in sys.modules:  # a rank among others
    from megagpt.cluster.process import end

    end(code)
sys.exit(code)
