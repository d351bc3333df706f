"""Scores and pictures of models: of a run that ends, of saved ones, and of every site's at every other."""
