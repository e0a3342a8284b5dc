"""`python -m tf_gptopt` is the command line."""

import sys

from tf_gptopt.cli import main
from tf_gptopt.training.launch import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()
    sys.exit(main())
