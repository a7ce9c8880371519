"""Points of sweeps as plain Python: `get_points() -> list of dicts`."""
