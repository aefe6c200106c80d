"""``python -m flip_observability.cli``."""

from flip_observability.cli import main

if __name__ == "__main__":
    main()
