"""Start of the command line by `python -m knowiso_train.cli`."""

import sys

from knowiso_train.cli import main

if __name__ == "__main__":
    sys.exit(main())
