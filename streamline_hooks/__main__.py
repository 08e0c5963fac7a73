"""Run the command line by ``python -m streamline_hooks``."""

from streamline_hooks.cli import main

if __name__ == "__main__":
    main()
