"""Several runs that belong together: one site left out in turn, one stage after the other."""
