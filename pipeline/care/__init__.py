"""What keeps a cache whole: verify, repair, gc, and the teacher run again on a sample of it."""
