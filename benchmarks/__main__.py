"""``python -m benchmarks``, from the repository's root."""

from __future__ import annotations

import argparse
import sys

from . import disk, latency, names, net, report, stall
from .measuring import Row, Settings

SECTIONS = (names.SECTION, net.SECTION, stall.SECTION, disk.SECTION, latency.SECTION)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure what blobspace promises.")
    chosen = [section.name for section in SECTIONS]
    parser.add_argument("--list", action="store_true", help="list the sections and measure nothing")
    parser.add_argument("--only", action="append", choices=chosen, metavar="NAME", help="one section; repeatable")
    parser.add_argument("--quick", action="store_true", help="less of everything: to see that it works, not to quote")
    parser.add_argument("--write", action="store_true", help="write the table into docs/benchmarks.md")
    parser.add_argument("--json", action="store_true", help="print JSON in place of the table")
    parser.add_argument("--seed", type=int, default=0, help="of the order within the rounds")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{section.name:8} {section.title}" for section in SECTIONS))
        return 0
    if options.quick and options.write:
        parser.error("a quick run is not to be quoted: --quick and --write exclude each other")
    settings = Settings(is_quick=options.quick, seed=options.seed)
    results: dict[str, list[Row]] = {}
    for section in SECTIONS:
        if section.name in (options.only or chosen):
            print(f"measuring {section.name}: {section.title} …", file=sys.stderr, flush=True)
            results[section.name] = section.run(settings)
    if options.write:
        report.write(results, SECTIONS)
    if options.json:
        print(report.as_json(results))
    else:
        report.show(results, SECTIONS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
