"""`python -m semiperm`: the same as the `semiperm` command."""

from .cli import main

if __name__ == "__main__":
    main()
