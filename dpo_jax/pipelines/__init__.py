"""Whole experiments, stage by stage; stages that are done are skipped."""
