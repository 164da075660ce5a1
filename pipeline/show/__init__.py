"""What a command shows while it works and keeps of it: progress, what a run is bound by, metrics."""
