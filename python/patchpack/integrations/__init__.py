"""What lets other libraries run on these kernels, a package each."""
