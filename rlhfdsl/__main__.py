"""`python -m rlhfdsl` is `rlhf`."""

import sys

from rlhfdsl.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
