"""The agent: in the initrd it turns user data into a committed system, or into a failure with a reason.

It knows the order of a boot (IMDS, manifest, pre-flight, pull, commit, profile, hand-off), the commit protocol
of the root disk, and the policy of the image it stands in. It imports only what the initrd carries.
Types: `Policy` (the image's), `BootStore` (a `nix.Sink`), `Record` (the committed set), `Failure`.
"""
