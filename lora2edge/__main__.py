"""`python -m lora2edge`."""

from lora2edge.cli import main

main()
