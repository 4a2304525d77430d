"""`python -m llmkit`: the program."""

from llmkit.cli.start import run

run()
