use proptest::prelude::*;
use proto::agent::v1::SandboxExecs;
use tokio::time::advance;

use super::*;

const SECOND: Duration = Duration::from_secs(1);

fn node() -> NodeName {
    "n1".parse().expect("node")
}

fn id(n: u8) -> SandboxId {
    SandboxId::new(1, &[n; 10])
}

fn team(n: u8) -> Team {
    if n.is_multiple_of(2) { "red" } else { "blue" }.parse().expect("team")
}

/// Place in a sandbox, whose number says its team.
fn place(n: u8, exec_id: &str) -> Place {
    let exec_id = (!exec_id.is_empty()).then(|| exec_id.to_owned());
    Place { node: node(), team: team(n), sandbox: id(n), exec_id }
}

fn told(n: u8, kept_bytes: u64, running: &[&str]) -> SandboxExecs {
    let running = running.iter().map(ToString::to_string).collect();
    SandboxExecs { id: id(n).to_string(), kept_bytes, running }
}

fn report(commands: &Commands, sandboxes: Vec<SandboxExecs>) {
    commands.report(&node(), WatchExecs { sandboxes, more: false }, lives);
}

fn lives(wanted: &SandboxId) -> Option<Team> {
    (0..9).find(|n| id(*n) == *wanted).map(team)
}

fn running(commands: &Commands, n: u8) -> u64 {
    commands.of_team(&team(n)).running
}

#[tokio::test(start_paused = true)]
async fn command_counts_until_its_end() {
    let commands = Arc::new(Commands::default());
    let (one, other) = (commands.begin(place(0, "")), commands.begin(place(0, "a")));
    let again = commands.join(&place(0, "a")).expect("it runs");
    assert_eq!((running(&commands, 0), running(&commands, 1)), (2, 0));
    one.end(End::NeverRan);
    again.end(End::MayRun);
    assert_eq!(running(&commands, 0), 1);
    other.end(End::Ended(true));
    assert_eq!(running(&commands, 0), 0);
    // Its name is known, and does not count any more.
    let replay = commands.join(&place(0, "a")).expect("it has run");
    assert_eq!(running(&commands, 0), 0);
    drop(replay);
    assert!(commands.join(&place(0, "b")).is_none());
    assert!(commands.join(&place(2, "a")).is_none(), "of another sandbox");
    commands.begin(place(0, "free")).end(End::Ended(false));
    assert!(commands.join(&place(0, "free")).is_none(), "the name may run again");
}

#[tokio::test(start_paused = true)]
async fn command_without_a_caller_counts_until_its_node_reports_its_end() {
    let commands = Arc::new(Commands::default());
    commands.connected(&node());
    report(&commands, vec![]);
    drop(commands.begin(place(0, "a")));
    commands.begin(place(0, "b")).end(End::Ended(true));
    // A report that is behind neither ends what has just begun nor brings back what has ended.
    report(&commands, vec![told(0, 5, &["b"])]);
    assert_eq!(commands.of_team(&team(0)), CommandUse { running: 1, kept_bytes: 5 });
    advance(BEHIND).await;
    report(&commands, vec![told(0, 7, &["a"])]);
    assert_eq!(commands.of_team(&team(0)), CommandUse { running: 1, kept_bytes: 7 });
    report(&commands, vec![]);
    assert_eq!(commands.of_team(&team(0)), CommandUse::default());
    // One from before our start, and one with a caller, whom no report overrides.
    let held = commands.begin(place(1, "c"));
    report(&commands, vec![told(0, 0, &["old"])]);
    advance(BEHIND).await;
    report(&commands, vec![told(0, 0, &["old"])]);
    assert_eq!((running(&commands, 0), running(&commands, 1)), (1, 1));
    assert!(commands.join(&place(0, "old")).is_some(), "its name is known");
    drop(held);
    commands.forget(&node());
    assert_eq!((running(&commands, 0), running(&commands, 1)), (0, 0));
    assert_eq!(commands.miscounted(), []);
}

#[tokio::test(start_paused = true)]
async fn report_in_parts_counts_when_it_is_whole() {
    let commands = Arc::new(Commands::default());
    let of = |_: &SandboxId| Some(team(0));
    let part = |sandboxes, more| commands.report(&node(), WatchExecs { sandboxes, more }, of);
    part(vec![told(0, 1, &[])], true);
    assert_eq!(commands.of_team(&team(0)).kept_bytes, 0);
    part(vec![told(2, 2, &["x"])], false);
    assert_eq!(commands.of_team(&team(0)), CommandUse { running: 1, kept_bytes: 3 });
    // What has ended by now does not count, whatever the node still tells.
    commands.report(&node(), WatchExecs::default(), |_| None);
    advance(BEHIND).await;
    commands.report(
        &node(),
        WatchExecs { sandboxes: vec![told(2, 2, &["x"])], more: false },
        |_| None,
    );
    assert_eq!(commands.of_team(&team(0)), CommandUse::default());
}

#[tokio::test(start_paused = true)]
async fn agent_that_does_not_report_counts_for_its_callers_only() {
    let commands = Arc::new(Commands::default());
    commands.connected(&node());
    report(&commands, vec![told(0, 9, &["a"])]);
    let held = commands.begin(place(0, "b"));
    // An older version of the agent was installed.
    commands.connected(&node());
    commands.beat(&node(), lives);
    assert_eq!(running(&commands, 0), 2, "it may still report");
    advance(SILENT).await;
    commands.beat(&node(), lives);
    assert_eq!(commands.of_team(&team(0)), CommandUse { running: 1, kept_bytes: 0 });
    drop(held);
    assert_eq!(running(&commands, 0), 0);
}

#[tokio::test(start_paused = true)]
async fn names_of_ended_sandboxes_are_forgotten_also_on_a_node_that_does_not_report() {
    let commands = Arc::new(Commands::default());
    commands.connected(&node());
    for n in [0, 2] {
        commands.begin(place(n, "a")).end(End::Ended(true));
    }
    advance(SILENT).await;
    commands.beat(&node(), |wanted| lives(wanted).filter(|_| *wanted == id(0)));
    assert!(commands.join(&place(0, "a")).is_some(), "it is still there");
    assert!(commands.join(&place(2, "a")).is_none(), "it has ended");
    commands.beat(&node(), |_| None);
    assert!(commands.index.lock().sandboxes_of(&node()).is_empty(), "nothing is left");
}

#[tokio::test(start_paused = true)]
async fn node_that_is_away_for_long_does_not_count_until_it_is_back() {
    let commands = Arc::new(Commands::default());
    commands.connected(&node());
    report(&commands, vec![told(0, 9, &["a"]), told(1, 5, &[])]);
    let attached = commands.begin(place(0, "b"));
    assert_eq!(commands.of_team(&team(0)), CommandUse { running: 2, kept_bytes: 9 });
    commands.away(&node());
    commands.away(&node());
    assert_eq!(commands.of_team(&team(0)), CommandUse { running: 1, kept_bytes: 0 });
    assert_eq!(commands.of_team(&team(1)), CommandUse::default());
    assert_eq!(commands.miscounted(), []);
    assert!(commands.join(&place(0, "a")).is_some(), "its name is known");
    drop(attached);
    assert_eq!(running(&commands, 0), 0);
    // All of it may still run.
    commands.connected(&node());
    assert_eq!(commands.of_team(&team(0)), CommandUse { running: 2, kept_bytes: 9 });
    assert_eq!(commands.of_team(&team(1)), CommandUse { running: 0, kept_bytes: 5 });
    advance(BEHIND).await;
    report(&commands, vec![told(0, 4, &["a"])]);
    assert_eq!(commands.of_team(&team(0)), CommandUse { running: 1, kept_bytes: 4 });
    assert_eq!(commands.of_team(&team(1)), CommandUse::default());
    commands.away(&node());
    commands.forget(&node());
    assert_eq!(commands.of_team(&team(0)), CommandUse::default());
    assert_eq!(commands.miscounted(), []);
}

#[derive(Debug, Clone)]
enum Step {
    Begin(u8, u8),
    Drop(usize),
    End(usize, bool),
    Refuse(usize),
    Report(Vec<(u8, u64, Vec<u8>)>),
    Wait(u8),
    Connect,
    Away,
    Forget,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let one = prop_oneof![
        4 => (0_u8..4, 0_u8..4).prop_map(|(n, name)| Step::Begin(n, name)),
        2 => any::<usize>().prop_map(Step::Drop),
        2 => (any::<usize>(), any::<bool>()).prop_map(|(n, good)| Step::End(n, good)),
        1 => any::<usize>().prop_map(Step::Refuse),
        2 => prop::collection::vec((0_u8..4, 0_u64..9, prop::collection::vec(0_u8..4, 0..3)), 0..4)
            .prop_map(Step::Report),
        2 => (1_u8..20).prop_map(Step::Wait),
        1 => Just(Step::Connect),
        1 => Just(Step::Away),
        1 => Just(Step::Forget),
    ];
    prop::collection::vec(one, 0..60)
}

proptest! {
    #[test]
    fn sums_equal_a_recount_after_any_sequence(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime");
        runtime.block_on(async {
            let (commands, mut held) = (Arc::new(Commands::default()), Vec::new());
            let name = |n: u8| if n == 0 { String::new() } else { format!("e{n}") };
            for step in steps {
                let taken = |held: &mut Vec<Running>, n: usize| {
                    (!held.is_empty()).then(|| held.swap_remove(n % held.len()))
                };
                match step {
                    Step::Begin(n, exec) => {
                        let place = place(n, &name(exec));
                        let joined = commands.join(&place);
                        held.push(joined.unwrap_or_else(|| commands.begin(place)));
                    }
                    Step::Drop(n) => drop(taken(&mut held, n)),
                    Step::End(n, good) => {
                        taken(&mut held, n).into_iter().for_each(|one| one.end(End::Ended(good)));
                    }
                    Step::Refuse(n) => {
                        taken(&mut held, n).into_iter().for_each(|one| one.end(End::NeverRan));
                    }
                    Step::Report(all) => {
                        let sandboxes = all.into_iter().map(|(n, kept, names)| {
                            let names: Vec<_> = names.into_iter().map(|n| name(n + 1)).collect();
                            told(n, kept, &names.iter().map(String::as_str).collect::<Vec<_>>())
                        });
                        report(&commands, sandboxes.collect());
                    }
                    Step::Wait(seconds) => {
                        advance(SECOND * seconds.into()).await;
                        commands.beat(&node(), lives);
                    }
                    Step::Connect => commands.connected(&node()),
                    Step::Away => commands.away(&node()),
                    Step::Forget => commands.forget(&node()),
                }
                assert_eq!(commands.miscounted(), []);
            }
            // Without callers, a report that is not behind is all there is.
            held.clear();
            commands.connected(&node());
            advance(BEHIND).await;
            report(&commands, vec![]);
            assert_eq!((running(&commands, 0), running(&commands, 1)), (0, 0));
        });
    }
}
