use insta::assert_snapshot;

use super::*;
use crate::{
    detect::tests::Host,
    join::lacks,
    journal::{Journal as _, SqliteJournal, conformance},
};

fn net(text: &str) -> Ipv4Net {
    text.parse().expect("a network")
}

/// Paths below a host of a test, whose configuration looks at that host.
fn paths(host: &Host) -> Paths {
    host.write("etc/interfaces", "auto lo\nsource /x\n");
    let interfaces_d = host.path("etc/interfaces.d");
    let interfaces = format!("auto vmbr1\nsource {}/*\n", interfaces_d.display());
    host.write("etc/interfaces", &interfaces);
    let (pve, proc) = (host.path("pve"), host.path("proc"));
    host.write("agent.toml", &format!("# mine\n[pve]\nroot = {pve:?}\nproc = {proc:?}\n"));
    Paths {
        interfaces: host.path("etc/interfaces"),
        interfaces_d,
        etc: host.path("etc/pve-sandbox"),
        config: host.path("agent.toml"),
    }
}

fn planned(host: &Host, paths: &Paths, subnet: Option<&str>) -> Result<Plan, Error> {
    plan(subnet.map(net), paths, &host.path("net"))
}

#[test]
fn bridge_is_planned_written_and_then_complete() {
    let host = Host::new();
    let paths = paths(&host);
    // The number of the node would give 10.100.3.0/24, which vmbr0 has.
    let used = planned(&host, &paths, None).expect_err("in use").to_string();
    assert!(used.contains("vmbr0") && used.contains("join with --pool"), "{used}");
    let plan = planned(&host, &paths, Some("10.200.3.7/24")).expect("a plan");
    let bridge = Bridge { name: "vmbr2".to_owned(), address: net("10.200.3.1/24") };
    assert_eq!(plan, Plan::Make(bridge.clone()), "vmbr0 is there, vmbr1 is in a file");

    let written = write(&bridge, &paths).expect("written");
    assert_eq!(written.len(), 4, "{written:?}");
    assert_eq!(write(&bridge, &paths).expect("again"), Vec::<PathBuf>::new());
    let config = fs::read_to_string(&paths.config).expect("read");
    assert!(config.starts_with("# mine\n") && config.contains("bridge = \"vmbr2\""), "{config}");

    host.write("net/vmbr2/bridge/x", "");
    let again = planned(&host, &paths, Some("10.200.3.0/24")).expect("a plan");
    assert_eq!(again, Plan::Make(bridge));

    // Removed, nothing of it is left, and nothing of the operator's is gone.
    assert_eq!(remove(&paths).expect("removed").len(), 4);
    assert_eq!(remove(&paths).expect("again"), Vec::<PathBuf>::new());
    assert_eq!(made(&paths), None);
    let config = fs::read_to_string(&paths.config).expect("read");
    assert!(config.starts_with("# mine\n") && !config.contains("vmbr2"), "{config}");
}

#[test]
fn files_of_a_bridge_are_as_ifupdown2_nft_and_dnsmasq_read_them() {
    let bridge = Bridge { name: "vmbr1".to_owned(), address: net("10.100.7.1/24") };
    assert_snapshot!(render::interfaces(&bridge, Path::new("/etc/pve-sandbox/nat.nft")));
    assert_snapshot!(render::nat(&bridge));
    assert_snapshot!(render::dns(&bridge));
    let text = render::interfaces(&bridge, Path::new("/x"));
    assert_eq!(render::name_in(&text).as_deref(), Some("vmbr1"));
}

#[test]
fn named_bridge_stays_and_a_pool_that_is_a_network_is_used() {
    let host = Host::new();
    let paths = paths(&host);
    let before = fs::read_to_string(&paths.config).expect("read");
    host.write("agent.toml", &format!("{before}[network]\npool = \"10.150.0.0/22\"\n"));
    let plan = planned(&host, &paths, None).expect("a plan");
    let address = net("10.150.0.1/22");
    assert_eq!(plan, Plan::Make(Bridge { name: "vmbr2".to_owned(), address }));
    host.write("agent.toml", &format!("{before}[network]\nbridge = \"vmbr0\"\n"));
    let plan = planned(&host, &paths, None).expect("a plan");
    assert_eq!(plan, Plan::Named("vmbr0".to_owned()));
}

#[test]
fn node_whose_agent_has_run_keeps_its_bridge_unless_a_network_is_named() {
    let host = Host::new();
    let paths = paths(&host);
    let before = fs::read_to_string(&paths.config).expect("read");
    let state = host.path("state");
    host.write("agent.toml", &format!("state_dir = {state:?}\n{before}"));
    host.write("state/journal.sqlite", "");
    let plan = planned(&host, &paths, None).expect("a plan");
    assert_eq!(plan, Plan::Named("vmbr0".to_owned()));
    let plan = planned(&host, &paths, Some("10.200.0.0/24")).expect("a plan");
    assert!(matches!(plan, Plan::Make(_)), "{plan:?}");
}

/// Host whose agent has a journal and this pool, and whose vmbr0 has 10.100.3.1/24.
fn host_of_an_agent(pool: &str) -> (Host, Paths) {
    let host = Host::new();
    let paths = paths(&host);
    let before = fs::read_to_string(&paths.config).expect("read");
    let state = host.path("state");
    let network = format!("[network]\npool = \"{pool}\"\n");
    host.write("agent.toml", &format!("state_dir = {state:?}\n{before}{network}"));
    fs::create_dir_all(&state).expect("made");
    (host, paths)
}

#[tokio::test]
async fn journal_without_sandboxes_does_not_put_a_pool_on_a_bridge_with_another_network() {
    let (host, paths) = host_of_an_agent("10.150.0.0/24");
    let journal = SqliteJournal::open(&host.path("state/journal.sqlite"), conformance::pools());
    let journal = journal.expect("a journal");
    let made = Plan::Make(Bridge { name: "vmbr2".to_owned(), address: net("10.150.0.1/24") });
    assert_eq!(planned(&host, &paths, None).expect("a plan"), made);
    journal.begin(conformance::intent(1), 0).await.expect("room");
    // One lives: nobody can tell where, and another bridge is not made behind its back.
    let error = planned(&host, &paths, None).expect_err("not in the network of vmbr0");
    let told = error.to_string();
    assert!(told.contains("10.100.3.0/24, the network of their bridge vmbr0"), "{told}");
    assert!(told.contains("bridge init --subnet NETWORK"), "{told}");
    let subnet = Some("10.150.0.0/24");
    assert_eq!(planned(&host, &paths, subnet).expect("the remedy"), made);

    let (host, paths) = host_of_an_agent("10.100.3.128/25");
    SqliteJournal::open(&host.path("state/journal.sqlite"), conformance::pools()).expect("made");
    let plan = planned(&host, &paths, None).expect("a plan");
    assert_eq!(plan, Plan::Named("vmbr0".to_owned()), "its sandboxes were there");
}

#[test]
fn named_bridge_refuses_a_pool_of_another_network_before_a_token_is_used() {
    let host = Host::new();
    let paths = paths(&host);
    let before = fs::read_to_string(&paths.config).expect("read");
    host.write("agent.toml", &format!("{before}[network]\nbridge = \"vmbr0\"\n"));
    let checked = |pool: &str| check(pool.parse().ok(), &paths, &host.path("net"));
    let error = checked("172.20.0.0/24").expect_err("elsewhere");
    assert!(matches!(error, Error::PoolOffBridge(..)), "{error}");
    checked("10.100.3.64/26").expect("a part of it");
}

#[test]
fn named_bridge_that_is_not_there_is_refused_with_what_to_name() {
    let host = Host::new();
    let paths = paths(&host);
    let before = fs::read_to_string(&paths.config).expect("read");
    let named = format!("{before}[network]\nbridge = \"vmbr5\"\n");
    host.write("agent.toml", &named);
    let error = planned(&host, &paths, None).expect_err("gone").to_string();
    assert!(error.contains("take network.bridge out of"), "{error}");
    // Nor is a token used for it.
    let error = check("10.200.3.0/24".parse().ok(), &paths, &host.path("net")).expect_err("gone");
    assert!(matches!(error, Error::Missing { .. }), "{error}");

    host.write("agent.toml", &before);
    let bridge = Bridge { name: "vmbr2".to_owned(), address: net("10.200.3.1/24") };
    write(&bridge, &paths).expect("written");
    host.write("agent.toml", &named);
    let error = planned(&host, &paths, None).expect_err("mistyped").to_string();
    assert!(error.ends_with(&instead(Some("vmbr2"), &paths.config)), "{error}");
    host.write("agent.toml", &named.replace("vmbr5", "vmbr2"));
    assert_eq!(planned(&host, &paths, None).expect("the remedy"), Plan::Make(bridge));
    assert_eq!(made_address(&paths), Some(Ipv4Addr::new(10, 200, 3, 1)));
}

/// Host with a made bridge vmbr2 of 10.200.3.1/24.
fn host_with_a_bridge() -> (Host, Paths) {
    let host = Host::new();
    let paths = paths(&host);
    let bridge = Bridge { name: "vmbr2".to_owned(), address: net("10.200.3.1/24") };
    write(&bridge, &paths).expect("written");
    (host, paths)
}

/// Writes the config of a container of the host; returns its file.
fn container(host: &Host, vmid: u32, mark: &str, net0: &str) -> PathBuf {
    let file = format!("pve/nodes/node3/lxc/{vmid}.conf");
    host.write(&file, &format!("{mark}hostname: x\nnet0: name=eth0,{net0}\n"));
    host.path(&file)
}

/// First line of a sandbox's config.
const MARK: &str = "#pve-sandbox%3Av1 id=x\n";

#[test]
fn network_that_would_cut_off_a_sandbox_is_refused() {
    let (host, paths) = host_with_a_bridge();
    let checked = |pool: &str| check(pool.parse().ok(), &paths, &host.path("net"));
    checked("172.20.0.0/24").expect("nobody is on it");
    let theirs = "bridge=vmbr2,ip=10.200.3.5/24,gw=10.200.3.1";
    container(&host, 207, "", theirs);
    container(&host, 100_000, MARK, "bridge=vmbr0,ip=192.0.2.9/24");
    checked("172.20.0.0/24").expect("a container that is not ours, and one on another bridge");

    let file = container(&host, 100_001, MARK, theirs);
    for pool in ["172.20.0.0/24", "10.200.0.0/16"] {
        let told = checked(pool).expect_err(pool).to_string();
        assert!(told.contains("their gateway: 100001. Keep"), "{pool}: {told}");
    }
    checked("10.200.3.0/24").expect("the same network");
    checked("10.200.3.128/25").expect("a part of it leaves the bridge as it is");
    let edited = planned(&host, &paths, Some("10.201.3.0/24")).expect_err("by another command");
    assert!(matches!(edited, Error::CutsOff { .. }), "{edited}");

    let also = |number: u32| container(&host, 100_001 + number, MARK, theirs);
    let files: Vec<_> = (1..=11).map(also).collect();
    let told = checked("172.20.0.0/24").expect_err("all of them").to_string();
    assert!(told.contains("100010 and 2 more. Keep"), "{told}");
    // Which sandboxes are here is not known.
    let members = fs::read_to_string(host.path("pve/.members")).expect("read");
    fs::remove_file(host.path("pve/.members")).expect("removed");
    let error = checked("172.20.0.0/24").expect_err("pmxcfs is down");
    assert!(matches!(error, Error::Unknown(_)), "{error}");
    host.write("pve/.members", &members);
    for file in files.iter().chain([&file]) {
        fs::remove_file(file).expect("removed");
    }
    checked("172.20.0.0/24").expect("the remedy: they are gone");
}

#[test]
fn made_bridge_without_a_pool_keeps_its_network() {
    let (host, paths) = host_with_a_bridge();
    let bridge = Bridge { name: "vmbr2".to_owned(), address: net("10.200.3.1/24") };
    assert_eq!(planned(&host, &paths, None).expect("a plan"), Plan::Make(bridge));
    check(None, &paths, &host.path("net")).expect("no other is looked for");
}

#[test]
fn part_of_a_network_is_no_network_of_a_bridge() {
    let host = Host::new();
    let paths = paths(&host);
    let before = fs::read_to_string(&paths.config).expect("read");
    host.write("agent.toml", &format!("{before}[network]\npool = \"10.150.0.9-10.150.0.90\"\n"));
    let error = planned(&host, &paths, None).expect_err("a part");
    assert!(error.to_string().contains("network.bridge"), "{error}");
    assert!(matches!(planned(&host, &paths, Some("10.150.0.0/24")), Ok(Plan::Make(_))));
    // The configuration would be invalid.
    let error = planned(&host, &paths, Some("10.200.0.0/24")).expect_err("elsewhere");
    assert!(error.to_string().contains("join with --pool 10.200.0.0/24"), "{error}");
}

#[test]
fn bridge_of_a_node_that_joins_is_checked_with_the_addresses_that_it_is_likely_to_get() {
    let host = Host::new();
    let paths = paths(&host);
    let checked = |pool: Option<&str>| {
        let pool = pool.map(|pool| pool.parse().expect("a pool"));
        check(pool, &paths, &host.path("net"))
    };
    let error = checked(None).expect_err("10.100.3.0/24, by the node's number");
    assert!(matches!(error, Error::PoolUsed(..)), "{error}");
    checked(Some("10.200.3.0/24")).expect("free");
    let error = checked(Some("10.200.3.9-10.200.3.90")).expect_err("a part");
    assert!(matches!(error, Error::PartOfNetwork), "{error}");
    // A node without a cluster has no number.
    host.write("pve/.members", r#"{"nodename":"node3","version":0}"#);
    checked(None).expect("10.100.1.0/24 is free");
    host.write("proc/net/route", &routes("vmbr0\t0000000A\t00000000\t0001\t0\t0\t0\t000000FF"));
    let error = checked(None).expect_err("10.0.0.0/8 has all that the controller gives");
    assert!(matches!(error, Error::PoolUsed(..)), "{error}");
    checked(Some("172.20.0.0/24")).expect("free");
}

/// Kernel's list with this route.
fn routes(line: &str) -> String {
    format!("Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\n{line}\t0\t0\t0\n")
}

#[test]
fn network_behind_a_gateway_is_refused_and_a_wide_route_is_not() {
    let host = Host::new();
    let paths = paths(&host);
    // By 10.0.0.1, as a VPN has it; and one that the node rejects.
    for line in [
        "eth0\t0000640A\t0100000A\t0003\t0\t0\t0\t0000FFFF",
        "*\t0000640A\t00000000\t0200\t0\t0\t0\t0000FFFF",
    ] {
        host.write("proc/net/route", &routes(line));
        let error = planned(&host, &paths, Some("10.100.3.0/24")).expect_err(line);
        assert!(error.to_string().contains("overlaps with 10.100.0.0/16"), "{error}");
        assert!(matches!(planned(&host, &paths, Some("10.101.3.0/24")), Ok(Plan::Make(_))));
    }
    // 0.0.0.0/1 by a VPN is half of a default route.
    host.write("proc/net/route", &routes("tun0\t00000000\t0100000A\t0003\t0\t0\t0\t00000080"));
    assert!(matches!(planned(&host, &paths, Some("10.100.3.0/24")), Ok(Plan::Make(_))));
}

#[test]
fn made_bridge_stays_good_when_a_route_through_a_gateway_has_its_network() {
    let host = Host::new();
    let paths = paths(&host);
    let before = fs::read_to_string(&paths.config).expect("read");
    let pool = "[network]\npool = \"10.200.3.0/24\"\n";
    host.write("agent.toml", &format!("{before}{pool}"));
    let bridge = Bridge { name: "vmbr2".to_owned(), address: net("10.200.3.1/24") };
    let gateway = "eth0\t0000000A\t0100000A\t0003\t0\t0\t0\t000000FF";
    host.write("proc/net/route", &routes(gateway));
    let error = planned(&host, &paths, None).expect_err("a new bridge");
    assert!(matches!(error, Error::PoolUsed(..)), "{error}");

    host.write("proc/net/route", &routes(""));
    write(&bridge, &paths).expect("written");
    host.write("net/vmbr2/bridge/x", "");
    let own = "vmbr2\t0003C80A\t00000000\t0001\t0\t0\t0\t00FFFFFF\t0\t0\t0";
    host.write("proc/net/route", &routes(&format!("{own}\n{gateway}")));
    host.write("proc/net/fib_trie", "|-- 10.200.3.1\n/32 host LOCAL\n");
    // `bridge init` again, `join` again, and `setup`.
    for subnet in [None, Some("10.200.3.0/24")] {
        let plan = planned(&host, &paths, subnet).expect("a plan");
        assert_eq!(plan, Plan::Make(bridge.clone()), "{subnet:?}");
    }
    for pool in [None, Some("10.200.3.0/24")] {
        let pool = pool.map(|pool| pool.parse().expect("a pool"));
        check(pool, &paths, &host.path("net")).expect("its own network");
    }
    let wanted = lacks::Wanted { bridge: true, template: false, start: false };
    let missing = lacks::look(wanted, &paths, &host.path("net"), true).expect("looked");
    assert_eq!(missing, [], "the bridge is there");
    let other = check("10.201.3.0/24".parse().ok(), &paths, &host.path("net"));
    assert!(matches!(other, Err(Error::PoolUsed(..))), "another network is a new one: {other:?}");
}

#[test]
fn unfit_networks_and_a_file_without_the_directory_are_refused() {
    let host = Host::new();
    let paths = paths(&host);
    for bad in ["8.8.8.0/24", "10.0.0.0/7", "10.9.0.0/30", "0.0.0.0/0"] {
        let error = planned(&host, &paths, Some(bad)).expect_err(bad);
        assert!(matches!(error, Error::Unfit(_)), "{bad}: {error}");
    }
    for near in ["10.100.0.0/16", "10.100.3.128/25", "10.99.0.0/24"] {
        let error = planned(&host, &paths, Some(near)).expect_err(near);
        assert!(matches!(error, Error::Used(..)), "{near}: {error}");
    }
    host.write("etc/interfaces", "source /etc/network/other.d/*\n");
    let error = planned(&host, &paths, Some("10.200.0.0/24")).expect_err("not included");
    assert!(error.to_string().contains("add the line"), "{error}");
}
