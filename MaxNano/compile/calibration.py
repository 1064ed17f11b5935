"""How the estimates for a TPU v6e compare with measurements: a factor for each class of operation.

benchmarks/calibration.py compiles programs whose time on a v6e is public and prints the ratios; the
table is in benchmarks/tpu.md. No other chip is calibrated.
"""

from collections.abc import Mapping
from typing import NamedTuple

from MaxNano.distributed import hardware


class Factor(NamedTuple):
    """Measured by estimated cycles of a class of operations."""

    value: float
    low: float
    high: float
    source: str


class Range(NamedTuple):
    """A calibrated estimate, and the lowest and highest that the measurements allow."""

    value: float
    low: float
    high: float

    def times(self, scale: float) -> "Range":
        """The range in another unit."""
        return Range(*(scale * part for part in self))

    def text(self, form: str, unit: str = "") -> str:
        """Such as "0.73 s (0.62 to 0.90)"."""
        return f"{self.value:{form}}{unit} ({self.low:{form}} to {self.high:{form}})"


PRODUCTS = Factor(
    0.90, 0.80, 1.00, "a product of 8,192^3, alone; lower in linear layers with cross-entropy"
)
OTHER_XLA = Factor(
    0.56,
    0.49,
    0.80,
    "a copy, and what remains of three linear layers with cross-entropy and of plain attention at "
    "three lengths after their products",
)
KERNELS = Factor(
    0.97,
    0.89,
    1.18,
    "tokamax's Splash forward at four sizes, by its bundles, without the transposes around the kernel",
)
GATHERS = Factor(1.0, 0.5, 2.0, "not measured")
COLLECTIVES = Factor(
    1.0,
    0.76,
    1.53,
    "an all-reduce over 256 chips at 236 GB/s, 65 % of four links; the high end: 65 % of two",
)

# By costs.CLASSES.
FACTORS: dict[str, Factor] = {
    "matmul": PRODUCTS,
    "activation": OTHER_XLA,
    "weight": OTHER_XLA,
    "table": OTHER_XLA,
    "copy": OTHER_XLA,
    "other": OTHER_XLA,
    "pallas": KERNELS,
    "gather/scatter": GATHERS,
    "collective": COLLECTIVES,
}

ASSUMPTION = "calibrated: what public measurements on a v6e make of the estimate, " + ", ".join(
    f"{name} x {factor.value:g} ({factor.low:g} to {factor.high:g})"
    for name, factor in (
        ("matmul", PRODUCTS),
        ("pallas", KERNELS),
        ("gather/scatter", GATHERS),
        ("collective", COLLECTIVES),
        ("other classes", OTHER_XLA),
    )
)


def calibrate(cycles_by_class: Mapping[str, float], chip: hardware.Chip) -> Range | None:
    """Calibrated cycles of a program with these estimated cycles; None for an uncalibrated chip."""
    if chip != hardware.CHIPS["TPU v6e"]:
        return None
    return Range(
        *(
            sum(cycles * getattr(FACTORS[kind], part) for kind, cycles in cycles_by_class.items())
            for part in Range._fields
        )
    )
