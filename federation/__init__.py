"""The corridors between sites and server: one currency, one contract, one round loop."""
