"""Certificates: what is proved about this network on this data."""

from .certificate import Certificate, Fingerprint, Hypothesis
from .path import certify_path
from .path_certificate import PathCertificate
from .prove import certify
from .verify import verify

__all__ = ["Certificate", "Fingerprint", "Hypothesis", "PathCertificate", "certify", "certify_path", "verify"]
