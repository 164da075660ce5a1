"""What `cskd launch` writes, on the real thing: a SLURM on loopback, and a Ray on this machine."""
