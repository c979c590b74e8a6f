"""`python -m sglang_macs`: the same as the command `sglang-macs`."""

import sys

from .cli import main

sys.exit(main())
