"""Many runs: what they are, how they start, and the table they end in."""
