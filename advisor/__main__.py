"""Lets `python -m advisor` start the command line."""

from advisor.cli.main import main

main()
