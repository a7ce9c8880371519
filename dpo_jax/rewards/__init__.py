"""From text to a score."""
