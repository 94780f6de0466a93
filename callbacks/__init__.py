"""Keras callbacks that Keras does not have. Each file stands alone and needs only Keras to be imported."""

from callbacks.activation_statistics import ActivationStatistics
from callbacks.comparison import Comparison
from callbacks.gradient_norms import GradientNorms

__all__ = ["ActivationStatistics", "Comparison", "GradientNorms"]
