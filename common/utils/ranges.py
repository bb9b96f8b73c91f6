"""The ranges of arguments, declared in their types.

    @dataclass
    class Arguments:
        layers: Count = 2
        rates: list[Positive] | None = None

`kd.common.cli.Parser` checks every flag. No range contains NaN or infinity.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, get_args, get_type_hints

MOST = 2**31 - 1


@dataclass(frozen=True)
class Range:
    """Finite numbers from `low` to `high`. `above` excludes `low`, `below` excludes `high`, and `or_else` is one more
    valid number.
    """

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False
    or_else: float | None = None

    def __contains__(self, value: float) -> bool:
        if value == self.or_else:
            return True
        low = self.low < value if self.above else self.low <= value
        high = value < self.high if self.below else value <= self.high
        return low and high and math.isfinite(value)

    def __str__(self) -> str:
        ends = []
        if math.isfinite(self.low):
            ends.append(f"{'above' if self.above else 'at least'} {self.low}")
        if math.isfinite(self.high) and self.high != MOST:
            ends.append(f"{'below' if self.below else 'at most'} {self.high}")
        words = " and ".join(ends) or "a finite number"
        if len(ends) == 2 and not self.above and not self.below:
            words = f"between {self.low} and {self.high}"
        return words if self.or_else is None else f"{words}, or {self.or_else}"


FINITE = Range()
Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
ShareBelow1 = Annotated[float, Range(0, 1, below=True)]
ShareAbove0 = Annotated[float, Range(0, 1, above=True)]
ProperShare = Annotated[float, Range(0, 1, above=True, below=True)]
Count = Annotated[int, Range(1, MOST)]
CountOrZero = Annotated[int, Range(0, MOST)]
Seed = Annotated[int, Range(0, 2**32 - 1)]


@cache
def ranges_of(arguments: type) -> dict[str, Range]:
    """The ranges of a dataclass by field: those of its types and its parents' types, and INHERITED_RANGES for fields
    of a parent outside this project.
    """
    ranges: dict[str, Range] = dict(getattr(arguments, "INHERITED_RANGES", {}))
    for kind in reversed(arguments.__mro__):
        hints = get_type_hints(kind, include_extras=True)
        ranges |= {name: limits for name, hint in hints.items() if (limits := range_in(hint)) is not None}
    return ranges


def range_in(hint: Any) -> Range | None:
    """The range that a type declares, for itself or for its items."""
    for part in (*getattr(hint, "__metadata__", ()), *get_args(hint)):
        found = part if isinstance(part, Range) else range_in(part)
        if found is not None:
            return found
    return None


def check_declared(arguments: Any) -> None:
    """Raises ValueError if a field of a dataclass instance is out of its range."""
    kind: type = type(arguments)
    check_ranges(vars(arguments), ranges_of(kind))


def check_ranges(values: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """Raises ValueError, naming flag, range and value, for the first number out of range, alone or in a list."""
    for name, value in values.items():
        limits = ranges.get(name, FINITE)
        for item in value if isinstance(value, list | tuple) else [value]:
            if isinstance(item, int | float) and not isinstance(item, bool) and item not in limits:
                wanted = f"at most {MOST}" if MOST < item < math.inf and limits.high == MOST else limits
                raise ValueError(f"--{name} must be {wanted}, got {item}")
