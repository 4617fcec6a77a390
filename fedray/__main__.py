"""`python -m fedray`: the command `fedray` where the package is present but its entry point is not installed."""

from fedray.cli.app import main

if __name__ == "__main__":
    main()
