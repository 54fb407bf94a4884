"""Upper bounds on what a run measures: a trial that keeps them all is feasible, and only such a one can win."""

from collections.abc import Iterable, Mapping

# What may be bounded: what a finished training costs, or how far off its confidence is.
TIMES = ("model/latency_ms", "time/epoch_s", "time/training_s")  # which other work on the machine changes
MEASURES = ("model/parameters", *TIMES, "val/ece", "calibration/ece", "calibration/loss")


def excess(bounds: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
    """Metric -> how far it is above its bound, at most 0 where it keeps it; of those that were measured."""
    return {name: metrics[name] - bound for name, bound in bounds.items() if name in metrics}


def violations(bounds: Mapping[str, float], metrics: Mapping[str, float]) -> str:
    """`model/parameters 1,234, at most 1,000`, for each bound that is broken; empty where none is known to be."""
    broken = [name for name, above in excess(bounds, metrics).items() if above > 0]
    return "; ".join(f"{name} {_shown(metrics[name])}, at most {_shown(bounds[name])}" for name in broken)


def nearest(bounds: Mapping[str, float], measured: Iterable[tuple[str, Mapping[str, float]]]) -> str:
    """Of named metrics that all break a bound the nearest, by the sum of `metric / bound - 1`: `trial 3 (...)`."""

    def distance(metrics: Mapping[str, float]) -> float:
        return sum(max(above, 0.0) / bounds[name] for name, above in excess(bounds, metrics).items())

    name, metrics = min(measured, key=lambda item: distance(item[1]))
    return f"{name} ({violations(bounds, metrics)})"


def _shown(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:.4g}"
