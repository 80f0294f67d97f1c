"""Scores of cache policies over retention, as an image: one line a selection, dense decoding as a band behind them."""

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

if TYPE_CHECKING:
    from dllmc.evaluate import Interval, Report
    from dllmc.runtime.params import CachePolicy

# Okabe and Ito's, which people tell apart who see few colours
COLOURS = {"per_head": "#0072B2", "shared": "#D55E00"}
DENSE = "#777777"
SHIFT = 0.006  # of the lines to one another, so that error bars do not hide each other


def image(policies: "Sequence[CachePolicy]", reports: "Sequence[Report]", suffix: str) -> bytes:
    """Draw reports of policies, dense decoding's first: accuracy, and for code the NLL beside it.

    suffix: of the file whose bytes are returned, as in ".png".
    """
    of_nll = reports[0].nll is not None
    figure = Figure(figsize=(10 if of_nll else 6, 4), layout="constrained", dpi=150)
    figure.suptitle(f"{reports[0].task}, {reports[0].examples} examples, 95% intervals")
    accuracy, *nll = figure.subplots(1, 2 if of_nll else 1, squeeze=False)[0]
    _draw(accuracy, policies, [(r.accuracy, r.interval) for r in reports])
    accuracy.set_ylabel("missing tokens that are right" if of_nll else "answers that are right")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in nll:
        _draw(axes, policies, [(r.nll, r.nll_interval) for r in reports if r.nll is not None and r.nll_interval])
        axes.set_ylabel("NLL, nats a missing token, teacher-forced")
    accuracy.legend(frameon=False)
    drawn = io.BytesIO()
    figure.savefig(drawn, format=suffix.removeprefix("."))
    return drawn.getvalue()


def _draw(axes: Any, policies: "Sequence[CachePolicy]", scores: "Sequence[tuple[float, Interval]]") -> None:
    score, (low, high) = scores[0]
    axes.axhspan(low, high, color=DENSE, alpha=0.15, linewidth=0)
    axes.axhline(score, color=DENSE, linestyle="--", label="dense")
    selections = dict.fromkeys(policy.selection for policy in policies[1:])
    for place, selection in enumerate(selections):
        points = sorted(
            (policy.retention, *of_policy)
            for policy, of_policy in zip(policies[1:], scores[1:], strict=True)
            if policy.selection == selection or policy.retention == 1
        )
        shift = (place - (len(selections) - 1) / 2) * SHIFT
        axes.errorbar(
            [retention + shift for retention, *_ in points],
            [score for _, score, _ in points],
            yerr=[[s - low for _, s, (low, _) in points], [high - s for _, s, (_, high) in points]],
            color=COLOURS[selection],
            marker="o",
            markersize=4,
            capsize=3,
            label=f"{selection.replace('_', '-')} selection",
        )
    axes.set_xlabel("retention")
    axes.set_xlim(0, 1.05)
    axes.spines[["top", "right"]].set_visible(False)
