"""The command line: `glesam segment / bag / demo / bench`; one module a command."""
