"""The requirements of setup.cfg at one end of their bounds, one per line, for `make test-newest` and `test-oldest`.

    python .ci/requirements.py newest|oldest

`newest` leaves upper bounds out, `oldest` asks for the lower bounds themselves. Exact pins (the LIBERO simulator's)
stay as they are.
"""

import configparser
import re
import sys
from pathlib import Path

SETUP = Path(__file__).parent.parent / "setup.cfg"


def main() -> None:
    setup = configparser.ConfigParser(inline_comment_prefixes=("#",))
    setup.read(SETUP)
    lines = f"{setup['options']['install_requires']}\n{setup['options.extras_require']['dev']}".split()
    bound = {"newest": (r",?<[^,]+", ""), "oldest": (r">=([^,]+).*", r"==\1")}[sys.argv[1]]
    print(*(re.sub(*bound, line) for line in lines), sep="\n")


if __name__ == "__main__":
    main()
