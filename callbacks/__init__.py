"""Keras callbacks that Keras does not have. Each file stands alone and needs only Keras to be imported."""

from callbacks.comparison import Comparison
from callbacks.gradient_norms import GradientNorms

__all__ = ["Comparison", "GradientNorms"]
