"""``python -m blobspace.cluster.demo``: the demo, and the driver process that it starts."""

from __future__ import annotations

import argparse
import sys

from . import main


def _run(arguments: list[str]) -> int:
    if arguments[:1] == ["driver"]:
        from . import driver  # noqa: PLC0415  (it loads Ray)

        return driver.main(arguments[1:])
    parser = argparse.ArgumentParser(prog="python -m blobspace.cluster.demo", description=main.__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--keep", metavar="FOLDER")
    options = parser.parse_args(arguments)
    return main(as_json=options.json, quick=options.quick, keep=options.keep)


if __name__ == "__main__":
    sys.exit(_run(sys.argv[1:]))
