"""``python -m distorch`` is the command ``distorch``."""

from __future__ import annotations

from distorch.cli import main

if __name__ == "__main__":
    main()
