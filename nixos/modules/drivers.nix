# Drivers that a disk and a network card of EC2 or of QEMU need, and what systemd and NixOS need in an initrd of ours.
{
  boot.initrd.availableKernelModules = [
    "ena"
    "nvme"
    "virtio_net"
    "virtio_blk"
    "virtio_pci"
    "af_packet"
    "erofs"
    "overlay"
    "loop"
    # systemd looks for credentials in SMBIOS early, and does not look again.
    "dmi_sysfs"
  ];
}
