"""How people read a figure: its unit, and whether more of it is better. Each run keeps its own, beside its figures."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Metric:
    """A figure of a task.

    Args:
        name: as in metrics.jsonl, behind train/ or eval/.
        unit: "%" for a share of 1, which people read in per cent; px, dB, ...; empty: a bare number.
        better: which of two values is the better one.
        headline: the one that a run is judged by.
        detail: of one class, say: in files and closing tables, but not in lines and curves of a training.
    """

    name: str
    unit: str = ""
    better: Literal["more", "less"] = "more"
    headline: bool = False
    detail: bool = False

    def best(self, values: Iterable[float]) -> float:
        return max(values) if self.better == "more" else min(values)

    def improves(self, value: float, on: float | None) -> bool:
        return on is None or (value > on if self.better == "more" else value < on)

    def text(self, value: float, digits: int = 4) -> str:
        """A value as a person reads it."""
        if self.unit == "%":
            return f"{value:.2%}"
        return f"{in_digits(value, digits)} {self.unit}".rstrip()


def in_digits(value: float, digits: int = 3) -> str:
    """A number as a person reads it."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.{digits}g}"


# Of runs that were written before a run told its own
CLASSIFICATION = (Metric("loss", better="less"), Metric("accuracy", unit="%", headline=True))


def headline(metrics: Sequence[Metric]) -> Metric:
    (one,) = (metric for metric in metrics if metric.headline)
    return one


def metric_of(key: str, metrics: Sequence[Metric]) -> Metric | None:
    """The metric that a key of metrics.jsonl has values of: train/, eval/ or eval/recalibrated_ before its name."""
    name = key.rpartition("/")[2].removeprefix("recalibrated_")
    return next((metric for metric in metrics if metric.name == name), None)


def in_words(figures: Mapping[str, float], metrics: Sequence[Metric]) -> dict[str, str]:
    """Figures as a person reads them; of what is no metric, four digits behind the point."""
    return {
        key: metric.text(value)
        if (metric := metric_of(key, metrics)) and metric.unit
        else f"{value:.4f}"
        if value % 1
        else f"{value:.0f}"
        for key, value in figures.items()
    }
