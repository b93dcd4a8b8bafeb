"""`python -m metablocks` is the command `metablocks`."""

import sys

from metablocks.cli import main

if __name__ == "__main__":
    sys.exit(main())
