use proptest::prelude::*;

use super::*;

const RECORDED: &str = "\
## Sandbox
#
#{\"id\"%3A\"morphvm_ab12\",\"ports\"%3A[{\"name\"%3A\"vs code\",\"p\"%3A39378}],\"exp\"%3A1732000000}
#%09tab & <b>%C3%A4%C3%B6%C3%BC %F0%9F%99%82</b> 100%25
arch: amd64
features: nesting=1
hostname: c601
lock: create
memory: 600
net0: name=eth0,bridge=vmbr0,gw=10.99.0.11,hwaddr=BC:24:11:EB:A5:13,ip=10.99.2.1/16,type=veth
rootfs: btr:601/vm-601-disk-0.raw,size=2G
tags: a;b;c
template: 1
unprivileged: 1
lxc.mount.entry: /dev/net dev/net none bind,create=dir

[pve:pending]
hostname: later

[s1]
#first snap
lock: backup
rootfs: btr:601/vm-601-disk-0.raw@s1,size=2G
";

#[test]
fn changes_that_wait_for_a_boot_are_read_and_snapshots_are_not() {
    let config = ContainerConfig::parse(RECORDED.as_bytes());
    let names = |config: &ContainerConfig| {
        let of = |(key, value): (&str, &str)| (key == "hostname").then(|| value.to_owned());
        config.settings_with_pending().filter_map(of).collect::<Vec<_>>()
    };
    assert_eq!(names(&config), ["c601", "later"]);
    assert_eq!(config.hostname(), Some("c601"), "it has that name now");
    let text = b"hostname: a\n[PVE:Pending] \n#hostname: b\nhostname: c\n[s1]\nhostname: d\n\
        [later:kind]\nhostname: e\n[S-2]\nhostname: f\n[no header\nhostname: g\n";
    assert_eq!(names(&ContainerConfig::parse(text)), ["a", "c", "e", "g"]);
}

#[test]
fn container_that_a_boot_makes_privileged_does_not_stay_unprivileged() {
    let stays = |text: &str| {
        let config = ContainerConfig::parse(format!("unprivileged: 1\n{text}\n").as_bytes());
        assert!(config.is_unprivileged(), "{text}");
        config.stays_unprivileged()
    };
    for text in ["", "[pve:pending]\ndelete: features,unprivileged2", "[s1]\nunprivileged: 0"] {
        assert!(stays(text), "{text}");
    }
    for text in ["unprivileged: 0", "delete: unprivileged", "delete: memory,!unprivileged;swap"] {
        assert!(!stays(&format!("[pve:pending]\n{text}")), "{text}");
    }
}

#[test]
fn disk_size_is_rounded_down() {
    let of = |size: &str| {
        let config = format!("rootfs: local:subvol-1-disk-0{size}\n");
        ContainerConfig::parse(config.as_bytes()).rootfs_gib()
    };
    for (size, gib) in [
        (",size=8G", 8),
        (",acl=1,size=2560M", 2),
        (",size=4.5G", 4),
        (",size=1T", 1024),
        (",size=4294967296", 4),
        (",size=3X", 0),
        (",size=99999999999T", 0),
        ("", 0),
    ] {
        assert_eq!(of(size), gib, "{size}");
    }
}

#[test]
fn config_written_by_pve_is_read() {
    let config = ContainerConfig::parse(RECORDED.as_bytes());
    assert_eq!(config.hostname(), Some("c601"));
    assert_eq!(config.lock(), Some("create"));
    assert_eq!(config.rootfs(), Some("btr:601/vm-601-disk-0.raw"));
    assert_eq!(config.storage(), Some("btr"));
    assert_eq!(config.tags().collect::<Vec<_>>(), ["a", "b", "c"]);
    assert!(config.is_template() && config.is_unprivileged() && !config.is_protected());
    assert_eq!((config.memory_mib(), config.cores()), (600, None));
    assert_eq!(config.get("swap"), None);
    assert_eq!(
        config.net0(),
        Some(Interface {
            bridge: "vmbr0".to_owned(),
            mac: "BC:24:11:EB:A5:13".to_owned(),
            ip: Ip::Static(Ipv4Addr::new(10, 99, 2, 1), 16),
            gateway: Some(Ipv4Addr::new(10, 99, 0, 11)),
        })
    );
    let description = "# Sandbox\n\n{\"id\":\"morphvm_ab12\",\"ports\":[{\"name\":\"vs code\",\
        \"p\":39378}],\"exp\":1732000000}\n\ttab & <b>äöü 🙂</b> 100%";
    assert_eq!(config.description().as_deref(), Some(description));
    let mut copy = config.clone();
    copy.set_description(description).expect("fits");
    assert_eq!(copy, config, "encoded as PVE does");
    assert!(config.mentions("btr:601/vm-601-disk-0.raw"));
    assert!(config.mentions("vm-601-disk-0") && !config.mentions("vm-601-disk-"));
}

#[test]
fn read_only_root_does_not_grow_while_running() {
    let grows = |line: &str| ContainerConfig::parse(line.as_bytes()).grows_running();
    for line in [
        "rootfs: local-zfs:subvol-1-disk-0,size=2G\n",
        "rootfs: local-lvm:vm-1-disk-0,mountoptions=noatime,ro=0,size=2G\n",
        "rootfs: ceph:vm-1-disk-0,size=2G\nmp0: ceph:vm-1-disk-1,mp=/x,ro=1\n",
    ] {
        assert!(grows(line), "{line}");
    }
    assert!(!grows("rootfs: btr:1/vm-1-disk-0.raw,ro=1,size=2G\n"));
}

#[test]
fn own_volumes_are_only_those_of_the_vmid() {
    let config = ContainerConfig::parse(
        b"mp0: tank:601/vm-601-disk-1.raw,mp=/data\nmp1: /srv,mp=/srv\nmp2: tank:subvol-7-disk-0,mp=/x\n\
          rootfs: local-zfs:basevol-9000-disk-0/subvol-601-disk-0,size=2G\nunused0: tank:vm-601-disk-3\n\
          [s1]\nmp9: tank:vm-601-disk-9\n",
    );
    let vmid = "601".parse().expect("valid");
    assert_eq!(
        config.own_volumes(vmid),
        ["tank:vm-601-disk-1.raw", "local-zfs:subvol-601-disk-0", "tank:vm-601-disk-3"]
    );
    assert_eq!(config.storages(), ["local-zfs", "tank"]);
    assert_eq!(config.own_volumes("9000".parse().expect("valid")), [""; 0], "a base is no part");
}

#[test]
fn set_and_remove_change_only_their_line() {
    let mut config = ContainerConfig::parse(RECORDED.as_bytes());
    config.remove("lock");
    config.set("swap", "0").expect("fits");
    config.set("hostname", "new").expect("fits");
    let expected = RECORDED
        .replacen("lock: create\n", "", 1)
        .replacen("hostname: c601", "hostname: new", 1)
        .replacen("tags: ", "swap: 0\ntags: ", 1);
    assert_eq!(String::from_utf8(config.to_bytes()).expect("text"), expected);
}

#[test]
fn file_without_a_final_newline_is_extended() {
    let mut config = ContainerConfig::parse(b"arch: amd64");
    config.set("memory", "64").expect("fits");
    assert_eq!(config.to_bytes(), b"arch: amd64\nmemory: 64\n");
}

proptest! {
    #[test]
    fn any_config_is_written_back_unchanged(bytes: Vec<u8>) {
        let config = ContainerConfig::parse(&bytes);
        prop_assert_eq!(config.to_bytes(), bytes);
        let _ = (config.mark(), config.net0(), config.tags().count(), config.rootfs());
    }

    #[test]
    fn value_never_adds_another_line(text: String, key in "[a-z]{1,5}") {
        let mut config = ContainerConfig::parse(RECORDED.as_bytes());
        let foreign = |c: &ContainerConfig| {
            let mine = |line: &&Vec<u8>| !line.starts_with(format!("{key}:").as_bytes());
            c.lines.iter().filter(mine).cloned().collect::<Vec<_>>()
        };
        let before = foreign(&config);
        if config.set(&key, &text).is_ok() {
            let read = ContainerConfig::parse(&config.to_bytes());
            prop_assert_eq!(read.get(&key), Some(text.trim()));
            prop_assert_eq!(&read, &config);
        }
        prop_assert_eq!(foreign(&config), before);
    }

    #[test]
    fn description_never_adds_a_setting(text: String, more in "(\\PC|[\n\r%:#\\[]){0,40}") {
        for text in [text, more] {
            let mut config = ContainerConfig::parse(RECORDED.as_bytes());
            let settings = |c: &ContainerConfig| {
                let no_comment = |line: &&Vec<u8>| !line.starts_with(b"#");
                c.lines[..c.main].iter().filter(no_comment).cloned().collect::<Vec<_>>()
            };
            let before = settings(&config);
            config.set_description(&text).expect("short");
            let read = ContainerConfig::parse(&config.to_bytes());
            prop_assert_eq!(&read, &config);
            prop_assert_eq!(settings(&read), before);
            let expected = text.split('\n').map(|l| l.trim_end_matches(' ')).collect::<Vec<_>>().join("\n");
            prop_assert_eq!(read.description().unwrap_or_default(), expected);
        }
    }
}
