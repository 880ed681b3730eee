"""Bringing statistics of a quantized attention back to those of full precision (QuantVLA §3.3).

Teacher: the policy in floating point. Student: the same policy, quantized, on the same inputs.
"""

from __future__ import annotations

from torch import Tensor

_NONE = 1e-6
"""The constant of Eq. 9 and 14: against a statistic of this size nothing can be measured."""


def ratio(teacher: Tensor, student: Tensor, *, limit: float, dead_band: float) -> Tensor:
    """The factor for the student, float64 [...], from one statistic of both [...] (QuantVLA Eq. 9-11, 14-16).

    teacher / (student + 1e-6), its log clipped to ± `limit`, and exactly 1 where that log is smaller than
    `dead_band`. Where neither has the statistic, as a head that only ever sees one key has no spread of logits, every
    factor leaves both alike: it is 1.

    Raises `ValueError` if a statistic is not finite, or if the student lacks what the teacher has, which no factor
    can bring back.
    """
    teacher, student = teacher.double(), student.double()
    if not (teacher.isfinite().all() and student.isfinite().all()):
        raise ValueError("a statistic is NaN or infinite")
    absent = student < _NONE
    if (absent & (teacher >= _NONE)).any():
        raise ValueError("zero once quantized, but not in full precision; no factor restores it")
    log = (teacher / (student + _NONE)).log().clamp(-limit, limit)
    return log.masked_fill((log.abs() < dead_band) | absent, 0).exp()


def centred_logit_power(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the squared centred logits, float64 [heads], and their number, int64 [heads], from attention weights
    after softmax [B, heads, query, key].

    Softmax forgets a constant per row, so log p is the logits up to that constant, and their spread is taken around
    the mean of each row. The paper takes it over all logits (Eq. 9); but a constant per row reaches neither
    the attention nor the weights that it leaves. A weight of exactly 0 is a masked key.
    """
    masked = weights == 0
    logits = weights.double().masked_fill(masked, 1).log()
    count = (~masked).sum(-1, keepdim=True)
    mean = logits.sum(-1, keepdim=True) / count.clamp(min=1)
    centred = (logits - mean).masked_fill(masked, 0)
    return centred.square().sum((0, 2, 3)), count.sum((0, 2, 3))
