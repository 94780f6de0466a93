"""Keras callbacks that Keras does not have. Each file, or folder, stands alone and needs only Keras to be imported."""

import importlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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


def __getattr__(name):
    # Imported when it is asked for, because what only reads results (callbacks.comparison.result) needs no Keras.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()
    return getattr(importlib.import_module(f"callbacks.{module}"), name)
