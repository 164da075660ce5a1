"""From what a user has (class folders, a tar of them, webdataset shards) to shuffled shards with an inventory."""
