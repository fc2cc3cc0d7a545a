"""The command `grasp-lora`, also as `python -m grasp_lora` for launchers that start a module."""

import signal
import sys
from typing import Any, NoReturn

from grasp_lora.errors import BEFORE_IT_BEGAN, STOPPED


def main() -> None:
    """Run the command line; Ctrl-C while that or a library is imported is one line, too."""
    asked: list[int] = []

    def stop(number: int, frame: Any) -> NoReturn:
        asked.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or somebody else's
        signal.signal(signal.SIGINT, stop)
    try:
        from grasp_lora.cli import main as command

        command()
    except (Exception, KeyboardInterrupt) as error:  # some libraries make an ImportError of it, and name no cause
        if not asked and not isinstance(error, KeyboardInterrupt):
            raise
        sys.stderr.write(f"{BEFORE_IT_BEGAN}\n")
        sys.exit(STOPPED)


if __name__ == "__main__":
    main()
