"""The way to sites on other machines, on Flower: its messages carry our tasks, states and updates, without pickle."""
