"""`python -m fedray`: the command `fedray`, where only the package is there."""

from fedray.cli.app import main

if __name__ == "__main__":
    main()
