"""What `export.py` writes of a model, beside its weights."""
