"""Certificates: what is proved about this network on this data."""
