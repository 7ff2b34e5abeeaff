use std::{collections::HashMap, fs};

use proto::name::SnapshotId;

use super::*;
use crate::{detect::tests::Host, journal::Journal};

fn complete(host: &Host, file: &str, flags: &Flags, env: &[(&str, &str)]) -> Result<Config, Error> {
    let env: HashMap<_, _> = env.iter().copied().collect();
    let mut file: File = toml::from_str(file).expect("a file");
    file.pve.root = host.path("pve");
    file.pve.proc = host.path("proc");
    let look = |name: &str| env.get(name).map(|text| (*text).to_owned());
    Config::complete(file, flags, &look, &host.path("net"))
}

fn table(config: &Config) -> String {
    config.settings().iter().map(|setting| format!("{setting}\n")).collect()
}

fn mistakes(result: Result<Config, Error>) -> String {
    result.expect_err("mistakes").to_string()
}

#[test]
fn empty_configuration_is_completed_by_detection() {
    let config = complete(&Host::new(), "", &Flags::default(), &[]).expect("complete");
    insta::assert_snapshot!(table(&config), @r"
    node = node3 (detected)
    listen = 0.0.0.0:7445 (default)
    vmids = 212500-268749 (default)
    network.bridge = vmbr0 (detected)
    network.gateway = 10.100.3.1 (detected)
    network.pool = 10.100.3.2-10.100.3.254 (detected)
    network.dhcp = false (default)
    network.isolation = true (default)
    storage = local-zfs (detected)
    ");
    assert_eq!(config.network.prefix, 24);
    assert_eq!(config.ingress.socket.as_deref(), Some(Path::new("/run/pve-sandbox/ingress.sock")));
}

#[test]
fn node_and_its_directory_are_known_without_the_bridge_and_with_a_broken_journal() {
    let host = Host::new();
    fs::remove_dir_all(host.path("net/vmbr0")).expect("removed");
    host.write("state/journal.sqlite", &"this is no journal".repeat(100));
    let state = host.path("state");
    let text = format!("state_dir = {state:?}\n[network]\nbridge = \"vmbr0\"\n");
    let why = mistakes(complete(&host, &text, &Flags::default(), &[]));
    assert!(why.contains("network.bridge") && why.contains("state_dir"), "{why}");
    let basics = |env: &dyn Fn(&str) -> Option<String>| {
        let mut file: File = toml::from_str(&text).expect("a file");
        (file.pve.root, file.pve.proc) = (host.path("pve"), host.path("proc"));
        Basics::complete(file, env)
    };
    let known = basics(&|_| None).expect("known");
    assert_eq!((known.node.as_str(), known.state_dir), ("node3", state.clone()));
    // Another node's containers are never looked at.
    let other = basics(&|_| Some("node9".to_owned())).expect_err("not this node");
    assert!(other.to_string().contains("is not this node, which is node3"), "{other}");
}

#[test]
fn flag_overrides_file_and_file_overrides_variable() {
    let file = "storage = \"from-file\"\n[network]\npool = \"10.100.3.128/25\"\ndhcp = true\n\
        [ingress]\ndomain = \"file.example\"\n[vmids]\nstripes = 3\n";
    let flags = Flags { domain: Some("flag.example".to_owned()), ..Flags::default() };
    let env = [
        ("PVE_STORAGE", "from-env"),
        ("PVE_BRIDGE", "vmbr0"),
        ("PVE_PUBLIC_DOMAIN", "env.example"),
        ("PVE_GATEWAY", "10.100.3.9"),
        ("PVE_NODE", ""),
    ];
    let config = complete(&Host::new(), file, &flags, &env).expect("complete");
    insta::assert_snapshot!(table(&config), @r"
    node = node3 (detected)
    listen = 0.0.0.0:7445 (default)
    vmids = 700000-999999 (file)
    network.bridge = vmbr0 (PVE_BRIDGE)
    network.gateway = 10.100.3.9 (PVE_GATEWAY)
    network.pool = 10.100.3.128-10.100.3.254 (file)
    network.dhcp = true (file)
    network.dhcp_server = 10.100.3.9 (default)
    network.isolation = true (default)
    storage = from-file (file)
    ingress.domain = flag.example (flag)
    ");
}

#[test]
fn node_number_of_the_journal_wins_and_none_is_guessed() {
    let host = Host::new();
    let state = host.path("state");
    fs::create_dir_all(&state).expect("mkdir");
    let file = format!("state_dir = {state:?}\n");
    let load = || complete(&host, &file, &Flags::default(), &[]);
    let bare = "{\n\"nodename\": \"node3\",\n\"version\": 0\n}\n";

    // A member whose pmxcfs was started while corosync is down, without a journal.
    host.write("pve/.members", bare);
    host.write("pve/corosync.conf", "totem {}");
    let text = mistakes(load());
    assert!(text.contains("vmids.stripe") && text.contains("corosync"), "{text}");
    // A node outside a cluster is number 1.
    fs::remove_file(host.path("pve/corosync.conf")).expect("removed");
    let config = load().expect("complete");
    assert_eq!((config.number, config.vmids.value.0.get()), (Some(1), 100_000));

    let journal = SqliteJournal::open(&config.journal(), config.pools()).expect("opens");
    let node = journal::Node { name: "node3".parse().expect("a name"), number: 3 };
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(journal.set_node(&node)).expect("written");
    // Whatever pmxcfs reports now, the journal's ranges apply.
    host.write("pve/corosync.conf", "totem {}");
    for members in [
        Some(bare),
        Some(
            r#"{"nodename":"node3","cluster":{"quorate":1},
        "nodelist":{"node3":{"id":7,"online":1}}}"#,
        ),
        None,
    ] {
        match members {
            Some(text) => host.write("pve/.members", text),
            None => fs::remove_file(host.path("pve/.members")).expect("removed"),
        }
        let config = load().expect("complete");
        assert_eq!((config.number, config.vmids.value.0.get()), (Some(3), 212_500), "{members:?}");
        assert_eq!(config.node.value.as_str(), "node3");
        let source = if members.is_some() { Source::Detected } else { Source::Journal };
        assert_eq!(config.node.source, source);
    }
}

#[test]
fn undetectable_storage_does_not_stop_the_agent() {
    for text in ["", "rbd: a\n\tcontent rootdir\n\nrbd: b\n\tcontent rootdir\n"] {
        let host = Host::new();
        host.write("pve/storage.cfg", text);
        let config = complete(&host, "", &Flags::default(), &[]).expect("complete");
        assert!(!table(&config).contains("storage"), "{}", table(&config));
        assert_eq!(config.storage, None);
    }
    let host = Host::new();
    fs::remove_file(host.path("pve/storage.cfg")).expect("removed");
    let config = complete(&host, "storage = \"kept\"", &Flags::default(), &[]).expect("complete");
    assert!(table(&config).contains("storage = kept (file)"));
    let kept = Sourced { value: "kept".to_owned(), source: Source::File };
    assert_eq!(config.storage, Some(kept));
}

#[test]
fn all_configuration_mistakes_are_reported_together() {
    let file = "[[template]]\nsnapshot = \"s\"\nvmid = 9000\ncores = 0\n\
        probe = { http = { port = 80, path = \"x\" } }\n\
        [vmids]\nstripe = 17\n";
    let env = [("PVE_NODE", "node9"), ("PVE_GATEWAY", "x"), ("PVE_IP_POOL_CIDR", "10.1.0.0/24")];
    insta::assert_snapshot!(mistakes(complete(&Host::new(), file, &Flags::default(), &env)), @r"
    the configuration cannot be used
      node: node9 (PVE_NODE) is not this node, which is node3
      vmids.stripe: 17 is not one of the 16 stripes: raise vmids.stripes on every node, or choose one
      network.gateway: PVE_GATEWAY=x: invalid IPv4 address syntax
      network.pool: pool 10.1.0.0-10.1.0.255 (PVE_IP_POOL_CIDR) and gateway 10.100.3.1 (detected) must lie in the network of vmbr0, 10.100.3.0/24
      template: s (9000): cores must be 1 to 64
      template: s (9000): probe.http.path must start with a slash
    ");
}

#[test]
fn template_with_a_name_that_marks_sandboxes_without_one_is_refused() {
    for name in [SnapshotId::ADOPTED, SnapshotId::RECOVERED] {
        let file = format!("[[template]]\nsnapshot = \"{name}\"\nvmid = 9000\n");
        let text = mistakes(complete(&Host::new(), &file, &Flags::default(), &[]));
        assert!(text.contains(&format!("template: {name} (9000): no template may have")), "{text}");
    }
}

#[test]
fn bridge_on_a_shared_network_needs_an_explicit_pool() {
    let host = Host::new();
    host.write(
        "proc/net/route",
        "Iface Destination Gateway Flags RefCnt Use Metric Mask\n\
         vmbr0 00000000 0101A8C0 0003 0 0 0 00000000\n\
         vmbr0 0001A8C0 00000000 0001 0 0 0 00FFFFFF\n",
    );
    host.write("proc/net/fib_trie", "|-- 192.168.1.10\n/32 host LOCAL\n");
    let text = mistakes(complete(&host, "", &Flags::default(), &[]));
    assert!(text.contains("192.168.1.0/24") && text.contains("say which part"), "{text}");
    let env = [("PVE_IP_POOL_CIDR", "192.168.1.128-192.168.1.200")];
    let network = complete(&host, "", &Flags::default(), &env).expect("complete").network;
    assert_eq!((network.gateway, network.prefix), (Ipv4Addr::new(192, 168, 1, 1), 24));
    assert_eq!(network.pool.to_string(), "192.168.1.128-192.168.1.200");
}

#[test]
fn bridge_without_an_address_needs_an_explicit_gateway() {
    let host = Host::new();
    host.write("proc/net/route", "");
    let text = mistakes(complete(&host, "", &Flags::default(), &[]));
    assert!(text.contains("network.gateway: vmbr0 has no address"), "{text}");
    let env = [("PVE_GATEWAY", "10.100.0.1")];
    let network = complete(&host, "", &Flags::default(), &env).expect("complete").network;
    assert_eq!(
        (network.prefix, network.pool.to_string().as_str()),
        (22, "10.100.3.0-10.100.3.254")
    );
}

#[test]
fn pool_leaves_out_addresses_of_the_host() {
    let left = |pool: &str, owned: &[&str]| {
        let owned: Vec<_> = owned.iter().map(|text| text.parse().expect("an address")).collect();
        let network = "10.0.0.0/24".parse().expect("a network");
        pool.parse::<Pool>().expect("a pool").without(network, &owned).map(|pool| pool.to_string())
    };
    assert_eq!(left("10.0.0.0/24", &["10.0.0.1"]).as_deref(), Some("10.0.0.2-10.0.0.254"));
    assert_eq!(left("10.0.0.0/24", &["10.0.0.254"]).as_deref(), Some("10.0.0.1-10.0.0.253"));
    assert_eq!(left("10.0.0.0/24", &["10.0.0.90"]).as_deref(), Some("10.0.0.91-10.0.0.254"));
    assert_eq!(left("10.0.0.5-10.0.0.5", &["10.0.0.1"]).as_deref(), Some("10.0.0.5-10.0.0.5"));
    assert_eq!(left("10.0.0.5-10.0.0.5", &["10.0.0.5"]), None);
    for text in ["", "10.0.0.9-10.0.0.1", "10.0.0.0/33", "a-b", "::1-::2"] {
        assert!(text.parse::<Pool>().is_err(), "{text}");
    }
}

#[test]
fn snapshot_can_configure_its_own_link() {
    let template = |more: &str| {
        let file = format!("[[template]]\nsnapshot = \"s\"\nvmid = 9000\n{more}");
        complete(&Host::new(), &file, &Flags::default(), &[])
    };
    let config =
        template("bridge = \"vmbr0\"\ntag = 42\nrate = 10\nfirewall = true\n").expect("fits");
    let options = config.options();
    let of = &options.templates[0];
    assert_eq!(
        (of.bridge.as_deref(), of.link.tag, of.link.firewall),
        (Some("vmbr0"), Some(42), Some(true))
    );
    assert_eq!(of.link.rate.map(|rate| rate.to_string()).as_deref(), Some("10"));
    let plain = template("").expect("fits").options();
    assert_eq!(
        (&plain.templates[0].bridge, &plain.templates[0].link),
        (&None, &Default::default())
    );
    for (line, told) in [
        ("tag = 0\n", "s (9000): tag must be 1 to 4094"),
        ("tag = 4095\n", "s (9000): tag must be 1 to 4094"),
        ("bridge = \"vmbr7\"\n", "s (9000): there is no interface \"vmbr7\""),
        ("bridge = \"vmbr0,tag=1\"\n", "s (9000): there is no interface"),
        ("bridge = \"../net/vmbr0\"\n", "s (9000): there is no interface"),
    ] {
        let text = mistakes(template(line));
        assert!(text.contains(told), "{line}: {text}");
    }
    for line in ["rate = 0\n", "rate = -1.5\n", "rate = nan\n", "tag = 70000\n", "tag = -1\n"] {
        let file = format!("[[template]]\nsnapshot = \"s\"\nvmid = 9000\n{line}");
        assert!(toml::from_str::<File>(&file).is_err(), "{line}");
    }
}

#[test]
fn bounds_of_waiting_requests_and_idle_rules_are_checked() {
    let config = complete(&Host::new(), "", &Flags::default(), &[]).expect("complete");
    assert_eq!(config.lifetimes.silent_bytes, 1024);
    assert_eq!(config.lifetimes.default.idle_cpu, Some(0));
    let file = "[ingress.wake]\nhold_s = 90\nteam_held_max = 10\nheld_max = 10\nfollowers = true\n\
                [lifetime]\nidle_cpu = 6400\nsilent_bytes = 0\n";
    let config = complete(&Host::new(), file, &Flags::default(), &[]).expect("complete");
    assert!(config.ingress.wake.followers);
    let file = "[ingress.wake]\nhold_s = 91\nteam_wakes_per_min = 0\nteam_held_max = 11\nheld_max = 10\n\
                rest_s = 3601\n[lifetime]\nidle_cpu = 6401\n";
    let wrong = mistakes(complete(&Host::new(), file, &Flags::default(), &[]));
    for name in ["hold_s", "team_wakes_per_min", "team_held_max", "rest_s", "lifetime.idle_cpu"] {
        assert!(wrong.contains(name), "{name}: {wrong}");
    }
    let wrong = mistakes(complete(
        &Host::new(),
        "[ingress.wake]\nheld_max = 3001\n",
        &Flags::default(),
        &[],
    ));
    assert!(wrong.contains("held_max: must be 1 to 3000"), "{wrong}");
}

#[test]
fn snapshot_says_what_its_sandboxes_expose() {
    let template = |more: &str| {
        let file = format!("[[template]]\nsnapshot = \"s\"\nvmid = 9000\n{more}");
        complete(&Host::new(), &file, &Flags::default(), &[])
    };
    let service = |rest: &str| format!("[[template.services]]\n{rest}\n");
    let vscode = service("name = \"vscode\"\nport = 39378\nvisibility = \"public\"");
    let exec = service("name = \"exec\"\nport = 39375");
    let options =
        template(&format!("expose_on_listen = true\n{vscode}{exec}")).expect("fits").options();
    let ports = &options.templates[0].ports;
    let said: Vec<_> =
        ports.services.iter().map(|of| (of.name.to_string(), of.visibility)).collect();
    let public = Some(proto::visibility::Visibility::Public);
    assert_eq!(said, [("vscode".to_owned(), public), ("exec".to_owned(), None)]);
    assert!(ports.on_listen);
    assert_eq!(template("").expect("fits").options().templates[0].ports, Default::default());

    let same_name = service("name = \"vscode\"\nport = 1");
    let same_port = service("name = \"other\"\nport = 39378");
    let shell = service("name = \"xterm\"\nport = 39383\nvisibility = \"public\"");
    let many: String =
        (1..=33).map(|port| service(&format!("name = \"s-{port}\"\nport = {port}"))).collect();
    let twin = "[[template]]\nsnapshot = \"s\"\nvmid = 9001\n";
    for (more, told) in [
        (format!("{vscode}{same_name}"), "services: the name vscode stands there twice"),
        (format!("{vscode}{same_port}"), "services: the port 39378 stands there twice"),
        (shell, "services: xterm may not be public, because port 39383 gives a shell"),
        (many, "services must be at most 32"),
        (format!("{vscode}{twin}"), "must be the same for all templates of a snapshot"),
    ] {
        let text = mistakes(template(&more));
        assert!(text.contains(told), "{told}: {text}");
    }
    template(&format!("{vscode}{twin}{vscode}")).expect("both say the same");
    for rest in [
        "name = \"vscode\"\nport = 0",
        "name = \"vscode\"\nport = 65536",
        "name = \"VS Code\"\nport = 1",
        "name = \"vscode\"",
        "port = 1",
        "name = \"vscode\"\nport = 1\nvisibility = \"friends\"",
        "name = \"vscode\"\nport = 1\nurl = \"x\"",
    ] {
        let file = format!("[[template]]\nsnapshot = \"s\"\nvmid = 9000\n{}", service(rest));
        assert!(toml::from_str::<File>(&file).is_err(), "{rest}");
    }
}

#[test]
fn template_found_by_its_mark_has_the_services_of_its_snapshot() {
    let host = Host::new();
    for (vmid, snapshot) in [(9001, "cmux"), (9002, "other")] {
        let mark = format!("#pve-sandbox-template%3Av1 snapshot={snapshot} cores=1 memory_mib=512");
        let path = format!("pve/nodes/node3/lxc/{vmid}.conf");
        host.write(&path, &format!("{mark}\ntemplate: 1\n"));
    }
    let file = "[[template]]\nsnapshot = \"cmux\"\nvmid = 9000\nexpose_on_listen = true\n\
                [[template.services]]\nname = \"vscode\"\nport = 39378\n";
    let config = complete(&host, file, &Flags::default(), &[]).expect("the agent starts");
    let ports: Vec<_> = config.options().templates.into_iter().map(|one| one.ports).collect();
    assert_eq!((ports.len(), ports[0].services.len(), ports[0].on_listen), (3, 1, true));
    assert_eq!(ports[1], ports[0], "of the same snapshot");
    assert_eq!(ports[2], Default::default(), "of a snapshot that the file does not name");

    // Mistakes are told of the templates that the file names.
    let file = file.replace("39378", "39383\nvisibility = \"public\"");
    let text = mistakes(complete(&host, &file, &Flags::default(), &[]));
    assert!(text.contains("cmux (9000): services") && !text.contains("9001"), "{text}");
}

#[test]
fn certificate_of_ones_own_has_files_or_acme_and_addresses_of_its_own() {
    let of = |text: &str| complete(&Host::new(), text, &Flags::default(), &[]);
    let files = "[ingress]\ndomain = \"sbx.test\"\npeer = \"10.99.0.1:8481\"\n\
                 [ingress.certificate]\ncert = \"/c\"\nkey = \"/k\"\n";
    let own = of(files).expect("complete").ingress.certificate.expect("a certificate");
    assert_eq!(own.listen, ["0.0.0.0:443".parse().expect("an address")]);
    let acme = "[ingress]\ndomain = \"sbx.test\"\n[ingress.certificate]\nredirect = true\n\
                acme_dns = { provider = \"cloudflare\", email = \"a@b.test\", token_file = \"/t\" }\n";
    let own = of(acme).expect("complete").ingress.certificate.expect("a certificate");
    assert_eq!(own.redirects(), ["0.0.0.0:80".parse().expect("an address")]);
    let with_resolver =
        |address: &str| acme.replace(" }", &format!(", resolvers = [\"{address}\"] }}"));
    let own = of(&with_resolver("192.0.2.53:53")).expect("complete").ingress.certificate;
    let acme_dns = own.and_then(|own| own.acme_dns).expect("ACME");
    assert_eq!(acme_dns.resolvers, ["192.0.2.53:53".parse().expect("an address")]);

    for (text, word) in [
        ("[ingress.certificate]\ncert = \"/c\"\nkey = \"/k\"\n".to_owned(), "needs ingress.domain"),
        (files.replace("key", "#"), "either cert and key, or acme_dns"),
        (
            format!("{files}{}", acme.lines().last().expect("a line")),
            "either cert and key, or acme_dns",
        ),
        (with_resolver("192.0.2.53:0"), "four addresses at most, with ports"),
        (format!("{files}listen = []\n"), "one to four addresses"),
        (
            format!("{files}listen = [\"127.0.0.1:8480\"]\n"),
            "127.0.0.1:8480 is taken by 127.0.0.1:8480",
        ),
        (
            format!("{files}listen = [\"0.0.0.0:8481\"]\n"),
            "0.0.0.0:8481 is taken by 10.99.0.1:8481",
        ),
        (format!("{files}redirect = \"10.0.0.1:443\"\n"), "10.0.0.1:443 is taken by 0.0.0.0:443"),
    ] {
        let wrong = mistakes(of(&text));
        assert!(wrong.contains(word), "{word}: {wrong}");
    }
    for line in
        ["lifetime = 1", "redirect = 80", "acme_dns = { provider = \"x\" }", "listen = \"x\""]
    {
        assert!(toml::from_str::<File>(&format!("{files}{line}\n")).is_err(), "{line}");
    }
}
