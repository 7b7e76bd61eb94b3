"""The command line, ``python -m patchpack``; one module a subcommand."""
