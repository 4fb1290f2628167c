"""`python -m bcnn` is the command `bcnn`."""

import sys

from bcnn.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
