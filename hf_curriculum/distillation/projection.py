"""
The two products of a language-model head: hidden states to logits, and the gradient of logits back.

Shapes: R positions of one chunk, H hidden size, V vocabulary.
"""

from dataclasses import dataclass

import torch

from ..core.errors import invalid


__all__ = ["HeadGradients", "HeadWeights", "Projection"]


@dataclass(frozen=True)
class HeadWeights:
    """
    What turns hidden states into logits: softcap * tanh(logit_scale * (h W^T + b) / softcap).

    Args:
        weight (`torch.Tensor` of shape `(V, H)`, floating point):
            The projection W. It gets a gradient if it requires one.
        bias (`torch.Tensor` of shape `(V,)`, *optional*):
            b, in the same precision.
        logit_scale (`float`, *optional*, defaults to `1.0`):
            Factor on the raw logits.
        softcap (`float`, *optional*):
            Bound of the logits; None leaves them as they are.

    Raises:
        `ValueError`: for a weight that is not a matrix (one that ZeRO-3 has partitioned, say), or a bias that does not
            fit it.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None = None
    logit_scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        if self.weight.dim() != 2:
            raise invalid(
                "weight",
                f"shape {tuple(self.weight.shape)}",
                "a matrix of shape (V, H)",
                "A partitioned weight must be gathered first.",
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise invalid("bias", f"shape {tuple(self.bias.shape)}", f"shape ({self.weight.shape[0]},)")

    @property
    def vocabulary(self) -> int:
        """V, with the padding of the weight."""
        return self.weight.shape[0]


def _compute_dtype(hidden: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    """Precision of the matrix products: that of autocast, or else the model's own."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


class Projection:
    """
    A head in the precision of its products: that of autocast, or else the model's own.

    Args:
        head ([`HeadWeights`]):
            The head. Its weight is cast once, not per chunk.
        hidden (`torch.Tensor`):
            Hidden states of the precision that will be projected.

    Attributes:
        weight (`torch.Tensor` of shape `(V, H)`):
            W, without graph.
        dtype (`torch.dtype`):
            Precision of the products and of the raw logits.
        arithmetic (`torch.dtype`):
            Precision of everything else: float32, or float64 where the products have it.
    """

    def __init__(self, head: HeadWeights, hidden: torch.Tensor) -> None:
        self.dtype = _compute_dtype(hidden, head.weight)
        self.arithmetic = torch.promote_types(self.dtype, torch.float32)
        self.weight = head.weight.detach().to(self.dtype)
        self._bias = None if head.bias is None else head.bias.detach().to(self.dtype)

    def buffer(self, rows: int) -> torch.Tensor:
        """Room for the raw logits of so many positions, uninitialised."""
        return self.weight.new_empty((rows, len(self.weight)))

    def into(self, buffer: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Raw logits, `(R, V)`, of `hidden`, `(R, H)`, in the first rows of a buffer."""
        logits = torch.mm(hidden.to(self.dtype), self.weight.t(), out=buffer[: len(hidden)])
        return logits if self._bias is None else logits.add_(self._bias)


class HeadGradients:
    """
    Gradients of a sum over chunks, each only where it is wanted.

    Args:
        hidden (`torch.Tensor` of shape `(T, H)`):
            Hidden states of all positions.
        head ([`HeadWeights`]):
            The head.
        projection ([`Projection`]):
            What projects the hidden states.
        wanted (`tuple[bool, bool, bool]`):
            Whether hidden states, weight and bias want a gradient.
    """

    def __init__(
        self, hidden: torch.Tensor, head: HeadWeights, projection: Projection, wanted: tuple[bool, bool, bool]
    ) -> None:
        arithmetic = projection.arithmetic
        self._head, self._projection = head, projection
        self._hidden = torch.zeros_like(hidden, memory_format=torch.contiguous_format) if wanted[0] else None
        # Sums over chunks stay in float32: rounded to bfloat16 after each chunk, small contributions would be lost.
        self._weight = head.weight.new_zeros(head.weight.shape, dtype=arithmetic) if wanted[1] else None
        self._bias = head.weight.new_zeros(head.vocabulary, dtype=arithmetic) if wanted[2] else None
        self.wanted = any(wanted)

    def add(self, rows: slice | torch.Tensor, logits: torch.Tensor, hidden: torch.Tensor) -> None:
        """
        Adds a chunk.

        Args:
            rows (`slice` or `torch.Tensor` of shape `(R,)`, int64):
                Where the chunk stands among all positions.
            logits (`torch.Tensor` of shape `(R, V)`):
                Gradient of the raw logits.
            hidden (`torch.Tensor` of shape `(R, H)`):
                Hidden states of the chunk.
        """
        if self._hidden is not None:
            self._hidden[rows] = torch.mm(logits, self._projection.weight).to(self._hidden.dtype)
        if self._weight is not None:
            hidden = hidden.to(logits.dtype)
            if logits.is_cuda and logits.dtype != self._weight.dtype:
                torch.addmm(self._weight, logits.t(), hidden, out_dtype=self._weight.dtype, out=self._weight)
            else:
                self._weight.addmm_(logits.t().to(self._weight.dtype), hidden.to(self._weight.dtype))
        if self._bias is not None:
            self._bias += logits.sum(dim=0, dtype=self._bias.dtype)

    def result(self) -> list[torch.Tensor | None]:
        """Gradients of hidden states, weight and bias, in the precision of what they belong to."""
        weight = None if self._weight is None else self._weight.to(self._head.weight.dtype)
        bias = self._bias if self._bias is None or self._head.bias is None else self._bias.to(self._head.bias.dtype)
        return [self._hidden, weight, bias]
