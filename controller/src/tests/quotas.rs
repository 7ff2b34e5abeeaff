//! Limits of teams: how much they have at once, and how often they create.

use std::collections::BTreeMap;

use proto::{
    Reason,
    limits::TeamLimits,
    sandbox::v1::{Team as TeamMessage, *},
    update,
};

use super::*;
use crate::inventory::Usage;

impl Lab {
    /// Creates a lab whose teams have these limits.
    pub(super) async fn limited(limits: &str) -> Self {
        let mut lab = Self::new().await;
        lab.options.limits = TeamLimits::stored(limits);
        lab.start().await;
        lab
    }

    pub(super) async fn team(&self, name: &str) -> TeamMessage {
        let request = GetTeamRequest { name: name.into() };
        let answer = self.operator().get_team(request).await.expect("a team");
        answer.into_inner().team.expect("a team")
    }

    pub(super) async fn usage(&self, name: &str) -> TeamUsage {
        self.team(name).await.usage.expect("a usage")
    }

    pub(super) async fn set_limits(
        &self,
        name: &str,
        limits: &str,
        fields: &[&str],
    ) -> Result<(), Status> {
        let team = TeamMessage {
            name: name.into(),
            limits: Some(TeamLimits::stored(limits).into()),
            ..TeamMessage::default()
        };
        let paths = fields.iter().map(ToString::to_string).collect();
        let update_mask = Some(prost_types::FieldMask { paths });
        let request = UpdateTeamRequest { team: Some(team), update_mask };
        self.operator().update_team(request).await.map(drop)
    }

    async fn drop_sandbox(&self, id: &str) {
        let request = DeleteSandboxRequest { id: id.into() };
        self.api().delete_sandbox(request).await.expect("deleted");
    }

    async fn with_size(&self, request_id: &str, size: Size) -> Result<Sandbox, Status> {
        let request = CreateSandboxRequest { size: Some(size), ..request(request_id) };
        create(&mut self.api(), request).await
    }

    async fn grow(&self, id: &str, size: Size) -> Result<(), Status> {
        let change = Sandbox { id: id.into(), size: Some(size), ..Sandbox::default() };
        self.api().update_sandbox(update::request(change, &["size"])).await.map(drop)
    }
}

/// Parts of a refusal: the limit, what is used, the most.
pub(super) fn exceeded(status: &Status) -> (String, String, String) {
    let (_, metadata) = daemon::status::info(status).expect("ours");
    let part = |key: &str| metadata.get(key).cloned().unwrap_or_default();
    (part("limit"), part("used"), part("max"))
}

pub(super) fn text(limit: &str, used: u32, max: u32) -> (String, String, String) {
    (limit.into(), used.to_string(), max.to_string())
}

#[tokio::test(start_paused = true)]
async fn of_many_parallel_creations_as_many_pass_as_the_quota_has_room_for() {
    let lab = Lab::limited("sandboxes=5").await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.boot = Duration::from_secs(2));
    }
    let names: Vec<_> = (0..30).map(|n| format!("r{n}")).collect();
    let answers = futures_util::future::join_all(names.iter().map(|name| lab.create(name))).await;
    let refused: Vec<_> = answers.into_iter().filter_map(Result::err).collect();
    assert_eq!((refused.len(), lab.living().len()), (25, 5));
    for status in &refused {
        assert_eq!(daemon::status::reason(status), Some(Reason::QuotaExceeded));
        assert_eq!(exceeded(status), text("sandboxes", 5, 5));
        assert_eq!(daemon::status::retry_after(status), Some(Duration::from_secs(30)));
        assert_eq!(status.metadata().get("retry-after").expect("a header"), "30");
    }
    assert_eq!(lab.usage("red").await.sandboxes, 5);
    // Another team has its own quota; a deletion makes room.
    let blue = token(&lab.store, "blue", "sandbox").await;
    create(&mut lab.api_as(&blue), request("r1")).await.expect("another team");
    lab.drop_sandbox(&lab.living()[0].id.clone()).await;
    let (a, b) = tokio::join!(lab.create("s1"), lab.create("s2"));
    assert_eq!([a.is_ok(), b.is_ok()].iter().filter(|made| **made).count(), 1);
}

#[tokio::test(start_paused = true)]
async fn repeated_request_does_not_count_again() {
    let lab = Lab::limited("sandboxes=1 creates=1/hour").await;
    let calls = (0..20).map(|_| lab.create("r1"));
    let answers = futures_util::future::join_all(calls).await;
    let ids: std::collections::BTreeSet<_> =
        answers.into_iter().map(|answer| answer.expect("the same").id).collect();
    assert_eq!((ids.len(), lab.living().len()), (1, 1));
    lab.create("r1").await.expect("again");
    assert_eq!(reason(lab.create("r2").await), Reason::QuotaExceeded);
    let named = CreateSandboxRequest { name: "web".into(), ..request("r3") };
    let named = GetOrCreateSandboxRequest { create: Some(named) };
    assert_eq!(reason(lab.api().get_or_create_sandbox(named).await), Reason::QuotaExceeded);
    let usage = lab.usage("red").await;
    assert_eq!((usage.sandboxes, usage.creates), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn cancelled_creation_counts_until_its_node_is_forgotten() {
    let mut lab = Lab::limited("sandboxes=1").await;
    for (node, ip) in [("n1", "10.0.0.1"), ("n2", "10.0.0.2")] {
        lab.agents[0].add_member(node, ip);
    }
    // A node that is in the configuration cannot be forgotten.
    lab.discover = true;
    lab.start().await;
    lab.controller.as_ref().expect("a controller").settled(Duration::from_secs(5)).await;
    lab.agents[1].faults(|faults| faults.boot = Duration::from_hours(1));
    let wait = Some(prost_types::Duration { seconds: 1, nanos: 0 });
    let asked = CreateSandboxRequest { node: "n2".into(), wait, ..request("r1") };
    let made = create(&mut lab.api(), asked).await.expect("accepted");
    assert_eq!((made.phase(), made.node.as_str()), (Phase::Creating, "n2"));
    let decision = async |lab: &Lab| {
        let row = lab.store.get(&made.id.parse().expect("id")).await.expect("read");
        row.expect("a row").decision
    };
    let first_decision = decision(&lab).await;
    assert!(first_decision.contains("n2"), "{first_decision}");

    lab.agents[1].down();
    let n2 = "n2".parse().expect("a name");
    let is_down = async {
        while lab.domain().nodes().get(&n2).is_some_and(|node| node.down().is_none()) {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), is_down).await.expect("noticed");
    let delete = DeleteSandboxRequest { id: made.id.clone() };
    assert_eq!(reason(lab.api().delete_sandbox(delete).await), Reason::NodeUnreachable);
    assert_eq!(lab.usage("red").await.sandboxes, 1, "its node may have it");
    assert_eq!(reason(lab.create("r2").await), Reason::QuotaExceeded);

    let forget = ForgetNodeRequest { node: "n2".into(), lost: false, dry_run: false };
    let forgotten = lab.operator().forget_node(forget).await.expect("forgotten").into_inner();
    assert_eq!(forgotten.sandboxes, [], "nobody has seen it run");
    lab.until(&made.id, Phase::Deleted).await;
    assert_eq!(lab.usage("red").await.sandboxes, 0);
    assert_eq!(decision(&lab).await, first_decision, "explain shows it still");
    lab.create("r2").await.expect("there is room");
    // After a crash in between, an operator forgets the node once more.
    lab.domain().nodes().forget(&n2).await.expect("forgotten");

    // If the node comes back after all, it cancels what it has of the creation.
    assert_eq!(lab.agents[1].living().len(), 1);
    lab.agents[1].up();
    lab.start().await;
    let cancelled = async {
        while !lab.agents[1].living().is_empty() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), cancelled).await.expect("cancelled");
    assert_eq!(lab.get(&made.id).await.expect("known").phase(), Phase::Deleted);
}

/// Lets the agents report the root disk of their snapshot, GiB, and waits until the controller knows.
async fn tell_disks(lab: &Lab, gib: u32, agents: std::ops::Range<usize>) {
    for agent in &lab.agents[agents] {
        agent.load(|load| load.snapshot_sizes[0].disk_gib = gib);
    }
    let known = async {
        while lab.domain().nodes().cache.snapshot_disk_gib(SNAPSHOT) != gib {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::time::timeout(Duration::from_mins(1), known).await.expect("reported");
}

#[tokio::test(start_paused = true)]
async fn disk_of_the_snapshot_counts_where_none_is_asked_for() {
    let lab = Lab::limited("disk_gib=40").await;
    let size = |disk_gib| Size { cpu_cores: 0, memory_mib: 0, disk_gib };
    // Older agents do not report it.
    let first = lab.create("r1").await.expect("made");
    assert_eq!(lab.usage("red").await.disk_gib, 0);
    // One of another version is enough.
    tell_disks(&lab, 8, 0..1).await;
    assert_eq!(lab.usage("red").await.disk_gib, 8);
    for number in 2..=4 {
        let made = lab.create(&format!("r{number}")).await.expect("made");
        assert_eq!(made.size.expect("a size").disk_gib, 0, "what was asked for is told");
    }
    let status = lab.with_size("r5", size(9)).await.expect_err("too much");
    assert_eq!(exceeded(&status), text("disk_gib", 32, 40));
    lab.create("r5").await.expect("as much as there is");
    let status = lab.create("r6").await.expect_err("too many");
    assert_eq!(exceeded(&status), text("disk_gib", 40, 40));
    // A disk that grows counts with the difference.
    let grown = async || lab.resize(&first.id, size(16), &["size.disk_gib"]).await;
    let status = grown().await.expect_err("too much");
    assert_eq!(exceeded(&status), text("disk_gib", 40, 40));
    let other = lab.living().into_iter().find(|other| other.id != first.id).expect("another");
    lab.drop_sandbox(&other.id).await;
    assert_eq!(lab.usage("red").await.disk_gib, 32);
    grown().await.expect("as much as there is");
    assert_eq!(lab.usage("red").await.disk_gib, 40);
    assert!(lab.domain().nodes().cache.miscounted().is_empty());
}

#[tokio::test(start_paused = true)]
async fn sizes_count_with_what_the_snapshot_gives() {
    let mut lab = Lab::limited("cpu_cores=4 memory_mib=2048 disk_gib=30").await;
    lab.create("r1").await.expect("1 core, 512 MiB");
    let size = |cpu_cores, memory_mib, disk_gib| Size { cpu_cores, memory_mib, disk_gib };
    for (asked, limit) in [
        (size(4, 0, 0), text("cpu_cores", 1, 4)),
        (size(0, 1537, 0), text("memory_mib", 512, 2048)),
        (size(0, 0, 31), text("disk_gib", 0, 30)),
    ] {
        let status = lab.with_size("r2", asked).await.expect_err("too much");
        assert_eq!(exceeded(&status), limit);
    }
    lab.with_size("r2", size(3, 1536, 30)).await.expect("as much as there is");
    let full = lab.usage("red").await;
    let full = (full.sandboxes, full.cpu_cores, full.memory_mib, full.disk_gib, full.creates);
    assert_eq!(full, (2, 4, 2048, 30, 0));
    // Also while it is made: after a restart the nodes have not told yet.
    lab.store
        .put_team_limits(&"red".parse().expect("team"), TeamLimits::stored("cpu_cores=9"))
        .await
        .expect("stored");
    for agent in &lab.agents {
        agent.faults(|faults| faults.hang = true);
    }
    lab.start().await;
    let wait = Some(prost_types::Duration::default());
    let hanging = CreateSandboxRequest { wait, ..request("r3") };
    let status = create(&mut lab.api(), hanging.clone()).await.expect_err("memory");
    assert_eq!(exceeded(&status), text("memory_mib", 2048, 2048));
    lab.set_limits("red", "memory_mib=none", &["limits.memory_mib"]).await.expect("more");
    create(&mut lab.api(), hanging).await.expect("under way");
    lab.start().await;
    assert_eq!((lab.usage("red").await.cpu_cores, lab.usage("red").await.memory_mib), (5, 2560));
}

#[tokio::test(start_paused = true)]
async fn rate_has_an_exact_hint_and_survives_a_restart() {
    let mut lab = Lab::limited("creates=3/hour").await;
    for n in 0..3 {
        let made = lab.create(&format!("r{n}")).await.expect("within the rate");
        lab.drop_sandbox(&made.id).await;
        tokio::time::sleep(Duration::from_mins(10)).await;
    }
    for restart in [false, true] {
        if restart {
            lab.start().await;
        }
        let status = lab.create("r3").await.expect_err("too often");
        assert_eq!(daemon::status::reason(&status), Some(Reason::RateExceeded));
        assert_eq!(status.code(), tonic::Code::ResourceExhausted);
        assert_eq!(exceeded(&status), text("creates", 3, 3));
        let wait = daemon::status::retry_after(&status).expect("a hint");
        let header = status.metadata().get("retry-after").expect("a header");
        let seconds = u64::try_from(wait.as_millis().div_ceil(1000)).expect("an hour");
        assert_eq!(header.to_str().expect("text"), seconds.to_string());
        assert!(wait <= Duration::from_mins(30) && wait > Duration::from_mins(29), "{wait:?}");
    }
    let status = lab.create("r3").await.expect_err("still");
    let wait = daemon::status::retry_after(&status).expect("a hint");
    tokio::time::sleep(wait - Duration::from_millis(10)).await;
    assert_eq!(reason(lab.create("r3").await), Reason::RateExceeded);
    tokio::time::sleep(Duration::from_millis(10)).await;
    lab.create("r3").await.expect("at the time of the hint");
    assert_eq!(reason(lab.create("r4").await), Reason::RateExceeded);
}

#[tokio::test(start_paused = true)]
async fn users_of_a_team_have_rates_of_their_own() {
    let mut lab = Lab::limited("user_creates=1/minute creates=3/minute").await;
    let mut tokens = BTreeMap::new();
    for user in ["ada", "bob", "eve"] {
        let order = token::Order {
            user: Some(user.parse().expect("user")),
            ..token::Order::new("red".parse().expect("team"), proto::scope::Scopes::SANDBOX)
        };
        let issued = token::issue(order, 1);
        lab.store.add_token(issued.token.clone()).await.expect("stored");
        tokens.insert(user, issued.text(Format::Plain));
    }
    let make = |lab: &Lab, user: &str, id: &str| {
        let (mut api, request) = (lab.api_as(&tokens[user]), request(id));
        async move { create(&mut api, request).await }
    };
    make(&lab, "ada", "r1").await.expect("first");
    lab.start().await;
    let status = make(&lab, "ada", "r2").await.expect_err("second of ada");
    assert_eq!(exceeded(&status), text("user_creates", 1, 1));
    assert!(status.message().contains("user ada of team red"), "{status:?}");
    make(&lab, "bob", "r3").await.expect("first of bob");
    // Without a user only the team's rate counts.
    lab.create("r4").await.expect("third of the team");
    let status = make(&lab, "eve", "r5").await.expect_err("fourth of the team");
    assert_eq!(exceeded(&status), text("creates", 3, 3));
    tokio::time::sleep(Duration::from_mins(1)).await;
    make(&lab, "ada", "r2").await.expect("a minute later");
}

#[tokio::test(start_paused = true)]
async fn creation_that_is_refused_takes_nothing() {
    let lab = Lab::limited("sandboxes=1 creates=1/hour").await;
    tokio::time::sleep(Duration::from_secs(11)).await;
    let unknown = CreateSandboxRequest { snapshot_id: "none_v1".into(), ..request("r1") };
    assert_eq!(reason(create(&mut lab.api(), unknown).await), Reason::SnapshotNotFound);
    let usage = lab.usage("red").await;
    assert_eq!((usage.sandboxes, usage.creates), (0, 0));
    lab.create("r2").await.expect("the first");
}

#[tokio::test(start_paused = true)]
async fn growth_of_a_sandbox_counts_and_what_shrinks_is_free() {
    let lab = Lab::limited("cpu_cores=4").await;
    let size = |cpu_cores| Size { cpu_cores, ..Size::default() };
    let one = lab.with_size("r1", size(2)).await.expect("made").id;
    let two = lab.with_size("r2", size(1)).await.expect("made").id;
    let status = lab.grow(&two, size(3)).await.expect_err("too much");
    assert_eq!(exceeded(&status), text("cpu_cores", 3, 4));
    // Of two that fit alone one passes.
    let (a, b) = tokio::join!(lab.grow(&one, size(3)), lab.grow(&two, size(2)));
    assert_eq!([a.is_ok(), b.is_ok()].iter().filter(|grown| **grown).count(), 1);
    assert_eq!(lab.usage("red").await.cpu_cores, 4);
    // A limit that was lowered ends nothing, and lets go of what is too much.
    lab.set_limits("red", "cpu_cores=1", &["limits.cpu_cores"]).await.expect("lowered");
    let memory = Size { memory_mib: 1024, ..Size::default() };
    lab.grow(&one, memory).await.expect("of memory there is no limit");
    lab.grow(&one, size(1)).await.expect("less");
    assert_eq!(reason(lab.grow(&one, size(2)).await), Reason::QuotaExceeded);
}

#[tokio::test(start_paused = true)]
async fn limits_of_a_team_win_over_the_defaults_and_survive_a_restart() {
    let mut lab = Lab::limited("sandboxes=1").await;
    lab.create("r1").await.expect("the first");
    assert_eq!(reason(lab.create("r2").await), Reason::QuotaExceeded);
    lab.set_limits("red", "sandboxes=2", &["limits.sandboxes"]).await.expect("more");
    lab.create("r2").await.expect("the second");
    lab.start().await;
    assert_eq!(reason(lab.create("r3").await), Reason::QuotaExceeded);
    let team = lab.team("red").await;
    let of = |limits: Option<proto::sandbox::v1::TeamLimits>| {
        limits.and_then(|limits| limits.sandboxes).map(|limit| (limit.max, limit.unlimited))
    };
    assert_eq!((of(team.limits), of(team.effective)), (Some((2, false)), Some((2, false))));
    lab.set_limits("red", "sandboxes=none", &["limits.sandboxes"]).await.expect("no limit");
    lab.create("r3").await.expect("the third");
    lab.set_limits("red", "", &["limits.sandboxes"]).await.expect("the default");
    assert_eq!(reason(lab.create("r4").await), Reason::QuotaExceeded);
    let team = lab.team("red").await;
    assert_eq!((of(team.limits), of(team.effective)), (None, Some((1, false))));
    for (name, fields) in [("a b", &["limits"][..]), ("red", &[]), ("red", &["usage"])] {
        let answer = lab.set_limits(name, "", fields).await;
        assert_eq!(reason(answer), Reason::FieldInvalid, "{name} {fields:?}");
    }
    // A team sees its own limits, and no other's.
    let blue = token(&lab.store, "blue", "read").await;
    let mut blue = OperatorServiceClient::with_interceptor(lab.channel(), bearer(&blue));
    let own = blue.get_team(GetTeamRequest::default()).await.expect("its own").into_inner();
    assert_eq!(own.team.expect("a team").name, "blue");
    for name in ["red", "nobody"] {
        let other = blue.get_team(GetTeamRequest { name: name.into() }).await;
        assert_eq!(reason(other), Reason::ScopeMissing);
    }
    let teams = lab.operator().list_teams(ListTeamsRequest::default()).await.expect("teams");
    let names: Vec<_> = teams.into_inner().teams.into_iter().map(|team| team.name).collect();
    assert_eq!(names, ["blue", "red"]);
}

/// Compares the counters with a recount of the cache, and with what the agents have.
async fn recounted(lab: &Lab, step: &str) {
    let cache = &lab.domain().nodes().cache;
    assert_eq!(cache.miscounted(), [], "{step}");
    let living = lab.living();
    let there = living.iter().fold(Usage::default(), |sum, sandbox| {
        sum.plus(Usage::of(sandbox.size.unwrap_or_default().into()))
    });
    let counted = cache.usage(&"red".parse().expect("team"), std::iter::empty());
    assert_eq!(counted, there, "{step}");
    // The fake agents give some addresses twice.
    let findings = lab.domain().fsck().await.findings.into_iter();
    let counters: Vec<_> = findings.filter(|f| f.invariant() == Invariant::I12).collect();
    assert!(counters.is_empty(), "{step}: {counters:?}");
}

#[tokio::test(start_paused = true)]
async fn counters_equal_a_recount_after_any_sequence_of_operations() {
    for seed in 1..=6_u64 {
        let mut lab = Lab::limited("sandboxes=6 cpu_cores=14").await;
        let random = Seeded(AtomicU64::new(seed * 7919));
        let draw = |below: usize| {
            let mut bytes = [0; 4];
            random.fill(&mut bytes);
            usize::try_from(u32::from_le_bytes(bytes)).expect("fits") % below
        };
        for step in 0..40 {
            let living = lab.living();
            let some = (!living.is_empty()).then(|| living[draw(living.len())].id.clone());
            let told = match (draw(10), some) {
                (0..=3, _) | (_, None) => {
                    let fails = draw(5) == 0;
                    for agent in &lab.agents {
                        agent.faults(|faults| faults.fail = fails.then_some(Reason::PctFailed));
                    }
                    let cores = u32::try_from(draw(4)).expect("small");
                    let size = Size { cpu_cores: cores, memory_mib: 0, disk_gib: cores };
                    let made = lab.with_size(&format!("r{}", draw(30)), size).await;
                    format!("create {cores}: {}", made.is_ok())
                }
                (4..=5, Some(id)) => {
                    lab.drop_sandbox(&id).await;
                    format!("delete {id}")
                }
                (6..=7, Some(id)) => {
                    let cores = 1 + u32::try_from(draw(5)).expect("small");
                    let grown = lab.grow(&id, Size { cpu_cores: cores, ..Size::default() }).await;
                    format!("grow {id} to {cores}: {}", grown.is_ok())
                }
                (8, Some(_)) => {
                    lab.start().await;
                    "restart".into()
                }
                (_, Some(_)) => {
                    let names: Vec<_> = (0..5).map(|n| format!("p{step}-{n}")).collect();
                    let calls = names.iter().map(|name| lab.create(name));
                    let answers = futures_util::future::join_all(calls).await;
                    format!("{:?} at once", answers.iter().map(Result::is_ok).collect::<Vec<_>>())
                }
            };
            let usage = lab.usage("red").await;
            assert!(usage.sandboxes <= 6 && usage.cpu_cores <= 14, "{seed} {step} {told}");
            recounted(&lab, &format!("seed {seed}, step {step}: {told}")).await;
        }
    }
}
