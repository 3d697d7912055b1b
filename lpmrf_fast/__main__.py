"""`python -m lpmrf_fast`: the command `lpmrf-fast`."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
