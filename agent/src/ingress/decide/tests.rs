use std::collections::BTreeSet;

use proptest::prelude::*;
use proto::id::{SandboxId, Vmid};

use super::*;

const ID: &str = "pvelxc-01jd0000000000000000000000";

fn domain() -> Domain {
    "sbx.test".parse().expect("a domain")
}

fn parse(host: &str) -> Option<Name> {
    Name::parse(host, &domain())
}

fn port(number: u32) -> Port {
    Port::try_from(number).expect("a port")
}

fn vmid(number: u32) -> Vmid {
    Vmid::try_from(number).expect("a vmid")
}

#[test]
fn host_names_by_vmid_and_by_id_are_parsed() {
    let by_vmid = Name { port: port(8000), sandbox: SandboxRef::Vmid(vmid(100_001)) };
    for host in [
        "port-8000-vm-100001.sbx.test",
        "PORT-8000-VM-100001.SBX.TEST",
        "port-8000-vm-100001.sbx.test:443",
        "Port-8000-vm-100001.Sbx.Test:65535",
    ] {
        assert_eq!(parse(host), Some(by_vmid), "{host}");
    }
    let id: SandboxId = ID.parse().expect("an id");
    let by_id = Name { port: port(80), sandbox: SandboxRef::Id(id) };
    for host in [format!("port-80-{ID}.sbx.test"), format!("port-80-{ID}.sbx.test").to_uppercase()]
    {
        assert_eq!(parse(&host), Some(by_id), "{host}");
    }
}

#[test]
fn other_host_names_are_refused() {
    for host in [
        "",
        ".",
        ":",
        "sbx.test",
        ".sbx.test",
        "port-8000-vm-100001",
        "port-8000-vm-100001.",
        "port-8000-vm-100001sbx.test",
        "port-8000-vm-100001.sbx.test.",
        "port-8000-vm-100001.sbx.test.evil.com",
        "port-8000-vm-100001.sbx.test@evil.com",
        "port-8000-vm-100001.evil.com",
        "port-8000-vm-100001.sbx.tes",
        "port-8000-vm-100001.xsbx.test",
        "port-8000-vm-100001.a.sbx.test",
        "a.port-8000-vm-100001.sbx.test",
        "xport-8000-vm-100001.sbx.test",
        "port-8000-vm-100001x.sbx.test",
        "port-0-vm-100001.sbx.test",
        "port-08000-vm-100001.sbx.test",
        "port-65536-vm-100001.sbx.test",
        "port-70000-vm-100001.sbx.test",
        "port-+80-vm-100001.sbx.test",
        "port--80-vm-100001.sbx.test",
        "port-8000-vm-0100001.sbx.test",
        "port-8000-vm-99.sbx.test",
        "port-8000-vm-0.sbx.test",
        "port-8000-vm-1000000000.sbx.test",
        "port-8000-vm-10000100001.sbx.test",
        "port-8000-vm--100001.sbx.test",
        "port-8000-vm-+100001.sbx.test",
        "port-8000-vm-100001.sbx.test:",
        "port-8000-vm-100001.sbx.test:0",
        "port-8000-vm-100001.sbx.test:99999999",
        "port-8000-vm-100001.sbx.test:80:80",
        "port-8000-vm-100001.sbx.test:http",
        "port-8000-vm-100001.sbx.test ",
        " port-8000-vm-100001.sbx.test",
        "port-8000-vm-100001\n.sbx.test",
        "port-8000-vm-100001\0.sbx.test",
        "port-8000-vm-１00001.sbx.test",
        "port-8000-100001.sbx.test",
        "port-8000-pvelxc-.sbx.test",
        "port-8000-pvelxc-01jd000000000000000000000.sbx.test",
        "port-8000-pvelxc-81jd0000000000000000000000.sbx.test",
        "port-8000-pvelxc-01jd000000000000000000000w.sbx.test",
        "port-8000-pve.sbx.test",
        "port-8006-localhost.sbx.test",
        "[::1]:8480",
        "127.0.0.1:8480",
        "localhost",
    ] {
        assert_eq!(parse(host), None, "{host:?}");
    }
    assert_eq!(parse(&"a".repeat(100_000)), None);
}

#[test]
fn domains_are_names_in_lower_case() {
    for text in ["a.b", "sandbox.localhost", "x-1.example.com", "localhost"] {
        assert!(text.parse::<Domain>().is_ok(), "{text}");
    }
    for text in ["", ".", "a..b", ".a", "a.", "A.b", "a b", "a_b", "-a.b", "{a}", "a/b", "a.*"] {
        assert!(text.parse::<Domain>().is_err(), "{text:?}");
    }
}

fn target(state: State) -> Target {
    Target {
        id: ID.parse().expect("an id"),
        vmid: vmid(100_001),
        team: "red".parse().expect("a team"),
        state,
        ip: Some([10, 100, 1, 5].into()),
        ports: BTreeSet::from([port(8000)]),
    }
}

fn ask(number: u32, via: Via, local: Option<Target>, owner: Owner) -> Verdict {
    let name = Name { port: port(number), sandbox: SandboxRef::Vmid(vmid(100_001)) };
    decide(Some(name), via, local.as_ref(), &owner)
}

#[test]
fn verdicts_match_the_table() {
    use Verdict::{Gone, Local, Misdirected, NotExposed, NotFound, Peer};
    let peer: SocketAddr = "10.99.0.2:8481".parse().expect("an address");
    let node: NodeName = "node2".parse().expect("a node");
    let local = Local {
        upstream: "10.100.1.5:8000".parse().expect("an address"),
        host: "localhost:8000".into(),
    };
    let booting = Verdict::Unavailable(Unavailable::Booting);
    let stopped = Verdict::Unavailable(Unavailable::Stopped);
    let down = Verdict::Unavailable(Unavailable::NodeDown(node.clone()));

    for via in [Via::Edge, Via::Peer] {
        // A sandbox that lives here is answered here, whatever the cluster says.
        for owner in [Owner::Nobody, Owner::Here, Owner::Peer(peer), Owner::Down(node.clone())] {
            let ask = |number, state| ask(number, via, Some(target(state)), owner.clone());
            assert_eq!(ask(8000, State::Running), local);
            assert_eq!(ask(8000, State::Booting), booting);
            assert_eq!(ask(8000, State::Stopped), stopped);
            for state in [State::Running, State::Booting, State::Stopped] {
                assert_eq!(ask(22, state), NotExposed(port(22)));
            }
        }
        assert_eq!(ask(8000, via, Some(target(State::Gone)), Owner::Nobody), Gone);
        assert_eq!(ask(22, via, Some(target(State::Gone)), Owner::Here), Gone);
        assert_eq!(ask(8000, via, None, Owner::Nobody), NotFound(NOBODY));
        assert_eq!(ask(8000, via, None, Owner::Here), NotFound(NOBODY));
        assert_eq!(decide(None, via, None, &Owner::Peer(peer)), NotFound(NO_NAME));
    }
    assert_eq!(ask(8000, Via::Edge, None, Owner::Peer(peer)), Peer { upstream: peer });
    assert_eq!(
        ask(8000, Via::Edge, Some(target(State::Gone)), Owner::Peer(peer)),
        Peer { upstream: peer }
    );
    assert_eq!(ask(8000, Via::Edge, None, Owner::Down(node.clone())), down);
    for via in [Via::Edge, Via::Peer] {
        let blind = Verdict::Unavailable(Unavailable::Blind);
        assert_eq!(ask(8000, via, None, Owner::Unknown), blind);
        assert_eq!(ask(8000, via, Some(target(State::Gone)), Owner::Unknown), Gone);
    }
    assert_eq!(ask(8000, Via::Peer, None, Owner::Peer(peer)), Misdirected);
    assert_eq!(ask(8000, Via::Peer, None, Owner::Down(node)), Misdirected);
    let mut nowhere = target(State::Running);
    nowhere.ip = None;
    assert_eq!(ask(8000, Via::Edge, Some(nowhere), Owner::Nobody), booting);
}

fn owner() -> impl Strategy<Value = Owner> {
    prop_oneof![
        Just(Owner::Nobody),
        Just(Owner::Here),
        Just(Owner::Unknown),
        Just(Owner::Peer("10.99.0.2:8481".parse().expect("an address"))),
        Just(Owner::Down("node2".parse().expect("a node"))),
    ]
}

fn state() -> impl Strategy<Value = State> {
    prop_oneof![Just(State::Running), Just(State::Booting), Just(State::Stopped), Just(State::Gone)]
}

proptest! {
    #[test]
    fn host_name_round_trips(
        number in 1u32..=65_535, guest in 100u32..=999_999_999, ms in 0u64..1 << 48, random: [u8; 10],
    ) {
        let by_vmid = Name { port: port(number), sandbox: SandboxRef::Vmid(vmid(guest)) };
        prop_assert_eq!(parse(&format!("port-{number}-vm-{guest}.sbx.test")), Some(by_vmid));
        let id = SandboxId::new(ms, &random);
        let by_id = Name { port: port(number), sandbox: SandboxRef::Id(id) };
        prop_assert_eq!(parse(&format!("port-{number}-{id}.sbx.test")), Some(by_id));
    }

    /// Every accepted host has exactly one spelling, except for case and a port at its end.
    #[test]
    fn accepted_host_has_exactly_one_spelling(host in "(?i)(port-)?[0-9+ ]{0,6}-?(vm-|pvelxc-)?[0-9a-z]{0,27}\\.?(sbx\\.test|\\PC{0,9})(:[0-9]{0,6})?") {
        if let Some(name) = parse(&host) {
            let sandbox = match name.sandbox {
                SandboxRef::Id(id) => id.to_string(),
                SandboxRef::Vmid(vmid) => format!("vm-{vmid}"),
            };
            let canonical = format!("port-{}-{sandbox}.sbx.test", name.port);
            let lower = host.to_ascii_lowercase();
            let rest = lower.strip_prefix(&canonical);
            prop_assert!(rest.is_some_and(|r| r.is_empty() || r.starts_with(':')), "{}", host);
        }
    }

    #[test]
    fn any_text_is_refused_without_a_panic(host in any::<String>()) {
        prop_assert_eq!(parse(&host), None);
    }

    /// Named properties of the verdict, for all of its inputs.
    #[test]
    fn verdict_obeys_the_rules_for_all_inputs(
        number in prop_oneof![Just(8000u32), 1u32..=65_535],
        edge: bool, here in proptest::option::of(state()), owner in owner(),
    ) {
        let via = if edge { Via::Edge } else { Via::Peer };
        let verdict = ask(number, via, here.map(target), owner.clone());
        // Only an exposed port of a running sandbox of this node is ever dialled.
        if let Verdict::Local { upstream, .. } = &verdict {
            prop_assert_eq!(upstream.to_string(), "10.100.1.5:8000");
            prop_assert_eq!((number, here), (8000, Some(State::Running)));
        }
        // One hop at most.
        if matches!(verdict, Verdict::Peer { .. }) {
            prop_assert_eq!(via, Via::Edge);
        }
        // Only a peer is told that it asked the wrong node.
        if verdict == Verdict::Misdirected {
            prop_assert_eq!(via, Via::Peer);
        }
        // The owner is looked up whenever it makes a difference.
        let name = Name { port: port(number), sandbox: SandboxRef::Vmid(vmid(100_001)) };
        if !needs_owner(Some(name), here.map(target).as_ref()) {
            prop_assert_eq!(&verdict, &ask(number, via, here.map(target), Owner::Nobody));
        }
    }
}
