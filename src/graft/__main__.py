"""`python -m graft`."""

from graft.cli.main import main

main()
