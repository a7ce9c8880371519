"""Entry points: each parses flags and calls one function of the package."""
