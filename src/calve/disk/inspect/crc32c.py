"""CRC-32C, the checksum of EROFS's superblock and ext4's metadata; the standard library has only CRC-32.

Source: RFC 3720, appendix B.4; the polynomial is 0x1EDC6F41, reflected 0x82F63B78.
"""

from __future__ import annotations

__all__ = ["crc32c"]

_POLYNOMIAL = 0x82F63B78


def _entry(value: int) -> int:
    for _ in range(8):
        value = value >> 1 ^ (_POLYNOMIAL if value & 1 else 0)
    return value


_TABLE = tuple(map(_entry, range(256)))


def crc32c(data: bytes, seed: int = 0xFFFFFFFF) -> int:
    """Go on from a seed over some bytes; no final inversion, as both file systems keep it."""
    value = seed
    for byte in data:
        value = value >> 8 ^ _TABLE[(value ^ byte) & 0xFF]
    return value
