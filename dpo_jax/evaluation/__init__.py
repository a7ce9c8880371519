"""The paper's numbers and figures."""
