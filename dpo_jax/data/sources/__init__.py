"""One file a source: what it reads, row by row."""
