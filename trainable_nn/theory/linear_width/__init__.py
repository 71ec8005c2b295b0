"""Paper B: residual networks whose width is linear in the number of samples. Its constants, and what is proved."""

from .certificate import Certificate, certificate, descend, scale_that_certifies, train_until_certified
from .gaussian import c_phi, sigma_matrix, smallest_eigenvalue
from .network import LinearWidthResNet
from .rows import Row, Rows

__all__ = [
    "Certificate", "LinearWidthResNet", "Row", "Rows", "c_phi", "certificate", "descend", "scale_that_certifies",
    "sigma_matrix", "smallest_eigenvalue", "train_until_certified",
]  # fmt: skip
