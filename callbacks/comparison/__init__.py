"""A fair experiment in rooms: `experiment` runs it, `result` holds it, `statistics` judges it, the others show it.

Each room is imported when it is asked for: a result can be read, summarised and judged without Keras.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .experiment import Comparison, environment
    from .result import Result, write_whole

ROOMS = {"Comparison": "experiment", "environment": "experiment", "Result": "result", "write_whole": "result"}

__all__ = ["Comparison", "Result", "environment", "write_whole"]


def __getattr__(name):
    if name not in ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{ROOMS[name]}", __name__), name)
