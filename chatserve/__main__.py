"""`python -m chatserve` and the console script `chatserve`."""

import logging
import os
import sys
import threading

from chatserve.cli import run
from chatserve.settings import LOADING_THREAD


def main() -> None:
    """Run the command line and exit with its status."""
    status = run(sys.argv[1:])
    if any(thread.name == LOADING_THREAD for thread in threading.enumerate()):
        # A model that is being loaded cannot be given up, and to take the interpreter down under
        # its native threads can end in an abort instead of the status. Nothing else is left to do.
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


if __name__ == "__main__":
    main()
