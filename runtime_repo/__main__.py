"""``python -m runtime_repo`` is the command ``runtime-repo``."""

from runtime_repo.cli import main

if __name__ == "__main__":
    main()
