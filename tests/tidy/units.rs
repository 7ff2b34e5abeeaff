//! The units promise what the programs do.

use std::collections::BTreeSet;

use crate::source::{files, read};

fn unit(name: &str) -> Vec<(String, String)> {
    let text = read(&format!("systemd/{name}.service"));
    let text = text.replace("\\\n", " ");
    let settings = text.lines().filter(|line| !line.starts_with(['#', ';', '[']));
    settings
        .filter_map(|line| line.split_once('='))
        .map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned()))
        .collect()
}

fn value(unit: &[(String, String)], key: &str) -> Option<String> {
    unit.iter().find(|(name, _)| name == key).map(|(_, value)| value.clone())
}

#[test]
fn agent_unit_shares_host_mounts_and_does_not_end_its_children() {
    let agent = unit("pve-sandbox-agent");
    assert_eq!(
        value(&agent, "KillMode").as_deref(),
        Some("process"),
        "pct's workers must not be cut"
    );
    assert_eq!(value(&agent, "Type").as_deref(), Some("notify"));
    // Each of these gives the agent mounts of its own, and pct's would stay in there; or it is
    // inherited by the commands in sandboxes.
    let banned = [
        "ProtectSystem",
        "ProtectHome",
        "PrivateTmp",
        "PrivateDevices",
        "PrivateMounts",
        "ReadWritePaths",
        "ReadOnlyPaths",
        "InaccessiblePaths",
        "BindPaths",
        "BindReadOnlyPaths",
        "TemporaryFileSystem",
        "ProtectKernelTunables",
        "ProtectKernelModules",
        "ProtectKernelLogs",
        "ProtectControlGroups",
        "ProtectProc",
        "ProcSubset",
        "DynamicUser",
        "RootDirectory",
        "MountFlags",
        "PrivateNetwork",
        "PrivateUsers",
        "NoNewPrivileges",
        "SystemCallFilter",
        "SystemCallArchitectures",
        "RestrictAddressFamilies",
        "RestrictNamespaces",
        "RestrictRealtime",
        "RestrictSUIDSGID",
        "LockPersonality",
        "MemoryDenyWriteExecute",
        "ProtectClock",
        "ProtectHostname",
        "UMask",
        "Nice",
        "LimitCORE",
    ];
    for key in banned {
        assert_eq!(value(&agent, key), None, "{key} in the agent's unit");
    }
}

#[test]
fn agent_is_spared_and_limited_and_its_children_are_neither() {
    let agent = unit("pve-sandbox-agent");
    assert_eq!(value(&agent, "OOMScoreAdjust").as_deref(), Some("-500"));
    assert_eq!(value(&agent, "MemoryMax").as_deref(), Some("1G"));
    // Every child goes through there.
    let child = read("agent/src/sys/child.rs");
    assert!(child.contains("apart.leave()"), "children inherit what is the agent's");
}

#[test]
fn other_services_of_the_machine_wait_for_ours() {
    for name in ["pve-sandbox-agent", "pve-sandbox-controller", "pve-sandbox-ingress"] {
        assert_eq!(value(&unit(name), "CPUWeight").as_deref(), Some("1000"), "{name}");
    }
}

#[test]
fn agent_unit_has_only_the_capabilities_of_its_code() {
    let listed: BTreeSet<_> = value(&unit("pve-sandbox-agent"), "CapabilityBoundingSet")
        .expect("the unit bounds them")
        .split_whitespace()
        .map(str::to_owned)
        .collect();
    for name in ["CAP_SYS_ADMIN", "CAP_CHOWN", "CAP_KILL"] {
        assert!(listed.contains(name), "{name} is needed");
    }
    for name in ["CAP_SYS_BOOT", "CAP_SYS_TIME", "CAP_SYS_MODULE", "CAP_MAC_ADMIN", "CAP_SYS_RAWIO"]
    {
        assert!(!listed.contains(name), "{name} is not needed");
    }
    // Where the code has a list, it is the same one.
    let in_code: BTreeSet<_> = files("agent/src", &[".rs"])
        .iter()
        .flat_map(|file| {
            file.text.split("Capability::").skip(1).map(str::to_owned).collect::<Vec<_>>()
        })
        .map(|rest| {
            rest.chars().take_while(|c| c.is_ascii_uppercase() || *c == '_').collect::<String>()
        })
        .filter(|name| name.starts_with("CAP_"))
        .collect();
    assert!(in_code.is_empty() || in_code == listed, "code {in_code:?}, unit {listed:?}");
}

#[test]
fn network_facing_units_are_locked_down() {
    for name in ["pve-sandbox-controller", "pve-sandbox-ingress"] {
        let unit = unit(name);
        assert_eq!(value(&unit, "User").as_deref(), Some(name), "{name} runs as a user of its own");
        for (key, expected) in [
            ("Type", "notify"),
            ("NoNewPrivileges", "yes"),
            ("ProtectSystem", "strict"),
            ("CapabilityBoundingSet", ""),
            ("LimitCORE", "0"),
        ] {
            assert_eq!(value(&unit, key).as_deref(), Some(expected), "{name}: {key}");
        }
    }
}

#[test]
fn every_program_with_secrets_forbids_core_dumps_of_itself() {
    for (program, call) in [
        ("agent/src/main.rs", "core_dumps::forbid()"),
        ("controller/src/main.rs", "core_dumps::forbid()"),
        ("agent/helper/src/main.rs", "set_dumpable(false)"),
    ] {
        assert!(read(program).contains(call), "{program} may be dumped");
    }
}

#[test]
fn name_server_of_the_sandboxes_is_locked_down() {
    let unit = unit("pve-sandbox-dns");
    for (key, expected) in [
        // A start that cannot listen fails, and does not only end later.
        ("Type", "forking"),
        ("DynamicUser", "yes"),
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("CapabilityBoundingSet", "CAP_NET_BIND_SERVICE"),
    ] {
        assert_eq!(value(&unit, key).as_deref(), Some(expected), "{key}");
    }
    let start = value(&unit, "ExecStart").expect("it starts something");
    let pid_file = value(&unit, "PIDFile").expect("where dnsmasq says which process it is");
    assert!(start.contains(&format!("--pid-file={pid_file}")), "{start}");
    assert!(!start.contains("--keep-in-foreground"), "{start}");
}

#[test]
fn connector_of_the_tunnel_is_locked_down_and_never_reloaded() {
    let unit = unit("pve-sandbox-tunnel");
    for (key, expected) in [
        ("Type", "notify"),
        ("DynamicUser", "yes"),
        ("NoNewPrivileges", "yes"),
        ("ProtectSystem", "strict"),
        ("CapabilityBoundingSet", ""),
        ("LimitCORE", "0"),
        ("TimeoutStopSec", "20s"),
    ] {
        assert_eq!(value(&unit, key).as_deref(), Some(expected), "{key}");
    }
    // SIGHUP ends cloudflared.
    assert_eq!(value(&unit, "ExecReload"), None);
    let start = value(&unit, "ExecStart").expect("it starts something");
    assert!(start.contains("--no-autoupdate"), "{start}");
    let handed: Vec<_> = unit.iter().filter(|(key, _)| key == "LoadCredential").collect();
    for (_, file) in &handed {
        let (name, path) = file.split_once(':').expect("name and path");
        assert!(start.contains(&format!("%d/{name}")), "{name} is not used: {start}");
        assert!(!start.contains(path), "its user cannot read {path}");
    }
    assert_eq!(handed.len(), 2);
}

#[test]
fn no_unit_is_started_again_for_ever_before_it_is_configured() {
    for (krate, name) in [
        ("agent", "pve-sandbox-agent"),
        ("controller", "pve-sandbox-controller"),
        ("agent", "pve-sandbox-ingress"),
        ("agent", "pve-sandbox-ingress-green"),
        ("agent", "pve-sandbox-dns"),
        ("agent", "pve-sandbox-tunnel"),
    ] {
        let manifest = read(&format!("{krate}/Cargo.toml"));
        // The controller's package has one unit, which has no name there.
        let of_unit = format!("unit-name = \"{name}\", enable = ");
        let setting =
            if krate == "agent" { of_unit.as_str() } else { "systemd-units = { enable = " };
        let (_, rest) = manifest.split_once(setting).expect(name);
        let unit = unit(name.trim_end_matches("-green"));
        let is_skipped = value(&unit, "ConditionPathExists").is_some();
        assert!(is_skipped || rest.starts_with("false"), "{name}: a boot would start it");
    }
}

#[test]
fn packages_install_binaries_where_the_units_start_them() {
    for (krate, name) in [("agent", "pve-sandbox-agent"), ("controller", "pve-sandbox-controller")]
    {
        let start = value(&unit(name), "ExecStart").expect("it starts something");
        let binary = start.split_whitespace().next().expect("a program");
        let manifest = read(&format!("{krate}/Cargo.toml"));
        let asset = format!("\"target/release/{name}\", \"{}\"", &binary[1..]);
        assert!(manifest.contains(&asset), "{krate}/Cargo.toml has no asset {asset}");
    }
}
