"""What lies on disk: image shards, and the units of a cache. The only package that imports webdataset or zarr."""
