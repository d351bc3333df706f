"""The search for a method's settings behind `sweep.py tune`."""
