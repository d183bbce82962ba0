"""`python -m glesam_ros.cli` is `glesam`."""

from __future__ import annotations

import sys

from glesam_ros.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
