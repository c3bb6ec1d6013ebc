"""`python -m eugen.cli`: the command where its script is not on the path."""

from eugen.cli import main

main()
