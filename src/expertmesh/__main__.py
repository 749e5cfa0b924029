"""`python -m expertmesh VERB ...` is the `expertmesh` command; launchers start their ranks by it."""

from expertmesh.cli import main

main()
