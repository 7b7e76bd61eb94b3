"""Models made of patchpack ops."""
