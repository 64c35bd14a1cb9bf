"""`python -m llb` is the command `llb`."""
from llb.cli import main

if __name__ == "__main__":
    main()
