"""Keras callbacks that Keras does not have. Each file stands alone and needs only Keras to be imported."""

from callbacks.comparison import Comparison

__all__ = ["Comparison"]
