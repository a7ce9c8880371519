"""Direct Preference Optimization and its relatives in JAX."""
