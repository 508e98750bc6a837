"""Seconds of several variants, side by side: they take turns within a round, so that noise hits them alike.

A product of matrices and a pass over memory take turns with them: the machine's peak is measured in the same minutes as
what is held against it. An accelerator is timed by its own events, anything else by the clock.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from acformer.lab.bench.settings import Settings
from acformer.training.peak_memory import PeakMemory

Result = dict[str, Any]
"""A row of a bench: labels, then figures."""
SHORTEST = 0.01
"""Seconds: what takes less is run several times for one measurement."""
SIDES = {"cpu": 2048}
SIDE = 8192
"""Rows of the matrices whose product measures the peak: on some devices, on others."""
MEMORY = 2**26
"""Floats that are copied and summed: more than caches hold."""


@dataclass(frozen=True)
class Variant:
    """One way to do a thing, and the least that any machine must do for it.

    run: does it `times` times (steps of a generation), all on the device.
    flops, nbytes: arithmetic, and bytes read or written, of doing it once; 0 where that is not the limit.
    """

    run: Callable[[], Any]
    flops: float = 0
    nbytes: float = 0
    times: int = 1


class MeasuredPeak(NamedTuple):
    """What the machine does in a second: FLOP of a product of matrices in the dtype, bytes moved."""

    flops: float
    nbytes: float

    def roofline(self, variant: Variant) -> float:
        """max(FLOP / rate, bytes / rate): the seconds that a variant takes at least."""
        return max(variant.flops / self.flops, variant.nbytes / self.nbytes)


@dataclass(frozen=True)
class Timings:
    """Of each variant: seconds of every round, ATen calls and peak bytes of one run."""

    variants: Mapping[str, Variant]
    seconds: dict[str, list[float]]
    calls: dict[str, int]
    peak_bytes: dict[str, int]
    peak: MeasuredPeak

    def row(self, name: str, base: str | None = None) -> Result:
        """Median milliseconds with quartiles, the roofline's and the ratio to it, peak MiB, and the measured peak.

        With a `base` also the ratio to it: median and quartiles of each round's own ratio.
        """
        roofline = self.peak.roofline(self.variants[name])
        seconds = self.seconds[name]
        found = {"ms": _short(1e3 * statistics.median(seconds)), "ms_quartiles": _quartiles(seconds, 1e3)}
        found["peak_mib"] = _short(self.peak_bytes[name] / 2**20)
        if roofline > 0:
            found |= {"floor_ms": _short(1e3 * roofline), "x_floor": _short(statistics.median(seconds) / roofline)}
        found |= {"gflop_per_s": _short(self.peak.flops / 1e9), "gb_per_s": _short(self.peak.nbytes / 1e9)}
        if base is not None:
            ratios = [value / other for value, other in zip(seconds, self.seconds[base], strict=True)]
            found |= {"ratio": _short(statistics.median(ratios)), "ratio_quartiles": _quartiles(ratios)}
        return found


def timed_rows(
    settings: Settings,
    variants: Sequence[tuple[Result, Variant]],
    base: Result,
    same: Sequence[str] = (),
    *,
    label: Sequence[Any] = (),
    calls: bool = False,
) -> list[Result]:
    """A row a (labels, variant): the labels, the number of ATen calls with `calls`, and what `Timings.row` tells.

    The ratio is to the first variant whose labels hold `base` and agree in those named `same`. label: of the bar.
    """
    named = {repr(labels): variant for labels, variant in variants}
    timings = measure(named, settings.device, settings.dtype, settings.rounds, label=settings.label(*label))
    rows = []
    for labels, _ in variants:
        wanted = {**base, **{key: labels[key] for key in same}}
        first = next((other for other, _ in variants if wanted.items() <= other.items()), None)
        counted = {"aten_calls": timings.calls[repr(labels)]} if calls else {}
        rows.append({**labels, **counted, **timings.row(repr(labels), repr(first) if first else None)})
    return rows


def measure(
    variants: Mapping[str, Variant], device: torch.device, dtype: torch.dtype, rounds: int, *, label: str | None = None
) -> Timings:
    """Time the variants `rounds` times each, after a run of each under `PeakMemory`, and one that warms up.

    The latter says how often a run is repeated for one measurement. label: of the progress bar; None for none.
    """
    everything = {**variants, **peak_variants(device, dtype)}
    calls, peaks, repeats = {}, {}, {}
    for name, variant in everything.items():
        calls[name], peaks[name] = _calls_and_peak(variant, device)
        repeats[name] = max(1, math.ceil(SHORTEST / timed(variant.run, 1, device)))
    seconds: dict[str, list[float]] = {name: [] for name in everything}
    for number in tqdm(range(rounds), desc=label, unit="round", disable=label is None):
        for name in everything if number % 2 == 0 else reversed(everything):
            variant = everything[name]
            seconds[name].append(timed(variant.run, repeats[name], device) / variant.times)
    return Timings(variants, seconds, calls, peaks, _measured_peak(everything, seconds))


def timed(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Seconds of one run, the mean of `repeats` in a row."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / repeats
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(repeats):
        run()
    synchronize(device)
    return (time.perf_counter() - begin) / repeats


def peak_variants(device: torch.device, dtype: torch.dtype) -> dict[str, Variant]:
    """A square product in the dtype, and a copy and a sum of floats: of the latter two the faster counts."""
    side = SIDES.get(device.type, SIDE)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source, target = (torch.ones(MEMORY, device=device) for _ in range(2))
    return {
        "(product)": Variant(lambda: left @ right, flops=2 * side**3),
        "(copy)": Variant(lambda: target.copy_(source), nbytes=2 * source.nbytes),
        "(sum)": Variant(source.sum, nbytes=source.nbytes),
    }


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that was asked of it."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _calls_and_peak(variant: Variant, device: torch.device) -> tuple[int, int]:
    """ATen calls and peak bytes of a run, the first one on the CPU."""
    if device.type == "cuda":
        variant.run()  # workspaces of the libraries stay
        torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with PeakMemory() as memory:
        variant.run()
        synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else memory.peak_bytes
    return memory.calls, peak


def _measured_peak(everything: Mapping[str, Variant], seconds: dict[str, list[float]]) -> MeasuredPeak:
    product, copy, total = (statistics.median(seconds[name]) for name in ("(product)", "(copy)", "(sum)"))
    nbytes = max(everything["(copy)"].nbytes / copy, everything["(sum)"].nbytes / total)
    return MeasuredPeak(everything["(product)"].flops / product, nbytes)


def _quartiles(values: list[float], scale: float = 1) -> list[float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [_short(scale * low), _short(scale * high)]


def _short(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")
