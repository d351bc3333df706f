"""Settings: YAML files of departures, and the code that composes and checks them."""
