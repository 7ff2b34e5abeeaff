//! What sandboxes reach: by default, by the caller's wish, and at most what their team may.

use proto::{
    Reason,
    limits::TeamLimits,
    sandbox::v1::{Team as TeamMessage, *},
    spec, update,
};

use super::*;
use crate::node::fake::Cut;

fn asking(request_id: &str, egress: Egress) -> CreateSandboxRequest {
    CreateSandboxRequest { egress: egress.into(), ..request(request_id) }
}

fn named(request_id: &str, egress: Egress) -> GetOrCreateSandboxRequest {
    let create = CreateSandboxRequest { name: "web".into(), ..asking(request_id, egress) };
    GetOrCreateSandboxRequest { create: Some(create) }
}

impl Lab {
    async fn egress(&self, request_id: &str, asked: Egress) -> Result<Egress, Status> {
        Ok(create(&mut self.api(), asking(request_id, asked)).await?.egress())
    }

    /// Sets the most that the sandboxes of a team reach.
    async fn set_most(&self, team: &str, most: Egress) {
        let limits = proto::sandbox::v1::TeamLimits { egress: most.into(), ..Default::default() };
        let team = TeamMessage { name: team.into(), limits: Some(limits), ..Default::default() };
        let update_mask = Some(prost_types::FieldMask { paths: vec!["limits.egress".into()] });
        let request = UpdateTeamRequest { team: Some(team), update_mask };
        self.operator().update_team(request).await.expect("set");
    }

    async fn change(&self, id: &str, egress: Egress) -> Result<Egress, Status> {
        let change = Sandbox { id: id.into(), egress: egress.into(), ..Sandbox::default() };
        let changed = self.api().update_sandbox(update::request(change, &["egress"])).await?;
        Ok(changed.into_inner().sandbox.expect("a sandbox").egress())
    }
}

fn reason(status: &Status) -> Option<Reason> {
    daemon::status::reason(status)
}

#[tokio::test(start_paused = true)]
async fn creation_gets_what_it_asks_for_and_the_default_otherwise() {
    let mut lab = Lab::new().await;
    assert_eq!(lab.egress("r1", Egress::Unspecified).await.expect("made"), Egress::Open);
    assert_eq!(lab.egress("r2", Egress::None).await.expect("made"), Egress::None);
    lab.options.egress = spec::Egress::None;
    lab.start().await;
    assert_eq!(lab.egress("r3", Egress::Unspecified).await.expect("made"), Egress::None);
    assert_eq!(lab.egress("r4", Egress::Open).await.expect("made"), Egress::Open);
    // A repetition is one by what the caller sent.
    assert_eq!(lab.egress("r1", Egress::Unspecified).await.expect("repeated"), Egress::Open);
}

#[tokio::test(start_paused = true)]
async fn team_gets_no_more_than_its_maximum() {
    let lab = Lab::new().await;
    let open = create(&mut lab.api(), asking("r1", Egress::Open)).await.expect("made");
    lab.set_most("red", Egress::None).await;
    assert_eq!(lab.egress("r2", Egress::Unspecified).await.expect("made"), Egress::None);
    let refused = lab.egress("r3", Egress::Open).await.expect_err("too much");
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    assert_eq!(reason(&refused), Some(Reason::EgressRefused));

    // An older sandbox stays, may be tightened, and not be opened again.
    let view =
        lab.api().get_sandbox(GetSandboxRequest { id: open.id.clone() }).await.expect("read");
    assert_eq!(view.into_inner().sandbox.expect("a sandbox").egress(), Egress::Open);
    assert_eq!(lab.change(&open.id, Egress::None).await.expect("tighter"), Egress::None);
    let refused = lab.change(&open.id, Egress::Open).await.expect_err("too much");
    assert_eq!(reason(&refused), Some(Reason::EgressRefused));
    assert_eq!(lab.change(&open.id, Egress::Unspecified).await.expect("the default"), Egress::None);

    lab.set_most("red", Egress::Unspecified).await;
    assert_eq!(lab.change(&open.id, Egress::Unspecified).await.expect("the default"), Egress::Open);
}

#[tokio::test(start_paused = true)]
async fn maximum_of_the_configuration_holds_for_teams_without_their_own() {
    let mut lab = Lab::new().await;
    lab.options.limits = TeamLimits::stored("egress=none");
    lab.start().await;
    lab.egress("r1", Egress::Open).await.expect_err("too much");
    lab.set_most("red", Egress::Open).await;
    assert_eq!(lab.egress("r2", Egress::Open).await.expect("made"), Egress::Open);
}

#[tokio::test(start_paused = true)]
async fn get_or_create_compares_the_egress_that_is_asked_for() {
    let lab = Lab::new().await;
    let get = async |request| lab.api().get_or_create_sandbox(request).await;
    let id = |answer: tonic::Response<GetOrCreateSandboxResponse>| {
        answer.into_inner().sandbox.expect("a sandbox").id
    };
    let made = id(get(named("r1", Egress::None)).await.expect("made"));
    assert_eq!(id(get(named("r2", Egress::None)).await.expect("the same")), made);
    assert_eq!(id(get(named("r3", Egress::Unspecified)).await.expect("any will do")), made);
    let other = get(named("r4", Egress::Open)).await.expect_err("another one");
    assert_eq!(reason(&other), Some(Reason::NameTaken));
    assert!(other.message().contains("egress"), "{other}");
}

fn listing(request_id: &str, names: &[&str]) -> CreateSandboxRequest {
    let egress_names = names.iter().map(|name| (*name).to_owned()).collect();
    CreateSandboxRequest { egress_names, ..asking(request_id, Egress::Allow) }
}

#[tokio::test(start_paused = true)]
async fn list_is_kept_within_the_list_of_its_team() {
    let lab = Lab::new().await;
    let made = async |request| create(&mut lab.api(), request).await;
    let free =
        made(listing("r1", &["GitHub.com", "*.npmjs.org", "github.com"])).await.expect("made");
    assert_eq!(free.egress(), Egress::Allow);
    assert_eq!(free.egress_names, ["*.npmjs.org", "github.com"], "in the normal form");
    made(listing("r2", &[])).await.expect_err("no names");
    made(listing("r3", &["10.0.0.1"])).await.expect_err("an address");
    let stray = CreateSandboxRequest { egress: Egress::Open.into(), ..listing("r4", &["a.b"]) };
    made(stray).await.expect_err("names without a list");

    let limits = proto::sandbox::v1::TeamLimits {
        egress: Egress::Allow.into(),
        egress_names: vec!["*.npmjs.org".into(), "pypi.org".into()],
        ..Default::default()
    };
    let team = TeamMessage { name: "red".into(), limits: Some(limits), ..Default::default() };
    let update_mask = Some(prost_types::FieldMask { paths: vec!["limits.egress".into()] });
    let set = lab.operator().update_team(UpdateTeamRequest { team: Some(team), update_mask }).await;
    let effective = set.expect("set").into_inner().team.and_then(|team| team.effective);
    assert_eq!(effective.expect("limits").egress_names, ["*.npmjs.org", "pypi.org"]);
    let whole = made(asking("r5", Egress::Unspecified)).await.expect("made");
    assert_eq!(whole.egress_names, ["*.npmjs.org", "pypi.org"], "the maximum");
    let part = made(listing("r6", &["cdn.npmjs.org"])).await.expect("made");
    assert_eq!(part.egress_names, ["cdn.npmjs.org"]);
    assert_eq!(made(asking("r7", Egress::None)).await.expect("made").egress(), Egress::None);
    for wrong in
        [listing("r8", &["github.com"]), listing("r9", &["npmjs.org"]), asking("ra", Egress::Open)]
    {
        let refused = made(wrong).await.expect_err("too much");
        assert_eq!(reason(&refused), Some(Reason::EgressRefused), "{refused}");
    }

    // A change is held to the same, and names both fields at once.
    let change = async |names: &[&str]| {
        let change = Sandbox {
            id: free.id.clone(),
            egress: Egress::Allow.into(),
            egress_names: names.iter().map(|name| (*name).to_owned()).collect(),
            ..Sandbox::default()
        };
        let changed = lab.api().update_sandbox(update::request(change, &["egress"])).await?;
        Ok::<_, Status>(changed.into_inner().sandbox.expect("a sandbox").egress_names)
    };
    assert_eq!(change(&["pypi.org"]).await.expect("tighter"), ["pypi.org"]);
    let refused = change(&["github.com"]).await.expect_err("too much");
    assert_eq!(reason(&refused), Some(Reason::EgressRefused));
    assert_eq!(lab.change(&free.id, Egress::None).await.expect("tighter"), Egress::None);
}

#[tokio::test(start_paused = true)]
async fn get_or_create_compares_lists_by_their_names() {
    let lab = Lab::new().await;
    let get = async |request_id, names: &[&str]| {
        let create = CreateSandboxRequest { name: "web".into(), ..listing(request_id, names) };
        let request = GetOrCreateSandboxRequest { create: Some(create) };
        let answer = lab.api().get_or_create_sandbox(request).await?;
        Ok::<_, Status>(answer.into_inner().sandbox.expect("a sandbox").id)
    };
    let made = get("r1", &["b.c", "a.b"]).await.expect("made");
    assert_eq!(get("r2", &["A.b", "b.c"]).await.expect("the same"), made);
    let other = get("r3", &["a.b"]).await.expect_err("another one");
    assert_eq!(reason(&other), Some(Reason::NameTaken));
}

#[tokio::test(start_paused = true)]
async fn list_goes_to_no_node_that_cannot_keep_to_it() {
    let mut lab = Lab::new().await;
    let (last, others) = lab.agents.split_last().expect("some");
    for agent in others {
        agent.faults(|faults| faults.filters_nothing = true);
    }
    let able = last.clone();
    lab.start().await;
    for number in 0..4 {
        let name = format!("r{number}");
        let sandbox = create(&mut lab.api(), listing(&name, &["a.b"])).await.expect("made");
        assert_eq!(sandbox.node, able.name().to_string());
    }
    for agent in &lab.agents {
        if agent.name() != able.name() {
            assert_eq!(agent.received(), [], "it was not even asked");
        }
    }
    // They still close sandboxes, and a sandbox there gets no list.
    let elsewhere = lab.agents.first().expect("one").name().to_string();
    let closed = CreateSandboxRequest { node: elsewhere, ..asking("r9", Egress::None) };
    let closed = create(&mut lab.api(), closed).await.expect("made");
    let change = Sandbox {
        id: closed.id,
        egress: Egress::Allow.into(),
        egress_names: vec!["a.b".into()],
        ..Sandbox::default()
    };
    let refused = lab.api().update_sandbox(update::request(change, &["egress"])).await;
    assert_eq!(reason(&refused.expect_err("refused")), Some(Reason::IsolationFailed));
}

#[tokio::test(start_paused = true)]
async fn closed_sandbox_goes_to_no_node_that_cannot_close_it() {
    let mut lab = Lab::new().await;
    let (last, others) = lab.agents.split_last().expect("some");
    for agent in others {
        agent.faults(|faults| faults.isolates_nothing = true);
    }
    let able = last.clone();
    lab.start().await;
    for number in 0..4 {
        let name = format!("r{number}");
        let sandbox = create(&mut lab.api(), asking(&name, Egress::None)).await.expect("made");
        assert_eq!(sandbox.node, able.name().to_string());
    }
    for agent in &lab.agents {
        if agent.name() != able.name() {
            assert_eq!(agent.received(), [], "it was not even asked");
        }
    }
}

impl Lab {
    /// Makes the first node the best one; only it and `able` others can close a sandbox.
    async fn prefer_first(&self, able: usize) {
        for (at, agent) in self.agents.iter().enumerate().skip(1) {
            agent.load(|load| load.memory_available = 20 << 30);
            agent.faults(|faults| faults.isolates_nothing = at > able);
            // They say so when they connect again.
            agent.down();
            agent.up();
        }
        tokio::time::sleep(Duration::from_secs(5)).await;
    }

    /// Begins a closed creation, whose request is lost on its way to the first node, which then goes down.
    async fn begin_lost(&self) -> tokio::task::JoinHandle<Result<Sandbox, Status>> {
        let first = &self.agents[0];
        first.faults(|faults| faults.cut = Some(Cut::Before));
        let mut api = self.api();
        let answer =
            tokio::spawn(async move { create(&mut api, asking("r1", Egress::None)).await });
        tokio::time::sleep(Duration::from_millis(200)).await;
        first.down();
        first.faults(|faults| faults.cut = None);
        answer
    }

    /// Lets the first node come back, with an agent that cannot close a sandbox.
    fn return_with_an_older_agent(&self) {
        self.agents[0].faults(|faults| faults.isolates_nothing = true);
        self.agents[0].up();
    }
}

#[tokio::test(start_paused = true)]
async fn closed_creation_waits_for_what_its_node_says_after_a_restart_of_the_controller() {
    let memory = Arc::new(Memory::new());
    let mut lab = Lab::over(memory).await;
    lab.prefer_first(0).await;
    let answer = lab.begin_lost().await;
    let back = lab.agents[0].clone();
    let back = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_secs(12)).await;
        back.up();
    });
    lab.start().await;
    drop(answer);
    back.await.expect("it came back");
    let made = lab.egress("r1", Egress::None).await.expect("made");
    assert_eq!(made, Egress::None);
    assert_eq!((lab.agents[0].living().len(), lab.living().len()), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn closed_creation_leaves_a_node_that_returns_with_an_older_agent() {
    let lab = Lab::new().await;
    lab.prefer_first(1).await;
    let answer = lab.begin_lost().await;
    lab.return_with_an_older_agent();
    let made = answer.await.expect("answered").expect("made");
    assert_eq!((made.node.as_str(), made.egress()), ("n2", Egress::None));
    assert_eq!(lab.agents[0].received(), [], "it would have made it open");
    assert_eq!(lab.living().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn closed_creation_that_no_node_can_close_any_more_says_so() {
    let mut lab = Lab::new().await;
    lab.options.queue = Duration::from_secs(10);
    lab.start().await;
    lab.prefer_first(0).await;
    let answer = lab.begin_lost().await;
    lab.return_with_an_older_agent();
    let refused = answer.await.expect("answered").expect_err("no node");
    assert_eq!(reason(&refused), Some(Reason::NoCapacity), "{refused}");
    assert!(refused.message().contains("cannot close a sandbox"), "{refused}");
    assert_eq!(lab.living(), []);
}

#[tokio::test(start_paused = true)]
async fn attempt_that_a_node_makes_open_is_taken_back() {
    let lab = Lab::new().await;
    lab.prefer_first(1).await;
    // Replaced so fast that the controller asks before it notices.
    lab.agents[0].faults(|faults| (faults.opens, faults.boot) = (true, Duration::from_secs(2)));
    let made = create(&mut lab.api(), asking("r1", Egress::None)).await.expect("made");
    assert_eq!((made.node.as_str(), made.egress()), ("n2", Egress::None));
    assert_eq!(lab.agents[0].received().len(), 1);
    assert_eq!(lab.living().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_came_up_open_before_anybody_saw_it_is_taken_back() {
    let lab = Lab::new().await;
    lab.prefer_first(1).await;
    lab.agents[0].faults(|faults| (faults.opens, faults.boot) = (true, Duration::ZERO));
    let made = create(&mut lab.api(), asking("r1", Egress::None)).await.expect("made");
    assert_eq!((made.node.as_str(), made.egress()), ("n2", Egress::None));
    assert_eq!(lab.living().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_its_user_opened_survives_an_old_store() {
    let memory = Arc::new(Memory::new());
    let mut lab = Lab::over(memory.clone()).await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.boot = Duration::from_secs(5));
    }
    let mut api = lab.api();
    let answer = tokio::spawn(async move { create(&mut api, asking("r1", Egress::None)).await });
    tokio::time::sleep(Duration::from_secs(2)).await;
    let copy = memory.copy();
    let made = answer.await.expect("answered").expect("made");
    assert_eq!(lab.change(&made.id, Egress::Open).await.expect("opened"), Egress::Open);
    lab.store = Arc::new(copy);
    lab.red = token(&lab.store, "red", "sandbox operator").await;
    lab.start().await;
    let same = lab.until(&made.id, Phase::Running).await;
    assert_eq!((same.node.as_str(), same.egress()), (made.node.as_str(), Egress::Open));
    assert_eq!(lab.living().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn node_that_cannot_close_a_sandbox_is_given_none_by_an_operator() {
    let mut lab = Lab::new().await;
    let closed = create(&mut lab.api(), asking("r1", Egress::None)).await.expect("made");
    let holder = lab.holder(&closed.id).clone();
    let mut stopped = holder.living().into_iter().next().expect("there");
    stopped.set_phase(Phase::Stopped);
    holder.put(stopped.clone());
    lab.options.egress = spec::Egress::None;
    for agent in &lab.agents {
        agent.faults(|faults| {
            (faults.isolates_nothing, faults.recovers) = (true, Some(stopped.clone()));
        });
        // They say so when they connect again.
        agent.down();
        agent.up();
    }
    lab.start().await;
    let mut operator = lab.operator();
    for node in ["n1", "n2", "n3"] {
        let adopt = AdoptSandboxRequest {
            node: node.into(),
            vmid: 207,
            team: "red".into(),
            ..Default::default()
        };
        let refused = operator.adopt_sandbox(adopt).await.expect_err("refused");
        assert_eq!(reason(&refused), Some(Reason::IsolationFailed), "{refused}");
        let recover =
            RecoverSandboxRequest { node: node.into(), vmid: stopped.vmid, dry_run: false };
        let refused = operator.recover_sandbox(recover).await.expect_err("refused");
        assert_eq!(reason(&refused), Some(Reason::IsolationFailed), "{refused}");
    }
    let drain = DrainNodeRequest { node: closed.node.clone(), why: String::new() };
    let drained = operator.drain_node(drain).await.expect("drained").into_inner();
    assert_eq!((drained.moved.len(), drained.stays.len()), (0, 1), "{drained:?}");
    assert_eq!(lab.holder(&closed.id).name().as_str(), closed.node, "it stays");
}
