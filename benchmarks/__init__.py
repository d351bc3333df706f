"""Speed and memory, and attacks: each a command that prints a table."""
