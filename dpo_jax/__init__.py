"""Direct Preference Optimization and its relatives in JAX."""

__version__ = "0.1.0"
