"""Long checks with seeds and a report, each a command (`python tests/reliability/NAME.py --help`) and a short test."""
