#!/bin/sh
# Run by mmdebstrap with the root directory of the template as its argument, before it is packed.
set -eu
root=$1

# Each clone makes its own machine id, and PVE writes its own name and name server.
: > "$root/etc/machine-id"
rm -f "$root/var/lib/dbus/machine-id" "$root/etc/hostname" "$root/etc/resolv.conf"

# No keys that all clones would share.
rm -f "$root"/etc/ssh/ssh_host_*

mkdir -p "$root/srv/www"
printf '<!doctype html>\n<title>sandbox</title>\n<h1>It works</h1>\n' > "$root/srv/www/index.html"

cat > "$root/etc/systemd/system/www.service" <<'UNIT'
[Unit]
Description=Web server of the template: shows that a sandbox is ready
ConditionPathIsDirectory=/srv/www

[Service]
ExecStart=/usr/bin/python3 -m http.server 8000 --directory /srv/www
DynamicUser=yes
Restart=on-failure

[Install]
WantedBy=multi-user.target
UNIT
mkdir -p "$root/etc/systemd/system/multi-user.target.wants"
ln -sf ../www.service "$root/etc/systemd/system/multi-user.target.wants/www.service"
# The console has no login: commands enter through the agent.
for unit in console-getty.service container-getty@.service getty@.service systemd-networkd-wait-online.service; do
    ln -sf /dev/null "$root/etc/systemd/system/$unit"
done
