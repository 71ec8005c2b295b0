"""Certificates: what is proved about this network on this data."""

from .certificate import Certificate, Fingerprint, Hypothesis
from .prove import certify
from .verify import verify

__all__ = ["Certificate", "Fingerprint", "Hypothesis", "certify", "verify"]
