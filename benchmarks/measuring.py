"""How everything here is measured: interleaved rounds in random order, and medians of ratios within one round.

Two rules make figures of a shared machine worth reading. What is compared is measured in the same round, in an
order that changes from round to round, so that a slow moment hits both sides. And what is reported is a ratio, or
a time beside the one that it is a multiple of.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How thorough to be.

    Attributes:
        is_quick: Fewer rounds, less data: to see that everything works, not to quote.
        seed: Of the order within the rounds.
    """

    is_quick: bool = False
    seed: int = 0

    def rounds(self, thorough: int) -> int:
        """Return how many rounds to do where a thorough run does ``thorough``."""
        return max(2, thorough // 5) if self.is_quick else thorough


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        what: What was measured, against what.
        value: The figure.
        unit: ``"x"`` for a ratio, ``"ms"`` for a time.
        target: The greatest value that meets the target; None where there is none.
        absolute: The figures behind it, in small print.
    """

    what: str
    value: float
    unit: str
    target: float | None = None
    absolute: str = ""

    @property
    def is_met(self) -> bool | None:
        """Whether the target is met; None where there is none."""
        return None if self.target is None else self.value <= self.target


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """One thing that users care about.

    Attributes:
        name: What ``--only`` takes.
        title: One line.
        bound: What limits it, in one line.
        run: Measures.
    """

    name: str
    title: str
    bound: str
    run: Callable[[Settings], list[Row]]


@dataclass(frozen=True, slots=True)
class Rounds:
    """Seconds (or another measure) of each contender, one figure a round."""

    figures: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.figures[name])

    def ratio(self, name: str, base: str) -> float:
        """Return the median over the rounds of one contender's figure as a multiple of another's, same round."""
        pairs = zip(self.figures[name], self.figures[base], strict=True)
        return statistics.median(figure / against for figure, against in pairs)

    def milliseconds(self, *names: str) -> str:
        """Return the medians for the small print."""
        return ", ".join(f"{name} {self.median(name) * 1e3:.3g} ms" for name in names)


def interleave(contenders: Mapping[str, Callable[[], float]], *, rounds: int, settings: Settings) -> Rounds:
    """Let every contender measure itself once a round, in another order each time, after one round for nothing."""
    generator = random.Random(settings.seed)
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name in generator.sample(list(contenders), len(contenders)):
            figure = contenders[name]()
            if number:
                figures[name].append(figure)
    return Rounds(figures)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that one call takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
