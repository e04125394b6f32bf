"""Binary caches: what a closure's paths look like as objects, in a directory, behind HTTP or in S3.

Knows Nix's layout (`nix-cache-info`, narinfos, NARs) and Calve's records beside it: manifests, roots, pending pushes.
Pushes and pulls in parallel with bounded memory; never learns what a release or a fleet is.
Types: `Location`, `Objects`, `Manifest`, `Root`, `Pending`, `Pushed`, `PullPlan`, `Pulled`.
`cache.pull` and what it imports run in the initrd: nothing there may import the command line's libraries.
"""
