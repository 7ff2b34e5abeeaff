use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

use proto::{host::FullName, id::Vmid, name::Port};
use tokio::task::JoinSet;

use super::*;
use crate::ingress::{
    OpenPort, Owner,
    intent::{Background, Follower},
};

/// Sandboxes in memory, which need a moment to wake.
#[derive(Debug)]
struct Table {
    states: Mutex<HashMap<SandboxId, State>>,
    wakes: AtomicU32,
    thaw: Duration,
    wakes_work: AtomicBool,
}

impl Table {
    fn new(thaw: Duration) -> Arc<Self> {
        Arc::new(Self {
            states: Mutex::default(),
            wakes: AtomicU32::new(0),
            thaw,
            wakes_work: AtomicBool::new(true),
        })
    }

    fn set(&self, id: SandboxId, state: State) -> Target {
        self.states.lock().insert(id, state);
        target(id, state)
    }

    fn wakes(&self) -> u32 {
        self.wakes.load(Ordering::Relaxed)
    }
}

fn target(id: SandboxId, state: State) -> Target {
    Target {
        id,
        vmid: Vmid::try_from(100_001).expect("a vmid"),
        team: "red".parse().expect("a team"),
        name: None,
        state,
        ip: Some([10, 100, 1, 5].into()),
        ports: BTreeMap::from([(Port::try_from(8000).expect("a port"), OpenPort::PUBLIC)]),
        main: None,
        key: None,
    }
}

fn id(number: u8) -> SandboxId {
    SandboxId::new(1, &[number; 10])
}

#[async_trait::async_trait]
impl Routes for Table {
    fn local(&self, sandbox: SandboxRef) -> Option<Target> {
        let SandboxRef::Id(id) = sandbox else { return None };
        self.states.lock().get(&id).map(|state| target(id, *state))
    }

    fn named(&self, _: &FullName) -> Option<SandboxId> {
        None
    }

    async fn owner(&self, _: SandboxRef) -> Owner {
        Owner::Nobody
    }

    fn used(&self, _: &SandboxId) {}

    async fn on_loopback(&self, _: Vmid, _: u16) -> bool {
        false
    }

    async fn wake(&self, sandbox: SandboxRef) {
        let SandboxRef::Id(id) = sandbox else { return };
        self.wakes.fetch_add(1, Ordering::Relaxed);
        sleep(self.thaw).await;
        if self.wakes_work.load(Ordering::Relaxed) {
            self.states.lock().insert(id, State::Running);
        }
    }
}

const PAUSED: State = State::Paused { wakes: true };

fn routes(table: &Arc<Table>) -> Arc<dyn Routes> {
    Arc::clone(table) as Arc<dyn Routes>
}

#[tokio::test(start_paused = true)]
async fn hundred_requests_wake_a_sandbox_once_and_all_go_on() {
    let table = Table::new(Duration::from_millis(400));
    let (holds, target) = (Holds::new(Limits::default()), table.set(id(1), PAUSED));
    let mut requests = JoinSet::new();
    for number in 0..100 {
        let (holds, routes, target) = (holds.clone(), routes(&table), target.clone());
        let intent = if number % 2 == 0 { Intent::Request } else { Intent::Navigation };
        requests.spawn(async move { holds.wait(&routes, &target, intent).await });
    }
    assert!(requests.join_all().await.into_iter().all(|held| held == Ok(())));
    assert_eq!(table.wakes(), 1);
    assert!(holds.0.state.lock().startups.is_empty());
    assert_eq!(holds.0.room.available_permits(), holds.0.limits.node_held, "all rooms are free");
}

#[tokio::test(start_paused = true)]
async fn person_gets_a_page_soon_and_a_program_is_held_longer() {
    let table = Table::new(Duration::from_secs(200));
    let (holds, target) = (Holds::new(Limits::default()), table.set(id(1), PAUSED));
    let begun = Instant::now();
    let page = holds.wait(&routes(&table), &target, Intent::Navigation).await;
    let elapsed = Duration::from_millis(1500);
    assert_eq!(page, Err(Refusal::Waits { stage: Stage::Waking, elapsed }));
    let held = holds.wait(&routes(&table), &target, Intent::Request).await;
    let elapsed = begun.elapsed();
    assert_eq!(elapsed, Duration::from_millis(21_500));
    assert_eq!(held, Err(Refusal::Waits { stage: Stage::Waking, elapsed }));
    assert_eq!(table.wakes(), 1, "the startup goes on without them");
    // No startup outlives the longest hold.
    sleep(HOLD_MAX).await;
    assert!(holds.0.state.lock().startups.is_empty());
}

/// Caddy asks the next agent about the other one, whose question breaks off.
#[tokio::test(start_paused = true)]
async fn request_that_is_too_old_for_the_next_agent_is_answered_when_the_agent_stops() {
    let table = Table::new(Duration::from_secs(80));
    let (holds, target) = (Holds::new(Limits::default()), table.set(id(1), PAUSED));
    let all_routes = routes(&table);
    let old = holds.wait(&all_routes, &target, Intent::Request);
    let young = async {
        sleep(ASKS_AGAIN - RESTART).await;
        holds.wait(&all_routes, &target, Intent::Request).await
    };
    let stops = async {
        sleep(Duration::from_secs(10)).await;
        holds.stop();
    };
    let (old, young, ()) = tokio::join!(old, young, stops);
    let stage = Stage::Waking;
    assert_eq!(old, Err(Refusal::Waits { stage, elapsed: Duration::from_secs(10) }));
    let elapsed = ASKS_AGAIN - RESTART + Limits::default().hold;
    assert_eq!(young, Err(Refusal::Waits { stage, elapsed }), "the agent ends before");
}

#[tokio::test(start_paused = true)]
async fn request_that_goes_away_leaves_its_place_and_not_its_wake() {
    let table = Table::new(Duration::from_secs(5));
    let (holds, target) = (Holds::new(Limits::default()), table.set(id(1), PAUSED));
    let all = holds.0.room.available_permits();
    let all_routes = routes(&table);
    {
        let held = holds.wait(&all_routes, &target, Intent::Request);
        timeout(Duration::from_secs(1), held).await.expect_err("it is held");
    }
    assert_eq!(holds.0.room.available_permits(), all);
    assert!(holds.0.of_teams.begin(target.team.clone(), 1).is_some(), "nothing is counted");
    let begun = Instant::now();
    assert_eq!(holds.wait(&all_routes, &target, Intent::Request).await, Ok(()));
    assert_eq!((begun.elapsed(), table.wakes()), (Duration::from_secs(4), 1));
}

#[tokio::test(start_paused = true)]
async fn passive_requests_wake_nobody_and_join_what_others_wake() {
    let table = Table::new(Duration::from_secs(1));
    let (holds, target) = (Holds::new(Limits::default()), table.set(id(1), PAUSED));
    let all_routes = routes(&table);
    let socket = Intent::Follows(Follower::WebSocket);
    for intent in [socket, Intent::Background(Background::WellKnown)] {
        let refused = holds.wait(&all_routes, &target, intent).await;
        assert!(matches!(refused, Err(Refusal::Passive(_))), "{refused:?}");
    }
    assert_eq!(table.wakes(), 0);
    let page = holds.wait(&all_routes, &target, Intent::Navigation);
    let (page, socket) = tokio::join!(page, holds.wait(&all_routes, &target, socket));
    assert_eq!((page, socket, table.wakes()), (Ok(()), Ok(()), 1));
    // By configuration a socket wakes; what nobody asked for never does.
    let limits = Limits { followers_wake: true, ..Limits::default() };
    let (holds, target) = (Holds::new(limits), table.set(id(2), PAUSED));
    let icon = Intent::Background(Background::WellKnown);
    assert!(matches!(holds.wait(&all_routes, &target, icon).await, Err(Refusal::Passive(_))));
    let socket = Intent::Follows(Follower::WebSocket);
    assert_eq!(holds.wait(&all_routes, &target, socket).await, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn failed_wake_is_not_tried_again_at_once() {
    let table = Table::new(Duration::from_millis(10));
    let (holds, target) = (Holds::new(Limits::default()), table.set(id(1), PAUSED));
    let all_routes = routes(&table);
    table.wakes_work.store(false, Ordering::Relaxed);
    for _ in 0..50 {
        let failed = holds.wait(&all_routes, &target, Intent::Request).await;
        assert!(matches!(failed, Err(Refusal::Failed { stage: Stage::Waking, .. })), "{failed:?}");
    }
    assert_eq!(table.wakes(), 1);
    table.wakes_work.store(true, Ordering::Relaxed);
    sleep(Limits::default().rest).await;
    assert_eq!(holds.wait(&all_routes, &target, Intent::Request).await, Ok(()));
    assert_eq!(table.wakes(), 2);
}

#[tokio::test(start_paused = true)]
async fn team_wakes_so_many_sandboxes_a_minute() {
    let table = Table::new(Duration::ZERO);
    let holds = Holds::new(Limits { team_wakes: 6, ..Limits::default() });
    let all_routes = routes(&table);
    for number in 0..6 {
        let target = table.set(id(number), PAUSED);
        assert_eq!(holds.wait(&all_routes, &target, Intent::Request).await, Ok(()));
    }
    let target = table.set(id(7), PAUSED);
    let refused = holds.wait(&all_routes, &target, Intent::Request).await;
    assert_eq!(refused, Err(Refusal::TooManyWakes { again: Duration::from_secs(10) }));
    let other = Target { team: "blue".parse().expect("a team"), ..table.set(id(8), PAUSED) };
    assert_eq!(holds.wait(&all_routes, &other, Intent::Request).await, Ok(()), "another's budget");
    sleep(Duration::from_secs(10)).await;
    assert_eq!(holds.wait(&all_routes, &target, Intent::Request).await, Ok(()));
}

#[tokio::test(start_paused = true)]
async fn held_requests_are_bounded_by_team_and_by_node() {
    let table = Table::new(Duration::from_secs(60));
    let limits = Limits { team_held: 2, node_held: 3, ..Limits::default() };
    let (holds, red) = (Holds::new(limits), table.set(id(1), PAUSED));
    let blue = Target { team: "blue".parse().expect("a team"), ..table.set(id(2), PAUSED) };
    let mut held = JoinSet::new();
    for target in [&red, &red, &blue] {
        let (holds, routes, target) = (holds.clone(), routes(&table), target.clone());
        held.spawn(async move { holds.wait(&routes, &target, Intent::Request).await });
        tokio::task::yield_now().await;
    }
    let all_routes = routes(&table);
    let other_blue = Target { team: "blue".parse().expect("a team"), ..table.set(id(3), PAUSED) };
    for target in [&blue, &other_blue] {
        let refused = holds.wait(&all_routes, target, Intent::Request).await;
        assert_eq!(refused, Err(Refusal::NodeWaits));
    }
    held.abort_all();
    while held.join_next().await.is_some() {}
    let _two: Vec<_> =
        (0..2).map(|_| holds.0.of_teams.begin(red.team.clone(), 2).expect("room")).collect();
    let other_red = table.set(id(4), PAUSED);
    for target in [&red, &other_red] {
        let refused = holds.wait(&all_routes, target, Intent::Request).await;
        assert_eq!(refused, Err(Refusal::TeamWaits));
    }
    let woken = holds.0.state.lock().startups.len();
    assert_eq!(woken, 2, "a request that is refused wakes nothing");
}

#[tokio::test(start_paused = true)]
async fn request_that_looked_before_a_startup_ended_begins_no_other() {
    let table = Table::new(Duration::ZERO);
    let holds = Holds::new(Limits { team_wakes: 1, ..Limits::default() });
    let (all_routes, paused) = (routes(&table), table.set(id(1), PAUSED));
    assert_eq!(holds.wait(&all_routes, &paused, Intent::Request).await, Ok(()));
    for intent in [Intent::Request, Intent::Follows(Follower::WebSocket)] {
        assert_eq!(holds.wait(&all_routes, &paused, intent).await, Ok(()), "it runs by now");
    }
    assert_eq!(table.wakes(), 1);
    assert!(holds.0.state.lock().startups.is_empty());
}

#[tokio::test(start_paused = true)]
async fn request_for_a_booting_sandbox_goes_on_once_it_runs() {
    let table = Table::new(Duration::ZERO);
    let (holds, target) = (Holds::new(Limits::default()), table.set(id(1), State::Booting));
    let all_routes = routes(&table);
    let boots = async {
        sleep(Duration::from_secs(3)).await;
        table.set(id(1), State::Running);
    };
    let begun = Instant::now();
    let (held, ()) = tokio::join!(holds.wait(&all_routes, &target, Intent::Request), boots);
    assert_eq!((held, table.wakes()), (Ok(()), 0));
    assert!(begun.elapsed() < Duration::from_secs(4), "soon after");
    // One that is stopped meanwhile is answered at once, too.
    let target = table.set(id(2), State::Booting);
    let stops = async {
        sleep(Duration::from_secs(1)).await;
        table.set(id(2), State::Stopped);
    };
    let (held, ()) = tokio::join!(holds.wait(&all_routes, &target, Intent::Request), stops);
    assert_eq!(held, Ok(()));
}
