"""Experiments as plain Python: `get_config(argument) -> ConfigDict`."""
