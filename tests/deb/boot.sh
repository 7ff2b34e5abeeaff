# Boots the root in $1 with its own systemd as pid 1. Runs as the first process of new mount, network,
# IPC, UTS, PID and cgroup namespaces. What a PVE node has beside Debian is in the root already; its
# pool, $2, and its network with the address $3 are made here. $4, if there is one, is mounted at /etc/pve.
set -eu
cd "$1"
mount --bind . .
cd "$1"
if [ -n "${4-}" ]; then
  mount --bind "$4" etc/pve
fi
mount -t proc proc proc
mount -t sysfs sysfs sys
# Only v2, as on PVE, whatever the machine has.
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs -o mode=755 tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
mount -t tmpfs -o mode=755 tmpfs dev
mkdir dev/pts dev/shm dev/net
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts dev/pts
ln -s pts/ptmx dev/ptmx
for device in null zero full random urandom tty fuse net/tun; do
  touch "dev/$device"
  mount --bind "/dev/$device" "dev/$device"
done
mount -o loop "$2" rpool
mkdir -p rpool/data
hostname "$(cat etc/hostname)"
ip link set lo up
ip link add eth0 type veth peer name uplink
ip address add "$3/24" dev eth0
ip link set eth0 up
ip link set uplink up
ip route add default via 192.0.2.1
# Not by chroot, in which the kernel makes no user namespaces.
pivot_root . .
umount -l .
cd /
exec env -i container=lxc PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --log-target=journal
