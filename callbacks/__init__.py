"""Keras callbacks that Keras does not have. Each file stands alone and needs only Keras to be imported."""

from callbacks.activation_statistics import ActivationStatistics
from callbacks.comparison import Comparison
from callbacks.gradient_norms import GradientNorms
from callbacks.learning_rate_logger import LearningRateLogger
from callbacks.learning_rate_range_test import LearningRateRangeTest
from callbacks.one_cycle import OneCycle
from callbacks.stochastic_weight_averaging import StochasticWeightAveraging
from callbacks.swap_schedule_free_weights import SwapScheduleFreeWeights
from callbacks.training_doctor import TrainingDoctor

__all__ = [
    "ActivationStatistics",
    "Comparison",
    "GradientNorms",
    "LearningRateLogger",
    "LearningRateRangeTest",
    "OneCycle",
    "StochasticWeightAveraging",
    "SwapScheduleFreeWeights",
    "TrainingDoctor",
]
