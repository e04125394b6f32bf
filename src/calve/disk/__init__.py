"""Disk formats as pure bytes, and the tools that make disks.

For `image` and `cli`, which build images, and `demo`. It knows what an initrd carries (kernel modules, the agent's
payload tree, busybox or systemd), and what becomes a raw disk that firmware starts: unified kernel images, the EFI
system partition, ext4, EROFS whose objects never move, dm-verity, the partition table. It knows no snapshot, no AMI.
Types: `Payload` (the agent's files), `Initrd`, `SystemdInitrd` and `Uki` (what goes into one), `Writer` and `Layout`
(of an EROFS image), `gpt.Layout`, `Part` (of a disk to be), `Tree` (of hashes), `Disk` (a raw disk, block by block).
"""
