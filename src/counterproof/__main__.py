"""``python -m counterproof``."""

from counterproof.cli import main

main()
