"""The page: run records drawn and set for people to read."""
