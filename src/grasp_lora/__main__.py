"""The command `grasp-lora`, also as `python -m grasp_lora` for launchers that start a module."""

import sys

from grasp_lora.errors import BEFORE_IT_BEGAN, STOPPED


def main() -> None:
    """Run the command line; Ctrl-C while that is imported is one line, too."""
    try:
        from grasp_lora.cli import main as command
    except KeyboardInterrupt:
        sys.stderr.write(f"{BEFORE_IT_BEGAN}\n")
        sys.exit(STOPPED)
    command()


if __name__ == "__main__":
    main()
