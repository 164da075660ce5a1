"""What keeps a cache whole, or copies it: verify, repair, gc, export, and the teacher run again on a sample of it."""
