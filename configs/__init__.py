"""Settings: YAML files of departures, and the code that composes and checks them."""

from fedseg import one_copy

one_copy(__name__)
