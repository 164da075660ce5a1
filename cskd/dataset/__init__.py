"""What lies in the shards: the frozen list of samples, the reader of their bytes, the decoder of images."""
