"""``python -m recbole_llm``: the command line."""

import sys

from recbole_llm.cli import main

if __name__ == "__main__":
    sys.exit(main())
