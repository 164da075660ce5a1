"""Every figure that only a GPU can give, in one run: see `python -m benchmarks.gpu --help`."""
