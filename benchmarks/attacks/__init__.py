"""What a curious server or peer learns: attacks on what travels, each with a known answer at its extremes."""
