"""TrainingDoctor: says what is wrong with a model, before the first step, and with its training, when that has ended.

`doctor` is the callback, `contract` reads the model's outputs, its loss and the targets, `record` the run. `rules` is
the table that judges what was read, by the signs in `before_training` and `after_training`. The folder can be copied
alone.
"""

from .doctor import TrainingDoctor
from .rules import RULES, THRESHOLDS, Finding

__all__ = ["RULES", "THRESHOLDS", "Finding", "TrainingDoctor"]
