//! Writes the lab's own files into /etc/pve: the storage and each node's templates, in PVE's format.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::disk;
use crate::image::Image;
use crate::lab::Node;
use crate::layout::{Layout, NodeId};

const STORAGE: &str = "dir: local\n\tpath /var/lib/vz\n\tcontent iso,vztmpl,backup\n\n\
     zfspool: local-zfs\n\tpool rpool/data\n\tsparse 1\n\tcontent images,rootdir\n\n";

/// Values that are written into the configs of all templates.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Template {
    /// Description, for people and for the agent; the config begins with it as comments.
    pub description: String,
    /// Tags, which every clone has from its start.
    pub tags: String,
    /// Name server of the sandboxes; empty for none.
    pub name_server: String,
}

/// Returns the name of the volume of a node's template.
pub fn base_volume(image: &Image, node: NodeId) -> String {
    format!("basevol-{}-disk-0", image.vmid(node))
}

/// Unpacks a template on the node and writes its config, if they are missing.
pub fn ensure_template(
    layout: &Layout,
    node: &Node,
    image: &Image,
    template: &Template,
) -> Result<()> {
    let id = node.id();
    disk::unpack(layout, node, image, &base_volume(image, id))?;
    let lxc = layout.pve(id).join("nodes").join(id.name()).join("lxc");
    let name = format!("{}.conf", image.vmid(id));
    // Written again if the wanted config differs from the last one, not if somebody changed the
    // file.
    let wanted = config(id, image, template);
    let last = layout.disk(id).join(format!("{name}.last"));
    if !lxc.join(&name).exists() || !fs::read_to_string(&last).is_ok_and(|old| old == wanted) {
        write(&lxc, &name, &wanted)?;
        fs::write(&last, wanted).context("cannot note what was written")?;
    }
    Ok(())
}

/// Writes the storage configuration, if it is missing.
pub fn ensure_storage(layout: &Layout, node: NodeId) -> Result<()> {
    let dir = layout.pve(node);
    if dir.join("storage.cfg").exists() { Ok(()) } else { write(&dir, "storage.cfg", STORAGE) }
}

/// Returns a template's config as PVE writes it: comments, then the keys in order.
pub fn config(node: NodeId, image: &Image, template: &Template) -> String {
    let mut out = String::new();
    for line in template.description.lines() {
        out.push('#');
        out.push_str(&encode(line));
        out.push('\n');
    }
    let volume = base_volume(image, node);
    let keys = [
        ("arch", "amd64".to_owned()),
        ("cores", image.cores.to_string()),
        ("features", "nesting=1".to_owned()),
        ("hostname", "debian".to_owned()),
        ("memory", image.memory_mib.to_string()),
        ("nameserver", template.name_server.clone()),
        (
            "net0",
            format!(
                "name=eth0,bridge=vmbr0,hwaddr=BC:24:11:00:{:02X}:00,ip=dhcp,type=veth",
                node.number()
            ),
        ),
        ("ostype", "debian".to_owned()),
        ("rootfs", format!("local-zfs:{volume},size={}G", image.disk_gib)),
        ("swap", "0".to_owned()),
        ("tags", template.tags.clone()),
        ("template", "1".to_owned()),
        ("unprivileged", "1".to_owned()),
    ];
    for (key, value) in keys.into_iter().filter(|(_, value)| !value.is_empty()) {
        // write! to a String cannot fail.
        let _infallible = writeln!(out, "{key}: {value}");
    }
    out
}

/// Encodes a line of a description as PVE does: bytes that could end or split it become %XX.
fn encode(line: &str) -> String {
    let mut out = String::new();
    for byte in line.bytes() {
        if matches!(byte, b'%' | b':') || !(b' '..=b'~').contains(&byte) {
            let _infallible = write!(out, "%{byte:02X}");
        } else {
            out.push(char::from(byte));
        }
    }
    out
}

/// Writes a file under another name first, so that nobody reads a half-written one.
fn write(dir: &Path, name: &str, text: &str) -> Result<()> {
    let file = dir.join(name);
    let new = dir.join(format!("{name}.tmp.{}", std::process::id()));
    fs::write(&new, text).with_context(|| format!("cannot write {}", new.display()))?;
    fs::rename(&new, &file).with_context(|| format!("cannot write {}", file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::MINIMAL;

    #[test]
    fn template_config_is_written_as_pve_writes_it() {
        let template = Template {
            description: "a: b 100%\n\täö".to_owned(),
            tags: "sandbox-template".to_owned(),
            name_server: "10.99.1.3".to_owned(),
        };
        let expected = "\
#a%3A b 100%25
#%09%C3%A4%C3%B6
arch: amd64
cores: 1
features: nesting=1
hostname: debian
memory: 512
nameserver: 10.99.1.3
net0: name=eth0,bridge=vmbr0,hwaddr=BC:24:11:00:02:00,ip=dhcp,type=veth
ostype: debian
rootfs: local-zfs:basevol-9001-disk-0,size=2G
swap: 0
tags: sandbox-template
template: 1
unprivileged: 1
";
        assert_eq!(config(NodeId::first(2)[1], &MINIMAL, &template), expected);
    }
}
