"""
The blocks of a model: what learns or is frozen together, and what lies outside.

Shapes: L blocks that may learn, in forward order, so that block L - 1 is next to the head.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xxhash
from torch import nn

from ..core.errors import invalid, unsupported
from ..core.parameters import parameters_by_name
from ..core.wrappers import unwrapped
from .depth import Layer, layers_of
from .outside import keeps_learning
from .towers import Tower, find_towers, named_towers, num_elements, unwrapped_part


__all__ = ["BLOCK_COLUMNS", "Block", "Blocks", "find_blocks"]

BLOCK_COLUMNS = ("tower", "blocks", "class", "parameters each", "share")
_SHOWN_NAMES = 4


@dataclass(frozen=True)
class Block:
    """
    One block that may learn.

    Args:
        name (`str`):
            Name of its module, such as `model.layers.3`.
        tower (`str`):
            Name of the list that it is in.
        index (`int`):
            Its place there, from 0.
        parameters (`tuple[str, ...]`):
            Names of its parameters that may learn, as [`~hf_curriculum.core.parameters.parameters_by_name`] gives
            them, in the model's order: those with `requires_grad` when the blocks were found.
        num_parameters (`int`):
            Their elements.
        num_weights (`int`):
            Elements of all its parameters, those that never learn too.
        kind (`str`, *optional*, defaults to `""`):
            Its class.
    """

    name: str
    tower: str
    index: int
    parameters: tuple[str, ...]
    num_parameters: int
    num_weights: int
    kind: str = ""


@dataclass(frozen=True)
class Blocks:
    """
    The blocks of a model, as [`find_blocks`] finds them.

    Args:
        blocks (`tuple[Block, ...]` of length L):
            Those that may learn, in forward order: vision or encoder towers before text and decoder towers.
        always (`tuple[str, ...]`):
            Parameters outside the blocks that keep learning.
        frozen (`tuple[str, ...]`):
            Parameters outside the blocks that could learn and are to be frozen.
        adapters (`bool`):
            Whether the model carries adapters of PEFT: those of a block are what learns in it.
        layers (`tuple[Layer, ...]`, *optional*):
            All blocks in forward order, those that never learn too. Defaults to `blocks`.
        num_weights (`int`, *optional*, defaults to `0`):
            Elements of the whole model.
        num_always (`int`, *optional*, defaults to `0`):
            Elements of `always`.
        num_frozen (`int`, *optional*, defaults to `0`):
            Elements of `frozen`.
    """

    blocks: tuple[Block, ...]
    always: tuple[str, ...]
    frozen: tuple[str, ...]
    adapters: bool
    layers: tuple[Layer, ...] = ()
    num_weights: int = 0
    num_always: int = 0
    num_frozen: int = 0

    def __post_init__(self) -> None:
        if not self.layers:
            own = tuple(Layer(block.name, block.num_weights) for block in self.blocks)
            object.__setattr__(self, "layers", own)

    @property
    def sizes(self) -> np.ndarray:
        """`np.ndarray` of shape `(L,)`, int64: elements of each block that may learn."""
        return np.array([block.num_parameters for block in self.blocks], dtype=np.int64)

    @property
    def num_parameters(self) -> int:
        """Elements of all blocks that may learn."""
        return sum(block.num_parameters for block in self.blocks)

    @property
    def num_layer_weights(self) -> int:
        """Elements of all layers, those that never learn too."""
        return sum(layer.num_weights for layer in self.layers)

    @cached_property
    def _places(self) -> dict[str, int]:
        return {layer.name: place for place, layer in enumerate(self.layers)}

    def num_active(self, active: Iterable[int]) -> int:
        """
        Counts what learns in some blocks.

        Args:
            active (`Iterable[int]`):
                Numbers of the blocks, in [0, L).

        Returns:
            `int`: elements.
        """
        return sum(self.blocks[number].num_parameters for number in set(active))

    def share(self, active: Iterable[int]) -> float:
        """
        The share a of the block parameters that learns.

        Args:
            active (`Iterable[int]`):
                Numbers of the blocks that learn, in [0, L).

        Returns:
            `float` in [0, 1].
        """
        return self.num_active(active) / self.num_parameters

    def depth(self, active: Iterable[int]) -> float:
        """
        The depth p that back-propagation must cross: from the top down to the lowest block that learns.

        Measured in weights of all layers, those that never learn too, so 1 may be out of reach; towers that run side
        by side are crossed each on its own. Parts outside the blocks that always learn count: with learning input
        embeddings everything is crossed.

        Args:
            active (`Iterable[int]`):
                Numbers of the blocks that learn, in [0, L).

        Returns:
            `float` in [0, 1]; 0 if nothing learns.
        """
        lowest: dict[int, int] = {}
        for place in sorted(self._places[self.blocks[number].name] for number in active):
            lowest.setdefault(self.layers[place].chain, place)
        crossed = [
            layer.num_weights
            for place, layer in enumerate(self.layers)
            if layer.is_crossed or place >= lowest.get(layer.chain, len(self.layers))
        ]
        return sum(crossed) / self.num_layer_weights

    def resolve(self, names: Sequence[str | int]) -> tuple[int, ...]:
        """
        Numbers of blocks that a user names.

        Args:
            names (`Sequence[str | int]`):
                For each, the name of a block or an ending of it that no other has (`layers.3`), the same of a tower
                for all its blocks, or a number in [-L, L), negative ones from the top.

        Returns:
            `tuple[int, ...]`: numbers in [0, L) in the order given, each once.

        Raises:
            `ValueError`: for a name that fits no block, or several.
        """
        if isinstance(names, str):
            raise invalid("blocks", names, "a list of names or numbers of blocks")
        found: dict[int, None] = {}
        for name in names:
            found |= dict.fromkeys(self._resolve(name))
        return tuple(found)

    def _resolve(self, name: object) -> list[int]:
        count = len(self.blocks)
        if isinstance(name, int | np.integer) and not isinstance(name, bool):
            if not -count <= name < count:
                raise invalid("blocks", int(name), f"a number in [{-count}, {count})")
            return [int(name) % count]
        for key in ("name", "tower"):
            texts = [getattr(block, key) for block in self.blocks]
            matches = [text for text in dict.fromkeys(texts) if text == name] or [
                text for text in dict.fromkeys(texts) if text.endswith(f".{name}")
            ]
            if len(matches) > 1:
                raise invalid("blocks", str(name), f"one of {_listed(matches)}")
            if matches:
                return [number for number, text in enumerate(texts) if text == matches[0]]
        if isinstance(name, str) and name.removeprefix("-").isdecimal():  # a number from the command line
            return self._resolve(int(name))
        raise invalid(
            "blocks", repr(name) if not isinstance(name, str) else name,
            f"a name such as {_listed([block.name for block in self.blocks])}, or a number in [{-count}, {count})",
        )  # fmt: skip

    def rows(self) -> list[list[object]]:
        """
        The blocks as a table, one line for neighbours of the same class and size.

        Returns:
            `list[list]`: cells under [`BLOCK_COLUMNS`]: tower, places in it, class, elements that may learn in each
            block, and share of the block parameters that the line's blocks hold.
        """
        runs: list[list[Block]] = []
        for block in self.blocks:
            last = runs[-1][-1] if runs else None
            if last is not None and (last.tower, last.index + 1, last.kind, last.num_parameters) == (
                block.tower, block.index, block.kind, block.num_parameters,
            ):  # fmt: skip
                runs[-1].append(block)
            else:
                runs.append([block])
        return [
            [
                run[0].tower,
                str(run[0].index) if len(run) == 1 else f"{run[0].index} to {run[-1].index}",
                run[0].kind,
                run[0].num_parameters,
                f"{100 * sum(block.num_parameters for block in run) / self.num_parameters:.1f} %",
            ]
            for run in runs
        ]

    def layers_to_transform(self, active: Iterable[int]) -> dict[str, object]:
        """
        The same blocks as a static choice for PEFT, to train only them another time.

        Args:
            active (`Iterable[int]`):
                Numbers of the blocks, in [0, L).

        Returns:
            `dict`: `layers_to_transform` (`list[int]`) and `layers_pattern` (`str`), as
            [`~peft.LoraConfig`] takes them beside a list of `target_modules`.

        Raises:
            `NotImplementedError`: for blocks of several towers, or that are not numbered: PEFT knows one list of
                numbers.
        """
        chosen = [self.blocks[number] for number in sorted(set(active))]
        towers = list(dict.fromkeys(block.tower for block in chosen))
        if len(towers) != 1 or any(block.name != f"{block.tower}.{block.index}" for block in chosen):
            raise unsupported(
                f"A static list of blocks of {', '.join(towers) or 'no tower'}",
                "PEFT's `layers_to_transform` are numbers in one list of layers",
                "Choose blocks of one list, or name their modules in `target_modules`.",
            )
        others = {layer.name.rpartition(".")[0] for layer in self.layers} - {towers[0]}
        parts = towers[0].split(".")
        pattern = next(
            ".".join(parts[start:])
            for start in range(len(parts) - 1, -1, -1)
            if not start or not any(f".{other}".endswith("." + ".".join(parts[start:])) for other in others)
        )
        return {"layers_to_transform": [block.index for block in chosen], "layers_pattern": pattern}

    def fingerprint(self) -> str:
        """
        What a choice of blocks belongs to: names and sizes of the blocks, in their order.

        Returns:
            `str`: 32 hexadecimal digits (xxh3, 128 bits).
        """
        identity = [[block.name, *block.parameters, block.num_parameters, block.num_weights] for block in self.blocks]
        return xxhash.xxh3_128_hexdigest(json.dumps([self.adapters, identity]).encode())


def find_blocks(model: nn.Module, *, block_modules: Sequence[str] = (), always_train: Sequence[str] = ()) -> Blocks:
    """
    Finds the blocks of a model from its structure, and what of the rest keeps learning.

    Blocks are the modules of its towers (see `towers.py`). A block learns with the parameters that have
    `requires_grad` now: all of them in full fine-tuning, the adapters under PEFT. A block without any is no block to
    choose, but still lies in the way of back-propagation.

    Outside the blocks (our choice): in full fine-tuning what was pre-trained is frozen, that is the base model
    (embeddings, final norm, pooler, projectors) and the output embeddings with what belongs to them; a task head
    (outside `model.base_model`, such as `classifier` or `score`) keeps learning, as it starts from nothing. Under PEFT
    what learns outside the blocks was asked for (`modules_to_save`, adapters on embeddings) and keeps learning.

    Nothing is changed in the model.

    Args:
        model (`nn.Module`):
            The model, wrapped or not, with `requires_grad` as the user set it.
        block_modules (`Sequence[str]`, *optional*):
            Names of the `nn.ModuleList`s (or single modules) that are the blocks, in forward order, where they cannot
            be found or others are wanted.
        always_train (`Sequence[str]`, *optional*):
            Parts outside the blocks that learn too: names of modules or parameters, or endings of them on a dot
            boundary, such as `lm_head` or `norm`.

    Returns:
        [`Blocks`]

    Raises:
        `ValueError`: if the blocks cannot be found, fewer than two may learn, or a name fits nothing.
        `NotImplementedError`: if blocks share parameters that learn.

    Example:

    ```python
    >>> from hf_curriculum.demo.model import build_model, build_tokenizer
    >>> from hf_curriculum.layerwise.blocks import find_blocks

    >>> blocks = find_blocks(build_model(build_tokenizer()))
    >>> [block.name for block in blocks.blocks]
    ['model.layers.0', 'model.layers.1', 'model.layers.2', 'model.layers.3']
    >>> blocks.frozen
    ('model.embed_tokens.weight', 'model.norm.weight')
    >>> blocks.depth(blocks.resolve(["layers.2"]))
    0.5
    ```
    """
    model = unwrapped(model)
    parameters = parameters_by_name(model)
    towers = named_towers(model, block_modules) if block_modules else find_towers(model)
    blocks = _learning_blocks(towers, parameters)
    if len(blocks) < 2:
        raise invalid(
            "model",
            f"{len(blocks)} blocks with parameters that may learn, of {sum(len(tower.modules) for tower in towers)}",
            "at least two",
            "Freezing layers chooses between blocks: let more of them learn (`requires_grad`) before training starts.",
        )
    inside = {id(parameter) for tower in towers for _, module in tower.modules for parameter in module.parameters()}
    outside = {name: parameter for name, parameter in parameters.items() if id(parameter) not in inside}
    adapters, always = keeps_learning(model, outside, always_train)
    learning = [name for name, parameter in outside.items() if parameter.requires_grad]
    frozen = [name for name in learning if name not in always]
    return Blocks(
        blocks=blocks,
        always=tuple(name for name in learning if name in always),
        frozen=tuple(frozen),
        adapters=adapters,
        layers=layers_of(towers, list(parameters), always),
        num_weights=num_elements(parameters.values()),
        num_always=num_elements(parameters[name] for name in always),
        num_frozen=num_elements(parameters[name] for name in frozen),
    )


def _learning_blocks(towers: Sequence[Tower], parameters: dict[str, nn.Parameter]) -> tuple[Block, ...]:
    names = {id(parameter): name for name, parameter in parameters.items()}
    owners: dict[str, str] = {}
    found = []
    for tower in towers:
        for index, (block_name, module) in enumerate(tower.modules):
            learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
            own = tuple(names[id(parameter)] for parameter in learning)
            for name in own:
                if (first := owners.setdefault(name, block_name)) != block_name:
                    raise unsupported(
                        f"Freezing {block_name} and {first} on their own",
                        f"they share {name}: it would learn with either",
                        "Train the whole model, or choose one whose layers have parameters of their own.",
                    )
            if own:
                sizes = num_elements(learning), num_elements(module.parameters())
                found.append(Block(block_name, tower.path, index, own, *sizes, type(unwrapped_part(module)).__name__))
    return tuple(found)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN_NAMES]) + (", ..." if len(names) > _SHOWN_NAMES else "")
