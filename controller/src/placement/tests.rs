use std::collections::BTreeMap;

use proptest::prelude::*;
use proto::{sandbox::v1::Size as WireSize, spec::Network};

use super::*;

const GIB: u64 = 1 << 30;
const SNAPSHOT: &str = "base_v1";

pub(crate) fn spec(memory_mib: u32) -> Spec {
    Spec {
        request_id: "r".parse().expect("id"),
        snapshot: SNAPSHOT.parse().expect("id"),
        size: Size { cpu_cores: 0, memory_mib },
        metadata: BTreeMap::new(),
        env: BTreeMap::new(),
        network: Network::Static,
        services: BTreeMap::new(),
        node: None,
        lifetime: proto::lifetime::Wish::default(),
    }
}

fn idle(name: &str) -> NodeView {
    NodeView {
        name: name.parse().expect("name"),
        down: None,
        breaker_open: false,
        report: Some((
            NodeLoad {
                cores: 4.0,
                memory_total: 16 * GIB,
                memory_available: 14 * GIB,
                storage_free: 90 * GIB,
                storage_total: 100 * GIB,
                vmids_free: 1000,
                ips_free: 200,
                quorate: true,
                snapshots: vec![SNAPSHOT.into()],
                snapshot_sizes: vec![WireSize { cpu_cores: 1, memory_mib: 512 }],
                ..NodeLoad::default()
            },
            Duration::from_millis(500),
        )),
        reserved: Reserved::default(),
        team_sandboxes: 0,
        refused: None,
        failed: None,
    }
}

fn with(name: &str, change: impl FnOnce(&mut NodeView, &mut NodeLoad, &mut Duration)) -> NodeView {
    let mut node = idle(name);
    let (mut load, mut age) = node.report.take().expect("report");
    change(&mut node, &mut load, &mut age);
    node.report = Some((load, age));
    node
}

fn decide(nodes: &[NodeView], spec: &Spec) -> Decision {
    place(nodes, spec, &Limits::default(), 1, 0)
}

fn chosen(nodes: &[NodeView]) -> Option<String> {
    decide(nodes, &spec(0)).node().map(ToString::to_string)
}

#[test]
fn a_burdened_node_loses() {
    let hog = with("a", |_, load, _| (load.cpu_busy, load.psi_cpu) = (1.0, 60.0));
    assert_eq!(chosen(&[hog, idle("b")]).as_deref(), Some("b"));
    let full = with("a", |_, load, _| load.memory_available = 3 * GIB);
    assert_eq!(chosen(&[full, idle("b")]).as_deref(), Some("b"));
    let boots = with("a", |_, load, _| load.starting = 6);
    assert_eq!(chosen(&[boots, idle("b")]).as_deref(), Some("b"));
    let promised = with("a", |node, _, _| {
        node.reserved = Reserved { sandboxes: 2, memory_bytes: GIB, cores: 2, boot_cores: 2 };
    });
    assert_eq!(chosen(&[promised, idle("b")]).as_deref(), Some("b"));
    let slow = with("a", |_, load, _| load.start_ms = 9000);
    let (mut b, mut c) = (idle("b"), idle("c"));
    for node in [&mut b, &mut c] {
        node.report.as_mut().expect("report").0.start_ms = 1000;
    }
    assert_eq!(chosen(&[slow, b, c]).as_deref(), Some("b"));
}

#[test]
fn a_team_spreads_but_a_hog_weighs_more() {
    let home = with("a", |node, _, _| node.team_sandboxes = 1);
    assert_eq!(chosen(&[home.clone(), idle("b")]).as_deref(), Some("b"));
    let hog = with("b", |_, load, _| (load.cpu_busy, load.psi_cpu) = (1.0, 50.0));
    assert_eq!(chosen(&[home, hog]).as_deref(), Some("a"));
}

#[test]
fn an_old_report_is_used_only_if_nothing_else_is_there() {
    let old = with("a", |_, _, age| *age = Duration::from_secs(10));
    let busy = with("b", |_, load, _| load.cpu_busy = 1.0);
    assert_eq!(chosen(&[old.clone(), busy]).as_deref(), Some("b"));
    assert_eq!(chosen(&[old]).as_deref(), Some("a"));
    let stale = with("a", |_, _, age| *age = Duration::from_secs(31));
    assert_eq!(chosen(&[stale]), None);
}

#[test]
fn each_reason_is_told() {
    let cases: [(&str, NodeView, Obstacle); 12] = [
        ("NOT_READY", with("a", |n, _, _| n.down = Some("refused".into())), Obstacle::Unreachable),
        ("BREAKER_OPEN", with("a", |n, _, _| n.breaker_open = true), Obstacle::Unreachable),
        (
            "REPORT_STALE",
            with("a", |_, _, age| *age = Duration::from_secs(60)),
            Obstacle::Unreachable,
        ),
        ("NEVER_REPORTED", NodeView { report: None, ..idle("a") }, Obstacle::Unreachable),
        ("SNAPSHOT_MISSING", with("a", |_, l, _| l.snapshots.clear()), Obstacle::UnknownSnapshot),
        ("NO_QUORUM", with("a", |_, l, _| l.quorate = false), Obstacle::NoQuorum),
        ("MEMORY_SUM", with("a", |_, l, _| l.memory_allocated = 24 * GIB), Obstacle::Full),
        ("MEMORY_USED", with("a", |_, l, _| l.memory_available = GIB), Obstacle::Full),
        ("STORAGE_FULL", with("a", |_, l, _| l.storage_free = GIB), Obstacle::Full),
        ("VMIDS_EXHAUSTED", with("a", |_, l, _| l.vmids_free = 0), Obstacle::Full),
        ("ADDRESSES_EXHAUSTED", with("a", |_, l, _| l.ips_free = 0), Obstacle::Full),
        ("FAILED_BEFORE", with("a", |n, _, _| n.failed = Some("x".into())), Obstacle::Failed),
    ];
    for (reason, node, obstacle) in cases {
        let decision = decide(&[node], &spec(0));
        assert_eq!(decision.node(), None, "{reason}");
        assert_eq!(decision.verdicts[0].filtered.map(Filtered::as_str), Some(reason));
        assert_eq!(decision.obstacle(None), obstacle, "{reason}");
        let json = serde_json::to_value(decision.verdicts[0].filtered).expect("json");
        assert_eq!(json, reason, "the record says the same");
    }
}

#[test]
fn a_wish_is_the_only_choice() {
    let mut wish = spec(0);
    wish.node = Some("b".parse().expect("name"));
    let nodes = [idle("a"), with("b", |_, load, _| load.cpu_busy = 1.0)];
    assert_eq!(decide(&nodes, &wish).node().map(ToString::to_string).as_deref(), Some("b"));
    wish.node = Some("z".parse().expect("name"));
    assert_eq!(decide(&nodes, &wish).obstacle(wish.node.as_ref()), Obstacle::UnknownNode);
}

#[test]
fn what_is_larger_than_every_node_is_not_waited_for() {
    let decision = decide(&[idle("a"), idle("b")], &spec(100 * 1024));
    assert_eq!(decision.obstacle(None), Obstacle::TooLarge);
    // One that is only full now makes it worth waiting.
    let full = with("b", |_, load, _| {
        load.memory_total = 100 * GIB;
        load.memory_allocated = 100 * GIB;
    });
    assert_eq!(decide(&[idle("a"), full], &spec(100 * 1024)).obstacle(None), Obstacle::Full);
}

fn any_node() -> impl Strategy<Value = NodeView> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>(), 0u64..40_000);
    let load = (0.1f64..64.0, 0.0f64..1.0, 0.0f64..100.0, 0u64..64, 0u64..64, 0u64..64, 0u32..20);
    (0u8..20, flags, load).prop_map(|(name, (down, breaker, quorate, has, age), load)| {
        let (cores, busy, psi, total, available, allocated, starting) = load;
        with(&format!("n{name}"), |node, report, at| {
            node.down = down.then(|| "gone".into());
            node.breaker_open = breaker;
            *at = Duration::from_millis(age);
            report.quorate = quorate;
            if !has {
                report.snapshots.clear();
            }
            (report.cores, report.cpu_busy, report.psi_cpu) = (cores, busy, psi);
            report.memory_total = total * GIB;
            report.memory_available = available.min(total) * GIB;
            report.memory_allocated = allocated * GIB;
            report.starting = starting;
        })
    })
}

fn some_nodes() -> impl Strategy<Value = Vec<NodeView>> {
    prop::collection::btree_map(0u8..12, any_node(), 0..12).prop_map(|nodes| {
        nodes
            .into_iter()
            .map(|(name, node)| NodeView {
                name: format!("n{name}").parse().expect("name"),
                ..node
            })
            .collect()
    })
}

proptest! {
    #[test]
    fn never_placed_on_a_node_that_is_not_ready(nodes in some_nodes(), memory in 64u32..100_000) {
        let decision = decide(&nodes, &spec(memory));
        if let Some(chosen) = decision.node() {
            let node = nodes.iter().find(|node| node.name == *chosen).expect("a known node");
            let (load, age) = node.report.as_ref().expect("reported");
            prop_assert!(node.down.is_none() && !node.breaker_open && load.quorate);
            prop_assert!(*age <= STALE && !load.snapshots.is_empty());
            let sum = load.memory_allocated + (u64::from(memory) << 20);
            prop_assert!(sum as f64 <= load.memory_total as f64 * 1.5);
        }
    }

    #[test]
    fn same_nodes_in_any_order_same_decision(nodes in some_nodes(), seed in any::<u64>()) {
        let mut shuffled = nodes.clone();
        let mut state = seed;
        for i in (1..shuffled.len()).rev() {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            shuffled.swap(i, (state >> 33) as usize % (i + 1));
        }
        prop_assert_eq!(decide(&nodes, &spec(512)), decide(&shuffled, &spec(512)));
    }

    #[test]
    fn every_node_gets_a_verdict_and_an_impossible_request_says_why(nodes in some_nodes()) {
        let decision = decide(&nodes, &spec(512_000));
        prop_assert_eq!(decision.verdicts.len(), nodes.len());
        prop_assert_eq!(decision.node(), None);
        for verdict in &decision.verdicts {
            prop_assert!(verdict.filtered.is_some() && !verdict.detail.is_empty());
        }
    }

    #[test]
    fn the_parts_add_up_to_the_score(nodes in some_nodes()) {
        for verdict in decide(&nodes, &spec(512)).verdicts {
            let sum: f64 = verdict.parts.iter().map(|part| part.value).sum();
            prop_assert!((sum - verdict.score).abs() < 1e-9);
        }
    }

    #[test]
    fn more_load_never_makes_a_node_better(busy in 0.0f64..0.9, more in 0.0f64..0.1) {
        let score = |busy| {
            let node = with("a", |_, load, _| load.cpu_busy = busy);
            decide(&[node], &spec(0)).verdicts[0].score
        };
        prop_assert!(score(busy + more) >= score(busy));
    }
}
