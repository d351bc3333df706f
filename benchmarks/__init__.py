"""Speed and memory, each a command that prints a table; a package, since a library installs one of this name too."""
