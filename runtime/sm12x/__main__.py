"""``python -m sm12x``."""

import sys

from sm12x.cli import main

if __name__ == "__main__":
    sys.exit(main())
