"""The systems of the literature, one readable file each."""
