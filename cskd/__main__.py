"""`python -m cskd`: the command line where its script is not on the path."""

from cskd.cli import main

if __name__ == "__main__":
    main()
