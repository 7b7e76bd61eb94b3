"""``patchpack`` inside other libraries, each imported only where its file is."""
