"""``python -m shapeloom`` is the ``shapeloom`` command."""

from .launch.cli import main

if __name__ == "__main__":
    main()
