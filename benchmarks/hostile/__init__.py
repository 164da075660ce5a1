"""Inputs that were made to hurt: `run.py` reads them, `curated_*.py` and `mutations.py` make them."""
