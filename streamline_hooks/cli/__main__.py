"""What ``python -m streamline_hooks.cli`` runs."""

from streamline_hooks.cli import main

if __name__ == "__main__":
    main()
