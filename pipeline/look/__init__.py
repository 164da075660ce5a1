"""What people look at: `cskd inspect`, its drawings, and words for WordNet ids."""
