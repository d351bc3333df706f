"""Speed, memory, privacy and attacks: each a command that prints a table; a package, as a library has one of this name."""
