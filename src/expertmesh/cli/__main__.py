"""`python -m expertmesh.cli`, which is how a launcher starts its ranks."""

from expertmesh.cli import main

main()
