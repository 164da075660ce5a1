"""What a cache and a training run survive: `run.py` says which parts there are, a file each for those that are alike."""
