"""``python -m gdr`` is the command ``gdr``."""

import sys

from gdr.cli import main

if __name__ == "__main__":
    sys.exit(main())
