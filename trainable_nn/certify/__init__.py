"""Certificates: what is proved about this network on this data."""

from .certificate import Certificate, Fingerprint, Hypothesis
from .kernel_error import KernelError, kernel_error_at_most
from .path import certify_path
from .path_certificate import PathCertificate
from .prove import certify
from .verify import verify

__all__ = [
    "Certificate",
    "Fingerprint",
    "Hypothesis",
    "KernelError",
    "PathCertificate",
    "certify",
    "certify_path",
    "kernel_error_at_most",
    "verify",
]
