"""What a config will cost on this machine, before anything is cached: `cskd plan`."""
