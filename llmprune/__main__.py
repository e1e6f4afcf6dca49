"""``python -m llmprune`` is the command line."""

from llmprune.cli.main import main

main()
