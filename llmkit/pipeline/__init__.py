"""Plan, run, commit."""
