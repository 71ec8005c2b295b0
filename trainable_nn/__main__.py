"""`python -m trainable_nn`: which version and which kernels are in use; with arguments, the command line."""

import sys

from . import __version__, ops


def main() -> int:
    if len(sys.argv) > 1:
        from .cli import main as command_line  # needs more packages than the report does

        return command_line()
    print(f"trainable_nn {__version__}\n{ops.native.report()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
