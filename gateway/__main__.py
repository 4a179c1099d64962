"""``python -m gateway``: the command `trio-gateway`."""

from gateway.cli import main

if __name__ == "__main__":
    main()
