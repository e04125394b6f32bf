"""Disks read back: whatever wrote them, what is on them and what is wrong with it.

For `image`, which reads a snapshot back before it registers it, and `cli`. It knows GPT, FAT, PE and UKIs, EROFS,
ext4 and dm-verity from their documents; it shares no code with the writers in `disk`, so that a mistake of theirs
is not made twice. Everything that it reads is foreign: damage is a finding, never a traceback.
Types: `Source` (bytes at an offset), `Finding` (a check that failed), `Expected`, `Inspection`.
"""
