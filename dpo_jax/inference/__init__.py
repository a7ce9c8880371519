"""A trained model at work: it samples, scores, and is written for others."""
