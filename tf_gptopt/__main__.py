"""`python -m tf_gptopt` is the command line."""

import sys

from tf_gptopt.cli import main

if __name__ == "__main__":
    sys.exit(main())
