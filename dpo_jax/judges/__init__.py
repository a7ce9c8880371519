"""Two texts to a verdict: who judges, what is asked, what is kept."""
