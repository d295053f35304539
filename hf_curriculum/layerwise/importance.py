"""
What makes a block matter: change rates, the spectrum of its weights, and what is remembered. Pure functions.

Shapes: L blocks in forward order, r rank of a LoRA pair of shapes `(r, d_in)` and `(d_out, r)`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from ..core.errors import invalid


__all__ = ["BlockScores", "change_rate", "lora_change_squared", "signal_to_noise"]

IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.float64]


def change_rate(change_squared: float, reference_squared: float, learning_rate_sum: float | None = None) -> float:
    r"""
    How far a block has moved, relative to where it was.

    `||W_t - W_ref||_F / ||W_ref||_F` over all weights of the block taken together. ALF selects by the "weight change
    rate" and publishes no formula: this one is our choice. Under Adam each weight moves by about the learning rate in
    a step, so windows of different learning rates compare only after a division by their sum, which is the variant
    with `learning_rate_sum`.

    Args:
        change_squared (`float`):
            `||W_t - W_ref||_F^2`, sum of squares over the block, at least 0.
        reference_squared (`float`):
            `||W_ref||_F^2`; for adapters that of the frozen weights they change, since a LoRA product starts at 0.
        learning_rate_sum (`float`, *optional*):
            Sum of the learning rates of the steps between the two, more than 0. Without it the rate is not
            normalised.

    Returns:
        `float`: at least 0. 0 where nothing changed, whatever the reference; `inf` where a reference of norm 0
        changed, and NaN where a sum of squares is NaN: [`BlockScores`] refuses both and names the block.

    Raises:
        `ValueError`: for a negative sum of squares, or a `learning_rate_sum` that is not positive: a window without a
            learning rate measures nothing, and a rate of 0 would say that the block does not matter.

    Example:

    ```python
    >>> from hf_curriculum.layerwise.importance import change_rate

    >>> change_rate(0.25, 4.0), change_rate(0.25, 4.0, learning_rate_sum=0.125)
    (0.25, 2.0)
    ```
    """
    for name, value in (("change_squared", change_squared), ("reference_squared", reference_squared)):
        if value < 0:
            raise invalid(name, value, "a sum of squares, at least 0")
    if learning_rate_sum is not None and not 0 < learning_rate_sum < math.inf:
        fix = "A window without a learning rate measures nothing: leave it out."
        raise invalid("learning_rate_sum", learning_rate_sum, "a float > 0", fix)
    if change_squared == 0 and not math.isnan(reference_squared):
        return 0.0
    if reference_squared == 0:
        return math.nan if math.isnan(change_squared) else math.inf
    # Two roots: the quotient of the squares leaves the range of floats before the rate does.
    rate = math.sqrt(change_squared) / math.sqrt(reference_squared)
    return rate if learning_rate_sum is None else rate / learning_rate_sum


@torch.no_grad()
def lora_change_squared(
    a: torch.Tensor, b: torch.Tensor, a_reference: torch.Tensor, b_reference: torch.Tensor, scaling: float
) -> torch.Tensor:
    r"""
    How far the product of a LoRA pair has moved.

    `||s (B A - B_ref A_ref)||_F^2` without the `(d_out, d_in)` product. With `dA = A - A_ref` and `dB = B - B_ref` the
    change is `B dA + dB A_ref = [B, dB] [dA; A_ref]`, and the squared norm of a product `U V` is the sum of the
    elements of `(U^T U) * (V V^T)`, two `(2r, 2r)` Gram matrices. The difference of the two products would lose the
    digits of a small step; differences of the factors are exact in float64 for every narrower type.

    Args:
        a (`torch.Tensor` of shape `(r, d_in)`, floating):
            LoRA's A now.
        b (`torch.Tensor` of shape `(d_out, r)`, floating):
            LoRA's B now.
        a_reference (`torch.Tensor` of shape `(r, d_in)`, floating):
            A at the reference.
        b_reference (`torch.Tensor` of shape `(d_out, r)`, floating):
            B at the reference; 0 at the start of training.
        scaling (`float`):
            Factor of the product, `lora_alpha / r` as a rule.

    Returns:
        `torch.Tensor`, a float64 scalar, at least 0: on the factors' device (on the CPU where the device has no
        float64). To be divided by `||W_0||_F^2` in [`change_rate`].

    Raises:
        `ValueError`: for shapes that do not belong together.

    Example:

    ```python
    >>> import torch
    >>> from hf_curriculum.layerwise.importance import lora_change_squared

    >>> a, b = torch.ones(1, 3), torch.zeros(2, 1)
    >>> lora_change_squared(a, b + 1, a, b, 0.5).item()
    1.5
    ```
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:
        raise invalid("a, b", f"shapes {tuple(a.shape)} and {tuple(b.shape)}", "(r, d_in) and (d_out, r)")
    if a_reference.shape != a.shape or b_reference.shape != b.shape:
        got = f"shapes {tuple(a_reference.shape)} and {tuple(b_reference.shape)}"
        raise invalid("a_reference, b_reference", got, f"{tuple(a.shape)} and {tuple(b.shape)}, those of a and b")
    device = torch.device("cpu") if a.device.type == "mps" else a.device
    now_a, then_a, now_b, then_b = (x.to(device).to(torch.float64) for x in (a, a_reference, b, b_reference))
    left = torch.cat([now_b, now_b - then_b], dim=1)  # (d_out, 2r)
    right = torch.cat([now_a - then_a, then_a], dim=0)  # (2r, d_in)
    squared = ((left.T @ left) * (right @ right.T)).sum() * float(scaling) ** 2
    # Terms of opposite sign that cancel (B doubled, A halved) may leave a rounding below 0.
    return squared.clamp(min=0.0)


@torch.no_grad()
def signal_to_noise(weight: torch.Tensor) -> float:
    r"""
    How much of a matrix stands out of noise, the measure of Spectrum.

    `sum(s_i > e) / sum(s_i <= e) / s_max` over the singular values, with the edge `e = sigma (1 + sqrt(beta))`,
    `beta = min(n, m) / max(n, m)` and `sigma = (q_75 - q_25) / 1.349`, quartiles of the singular values themselves
    (Hartford et al. 2024, arXiv 2406.06623, as the public code of QuixiAI/spectrum computes it). That edge is the
    Marchenko-Pastur law's in form alone: the law's sigma is the spread of the entries and its edge has a further
    factor `sqrt(max(n, m))`. A sum of no singular values below the edge counts as 1 there, which is kept; one of
    singular values that are all 0, an infinite ratio there, counts as 1 here too. The ratio has the unit of
    `1 / s_max`: it falls as a matrix grows, and only matrices of like scale compare.

    Args:
        weight (`torch.Tensor` of shape `(n, m)`, floating):
            A matrix. Narrower types are computed in float32.

    Returns:
        `float`: at least 0, finite; 0 for a matrix of zeros.

    Raises:
        `ValueError`: if it is no matrix, or holds values that are not finite.

    Example:

    ```python
    >>> import torch
    >>> from hf_curriculum.layerwise.importance import signal_to_noise

    >>> signal_to_noise(torch.diag(torch.tensor([8.0, 2.0, 2.0, 1.0, 1.0])))
    0.75
    ```
    """
    if weight.dim() != 2 or weight.numel() == 0 or not weight.is_floating_point():
        got = f"shape {tuple(weight.shape)}, {weight.dtype}"
        raise invalid("weight", got, "a matrix of floating-point numbers")
    matrix = weight if weight.dtype == torch.float64 else weight.float()
    if not bool(torch.isfinite(matrix).all()):
        raise invalid("weight", "values that are not finite", "a finite matrix")
    # LAPACK takes four times as long for a wide matrix as for its transpose.
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    values = torch.linalg.svdvals(tall).double().cpu()
    largest = float(values[0])
    if largest == 0:
        return 0.0
    lower, upper = np.quantile(values.numpy(), [0.25, 0.75])
    edge = (upper - lower) / 1.349 * (1.0 + math.sqrt(min(weight.shape) / max(weight.shape)))
    above = values > edge
    noise = float(values[~above].sum())
    return float(values[above].sum()) / (noise if noise > 0 else 1.0) / largest


class BlockScores:
    """
    What is known about every block: a smoothed score, and how long ago it was active.

    The score is an exponential moving average `m <- beta m + (1 - beta) x` of a block's rates, divided by
    `1 - beta^n` after n of them (the bias correction of Adam, arXiv 1412.6980, section 3), so that the first rate
    counts in full. A block that was frozen keeps its average and ages: its change of 0 says nothing about it.

    Args:
        num_blocks (`int`):
            L, at least 1.
        smoothing (`float`, *optional*, defaults to `0.7`):
            beta, in [0, 1); 0 keeps the newest rate alone. Our choice: half of the weight lies on a block's last two
            rates.

    Example:

    ```python
    >>> from hf_curriculum.layerwise.importance import BlockScores

    >>> known = BlockScores(3)
    >>> known.update(active=[2], rates={2: 0.5})
    >>> known.scores.tolist(), known.ages.tolist()
    ([nan, nan, 0.5], [1, 1, 0])
    ```
    """

    def __init__(self, num_blocks: int, smoothing: float = 0.7) -> None:
        if isinstance(num_blocks, bool) or not isinstance(num_blocks, int) or num_blocks < 1:
            raise invalid("num_blocks", num_blocks, "an integer >= 1")
        if not 0 <= smoothing < 1:
            raise invalid("smoothing", smoothing, "a float in [0, 1)")
        self.num_blocks = num_blocks
        self.smoothing = float(smoothing)
        self._averages = np.zeros(num_blocks, dtype=np.float64)
        self._counts = np.zeros(num_blocks, dtype=np.int64)
        self._ages = np.zeros(num_blocks, dtype=np.int64)

    @property
    def scores(self) -> FloatArray:
        """`np.ndarray` of shape `(L,)`, float64: smoothed scores, NaN where a block was never scored."""
        scores = np.full(self.num_blocks, np.nan)
        known = self._counts > 0
        scores[known] = self._averages[known] / (1.0 - self.smoothing ** self._counts[known])
        return scores

    @property
    def ages(self) -> IntArray:
        """`np.ndarray` of shape `(L,)`, int64: windows since a block was active, 0 = active in the last one."""
        return self._ages.copy()

    @property
    def counts(self) -> IntArray:
        """`np.ndarray` of shape `(L,)`, int64: how often each block was scored."""
        return self._counts.copy()

    def update(self, active: Sequence[int], rates: Mapping[int, float]) -> None:
        """
        Takes in what one window of training showed.

        Args:
            active (`Sequence[int]`):
                Blocks that were trained in the window.
            rates (`Mapping[int, float]`):
                Rate of each block that was measured, at least 0. A probe may measure frozen blocks as well; a block
                that is missing keeps its score.

        Raises:
            `ValueError`: for a block that does not exist or comes twice, or a rate that is negative or not finite.
                Nothing is changed then.
        """
        chosen = [self._checked(block, "active") for block in active]
        if len(set(chosen)) != len(chosen):
            raise invalid("active", chosen, "each block once")
        measured = {self._checked(block, "rates"): float(rate) for block, rate in rates.items()}
        for block, rate in measured.items():
            if not 0 <= rate < math.inf:
                fix = "Its weights or gradients are not finite, or it had none: look at the loss before the layers."
                raise invalid(f"rates[{block}]", rate, f"a finite rate >= 0 of block {block}", fix)
        blocks = np.fromiter(measured, dtype=np.int64, count=len(measured))
        values = np.fromiter(measured.values(), dtype=np.float64, count=len(measured))
        self._averages[blocks] = self.smoothing * self._averages[blocks] + (1.0 - self.smoothing) * values
        self._counts[blocks] += 1
        self._ages += 1
        self._ages[np.array(chosen, dtype=np.int64)] = 0

    def state(self) -> dict[str, object]:
        """
        Spells everything known in plain types.

        Returns:
            `dict[str, object]`: numbers and lists; after a round trip through JSON [`~BlockScores.restore`] gives the
            same scores to the last bit.
        """
        return {
            "smoothing": self.smoothing,
            "averages": self._averages.tolist(),
            "counts": self._counts.tolist(),
            "ages": self._ages.tolist(),
        }

    def restore(self, state: Mapping[str, object]) -> None:
        """
        Puts back what [`~BlockScores.state`] spelled.

        Args:
            state (`Mapping[str, object]`):
                Of a run with as many blocks and the same smoothing.

        Raises:
            `ValueError`: if it is the state of another model or of another smoothing, or is damaged. Nothing is
                changed then.
        """
        fix = "Resume with the model and the settings that the checkpoint was written with."
        if state.get("smoothing") != self.smoothing:
            raise invalid("smoothing", self.smoothing, f"{state.get('smoothing')}, as in the checkpoint", fix)
        lists: dict[str, list[float]] = {}
        for name, kinds in (("averages", (int, float)), ("counts", (int,)), ("ages", (int,))):
            values = state.get(name)
            whole = isinstance(values, list) and all(isinstance(x, kinds) and 0 <= x < math.inf for x in values)
            if not isinstance(values, list) or not whole:
                raise invalid(f"state[{name!r}]", values, "a list of finite numbers >= 0", fix)
            if len(values) != self.num_blocks:
                got = f"a state of {len(values)} blocks"
                raise invalid(f"state[{name!r}]", got, f"{self.num_blocks}, as many as the model has", fix)
            lists[name] = values
        self._averages = np.array(lists["averages"], dtype=np.float64)
        self._counts = np.array(lists["counts"], dtype=np.int64)
        self._ages = np.array(lists["ages"], dtype=np.int64)

    def _checked(self, block: int, name: str) -> int:
        if isinstance(block, bool) or not isinstance(block, int | np.integer) or not 0 <= block < self.num_blocks:
            raise invalid(name, block, f"block numbers in [0, {self.num_blocks})")
        return int(block)
