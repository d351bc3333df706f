"""Speed, memory, privacy, attacks: each a command that prints a table; a package, as a library has one of this name."""
