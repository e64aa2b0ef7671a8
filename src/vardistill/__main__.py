"""`python -m vardistill COMMAND`, for launchers of several processes."""

from vardistill.cli.main import main

if __name__ == "__main__":
    main()
