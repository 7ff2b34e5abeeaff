use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use proto::{
    name::{NodeName, SnapshotId},
    sandbox::v1::{NodeLoad, Size as WireSize},
    spec::{Network, Size},
};

use super::*;

const GIB: u64 = 1 << 30;
const SNAPSHOT: &str = "base_v1";
/// Time of the decisions, milliseconds.
const NOW: u64 = 1_000_000;

#[test]
fn limits_are_read_under_their_earlier_names_too() {
    let now = r#"{"assumed_cpu_use": 0.2, "assumed_memory_use": 0.3}"#;
    let earlier = r#"{"cpu_habit": 0.2, "memory_habit": 0.3}"#;
    let read = |text| serde_json::from_str::<Limits>(text).expect("limits");
    assert_eq!(read(now), read(earlier));
    assert_eq!(
        read(now),
        Limits { assumed_cpu_use: 0.2, assumed_memory_use: 0.3, ..Limits::default() }
    );
}

/// A node in a test.
#[derive(Debug, Clone)]
struct Node {
    name: NodeName,
    report: Option<(NodeLoad, u64)>,
    down: bool,
    breaker_until_ms: Option<u64>,
    vmids_overlap: bool,
    reserved: u32,
    before: Option<PriorOutcome>,
    team: u32,
    /// Creations of the team that wait there.
    queued: u32,
}

fn idle(name: &str) -> Node {
    Node {
        name: name.parse().expect("name"),
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
                snapshot_sizes: vec![WireSize { cpu_cores: 1, memory_mib: 512, disk_gib: 0 }],
                ..NodeLoad::default()
            },
            500,
        )),
        down: false,
        breaker_until_ms: None,
        vmids_overlap: false,
        reserved: 0,
        before: None,
        team: 0,
        queued: 0,
    }
}

fn with(name: &str, change: impl FnOnce(&mut Node, &mut NodeLoad, &mut u64)) -> Node {
    let mut node = idle(name);
    let (mut load, mut age_ms) = node.report.take().expect("report");
    change(&mut node, &mut load, &mut age_ms);
    node.report = Some((load, age_ms));
    node
}

/// Request in a test.
#[derive(Debug, Clone, Copy)]
struct Asked {
    size: Size,
    required: Option<usize>,
    affinity: Affinity,
    look: Look,
    seed: u64,
}

fn asked(memory_mib: u32) -> Asked {
    Asked {
        size: Size { cpu_cores: 0, memory_mib, disk_gib: 0 },
        required: None,
        affinity: Affinity::default(),
        look: Look::default(),
        seed: 7,
    }
}

fn fleet(nodes: &[Node], seed: u64) -> Fleet {
    let mut fleet = Fleet::new(Limits::default(), seed);
    // Shared values are learnt once a second: each node has reported before.
    for (node, at) in nodes.iter().zip(0u32..) {
        assert_eq!(fleet.add(node.name.clone()), at);
        fleet.set_down(at, node.down);
        fleet.set_vmids_overlap(at, node.vmids_overlap);
        if let Some((load, _)) = &node.report {
            fleet.reported(at, load, NOW - 100_000, true);
        }
        for number in 0..node.reserved {
            let id = proto::id::SandboxId::new(u64::from(at * 1000 + number), &[1; 10]);
            fleet.reserve(id, at, Size { cpu_cores: 1, memory_mib: 512, disk_gib: 0 }, NOW);
        }
        if let Some(until) = node.breaker_until_ms {
            fleet.trip(at, until - BREAKER_MS);
        }
    }
    for (node, at) in nodes.iter().zip(0u32..) {
        if let Some((load, age_ms)) = &node.report {
            fleet.reported(at, load, NOW - age_ms, true);
        }
    }
    fleet
}

/// Returns the choice, and the verdicts on it.
fn decide(nodes: &[Node], asked: Asked) -> (Choice, Decision) {
    let mut fleet = fleet(nodes, asked.seed);
    let snapshot: SnapshotId = SNAPSHOT.parse().expect("id");
    let prior: Vec<_> =
        nodes.iter().zip(0..).filter_map(|(node, at)| Some((at, node.before?))).collect();
    let team = |node: u32| nodes[node as usize].team;
    let queued = |node: u32| nodes[node as usize].queued;
    let ask = Ask {
        size: asked.size,
        network: Network::Static,
        required: asked.required.and_then(|required| u32::try_from(required).ok()),
        affinity: asked.affinity,
        prior: &prior,
        team: &team,
        queued: &queued,
    };
    let choice = fleet.choose(&snapshot, &ask, asked.look, NOW);
    let decided =
        Decided { snapshot: &snapshot, ask: &ask, choice: &choice, look: asked.look, among: None };
    let verdicts = fleet.explain(&decided, NOW, &|_| ExplainText::default());
    (choice, Decision { attempt: 1, decided_ms: 0, holders: 0, verdicts })
}

fn chosen(nodes: &[Node]) -> Option<String> {
    let (choice, decision) = decide(nodes, asked(0));
    let best = choice.best.first().map(|best| nodes[best.node as usize].name.clone());
    assert_eq!(decision.node(), best.as_ref(), "the explanation is of the same node");
    best.map(|name| name.to_string())
}

#[test]
fn loaded_node_loses() {
    let hog = with("a", |_, load, _| (load.cpu_busy, load.psi_cpu) = (1.0, 60.0));
    assert_eq!(chosen(&[hog, idle("b")]).as_deref(), Some("b"));
    let full = with("a", |_, load, _| load.memory_available = 3 * GIB);
    assert_eq!(chosen(&[full, idle("b")]).as_deref(), Some("b"));
    let boots = with("a", |_, load, _| load.starting = 6);
    assert_eq!(chosen(&[boots, idle("b")]).as_deref(), Some("b"));
    let young = with("a", |_, load, _| load.booting_cores = Some(2.0));
    assert_eq!(chosen(&[young, idle("b")]).as_deref(), Some("b"));
    let foreign = with("a", |_, load, _| load.foreign_cores = Some(2.0));
    assert_eq!(chosen(&[foreign, idle("b")]).as_deref(), Some("b"));
    let promised = with("a", |node, _, _| node.reserved = 2);
    assert_eq!(chosen(&[promised, idle("b")]).as_deref(), Some("b"));
    let slow = with("a", |_, load, _| load.start_ms = 9000);
    let [b, c] = ["b", "c"].map(|name| with(name, |_, load, _| load.start_ms = 1000));
    assert_eq!(chosen(&[slow, b, c]).as_deref(), Some("b"));
    assert_eq!(chosen(&[idle("b"), idle("a")]).as_deref(), Some("a"), "of equals, the first name");
}

#[test]
fn team_spreads_but_load_weighs_more() {
    let home = with("a", |node, _, _| node.team = 1);
    assert_eq!(chosen(&[home.clone(), idle("b")]).as_deref(), Some("b"));
    let hog = with("b", |_, load, _| (load.cpu_busy, load.psi_cpu) = (1.0, 50.0));
    assert_eq!(chosen(&[home, hog]).as_deref(), Some("a"));
}

#[test]
fn old_report_is_used_only_when_no_other_exists() {
    let old = with("a", |_, _, age_ms| *age_ms = 10_000);
    let busy = with("b", |_, load, _| load.cpu_busy = 1.0);
    assert_eq!(chosen(&[old.clone(), busy.clone()]).as_deref(), Some("b"));
    let (_, decision) = decide(&[old.clone(), busy], asked(0));
    assert_eq!(decision.verdicts[1].filtered, Some(Filtered::ReportOld));
    assert_eq!(chosen(&[old]).as_deref(), Some("a"));
    let stale = with("a", |_, _, age_ms| *age_ms = 31_000);
    assert_eq!(chosen(&[stale]), None);
}

#[test]
fn after_a_timeout_one_creation_tries_the_node_again() {
    let mut fleet = fleet(&[idle("a")], 1);
    let snapshot: SnapshotId = SNAPSHOT.parse().expect("id");
    let ask = Ask {
        size: Size::default(),
        network: Network::Static,
        required: None,
        affinity: Affinity::default(),
        prior: &[],
        team: &|_| 0,
        queued: &|_| 0,
    };
    let fits = |fleet: &mut Fleet, now_ms| {
        fleet.reported(0, &idle("a").report.expect("report").0, now_ms, true);
        fleet.choose(&snapshot, &ask, Look::default(), now_ms).best.first().is_some()
    };
    fleet.trip(0, NOW);
    assert!(!fits(&mut fleet, NOW + BREAKER_MS - 1));
    assert!(fits(&mut fleet, NOW + BREAKER_MS));
    fleet.reserve(proto::id::SandboxId::new(1, &[1; 10]), 0, Size::default(), NOW + BREAKER_MS);
    assert!(!fits(&mut fleet, NOW + BREAKER_MS), "one, and no other before it has answered");
    fleet.answered(0);
    assert!(fits(&mut fleet, NOW + BREAKER_MS));
}

#[test]
fn each_reason_is_explained() {
    let cases: [(&str, Node, Obstacle); 21] = [
        ("NOT_READY", with("a", |n, _, _| n.down = true), Obstacle::Unreachable),
        (
            "BREAKER_OPEN",
            with("a", |n, _, _| n.breaker_until_ms = Some(NOW + 1)),
            Obstacle::Unreachable,
        ),
        ("REPORT_STALE", with("a", |_, _, age| *age = 60_000), Obstacle::Unreachable),
        ("NEVER_REPORTED", Node { report: None, ..idle("a") }, Obstacle::Unreachable),
        ("SNAPSHOT_MISSING", with("a", |_, l, _| l.snapshots.clear()), Obstacle::UnknownSnapshot),
        ("NO_QUORUM", with("a", |_, l, _| l.quorate = false), Obstacle::NoQuorum),
        ("CORDONED", with("a", |_, l, _| l.cordoned = true), Obstacle::Withdrawn),
        ("DRAINING", with("a", |_, l, _| l.draining = true), Obstacle::Withdrawn),
        ("MAINTENANCE", with("a", |_, l, _| l.maintenance = true), Obstacle::Withdrawn),
        ("RENUMBERED", with("a", |_, l, _| l.renumbered_to = 3), Obstacle::Withdrawn),
        ("VMIDS_OVERLAP", with("a", |n, _, _| n.vmids_overlap = true), Obstacle::Withdrawn),
        ("MEMORY_SUM", with("a", |_, l, _| l.memory_allocated = 24 * GIB), Obstacle::Full),
        ("MEMORY_USED", with("a", |_, l, _| l.memory_available = GIB), Obstacle::Full),
        ("STALLED", with("a", |_, l, _| l.psi_memory_full = 11.0), Obstacle::Full),
        ("STALLED", with("a", |_, l, _| l.psi_io_full = 41.0), Obstacle::Full),
        (
            "QUEUE_FULL",
            with("a", |_, l, _| (l.snapshot_queues, l.snapshot_queue_max) = (vec![4], 4)),
            Obstacle::Full,
        ),
        ("STORAGE_FULL", with("a", |_, l, _| l.storage_free = GIB), Obstacle::Full),
        ("STORAGE_FULL", with("a", |_, l, _| l.thin_metadata_used = 0.96), Obstacle::Full),
        ("VMIDS_EXHAUSTED", with("a", |_, l, _| l.vmids_free = 0), Obstacle::Full),
        ("ADDRESSES_EXHAUSTED", with("a", |_, l, _| l.ips_free = 0), Obstacle::Full),
        (
            "FAILED_BEFORE",
            with("a", |n, _, _| n.before = Some(PriorOutcome::Failed)),
            Obstacle::Failed,
        ),
    ];
    for (reason, node, obstacle) in cases {
        let (choice, decision) = decide(&[node], asked(0));
        assert_eq!(choice.best.first(), None, "{reason}");
        assert_eq!(decision.verdicts[0].filtered.map(|f| f.wire().name()), Some(reason));
        assert_eq!(decision.obstacle(None), obstacle, "{reason}");
        let json = serde_json::to_value(decision.verdicts[0].filtered).expect("json");
        assert_eq!(json, reason, "the record says the same");
    }
}

#[test]
fn queue_is_shared_among_teams_as_on_the_node() {
    // Creations that wait on the node, those of the team, those decided a moment ago; whether one more may.
    let cases = [
        (3, 3, 0, true),
        (4, 4, 0, false),
        (4, 3, 0, true),
        (3, 3, 1, true),
        (3, 4, 1, false),
        (7, 0, 0, true),
        (7, 1, 0, false),
        (8, 0, 0, false),
        // The team's wait for other snapshots there.
        (1, 9, 0, true),
    ];
    for (waiting, of_team, reserved, fits) in cases {
        let node = with("a", |node, load, _| {
            (load.snapshot_queues, load.snapshot_queue_max) = (vec![waiting], 8);
            (node.queued, node.reserved) = (of_team, reserved);
        });
        let filtered = decide(&[node], asked(0)).1.verdicts[0].filtered;
        let expected = (!fits).then_some(Filtered::QueueFull);
        assert_eq!(filtered, expected, "{waiting} {of_team} {reserved}");
    }
    // A node of an older agent reports no bound.
    let unbounded = with("a", |node, load, _| (load.snapshot_queues, node.queued) = (vec![9], 9));
    assert_eq!(chosen(&[unbounded]).as_deref(), Some("a"));
}

#[test]
fn count_of_the_team_is_read_only_where_it_decides() {
    let snapshot: SnapshotId = SNAPSHOT.parse().expect("id");
    // Creations that wait on the node; whether one more may, and whether the count was read.
    for (waiting, fits, read) in [(3, true, false), (4, true, true), (8, false, false)] {
        let node = with("a", |_, load, _| {
            (load.snapshot_queues, load.snapshot_queue_max) = (vec![waiting], 8);
        });
        let was_read = std::cell::Cell::new(false);
        let queued = |_| {
            was_read.set(true);
            0
        };
        let ask = Ask {
            size: Size::default(),
            network: Network::Static,
            required: None,
            affinity: Affinity::default(),
            prior: &[],
            team: &|_| 0,
            queued: &queued,
        };
        let choice = fleet(&[node], 1).choose(&snapshot, &ask, Look::default(), NOW);
        assert_eq!((choice.best.first().is_some(), was_read.get()), (fits, read), "{waiting}");
    }
}

#[test]
fn requested_node_is_the_only_choice() {
    let nodes = [idle("a"), with("b", |_, load, _| load.cpu_busy = 1.0)];
    let required = Asked { required: Some(1), ..asked(0) };
    assert_eq!(decide(&nodes, required).1.node().map(NodeName::as_str), Some("b"));
    let nobody = Asked { required: Some(2), ..asked(0) };
    let name = "z".parse().expect("name");
    assert_eq!(decide(&nodes, nobody).1.obstacle(Some(&name)), Obstacle::UnknownNode);
}

#[test]
fn labels_are_preferred_or_required() {
    let label = |name, label: &str| with(name, |_, load, _| load.labels = vec![label.into()]);
    let nodes = [label("a", "hdd"), label("b", "ssd")];
    // Bits are assigned in the order in which labels are seen.
    let (hdd, ssd) = (1, 2);
    let node = |nodes: &[Node], affinity| {
        let (_, decision) = decide(nodes, Asked { affinity, ..asked(0) });
        decision.node().map(ToString::to_string)
    };
    let required = Affinity { preferred: ssd, ..Affinity::default() };
    assert_eq!(node(&nodes, required).as_deref(), Some("b"));
    let shun = Affinity { avoided: hdd, ..Affinity::default() };
    assert_eq!(node(&nodes, shun).as_deref(), Some("b"));
    let mut busy = nodes.clone();
    busy[1].report.as_mut().expect("report").0.cpu_busy = 1.0;
    assert_eq!(node(&busy, required).as_deref(), Some("a"), "a preference is not a rule");
    assert_eq!(node(&busy, Affinity { required: ssd, ..required }).as_deref(), Some("b"));
    assert_eq!(node(&busy, Affinity { forbidden: hdd, ..required }).as_deref(), Some("b"));
    let neither = Asked { affinity: Affinity { required: 4, ..required }, ..asked(0) };
    assert_eq!(decide(&nodes, neither).1.obstacle(None), Obstacle::Unfit);
}

#[test]
fn request_larger_than_every_node_does_not_wait() {
    let (_, decision) = decide(&[idle("a"), idle("b")], asked(100 * 1024));
    assert_eq!(decision.obstacle(None), Obstacle::Unfit);
    // A node that is only full now makes waiting worthwhile.
    let full = with("b", |_, load, _| {
        load.memory_total = 100 * GIB;
        load.memory_allocated = 100 * GIB;
    });
    let (_, decision) = decide(&[idle("a"), full], asked(100 * 1024));
    assert_eq!(decision.obstacle(None), Obstacle::Full);
}

#[test]
fn node_without_the_snapshot_any_more_is_not_chosen() {
    let mut fleet = fleet(&[idle("a")], 1);
    let snapshot: SnapshotId = SNAPSHOT.parse().expect("id");
    assert_eq!(fleet.holders(&snapshot).len(), 1);
    let (mut load, _) = idle("a").report.expect("report");
    load.snapshots = vec!["other".into()];
    fleet.reported(0, &load, NOW, false);
    assert_eq!(fleet.holders(&snapshot).len(), 0);
}

#[test]
fn sample_is_uniform() {
    // Each of 40 is in a sample of 16 with 0.4, and each pair with 16/40 * 15/39.
    let (n, k, rounds) = (40_u32, 16, 20_000);
    let mut random = SplitMix64::new(1);
    let (mut single, mut pairs) = ([0_u32; 40], [0_u32; 40]);
    for _ in 0..rounds {
        let sample = Sample::draw(n, k, &mut random);
        let set: BTreeSet<_> = sample.picked().iter().copied().collect();
        assert_eq!(set.len(), k, "without replacement");
        for &picked in &set {
            single[picked as usize] += 1;
            if set.contains(&((picked + 1) % n)) {
                pairs[picked as usize] += 1;
            }
        }
    }
    let near = |count: u32, share: f64| {
        let share_seen = f64::from(count) / f64::from(rounds);
        // Five standard deviations.
        assert!(
            (share_seen - share).abs() < 5.0 * (share * (1.0 - share) / f64::from(rounds)).sqrt()
        );
    };
    single.iter().for_each(|&count| near(count, 0.4));
    pairs.iter().for_each(|&count| near(count, 0.4 * 15.0 / 39.0));
}

#[test]
fn splitmix_matches_the_published_values() {
    let mut random = SplitMix64::new(1_234_567);
    let first: Vec<u64> = (0..3).map(|_| random.next()).collect();
    assert_eq!(
        first,
        [6_457_827_717_110_365_317, 3_203_168_211_198_807_973, 9_817_491_932_198_370_423]
    );
}

fn any_node() -> impl Strategy<Value = Node> {
    let flags = prop::array::uniform6(prop::bool::weighted(0.15));
    let when = prop_oneof![4 => 0_u64..3_000, 2 => 3_000_u64..30_001, 1 => 30_001_u64..60_000];
    let load = (0.1f64..64.0, 0.0f64..1.0, 0.0f64..100.0, 0u64..64, 0u64..64, 0u64..64, 0u32..20);
    let more = (0u32..4, 0u32..4, 0.0f64..8.0, 0u32..3);
    (flags, when, load, more).prop_map(|(flags, age_ms, load, more)| {
        let [down, breaker, split, lacks, cordoned, draining] = flags;
        let (cores, busy, psi, total, available, allocated, starting) = load;
        with("n", |node, report, at| {
            node.down = down;
            node.breaker_until_ms = breaker.then_some(NOW + 500);
            (node.team, node.reserved) = (more.0, more.1);
            node.before =
                [None, Some(PriorOutcome::Refused), Some(PriorOutcome::Failed)][more.3 as usize];
            if more.3 > 0 && more.0 > 0 {
                node.before = None;
            }
            *at = age_ms;
            report.quorate = !split;
            (report.cordoned, report.draining) = (cordoned, draining);
            if lacks {
                report.snapshots.clear();
            }
            (report.cores, report.cpu_busy, report.psi_cpu) = (cores, busy, psi);
            report.foreign_cores = Some(more.2.min(cores));
            report.memory_total = total * GIB;
            report.memory_available = available.min(total) * GIB;
            report.memory_allocated = allocated * GIB;
            report.starting = starting;
        })
    })
}

fn some_nodes(max: usize) -> impl Strategy<Value = Vec<Node>> {
    prop::collection::vec(any_node(), 0..max).prop_map(|nodes| {
        let name = |at: usize| format!("n{at}").parse().expect("name");
        nodes.into_iter().enumerate().map(|(at, node)| Node { name: name(at), ..node }).collect()
    })
}

fn picks(choice: &Choice) -> Vec<usize> {
    choice.best.iter().map(|pick| pick.node as usize).collect()
}

proptest! {
    #[test]
    fn cordoned_node_is_never_chosen(nodes in some_nodes(40), seed in any::<u64>()) {
        let (choice, _) = decide(&nodes, Asked { seed, ..asked(64) });
        for at in picks(&choice) {
            let (load, _) = nodes[at].report.as_ref().expect("reported");
            prop_assert!(!load.cordoned && !load.draining && !load.maintenance);
        }
    }

    #[test]
    fn no_node_is_filled_beyond_a_limit(nodes in some_nodes(40), memory in 64u32..100_000, seed in any::<u64>()) {
        let (choice, _) = decide(&nodes, Asked { seed, ..asked(memory) });
        let limits = Limits::default();
        for at in picks(&choice) {
            let node = &nodes[at];
            let (load, age_ms) = node.report.as_ref().expect("reported");
            prop_assert!(!node.down && node.breaker_until_ms.is_none() && node.before.is_none());
            prop_assert!(load.quorate && !load.snapshots.is_empty() && *age_ms <= 30_000);
            let given = load.memory_allocated + (u64::from(node.reserved * 512 + memory) << 20);
            prop_assert!(given as f64 <= load.memory_total as f64 * limits.memory_overcommit);
            let used = load.memory_total - load.memory_available;
            prop_assert!((used as f64) < load.memory_total as f64 * limits.memory_used_max);
        }
    }

    #[test]
    fn stale_node_is_never_chosen_while_a_fresh_one_fits(nodes in some_nodes(40), seed in any::<u64>()) {
        let (choice, _) = decide(&nodes, Asked { seed, ..asked(64) });
        let age = |at: usize| nodes[at].report.as_ref().expect("reported").1;
        // Whether a node fits is determined for each alone.
        let fits = |at: usize| {
            let alone = Asked { required: Some(at), seed, ..asked(64) };
            decide(&nodes, alone).0.best.first().is_some()
        };
        let fresh_fits = (0..nodes.len()).any(|at| {
            nodes[at].report.as_ref().is_some_and(|(_, age_ms)| *age_ms < 3_000) && fits(at)
        });
        for at in picks(&choice) {
            prop_assert!(age(at) < 3_000 || !fresh_fits);
        }
        // A refusal only when none fits.
        let any_fits = (0..nodes.len()).any(fits);
        prop_assert_eq!(choice.best.first().is_some(), any_fits);
    }

    #[test]
    fn same_input_and_seed_give_the_same_choice(nodes in some_nodes(40), seed in any::<u64>()) {
        let ask = Asked { seed, ..asked(512) };
        prop_assert_eq!(decide(&nodes, ask), decide(&nodes, ask));
    }

    #[test]
    fn order_of_the_nodes_does_not_change_the_choice(nodes in some_nodes(16), seed in any::<u64>()) {
        let mut shuffled = nodes.clone();
        let mut random = SplitMix64::new(seed);
        for i in (1..shuffled.len()).rev() {
            shuffled.swap(i, random.below(i as u32 + 1) as usize);
        }
        let (here, there) = (decide(&nodes, asked(512)).1, decide(&shuffled, asked(512)).1);
        prop_assert_eq!(here.node(), there.node());
        prop_assert_eq!(here.verdicts, there.verdicts);
    }

    #[test]
    fn impossible_request_is_explained_for_each_node(nodes in some_nodes(40), seed in any::<u64>()) {
        let (choice, decision) = decide(&nodes, Asked { seed, ..asked(512_000) });
        prop_assert_eq!(choice.best.first(), None);
        prop_assert_eq!(decision.verdicts.len(), nodes.len());
        for verdict in &decision.verdicts {
            prop_assert!(verdict.filtered.is_some() && !verdict.detail.is_empty());
        }
    }

    #[test]
    fn parts_add_up_to_the_score(nodes in some_nodes(40), seed in any::<u64>()) {
        let (choice, decision) = decide(&nodes, Asked { seed, ..asked(64) });
        let by_name: BTreeMap<_, _> = decision.verdicts.iter().map(|v| (&v.node, v)).collect();
        for pick in choice.best.iter() {
            let verdict = by_name[&nodes[pick.node as usize].name];
            let names: Vec<_> = verdict.parts.iter().map(|part| &*part.name).collect();
            prop_assert_eq!(names, PARTS);
            let sum: f64 = verdict.parts.iter().map(|part| part.value).sum();
            prop_assert!((sum - verdict.score).abs() < 1e-9);
            prop_assert!((pick.score - verdict.score).abs() < 1e-9, "the decision had the same");
        }
        let best: Vec<_> = choice.best.iter().map(|pick| pick.score).collect();
        prop_assert!(best.is_sorted());
    }

    #[test]
    fn sample_has_distinct_nodes_and_full_size(n in 0u32..100, k in 0usize..20, seed in any::<u64>()) {
        let sample = Sample::draw(n, k, &mut SplitMix64::new(seed));
        let set: BTreeSet<_> = sample.picked().iter().copied().collect();
        prop_assert_eq!(set.len(), sample.picked().len());
        prop_assert_eq!(set.len(), k.min(SAMPLE).min(n as usize));
        prop_assert!(set.iter().all(|&picked| picked < n));
    }

    #[test]
    fn more_load_never_improves_a_score(busy in 0.0f64..0.9, more in 0.0f64..0.1) {
        let score = |busy| {
            let node = with("a", |_, load, _| load.cpu_busy = busy);
            decide(&[node], asked(0)).1.verdicts[0].score
        };
        prop_assert!(score(busy + more) >= score(busy));
    }
}
