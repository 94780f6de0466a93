"""Keras callbacks that Keras does not have. Each file stands alone and needs only Keras to be imported."""

from callbacks.activation_statistics import ActivationStatistics
from callbacks.comparison import Comparison
from callbacks.gradient_norms import GradientNorms
from callbacks.learning_rate_logger import LearningRateLogger
from callbacks.one_cycle import OneCycle

__all__ = ["ActivationStatistics", "Comparison", "GradientNorms", "LearningRateLogger", "OneCycle"]
