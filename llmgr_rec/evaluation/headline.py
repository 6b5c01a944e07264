"""The sentence that a report opens with: how often the recommender is right, and how much more often than a baseline.

A difference whose 95 % interval includes 0 is not called better or worse.
"""

from llmgr_rec.evaluation.evaluated import Evaluated
from llmgr_rec.evaluation.intervals import Gain, K, rate_interval
from llmgr_rec.evaluation.results import MODEL_NAMES

_HR = f"hr@{K}"
# From this gain on, a factor is easier to read than a percentage.
_AS_FACTOR = 2.0
_SAME = ", which is not distinguishable from"


def headline(evaluated: Evaluated) -> str:
    """The conclusion of an evaluation in a sentence or two.

    Args:
        evaluated: Results of the evaluation.
    """
    model = evaluated.recommender
    if not evaluated.count:
        return f"There are no {evaluated.split} sessions to evaluate on."
    if model is None:
        return "Only baselines were evaluated, no model of the run."
    rate = evaluated.hit_rate(model)
    finds = f"The recommender finds the next click among {K} in {percent(rate)} of sessions"
    chance = min(K / max(evaluated.num_items, 1), 1.0)
    if rate_interval(rate, evaluated.count)[0] <= chance:
        return f"{finds}, which is not distinguishable from a random list ({percent(chance)})."
    baseline = evaluated.strongest_baseline
    if baseline is None:
        return f"{finds}; no baseline was evaluated beside it."
    gain = evaluated.gains(model, baseline)[_HR]
    return f"{finds}{compared(gain, in_sentence(baseline), evaluated.hit_rate(baseline))}"


def compared(gain: Gain | None, other: str, other_rate: float) -> str:
    """End of the sentence: the comparison with another model.

    Args:
        gain: Relative difference of the hit rates; None if there are too few hits.
        other: Name of the other model.
        other_rate: Its hit rate.
    """
    if gain is None:
        return f"; {other} finds it in {percent(other_rate)}, which are too few hits to compare."
    if gain.low <= 0 <= gain.high:
        return f"{_SAME} {other} ({percent(other_rate)}; difference {signed(gain)} {interval(gain)})."
    if gain.mean >= _AS_FACTOR:
        ends = f"{1 + gain.low:.1f} .. {1 + gain.high:.1f}"
        return f", {1 + gain.mean:.1f} times as often as {other} [{ends}]."
    if gain.mean > 0:
        return f", {_number(gain.mean, gain)} % more often than {other} {interval(gain)}."
    less = Gain(-gain.mean, -gain.high, -gain.low)
    return f", {_number(less.mean, less)} % less often than {other} {interval(less)}."


def compared_alone(gain: Gain | None, other: str, other_rate: float) -> str:
    """The comparison as a sentence of its own; see `compared` for the arguments."""
    text = compared(gain, other, other_rate)
    if text.startswith(_SAME):
        return f"Its hit rate is{text.removeprefix(', which is')}"
    return f"It finds the next click{text[1:]}" if text.startswith(",") else text.removeprefix("; ")


def percent(share: float) -> str:
    """A share as a percentage with one decimal; two for a share below 1 %."""
    return f"{100 * share:.1f} %" if share >= 0.01 or share == 0 else f"{100 * share:.2f} %"


def signed(gain: Gain) -> str:
    """The mean of a gain as a percentage with its sign."""
    return f"{_number(gain.mean, gain, '+')} %"


def interval(gain: Gain) -> str:
    """The interval of a gain in per cent, such as [40 .. 85], with as many decimals as its mean."""
    return f"[{_number(gain.low, gain)} .. {_number(gain.high, gain)}]"


def in_sentence(model: str) -> str:
    """Name of a model within a sentence."""
    name = MODEL_NAMES.get(model, model)
    return name[0].lower() + name[1:] if name[1:2].islower() else name


def _number(share: float, gain: Gain, sign: str = "") -> str:
    """A share in per cent: one decimal for a gain below 10 %, two if its whole interval is below 1 %."""
    decimals = 0 if abs(gain.mean) >= 0.0995 else 1 if max(abs(gain.low), abs(gain.high)) >= 0.00995 else 2
    # Adding 0 makes 0.0 of -0.0.
    return f"{round(100 * share, decimals) + 0.0:{sign}.{decimals}f}"
