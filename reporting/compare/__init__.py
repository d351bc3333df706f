"""Several runs compared: gathered into one table, tested, and told in tables, plots and one HTML page."""
