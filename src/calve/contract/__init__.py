"""What machine and operator say to each other, as pure dataclasses with parse and dump.

For `fleet`, which writes user data, and `boot`, which reads it; and the reverse for evidence. It knows the
versions of both formats and every failure code, and imports the standard library only.
Types: `UserData`, `Evidence`, `Code`.
"""
