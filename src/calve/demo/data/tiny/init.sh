#!@busybox@/usr/bin/busybox sh
# Stage 2 of the tiny system: runs as PID 1, on a root file system that the initrd has mounted, with the network up.
bb=@busybox@/usr/bin/busybox
system=@system@

$bb mkdir -p /proc /sys /dev /run /tmp /etc /root /var
$bb chmod 1777 /tmp
[ -e /proc/mounts ] || $bb mount -t proc proc /proc
mounted() { $bb grep -q " $1 " /proc/mounts; }
mounted /sys || $bb mount -t sysfs sysfs /sys
mounted /dev || $bb mount -t devtmpfs devtmpfs /dev
mounted /run || $bb mount -t tmpfs -o mode=0755 tmpfs /run

# Evidence (calve.contract.evidence): the initrd is behind us; what follows ends with the first answer.
read -r now rest </proc/uptime
echo "@@calve {\"v\":1,\"t\":$now,\"e\":\"phase\",\"n\":\"answer\",\"kernel\":\"$($bb uname -r)\"}" >/dev/console

$bb ln -sfn "$system" /run/current-system
[ -e /run/booted-system ] || $bb ln -s "$system" /run/booted-system
$bb ln -sfn /run/calve/resolv.conf /etc/resolv.conf
$bb ln -sfn "$system/etc/inittab" /etc/inittab

echo "@label@: $system" >/dev/console
exec $bb init
