"""`python -m zoo_compress` and `torchrun … -m zoo_compress`."""

from .cli import main

main()
