"""python -m megagpt is the `megagpt` command."""

import sys

from megagpt.cli import main

sys.exit(main())
