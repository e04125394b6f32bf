#!@busybox@/usr/bin/busybox sh
# Stage 2 of the web server: runs as PID 1, on a root file system that the initrd has mounted, with the network up,
# and makes of it what systemd expects. What Debian's maintainer scripts do once, this does at every boot.
bb=@busybox@/usr/bin/busybox
system=@system@

$bb mkdir -p /proc /sys /dev /run /tmp /root /home /mnt /srv /var
$bb chmod 1777 /tmp
$bb chmod 0700 /root
[ -e /proc/mounts ] || $bb mount -t proc proc /proc
mounted() { $bb grep -q " $1 " /proc/mounts; }
mounted /sys || $bb mount -t sysfs sysfs /sys
mounted /dev || $bb mount -t devtmpfs devtmpfs /dev
mounted /run || $bb mount -t tmpfs -o mode=0755 tmpfs /run
# Only errors of the kernel on the console, whatever its command line says: the console is for evidence.
echo 4 >/proc/sys/kernel/printk

# Evidence (calve.contract.evidence): the initrd is behind us; what follows ends with the first answer.
read -r now rest </proc/uptime
echo "@@calve {\"v\":1,\"t\":$now,\"e\":\"phase\",\"n\":\"answer\"}" >/dev/console

$bb ln -sfn "$system" /run/current-system
[ -e /run/booted-system ] || $bb ln -s "$system" /run/booted-system
# An initrd with systemd makes an empty one.
[ -L /usr ] || [ ! -d /usr ] || $bb rmdir /usr
$bb ln -sfn "$system/sw/usr" /usr
for name in bin sbin lib lib64; do
  $bb ln -sfn "usr/$name" "/$name"
done
[ -e /var/run ] || $bb ln -s ../run /var/run

# A fresh /etc: nothing of another release stays, but for the machine's own identity.
$bb rm -rf /etc.new
$bb mkdir -p /etc /etc.new
$bb cp -a "$system/etc/." /etc.new
$bb find /etc.new -type d -exec $bb chmod 0755 {} +
$bb chmod 0600 /etc.new/shadow
for old in /etc /etc.old; do
  if [ -s "$old/machine-id" ] && [ ! -s /etc.new/machine-id ]; then
    $bb cp "$old/machine-id" /etc.new/machine-id
  fi
done
[ -e /etc.new/machine-id ] || : >/etc.new/machine-id
: >/etc.new/.updated
$bb rm -rf /etc.old
$bb mv /etc /etc.old
$bb mv /etc.new /etc
$bb rm -rf /etc.old

if [ ! -e /run/calve/resolv.conf ] && [ -e /run/resolv.conf ]; then
  $bb mkdir -p /run/calve
  $bb cp /run/resolv.conf /run/calve/resolv.conf
fi

echo "@label@: $system" >/dev/console
exec /usr/lib/systemd/systemd "$@"
