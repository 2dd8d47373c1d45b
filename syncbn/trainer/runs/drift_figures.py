"""How people read the figures of drift: the one table that screen, report and W&B take them from.

What they are and how they are made, syncbn.DriftMonitor says. A new one: `syncbn/drift/figures.py`, and a line here.
"""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class HeatMap:
    """A map of a figure, layer by step, and how it is coloured.

    scale: what stands beside the colours. low: where they begin; None: at the lowest number. high: where they end at
    least, so that mere noise stays pale.
    """

    title: str
    scale: str
    caption: str
    low: float | None = None
    high: float = -math.inf
    log: bool = False


@dataclass(frozen=True)
class DriftFigure:
    """A figure of one layer.

    label, unit: the head of its column. worst: which end of its values is the worse. sorts: whether layers are sorted
    by it, where none before it was measured. on_screen: whether the closing table has it.
    """

    label: str
    unit: str = ""
    worst: str = "high"
    sorts: bool = False
    on_screen: bool = False
    heat_map: HeatMap | None = None

    @property
    def head(self) -> str:
        return f"{self.label}, {self.unit}" if self.unit else self.label

    def worse(self, values: list[float]) -> float:
        return max(values) if self.worst == "high" else min(values)


DRIFT_FIGURES = {
    "icc": DriftFigure(
        "ICC",
        sorts=True,
        on_screen=True,
        heat_map=HeatMap(
            "ICC", "ICC", "How alike the images of one rank are, as against other ranks': 0 is chance", 0, 0.3
        ),
    ),
    "f": DriftFigure(
        "F",
        sorts=True,
        heat_map=HeatMap("F", "MSB/MSI", "Variance between ranks over variance within, of images: 1 is chance", 1, 2),
    ),
    "n_eff": DriftFigure(
        "n_eff",
        worst="low",
        on_screen=True,
        heat_map=HeatMap(
            "Effective batch size", "n_eff", "How many independent samples the statistics rest on", log=True
        ),
    ),
    "dmean_z": DriftFigure(
        "mean",
        "z",
        sorts=True,
        on_screen=True,
        heat_map=HeatMap(
            "Batch against running mean", "z", "How far the batch is from the running mean: 1 is chance", 1, 4
        ),
    ),
    "dlogvar_z": DriftFigure("log var", "z", on_screen=True),
    "lag": DriftFigure("lag", "σ"),
    "kl": DriftFigure("KL", "nats", sorts=True, on_screen=True),
    "dead": DriftFigure("dead channels", on_screen=True),
    "conditioning": DriftFigure("|mean|/σ", sorts=True),
    "gap": DriftFigure("gap", "nats"),
}
LIKENESS = ("icc", "f", "dmean_z")  # how alike a rank's images are: of the heat maps the first that was measured
OFFSETS = HeatMap(
    "Offset of each rank",
    "z",
    "How far each rank's mean is from the others': 1 is chance, above about 3 it differs",
    1,
    4,
)
