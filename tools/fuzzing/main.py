"""Starts the fuzz command from its file, wherever it is called from."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tools.fuzzing.command import main

if __name__ == "__main__":
    sys.exit(main())
