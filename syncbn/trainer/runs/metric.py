"""How people read a figure: its unit, and whether more of it is better. Each run keeps its own, beside its figures."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from syncbn.trainer.errors import some

MOST_PARTS = 12  # in a row of the closing table; of more, the ends
ENDS = 5  # best and worst of these


@dataclass(frozen=True)
class Metric:
    """A figure of a task.

    Args:
        name: as in metrics.jsonl, behind train/ or eval/.
        unit: "%" for a share of 1, which people read in per cent; px, dB, ...; empty: a bare number.
        better: which of two values is the better one.
        headline: the one that a run is judged by.
        detail: what it is of, if that is a part of what is judged: the class "road" of iou_road. Such a figure is in
            files, and with its like in closing tables and reports, but not in lines and curves of a training.
    """

    name: str
    unit: str = ""
    better: Literal["more", "less"] = "more"
    headline: bool = False
    detail: str = ""

    @property
    def of(self) -> str:
        """What of its part it measures: iou, for iou_road of the class road."""
        return self.name.removesuffix(f"_{self.detail}") if self.detail else self.name

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
    return next((metric for metric in metrics if metric.name == named(key)), None)


def named(key: str) -> str:
    """The name of a key's metric."""
    return key.rpartition("/")[2].removeprefix("recalibrated_")


def in_words(figures: Mapping[str, float], metrics: Sequence[Metric]) -> dict[str, str]:
    """Figures as a person reads them, those of parts at the end; of what is no metric, four digits behind the point."""
    rows: dict[str, str] = {}
    parts: dict[str, dict[str, float]] = {}
    for key, value in figures.items():
        metric = metric_of(key, metrics)
        if metric and metric.detail:
            parts.setdefault(key.removesuffix(f"_{metric.detail}"), {})[metric.name] = value
        elif metric and metric.unit:
            rows[key] = metric.text(value)
        else:
            rows[key] = f"{value:.4f}" if value % 1 else f"{value:.0f}"
    for key, values in parts.items():
        rows |= parts_in_words(key, values, [metric for metric in metrics if metric.detail and metric.of == named(key)])
    return rows


def parts_in_words(key: str, values: Mapping[str, float], metrics: Sequence[Metric]) -> dict[str, str]:
    """Rows for the figures of a metric's parts: from the best to the worst, of many the ends alone; what has none."""
    present = [metric for metric in metrics if metric.name in values]
    least_first = present[0].better == "less"
    present.sort(key=lambda metric: values[metric.name], reverse=not least_first)
    words = [f"{metric.detail}: {metric.text(values[metric.name])}" for metric in present]
    rows = (
        {key: ", ".join(words)}
        if len(words) <= MOST_PARTS
        else {
            f"{key}, best": f"{', '.join(words[:ENDS])} (of {len(words)})",
            f"{key}, worst": ", ".join(words[: -ENDS - 1 : -1]),
        }
    )
    absent = [metric.detail for metric in metrics if metric.name not in values]
    return rows | (
        {f"{key}, absent": f"{some(absent, MOST_PARTS)} (not in the eval data: left out of the mean)"} if absent else {}
    )
