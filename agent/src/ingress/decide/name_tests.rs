//! Verdicts on host names by the name of a sandbox.

use std::collections::BTreeMap;

use http::{HeaderMap, HeaderValue, header::HOST};
use proptest::prelude::*;
use proto::{name::Port, visibility::Visibility};

use super::*;
use crate::ingress::OpenPort;

fn port(number: u32) -> Port {
    Port::try_from(number).expect("a port")
}

/// A sandbox `box--red` with these open ports, of which none is the main one.
fn target(state: State, ports: &[u32]) -> Target {
    Target {
        id: "pvelxc-01jd0000000000000000000000".parse().expect("an id"),
        vmid: "100001".parse().expect("a vmid"),
        team: "red".parse().expect("a team"),
        name: "box--red".parse().ok(),
        state,
        ip: Some([10, 100, 1, 5].into()),
        ports: ports.iter().map(|number| (port(*number), OpenPort::PUBLIC)).collect(),
        main: None,
        key: None,
    }
}

fn ask(label: &str, via: Via, local: Option<&Target>, owner: &Owner) -> Verdict {
    let host = HeaderValue::from_str(&format!("{label}.sbx.test")).expect("a value");
    let headers: HeaderMap = [(HOST, host)].into_iter().collect();
    let domain = "sbx.test".parse().expect("a domain");
    let rules = Rules { domain, parents: Vec::new(), cors: true };
    decide(&Question::new(via, &headers, &rules, 0), local, owner)
}

fn reached(verdict: &Verdict) -> Option<u16> {
    let Verdict::Local { upstream, .. } = verdict else { return None };
    Some(upstream.port())
}

#[test]
fn name_leads_to_the_port_or_to_the_main_one() {
    let several = Target { main: Some(port(81)), ..target(State::Running, &[80, 81]) };
    for (label, expected) in [
        ("80-box--red", Some(80)),
        ("port-80-box--red", Some(80)),
        ("PORT-80-Box--RED", Some(80)),
        ("box--red", Some(81)),
        ("82-box--red", None),
        ("80-other--red", None),
        ("80-box--blue", None),
        ("other--red", None),
    ] {
        let verdict = ask(label, Via::Edge, Some(&several), &Owner::Nobody);
        assert_eq!(reached(&verdict), expected, "{label}: {verdict:?}");
    }
    let without = target(State::Running, &[80, 81]);
    assert_eq!(ask("box--red", Via::Edge, Some(&without), &Owner::Nobody), REFUSED);
}

const REFUSED: Verdict = Verdict::NotFound(NOT_BY_NAME);

#[test]
fn what_is_not_open_by_name_has_one_answer() {
    for via in [Via::Edge, Via::Peer] {
        let verdict = |label: &str, local: Option<&Target>| ask(label, via, local, &Owner::Nobody);
        let running = target(State::Running, &[80]);
        // A port that is not open, another's name, a name that nobody has, a deleted sandbox, a renamed one.
        assert_eq!(verdict("81-box--red", Some(&running)), REFUSED);
        assert_eq!(verdict("80-box--blue", Some(&running)), REFUSED);
        assert_eq!(verdict("80-box--red", None), REFUSED);
        assert_eq!(verdict("80-box--red", Some(&target(State::Gone, &[80]))), REFUSED);
        let renamed = Target { name: "shed--red".parse().ok(), ..running.clone() };
        assert_eq!(verdict("80-box--red", Some(&renamed)), REFUSED);
        let nameless = Target { name: None, main: Some(port(80)), ..running };
        assert_eq!(verdict("box--red", Some(&nameless)), REFUSED);
        for state in [State::Booting, State::Stopped, State::Paused { wakes: true }] {
            assert_eq!(verdict("81-box--red", Some(&target(state, &[80]))), REFUSED);
        }
    }
}

#[test]
fn name_of_a_sandbox_elsewhere_leads_to_its_node() {
    let upstream = "10.99.0.2:8481".parse().expect("an address");
    let owner = Owner::Peer(upstream);
    assert_eq!(ask("box--red", Via::Edge, None, &owner), Verdict::Peer { upstream });
    // It was here before it moved.
    let gone = target(State::Gone, &[]);
    assert_eq!(ask("box--red", Via::Edge, Some(&gone), &owner), Verdict::Peer { upstream });
    // One that has just left the node that is asked looks like one that nobody has.
    let down = Owner::Down("node2".parse().expect("a name"));
    for owner in [&owner, &down] {
        assert_eq!(ask("box--red", Via::Peer, None, owner), REFUSED);
        assert_eq!(ask("80-box--red", Via::Peer, None, owner), REFUSED);
    }
    // A node that cannot read its cluster says so, as one does whose peer is down: the caller tries again.
    let blind = Verdict::Unavailable(Unavailable::Blind);
    assert_eq!(ask("box--red", Via::Edge, None, &Owner::Unknown), blind);
}

#[test]
fn access_by_name_is_that_of_the_port() {
    let guarded = |visibility| {
        let open = OpenPort { visibility, generation: 1 };
        let ports = BTreeMap::from([(port(80), open)]);
        Target { ports, main: Some(port(80)), ..target(State::Paused { wakes: true }, &[]) }
    };
    for (visibility, label) in [
        (Visibility::Team, "box--red"),
        (Visibility::Token, "80-box--red"),
        (Visibility::Private, "port-80-box--red"),
    ] {
        let by_name = ask(label, Via::Edge, Some(&guarded(visibility)), &Owner::Nobody);
        let by_id = ask("80-vm-100001", Via::Edge, Some(&guarded(visibility)), &Owner::Nobody);
        assert!(matches!(by_name, Verdict::Unauthorized(_) | Verdict::Forbidden(_)), "{by_name:?}");
        assert_eq!(by_name, by_id, "{label}");
    }
    let public = ask("box--red", Via::Edge, Some(&guarded(Visibility::Public)), &Owner::Nobody);
    assert_eq!(public, Verdict::Wake);
}

proptest! {
    /// Whatever the host: by a name only an open port of the sandbox that has this name is reached.
    #[test]
    fn only_the_named_sandbox_is_reached(
        label in "(port-)?([0-9]{1,5}-)?(box|bo|boxx|b-x|[a-z0-9-]{0,6})(--|-|---)(red|re|[a-z0-9-]{0,5})",
        edge: bool,
        main: bool,
    ) {
        let via = if edge { Via::Edge } else { Via::Peer };
        let main = main.then(|| port(80));
        let target = Target { main, ..target(State::Running, &[80]) };
        let verdict = ask(&label, via, Some(&target), &Owner::Nobody);
        let own = ["80-box--red", "port-80-box--red"].contains(&label.as_str());
        let is_reached = own || main.is_some() && label == "box--red";
        prop_assert_eq!(reached(&verdict), is_reached.then_some(80), "{:?}", verdict);
        if !is_reached {
            prop_assert!(matches!(verdict, Verdict::NotFound(_)), "{:?}", verdict);
        }
    }
}
