"""
Where a model keeps its layers: the lists of blocks that its data run through one after the other.

A *tower* is one such list (the layers of a decoder, of an encoder, of a vision model). Names are those of
`core/parameters.py`: of the model without wrappers, and without what `torch.compile` puts around a part of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..core.errors import invalid, unsupported


__all__ = ["Tower", "find_towers", "named_towers", "num_elements", "outermost_models", "plain_name", "unwrapped_part"]

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")
_HELP = 'Name them: `block_modules=["path.to.list", ...]`, paths of `nn.ModuleList`s or of single modules.'
# Our choice. A list that transformers does not mark as layers is taken for one if its modules are of similar size,
# which the stages of a convolutional network are not, and if it is no small part of the model, as the lists of heads
# are.
_LARGEST_RATIO = 4
_SMALLEST_SHARE = 0.1
_SHOWN_LISTS = 8
# Inputs other than text are encoded before the text model reads them, and encoders run before decoders.
_FIRST = re.compile(r"(^|[._])(vision|visual|vit|image|audio|speech)([._]|$)")
_LAST = re.compile(r"(^|[._])(decoder|language|text)([._]|$)")


@dataclass(frozen=True)
class Tower:
    """
    One list of blocks.

    Args:
        path (`str`):
            Name of the `nn.ModuleList`, or of the module itself where a single one was named.
        modules (`tuple[tuple[str, nn.Module], ...]`):
            Names and blocks, bottom first.
        chain (`int`, *optional*, defaults to `0`):
            Towers of one chain run one after the other; those of different chains side by side (CLIP).
    """

    path: str
    modules: tuple[tuple[str, nn.Module], ...]
    chain: int = 0


def plain_name(name: str) -> str:
    """
    Takes the parts of wrappers out of the name of a module or parameter.

    Args:
        name (`str`):
            As `named_modules` or `named_parameters` give it.

    Returns:
        `str`
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def unwrapped_part(module: nn.Module) -> nn.Module:
    """
    Takes off what `torch.compile` and checkpointing put around a part of a model.

    Args:
        module (`nn.Module`):
            The part.

    Returns:
        `nn.Module`
    """
    while (wrapper := next((name for name in _WRAPPERS if name in module._modules), None)) is not None:
        inner = module._modules[wrapper]
        assert inner is not None
        module = inner
    return module


def num_elements(parameters: Iterable[nn.Parameter]) -> int:
    """
    Counts elements of full tensors; under ZeRO-3 the local ones are empty.

    Args:
        parameters (`Iterable[nn.Parameter]`):
            Parameters; one that comes twice counts once.

    Returns:
        `int`
    """
    found = {id(parameter): parameter for parameter in parameters}
    # 4-bit weights are counted packed, two to an element, as they are stored.
    return sum(int(getattr(parameter, "ds_numel", parameter.numel())) for parameter in found.values())


def outermost_models(module: nn.Module) -> Iterator[PreTrainedModel]:
    """
    Finds the transformers models in a model, without those that are parts of one.

    Args:
        module (`nn.Module`):
            The model: a transformers model, or one around it (PEFT, heads of ours).

    Yields:
        [`~transformers.PreTrainedModel`]
    """
    if isinstance(module, PreTrainedModel):
        yield module
        return
    for child in module.children():
        yield from outermost_models(child)


def find_towers(model: nn.Module) -> tuple[Tower, ...]:
    """
    Finds the towers of a model by its structure.

    They are the outermost `nn.ModuleList`s whose modules transformers marks as layers
    (`GradientCheckpointingLayer`), or are of one class and of similar size; together they must hold at least half of
    the weights that are not embeddings. Layers at the top of a vision tower whose output is not used (LLaVA's
    `vision_feature_layer`) are left out: they never get a gradient. The stages of a network that works at several
    resolutions are no layers.

    Args:
        model (`nn.Module`):
            The model without wrappers.

    Returns:
        `tuple[Tower, ...]`: in the order of the forward pass.

    Raises:
        `ValueError`: if they cannot be found; with the lists that there are.
        `NotImplementedError`: if several layers are one module, or its parameters.
    """
    _refuse_shared_groups(model)
    found = [(_that_is_read(model, tower), is_marked) for tower, is_marked in _walk(model, "", set())]
    rest = _weights_beside(model, [tower for tower, _ in found])
    sizes = [_size(tower) for tower, _ in found]
    whole = sum(sizes) + rest
    kept = [tower for (tower, is_marked), size in zip(found, sizes) if is_marked or size >= _SMALLEST_SHARE * whole]
    held = sum(_size(tower) for tower in kept)
    if sum(len(tower.modules) for tower in kept) < 2 or 2 * held < whole:
        raise invalid(
            "model",
            f"{type(model).__name__} with {_describe_lists(model)}",
            "lists of layers that hold at least half of the weights beside the embeddings",
            _HELP,
        )
    _refuse_repeated(kept)
    return _with_chains(model, _in_order(kept))


def named_towers(model: nn.Module, paths: Sequence[str]) -> tuple[Tower, ...]:
    """
    Takes the towers that a user names.

    Args:
        model (`nn.Module`):
            The model without wrappers.
        paths (`Sequence[str]`):
            Names of modules, or endings of them that only one module has, in the order of the forward pass. An
            `nn.ModuleList` stands for its modules, any other module for itself.

    Returns:
        `tuple[Tower, ...]`

    Raises:
        `ValueError`: for a name that no module has or that several have, and for modules inside one another.
        `NotImplementedError`: if a module comes twice.
    """
    if isinstance(paths, str) or not all(isinstance(path, str) for path in paths):
        raise invalid("block_modules", paths, 'a list of names of modules, such as `["model.layers"]`')
    _refuse_shared_groups(model)
    modules = {plain_name(name): module for name, module in model.named_modules() if name}
    towers = []
    for path in paths:
        matches = [path] if path in modules else [name for name in modules if name.endswith(f".{path}")]
        if len(matches) != 1:
            raise invalid(
                "block_modules",
                path,
                "the name of one module" if not matches else f"one of {', '.join(matches[:8])}",
                "" if matches else f"The model has {_describe_lists(model)}.",
            )
        name, module = matches[0], modules[matches[0]]
        inside = _numbered(name, module) if isinstance(module, nn.ModuleList) else ((name, module),)
        if not inside:
            raise invalid("block_modules", path, "a list that is not empty")
        towers.append(Tower(name, inside))
    _refuse_repeated(towers)
    names = [name for tower in towers for name, _ in tower.modules]
    for place, outer in enumerate(names):
        others = names[:place] + names[place + 1 :]
        if nested := [name for name in others if f"{name}.".startswith(f"{outer}.")]:
            raise invalid("block_modules", f"{nested[0]} and {outer}", "modules that do not contain one another")
    return _with_chains(model, towers)


def _numbered(path: str, modules: nn.ModuleList) -> tuple[tuple[str, nn.Module], ...]:
    return tuple((f"{path}.{index}", module) for index, module in enumerate(modules))


def _walk(module: nn.Module, path: str, seen: set[int]) -> Iterator[tuple[Tower, bool]]:
    """Outermost lists that look like layers, each with whether transformers marks it."""
    for name, child in module._modules.items():
        if child is None or id(child) in seen:
            continue
        seen.add(id(child))
        child_path = path if name in _WRAPPERS else f"{path}.{name}".lstrip(".")
        if isinstance(child, nn.ModuleList) and _are_stages(child):
            continue
        if isinstance(child, nn.ModuleList) and (is_marked := _looks_like_layers(child)) is not None:
            yield Tower(child_path, _numbered(child_path, child)), is_marked
        else:
            yield from _walk(child, child_path, seen)


def _are_stages(modules: nn.ModuleList) -> bool:
    """
    Stages, as transformers names them (Swin, ConvNeXt), differ in resolution: weights do not tell what they cost.

    Whoever wants them as blocks, or the layers in them, names them.
    """
    return any(type(unwrapped_part(module)).__name__.endswith("Stage") for module in modules)


def _looks_like_layers(modules: nn.ModuleList) -> bool | None:
    """True: as transformers marks it. False: by its looks. None: it does not."""
    parts = [unwrapped_part(module) for module in modules]
    if parts and all(isinstance(part, GradientCheckpointingLayer) for part in parts):
        return True
    if len(parts) < 2 or len({type(part) for part in parts}) > 1 or not any(parts[0].children()):
        return None
    sizes = [num_elements(part.parameters()) for part in parts]
    return False if 0 < max(sizes) <= _LARGEST_RATIO * min(sizes) else None


def _that_is_read(model: nn.Module, tower: Tower) -> Tower:
    """Without the top of a vision tower that no one reads: LLaVA takes the features from below the last layers."""
    if not _FIRST.search(tower.path.lower()):
        return tower
    for root in outermost_models(model):
        for name in ("vision_feature_layer", "vision_feature_layers"):
            if (taken := getattr(root.config, name, None)) is not None:
                # Hidden state 0 is what enters the first layer.
                states = range(len(tower.modules) + 1)
                highest = max(states[place] for place in (taken if isinstance(taken, list | tuple) else [taken]))
                return replace(tower, modules=tower.modules[:highest])
    return tower


def _size(tower: Tower) -> int:
    return num_elements(parameter for _, module in tower.modules for parameter in module.parameters())


def _weights_beside(model: nn.Module, towers: Sequence[Tower]) -> int:
    """Elements outside the towers that are not embeddings: the size of a vocabulary says nothing about layers."""
    left_out = [parameter for tower in towers for _, module in tower.modules for parameter in module.parameters()]
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            left_out += module.parameters()
        elif isinstance(module, PreTrainedModel) and (head := module.get_output_embeddings()) is not None:
            left_out += head.parameters()
    known = set(map(id, left_out))
    return num_elements(parameter for parameter in model.parameters() if id(parameter) not in known)


def _refuse_shared_groups(model: nn.Module) -> None:
    for module in model.modules():
        config = getattr(module, "config", None)
        groups, layers = getattr(config, "num_hidden_groups", None), getattr(config, "num_hidden_layers", None)
        if isinstance(groups, int) and isinstance(layers, int) and groups < layers:
            raise unsupported(
                f"Freezing single layers of {type(module).__name__}",
                f"its {layers} layers share the parameters of {groups} (`num_hidden_groups`): none can learn alone",
                "Train the whole model, or choose one whose layers have parameters of their own.",
            )


def _refuse_repeated(towers: Sequence[Tower]) -> None:
    seen: dict[int, str] = {}
    for name, module in (pair for tower in towers for pair in tower.modules):
        if (first := seen.setdefault(id(module), name)) != name:
            raise unsupported(
                f"Freezing {name} and {first} on their own",
                "they are one module that runs several times: neither can learn alone",
                "Train the whole model, or choose one whose layers have parameters of their own.",
            )


def _in_order(towers: Sequence[Tower]) -> list[Tower]:
    def rank(tower: Tower) -> int:
        path = tower.path.lower()
        return 2 if _LAST.search(path) else 0 if _FIRST.search(path) else 1

    return sorted(towers, key=rank)


def _with_chains(model: nn.Module, towers: Sequence[Tower]) -> tuple[Tower, ...]:
    # A contrastive model compares what its towers say and learns the scale of that comparison; none reads another.
    is_contrastive = any(name.rpartition(".")[2].startswith("logit_scale") for name, _ in model.named_parameters())
    return tuple(replace(tower, chain=number if is_contrastive else 0) for number, tower in enumerate(towers))


def _describe_lists(model: nn.Module) -> str:
    lists = []
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 0:
            kinds = sorted({type(unwrapped_part(part)).__name__ for part in module})
            lists.append(f"{plain_name(name)} ({len(module)} x {'/'.join(kinds)})")
    return f"the lists {', '.join(lists[:_SHOWN_LISTS])}" if lists else "no `nn.ModuleList`"
