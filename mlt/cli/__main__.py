"""`python -m mlt.cli`: the `mlt` command of an interpreter."""

from mlt.cli import main

main()
