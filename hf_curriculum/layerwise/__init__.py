"""Place: which layers learn, and which wait."""

__all__: list[str] = []
