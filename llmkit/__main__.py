"""`python -m llmkit`: the program."""

from llmkit.cli.app import run

run()
