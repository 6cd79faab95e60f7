"""`python -m fastadv` is the command `fastadv`."""

from __future__ import annotations

import sys

from fastadv.cli import main

if __name__ == "__main__":
    sys.exit(main())
