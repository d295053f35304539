"""Sharing: what tasks have in common, and what each keeps for itself."""

__all__: list[str] = []
