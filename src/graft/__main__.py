"""`python -m graft`: the command line, as launchers of several processes start it."""

from graft.cli.main import main

if __name__ == "__main__":
    main()
