"""`python -m benchmarks.launch`: see run.py."""

import sys

from benchmarks.launch.run import main

if __name__ == "__main__":
    sys.exit(main())
