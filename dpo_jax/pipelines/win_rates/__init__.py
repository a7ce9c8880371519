"""Dialogue and summaries, from pairs to win rates."""
