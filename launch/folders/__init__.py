"""A run's folder: opened again, gone on with, its models and what is kept beside its scores."""
