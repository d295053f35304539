"""The one wording of every refusal: what was got, what was expected, what to do."""

__all__ = ["invalid", "unsupported"]


def invalid(name: str, got: object, expected: str, fix: str = "") -> ValueError:
    """
    Builds the error for a wrong value, to be raised by the caller.

    Args:
        name (`str`):
            What is wrong, as the user spells it (an argument, a column, a file).
        got (`object`):
            The value found. Strings are shown as they are, everything else by `repr`.
        expected (`str`):
            What would have been right, with its range.
        fix (`str`, *optional*, defaults to `""`):
            One sentence on what to change.

    Returns:
        `ValueError`: to be raised by the caller, so that the traceback ends where the check stands.

    Example:

    ```python
    >>> from hf_curriculum.core.errors import invalid

    >>> raise invalid("warmup_fraction", 1.5, "a float in [0, 1]")
    Traceback (most recent call last):
        ...
    ValueError: Invalid `warmup_fraction`: got 1.5, expected a float in [0, 1].
    ```
    """
    shown = got if isinstance(got, str) else repr(got)
    return ValueError(f"Invalid `{name}`: got {shown}, expected {expected}." + (f" {fix}" if fix else ""))


def unsupported(what: str, why: str, instead: str) -> NotImplementedError:
    """
    Builds the error for a combination that is not supported.

    Args:
        what (`str`):
            Both parts of the combination, as the user spells them.
        why (`str`):
            What would go wrong silently otherwise.
        instead (`str`):
            The alternative, as a sentence.

    Returns:
        `NotImplementedError`: to be raised by the caller.
    """
    return NotImplementedError(f"{what} is not supported: {why}. {instead}")
