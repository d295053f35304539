"""Which argument is which where a mixin stands before a Trainer class, maybe the user's own."""

import inspect
from typing import Any

from .errors import invalid


__all__ = ["bind_trainer_arguments"]


def bind_trainer_arguments(cls: type, mixin: type, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """
    Names the positional arguments of a Trainer class.

    The classes after our mixins count, up to the first whose `__init__` names `train_dataset` and takes nothing else:
    a trainer of the user's may have arguments of its own, and hand on the others as `*args` and `**kwargs`.

    Args:
        cls (`type`):
            The class being built.
        mixin (`type`):
            The last of our mixins among its bases.
        args (`tuple`):
            Positional arguments.
        kwargs (`dict[str, Any]`):
            Keyword arguments.

    Returns:
        `dict[str, Any]`: all of them by name.

    Raises:
        `TypeError`: for an argument that neither the Trainer class nor a mixin before it has.
        `ValueError`: for a class without a Trainer among its bases.
    """
    named, rest, known, open_ended = dict(kwargs), list(args), _mixin_options(cls, mixin), False
    for base in cls.__mro__[cls.__mro__.index(mixin) + 1 :]:
        if "__init__" not in vars(base) or base is object:
            continue
        items = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        kinds = {item.kind for item in items}
        for name in [item.name for item in items if item.kind is item.POSITIONAL_OR_KEYWORD][: len(rest)]:
            if name in named:
                raise TypeError(f"{cls.__name__}() got multiple values for argument {name!r}")
            named[name] = rest.pop(0)
        known |= {item.name for item in items}
        if inspect.Parameter.VAR_KEYWORD not in kinds and "train_dataset" in known:
            break
        open_ended = open_ended or inspect.Parameter.VAR_KEYWORD in kinds
    else:
        raise invalid("bases", cls.__name__, "a class with a `transformers.Trainer` among its bases")
    if rest:
        raise TypeError(
            f"{cls.__name__}() takes {len(args) - len(rest)} positional arguments but {len(args)} were given"
        )
    if not open_ended and (unknown := named.keys() - known):
        raise TypeError(f"{cls.__name__}() got an unexpected keyword argument {min(unknown)!r}")
    return named


def _mixin_options(cls: type, mixin: type) -> set[str]:
    """Names of the keyword-only arguments of the mixins of a trainer."""
    inits = [vars(base)["__init__"] for base in cls.__mro__ if issubclass(base, mixin) and "__init__" in vars(base)]
    items = [item for init in inits for item in inspect.signature(init).parameters.values()]
    return {item.name for item in items if item.kind is item.KEYWORD_ONLY}
