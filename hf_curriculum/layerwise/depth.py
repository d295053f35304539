"""What back-propagation crosses on its way from the top of a model to the lowest part that learns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .towers import Tower, num_elements


__all__ = ["Layer", "layers_of"]


@dataclass(frozen=True)
class Layer:
    """
    What back-propagation meets on its way down: a block, whether it may learn or not.

    Args:
        name (`str`):
            Name of its module.
        num_weights (`int`):
            Elements of its parameters.
        chain (`int`, *optional*, defaults to `0`):
            Layers of one chain run one after the other, those of different chains side by side (CLIP).
        is_crossed (`bool`, *optional*, defaults to `False`):
            Whether something outside the blocks that always learns lies below it.
    """

    name: str
    num_weights: int
    chain: int = 0
    is_crossed: bool = False


def layers_of(towers: Sequence[Tower], names: Sequence[str], always: Iterable[str]) -> tuple[Layer, ...]:
    """
    Lines up the blocks of all towers.

    Args:
        towers (`Sequence[Tower]`):
            The towers, in forward order.
        names (`Sequence[str]`):
            All parameters of the model, in its order.
        always (`Iterable[str]`):
            Those outside the blocks that always learn.

    Returns:
        `tuple[Layer, ...]`: in forward order.
    """
    places = {name: place for place, name in enumerate(names)}
    crossed = {number for name in always for number in _towers_above(name, towers, places)}
    return tuple(
        Layer(name, num_elements(module.parameters()), tower.chain, number in crossed)
        for number, tower in enumerate(towers)
        for name, module in tower.modules
    )


def _towers_above(name: str, towers: Sequence[Tower], places: dict[str, int]) -> list[int]:
    """
    Towers that the gradient of a parameter comes through.

    Models register their parts in the order in which data pass them, so what comes before a tower lies below it. Of
    several towers, that is asked of the ones which the parameter shares most of its path with.
    """
    common = [_common_parts(name, tower.path) for tower in towers]
    nearest = [number for number, parts in enumerate(common) if parts == max(common)]
    chains = {towers[number].chain for number in nearest}
    if len(chains) > 1:
        # Behind towers that run side by side: where they are compared.
        return []
    above = [number for number in nearest if places[name] < _first_place(towers[number], places)]
    start = above[0] if above else nearest[-1] + 1
    if not above and len(nearest) > 1:
        return []
    return [number for number in range(start, len(towers)) if towers[number].chain in chains]


def _first_place(tower: Tower, places: dict[str, int]) -> int:
    return min((place for name, place in places.items() if name.startswith(f"{tower.modules[0][0]}.")), default=-1)


def _common_parts(first: str, second: str) -> int:
    common = 0
    for left, right in zip(first.split("."), second.split(".")):
        if left != right:
            break
        common += 1
    return common
