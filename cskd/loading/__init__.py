"""From shards to batches of views, in worker processes: `views` makes them, `stage1` and `stage2` order them, `stream` runs."""
