//! Writes what an operator would write on real nodes: the controller's CA and tokens, each node's
//! certificates, the daemons' configurations. Existing files are kept, above all the tokens.

use std::{
    fmt::Write as _,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};

use crate::{
    daemons::{AGENT_CONFIG, CONTROLLER_CONFIG},
    image::{IMAGES, TOOLS},
    lab::{Lab, Node},
    layout::{BOOT_ID, DOMAIN, HUB_IP, Layout, NodeId},
    way_out::NAME_SERVER,
};

/// Team of `target/lab/env`; its token has the operator's scopes, too.
const TEAM: &str = "demo";
/// Second team, for tests of the isolation between teams.
const OTHER_TEAM: &str = "other";
/// Directory of a node's certificates, inside the node.
const TLS: &str = "/etc/pve-sandbox/tls";

/// Writes the controller's CA, configuration and tokens, and the environment of `sandboxctl`.
pub fn controller(lab: &Lab, nodes: &[NodeId]) -> Result<()> {
    let layout = lab.layout();
    let program = layout.dir().join("bin/pve-sandbox-controller");
    if !program.exists() {
        return Ok(());
    }
    let data = layout.dir().join("controller");
    if !data.join("ca/ca.crt").exists() {
        fs::create_dir_all(&data)?;
        run(
            &program,
            &["init", "--data-dir", &shown(&data), "--name", HUB_IP, "--name", "127.0.0.1"],
        )?;
    }
    let mut config = format!(
        "listen = \"{HUB_IP}:7443\"\ndata_dir = \"{}\"\n\
         url_template = \"http://port-{{port}}-vm-{{vmid}}.{DOMAIN}:8480\"\ndiscover = true\n",
        data.display()
    );
    write!(config, "\n[ssh]\nlisten = \"{HUB_IP}:2222\"\n")?;
    // Only the first node: the others are discovered from its /etc/pve/.members.
    if let Some(node) = nodes.first() {
        write!(config, "\n[[node]]\nname = \"{node}\"\naddress = \"{}:7445\"\n", node.ip())?;
    }
    // As the predecessor had it: what is exposed is open to everybody. Host names by name are off by default.
    config.push_str("\n[ingress]\ndefault_visibility = \"public\"\nnames = true\n");
    fs::write(layout.dir().join(CONTROLLER_CONFIG), config)?;
    environment(layout, &program, &data)
}

/// Writes target/lab/env once: a token is shown only when it is created.
fn environment(layout: &Layout, program: &Path, data: &Path) -> Result<()> {
    let file = layout.dir().join("env");
    let snapshot = format!("export SANDBOXCTL_SNAPSHOT='{}'\n", TOOLS.snapshot);
    if let Ok(old) = fs::read_to_string(&file) {
        // An earlier version did not write it.
        return match old.contains("SANDBOXCTL_SNAPSHOT") {
            true => Ok(()),
            false => fs::write(&file, old + &snapshot).context("cannot complete the env file"),
        };
    }
    let token = |team: &str, scopes: &[&str]| {
        let data = shown(data);
        let mut words = vec!["token", "--data-dir", &data, "create", "--team", team];
        words.extend(scopes);
        run(program, &words).map(|said| said.trim().to_owned())
    };
    let text = format!(
        "# Puts a configured sandboxctl on the PATH: . {file}\n\
         export PATH=\"{bin}:$PATH\"\n\
         export LAB_DIR='{dir}'\n\
         export SANDBOXCTL_ENDPOINT='https://127.0.0.1:7443'\n\
         export SANDBOXCTL_CA='{ca}'\n\
         export SANDBOXCTL_TOKEN='{own}'\n\
         {snapshot}\
         export LAB_OTHER_TEAM_TOKEN='{other}'\n",
        file = file.display(),
        bin = layout.dir().join("bin").display(),
        dir = layout.dir().display(),
        ca = data.join("ca/ca.crt").display(),
        own = token(TEAM, &["--scope", "operator"])?,
        other = token(OTHER_TEAM, &[])?,
    );
    fs::write(&file, text)?;
    // The file holds tokens.
    fs::set_permissions(&file, fs::Permissions::from_mode(0o600))?;
    Ok(())
}

/// Writes a node's certificates and configurations. Returns whether the agent must be restarted to
/// read a change.
pub fn node(lab: &Lab, node: &Node) -> Result<bool> {
    let (layout, id, root) = (lab.layout(), node.id(), node.root()?);
    let controller = layout.dir().join("bin/pve-sandbox-controller");
    let agent = root.join("usr/bin/pve-sandbox-agent");
    if !controller.exists() || !agent.exists() {
        return Ok(false);
    }
    let there = |path: &str| root.join(path.trim_start_matches('/'));
    fs::create_dir_all(there(TLS))?;
    if !there(TLS).join("node.crt").exists() {
        let data = shown(&layout.dir().join("controller"));
        let out = shown(&there(TLS));
        run(
            &controller,
            &["node-cert", &id.name(), "--address", &id.ip(), "--out", &out, "--data-dir", &data],
        )?;
    }
    let config = agent_config(id, &root);
    let changed = fs::read_to_string(there(AGENT_CONFIG)).is_ok_and(|old| old != config);
    fs::write(there(AGENT_CONFIG), config)?;
    Ok(changed)
}

fn agent_config(node: NodeId, root: &Path) -> String {
    let (ip, net) = (node.ip(), node.containers_net());
    let cgroups = root.join("run/lab/cgroup");
    // On a machine with v1, what v2 lacks is there.
    let v1 = if cgroups.join("pids").exists() {
        "[pve]\ncgroup_v1 = \"/run/lab/cgroup\"\n\n"
    } else {
        ""
    };
    let mut templates = String::new();
    for image in &IMAGES {
        // write! to a String cannot fail.
        let _infallible = write!(
            templates,
            "[[template]]\nsnapshot = \"{}\"\nvmid = {}\ncores = {}\nmemory_mib = {}\n\
             probe = {{ http = {{ port = 8000, path = \"/\" }} }}\n\n",
            image.snapshot,
            image.vmid(node),
            image.cores,
            image.memory_mib,
        );
    }
    let mut config = format!(
        "listen = \"{ip}:7445\"\n# The kernel is the machine's: a boot of this node has a name of its own.\n\
         boot_id = \"{BOOT_ID}\"\n\n\
         [tls]\nca = \"{TLS}/ca.crt\"\ncert = \"{TLS}/node.crt\"\nkey = \"{TLS}/node.key\"\n\n\
         [network]\n# The end of the network is the DHCP server's, and the lab's own.\n\
         pool = \"{net}.2-{net}.229\"\ndhcp = \"on_request\"\n\
         # The lab's way out answers there; the node itself resolves as the machine does.\n\
         name_servers = [\"{NAME_SERVER}\"]\n\n\
         # Low enough for a test to reach them.\n[limits]\npids = 512\nconnections = 1024\n\n\
         {templates}[ingress]\ndomain = \"{DOMAIN}\"\nhttps = false\n\
         public = [\"127.0.0.1:8480\", \"{ip}:8480\"]\npeer = \"{ip}:8481\"\n\
         tls = {{ ca = \"{TLS}/ingress-ca.crt\", cert = \"{TLS}/ingress-node.crt\", \
         key = \"{TLS}/ingress-node.key\" }}\n\n\
         {v1}# The node is a cgroup of the machine, not a machine: its load is read from there.\n\
         [load.cgroup]\n",
    );
    for controller in ["unified", "cpu", "cpuacct", "memory"] {
        if cgroups.join(controller).exists() {
            config.push_str(&format!("{controller} = \"/run/lab/cgroup/{controller}\"\n"));
        }
    }
    config
}

fn run(program: &Path, words: &[&str]) -> Result<String> {
    let output = Command::new(program).args(words).stdin(Stdio::null()).output();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    ensure!(
        output.status.success(),
        "{} {}: {}",
        program.display(),
        words.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn shown(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}
