"""Networks of transformers: configurations read back from shapes, folders that its own classes open."""
