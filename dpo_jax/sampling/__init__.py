"""From parameters to text."""
