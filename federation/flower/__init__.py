"""The way to sites on other machines, on Flower: its messages carry our tasks, states and updates, without pickle."""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")  # Flower reads it once, when it is imported
