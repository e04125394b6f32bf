"""Nix's formats and stores, without Nix.

Knows hashes and their base 32, store paths, NAR, narinfo, signatures, registration, the closure, the store's database.
Checked against Nix 2.8 in tests/interop; everything that comes from outside fails as DamagedError, with its place.
The agent reaches all of it but `database` and `store`: the other modules import little.
Types: Hash, StorePath, PathInfo, NarInfo, Keyring, Sink, Staging, LocalStore.
"""
