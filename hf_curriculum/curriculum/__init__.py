"""Order: difficulty, levels, pacing, and the plan of a run."""

__all__: list[str] = []
