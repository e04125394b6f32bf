"""Disk formats as pure bytes, and the tools that make disks.

For `image` and `cli`, which build images, and `demo`. It knows cpio archives, what an initrd carries (kernel
modules, the agent's payload tree, busybox or systemd) and how an ext4 root disk is made; it knows no snapshot and no
AMI. Types: `Entry` (of an archive), `Payload` (the agent's files), `Initrd` and `SystemdInitrd` (what goes into one).
"""
