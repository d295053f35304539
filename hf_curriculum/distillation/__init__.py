"""Distillation: learn the next stage without forgetting the last."""

__all__: list[str] = []
