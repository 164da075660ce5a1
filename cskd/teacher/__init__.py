"""The CNN that is run once: built, checked, folded, and run in batches of a fixed size."""
