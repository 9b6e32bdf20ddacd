"""Several commands one after the other in the same processes: a program for torchrun, which spares their start.

It is given a JSON list of command lines of `finetrainers`.
"""

import json
import sys

from framebridge_plugin.cli import main

if __name__ == "__main__":
    sys.exit(max(main(arguments) for arguments in json.loads(sys.argv[1])))
