"""Pictures: charts, maps, matrices and photos as Pillow images. Knows no cache, no teacher and no run."""
