"""Reports: finished runs as one page that opens from disk, and the same figures as pictures."""
