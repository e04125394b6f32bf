"""Calve ships NixOS machines to AWS."""

__version__ = "0.1.0"
