"""Log-probabilities to one loss a pair."""
