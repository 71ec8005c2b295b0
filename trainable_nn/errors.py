"""Exceptions of trainable_nn: each is also the builtin that a caller would expect.

Every message says where (a module path or a function), what was found, what was
needed, and what to do.
"""


class TrainableNNError(Exception):
    """Base of all errors that this package raises on purpose."""


class ConversionError(TrainableNNError, ValueError):
    """A model, or a part of it, that a recipe does not rewrite."""


class CheckpointError(TrainableNNError, ValueError):
    """A file that is damaged, tampered with, or made for another model."""


class DatasetError(TrainableNNError, ValueError):
    """A data set that is missing, incomplete or of another format."""


class UnboundedError(TrainableNNError, TypeError):
    """A module for which no Lipschitz bound is proved."""


class CertificateError(TrainableNNError, ArithmeticError):
    """A certificate whose numbers do not hold for the model or the data."""


class OptionError(TrainableNNError, ValueError):
    """An option, an import path or an optimiser name that cannot be carried out as written."""
