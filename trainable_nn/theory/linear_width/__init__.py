"""Paper B: residual networks whose width is linear in the number of samples. Its constants, and what is proved."""

from .centre import Centre, measure
from .certificate import Certificate, certificate, descend, scale_that_certifies, train_until_certified
from .gaussian import c_phi, sigma_matrix, smallest_eigenvalue
from .network import LinearWidthResNet
from .paper import paper_constants
from .rows import Row, Rows
from .table1 import Demand, table1, table1_text

__all__ = [
    "Centre", "Certificate", "Demand", "LinearWidthResNet", "Row", "Rows", "c_phi", "certificate", "descend", "measure",
    "paper_constants", "scale_that_certifies", "sigma_matrix", "smallest_eigenvalue", "table1", "table1_text",
    "train_until_certified",
]  # fmt: skip
