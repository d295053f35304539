"""The embedded default: generated graded data and a small model built from code, so that nothing is downloaded."""

from .corpus import generate_corpus
from .model import build_model, build_tokenizer


__all__ = ["build_model", "build_tokenizer", "generate_corpus"]
