"""Images: from a raw disk to a verified EBS snapshot, and to an AMI.

It knows EBS direct's rules (what may be sent again, what is a block, what a snapshot must add up to) and what of a disk
differs from its parent; of AWS it knows the gateways, of disks their `disk.json`. Nothing here runs a program.
Types: `BlockPlan` (what to write), `Schedule` (what to send next), `Snapshot`, `Image`.
"""
