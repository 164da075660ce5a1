"""`python -m benchmarks.hostile`: see run.py."""

import sys

from benchmarks.hostile.run import main

if __name__ == "__main__":
    sys.exit(main())
