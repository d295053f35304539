"""What every method needs, and nothing else."""

__all__: list[str] = []
