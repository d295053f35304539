"""
What happened in a run: `evaluate.Metric` modules over the arithmetic of `hf_curriculum.core.metrics`.

Import each from its module, `from hf_curriculum.analysis.forgetting import Forgetting`: nothing is imported here,
because `evaluate` takes seconds to load.
"""

__all__: list[str] = []
