"""State on disk: written so that a killed write never looks complete."""
