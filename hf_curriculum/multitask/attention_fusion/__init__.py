"""A LoRA per task, and attention over what the task models say (JECEI 13(2), 2025)."""

from .attention import FusionAttention, measure_attention
from .config import AttentionFusionConfig
from .features import CachedFeatures, cache_features
from .model import AttentionFusionModel
from .prediction import FusedPrediction


__all__ = [
    "AttentionFusionConfig",
    "AttentionFusionModel",
    "CachedFeatures",
    "FusedPrediction",
    "FusionAttention",
    "cache_features",
    "measure_attention",
]
