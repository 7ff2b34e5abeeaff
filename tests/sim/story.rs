//! One story: callers create, stop, start and delete while agents, nodes, links and `pct` fail.
//! Then all is well again, and the world must be right.

use std::{collections::BTreeMap, fmt, time::Duration};

use agent::pve::{
    ErrorKind,
    fake::{Fault, Op, Trouble},
};
use proto::sandbox::v1::{
    CreateSandboxRequest, DeleteSandboxRequest, ExecCommandRequest, ExecStart, ExpiryAction,
    Lifetime, PauseSandboxRequest, Phase, ResumeSandboxRequest, StartSandboxRequest,
    StopSandboxRequest, exec_start, sandbox_service_client::SandboxServiceClient,
};
use tonic::{Request, metadata::MetadataValue};

use crate::{
    Broken, Mutant,
    chance::Chance,
    check,
    cluster::{Cluster, SNAPSHOT},
    operator::{self, Seen},
};

/// Moves of a story.
const MOVES: u64 = 30;

/// What a caller does to a sandbox.
const VERBS: [Verb; 9] = [
    Verb::Delete,
    Verb::Delete,
    Verb::Pause,
    Verb::Stop,
    Verb::Start,
    Verb::Pause,
    Verb::PauseOrStop,
    Verb::Resume,
    Verb::Exec,
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verb {
    Delete,
    Stop,
    Start,
    Pause,
    PauseOrStop,
    Resume,
    Exec,
}

/// What happened, counted.
#[derive(Debug, Default)]
pub struct Told {
    created: u64,
    deleted: u64,
    crashes: u64,
    faults: u64,
    /// What an operator did beside us.
    meddled: u64,
    unknown: u64,
}

impl Told {
    /// Everything that can happen did.
    pub fn is_busy(&self) -> bool {
        let Self { created, deleted, crashes, faults, meddled, .. } = self;
        [created, deleted, crashes, faults, meddled].into_iter().all(|count| *count > 0)
    }

    /// Both together.
    pub fn add(&mut self, other: &Told) {
        self.created += other.created;
        self.deleted += other.deleted;
        self.crashes += other.crashes;
        self.faults += other.faults;
        self.meddled += other.meddled;
        self.unknown += other.unknown;
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { created, deleted, crashes, faults, meddled, unknown } = self;
        write!(
            f,
            "{created} created, {deleted} deleted, {crashes} crashes, {faults} faults of pct, \
             {meddled} times an operator, {unknown} calls without an answer"
        )
    }
}

/// What the caller knows of one request_id.
#[derive(Debug, Default, Clone)]
pub(crate) struct Known {
    /// The sandbox that an answer named.
    pub(crate) id: Option<String>,
    /// An answer said that it runs.
    pub(crate) acked: bool,
    /// A deletion was asked for; whether it was answered.
    pub(crate) deleted: Option<bool>,
    /// An answer said that it is paused, and nobody has asked for anything since.
    paused: bool,
    /// Calls under way.
    calls: u64,
    /// A call had no answer: it may be carried out at any time.
    murky: bool,
}

impl Known {
    /// It is paused, and nothing can have happened to it.
    pub(crate) fn is_paused(&self) -> bool {
        self.paused && !self.murky && self.deleted.is_none()
    }

    fn asked(&mut self, verb: Verb) {
        self.calls += 1;
        self.paused = false;
        if verb == Verb::Delete {
            self.deleted = Some(false);
        }
    }
}

/// Requests of sandboxes that delete themselves begin so.
pub(crate) const MORTAL: &str = "mortal";
/// When they do.
const TTL: Duration = Duration::from_secs(90);

/// The callers' memory, by request_id.
pub(crate) type Memory = BTreeMap<String, Known>;

/// Tells the story of a seed, and checks its end.
pub(crate) async fn tell(seed: u64, mutant: Option<&Mutant>) -> Result<Told, Broken> {
    let chance = Chance::new(seed, 1);
    let mut cluster = Cluster::new(seed, mutant).await;
    let (mut told, mut memory, mut seen) = (Told::default(), Memory::new(), Seen::default());
    let mut calls = tokio::task::JoinSet::new();
    for step in 0..MOVES {
        match chance.below(100) {
            0..43 => {
                // Now and then the same request again, as a caller does that got no answer.
                let key = match chance.pick(&memory.keys().cloned().collect::<Vec<_>>()) {
                    Some(key) if chance.percent(20) => key.clone(),
                    _ if chance.percent(20) => format!("{MORTAL}{step}"),
                    _ => format!("r{step}"),
                };
                memory.entry(key.clone()).or_default().calls += 1;
                calls.spawn(create(&cluster, key));
            }
            43..63 => {
                if let Some((key, id)) = chance.pick(&acked(&memory)) {
                    let verb = *chance.pick(&VERBS).expect("there are some");
                    memory.get_mut(key).expect("known").asked(verb);
                    calls.spawn(change(&cluster, key.clone(), id.clone(), verb));
                }
            }
            63..74 => {
                cluster.pve.inject(fault(&chance));
                told.faults += 1;
            }
            74..82 => {
                let index = usize::try_from(chance.below(3)).expect("an index");
                if chance.percent(30) {
                    // What was answered before it is known before it.
                    drain(&mut calls, &mut told, &mut memory);
                    cluster.power_cut(index).await;
                    memory.values_mut().for_each(|known| known.paused = false);
                    seen.bring_back(&cluster, index, &chance).await;
                } else {
                    cluster.kill_agent(index).await;
                }
                told.crashes += 1;
                pause(&chance, 3000).await;
                cluster.start_agent(index).await;
            }
            82..88 => {
                let index = usize::try_from(chance.below(3)).expect("an index");
                let name = cluster.hosts[index].name.clone();
                cluster.net.set_reachable(&name, false);
                // Now and then for longer than a creation waits for its node.
                let cut_ms = if chance.percent(25) { 120_000 } else { 20_000 };
                pause(&chance, cut_ms).await;
                cluster.net.set_reachable(&name, true);
            }
            88..91 => {
                cluster.restart_controller().await;
                told.crashes += 1;
            }
            91..94 => {
                // Somebody takes the number that a creation was given, or the next.
                if let Some((node, vmid)) = operator::coveted(&cluster, &chance).await {
                    let index = cluster.hosts.iter().position(|host| host.name == node);
                    cluster.add_somebodys(index.expect("a host"), vmid, None);
                    told.meddled += 1;
                }
            }
            94..97 => {
                if let Some((key, id)) = chance.pick(&acked(&memory)) {
                    let verbs = [Verb::Delete, Verb::Start, Verb::Exec];
                    let verb = *chance.pick(&verbs).expect("there are some");
                    let call = change(&cluster, key.clone(), id.clone(), verb);
                    if let Some(record) = operator::quiet(&cluster, id).await
                        && let Some(was) = cluster.take_out(record.vmid)
                    {
                        memory.get_mut(key).expect("known").asked(verb);
                        calls.spawn(call);
                        told.meddled += 1;
                        pause(&chance, 15_000).await;
                        cluster.look().await;
                        cluster.put_back(record.vmid, was).await;
                    }
                }
            }
            _ => {
                cluster.pve.set_quorate(false);
                pause(&chance, 15_000).await;
                cluster.pve.set_quorate(true);
            }
        }
        pause(&chance, 4000).await;
        seen.look(&cluster);
        cluster.look().await;
        if !cluster.watch.seen().is_empty() {
            return Err(Broken(cluster.watch.seen()));
        }
        drain(&mut calls, &mut told, &mut memory);
    }
    cluster.pve.release();
    while let Some(done) = calls.join_next().await {
        note(&mut told, &mut memory, done.expect("a caller does not panic"));
    }
    check::settles(&mut cluster, &memory).await.map_err(Broken)?;
    Ok(told)
}

/// Sandboxes that their callers know to have come up, and have not deleted.
fn acked(memory: &Memory) -> Vec<(String, String)> {
    let known = memory.iter().filter(|(_, k)| k.acked && k.deleted.is_none());
    known.filter_map(|(key, k)| Some((key.clone(), k.id.clone()?))).collect()
}

async fn pause(chance: &Chance, ms_max: u64) {
    tokio::time::sleep(Duration::from_millis(chance.below(ms_max))).await;
}

fn fault(chance: &Chance) -> Fault {
    let op = *chance
        .pick(&[
            Op::Clone,
            Op::Set,
            Op::Start,
            Op::Stop,
            Op::Destroy,
            Op::Hold,
            Op::Release,
            Op::Freeze,
            Op::Thaw,
        ])
        .expect("there are some");
    let failed = || ErrorKind::Failed("simulated".into());
    let trouble = match chance.below(6) {
        0 => Trouble::Before(failed()),
        1 => Trouble::After(failed()),
        2 => Trouble::Killed,
        3 => Trouble::KilledAtOnce,
        4 => Trouble::RolledBack,
        _ => Trouble::Hangs,
    };
    Fault { op, node: None, vmid: None, trouble }
}

/// What a call came to.
enum Done {
    Created { key: String, id: String, running: bool },
    Deleted { key: String },
    Paused { key: String },
    Changed { key: String },
    Refused { key: String },
}

impl Done {
    fn key(&self) -> &str {
        match self {
            Self::Created { key, .. }
            | Self::Deleted { key }
            | Self::Paused { key }
            | Self::Changed { key }
            | Self::Refused { key } => key,
        }
    }
}

fn drain(calls: &mut tokio::task::JoinSet<Done>, told: &mut Told, memory: &mut Memory) {
    while let Some(done) = calls.try_join_next() {
        note(told, memory, done.expect("a caller does not panic"));
    }
}

fn note(told: &mut Told, memory: &mut Memory, done: Done) {
    let known = memory.get_mut(done.key()).expect("known");
    known.calls -= 1;
    match done {
        Done::Created { key, id, running } => {
            // I4: one sandbox per request_id, whatever is asked again. A failed try may be
            // followed by another sandbox; an acked one never is.
            if let Some(before) = known.id.as_ref().filter(|_| known.acked && running) {
                assert_eq!(before, &id, "I4: {key} is two sandboxes");
            }
            told.created += u64::from(running && !known.acked);
            known.acked |= running;
            known.id = Some(id);
        }
        Done::Deleted { .. } => {
            told.deleted += 1;
            known.deleted = Some(true);
        }
        // What else is under way may undo it.
        Done::Paused { .. } => known.paused = known.calls == 0,
        Done::Changed { .. } => {}
        Done::Refused { .. } => {
            known.murky = true;
            told.unknown += 1;
        }
    }
}

type Api = SandboxServiceClient<tonic::transport::Channel>;

fn authorised<T>(token: &str, message: T) -> Request<T> {
    let mut request = Request::new(message);
    let value = MetadataValue::try_from(format!("Bearer {token}")).expect("ascii");
    request.metadata_mut().insert("authorization", value);
    request.set_timeout(Duration::from_secs(60));
    request
}

fn create(cluster: &Cluster, key: String) -> impl Future<Output = Done> + Send + use<> {
    let (mut api, token) = (Api::new(cluster.channel()), cluster.token.clone());
    async move {
        let message = CreateSandboxRequest {
            request_id: key.clone(),
            snapshot_id: SNAPSHOT.into(),
            lifetime: key.starts_with(MORTAL).then(|| Lifetime {
                ttl: prost_types::Duration::try_from(TTL).ok(),
                ttl_action: ExpiryAction::Delete.into(),
                ..Lifetime::default()
            }),
            ..CreateSandboxRequest::default()
        };
        match api.create_sandbox(authorised(&token, message)).await {
            Ok(answer) => {
                let sandbox = answer.into_inner().sandbox.expect("a sandbox");
                let running = sandbox.phase() == Phase::Running;
                Done::Created { key, id: sandbox.id, running }
            }
            Err(_) => Done::Refused { key },
        }
    }
}

fn change(
    cluster: &Cluster,
    key: String,
    id: String,
    verb: Verb,
) -> impl Future<Output = Done> + Send + use<> {
    let (mut api, token) = (Api::new(cluster.channel()), cluster.token.clone());
    async move {
        let done = match verb {
            Verb::Delete => {
                let answer = api.delete_sandbox(authorised(&token, DeleteSandboxRequest { id }));
                match answer.await {
                    Ok(answer) => {
                        let sandbox = answer.into_inner().sandbox.expect("a sandbox");
                        let gone = sandbox.phase() == Phase::Deleted;
                        return if gone { Done::Deleted { key } } else { Done::Changed { key } };
                    }
                    Err(status) => Err(status),
                }
            }
            Verb::Pause | Verb::PauseOrStop => {
                let or_stop = verb == Verb::PauseOrStop;
                let request = PauseSandboxRequest { id, or_stop };
                match api.pause_sandbox(authorised(&token, request)).await {
                    Ok(answer) => {
                        let sandbox = answer.into_inner().sandbox.expect("a sandbox");
                        let paused = sandbox.phase() == Phase::Paused;
                        return if paused { Done::Paused { key } } else { Done::Changed { key } };
                    }
                    Err(status) => Err(status),
                }
            }
            Verb::Resume => {
                api.resume_sandbox(authorised(&token, ResumeSandboxRequest { id })).await.map(drop)
            }
            Verb::Stop => {
                api.stop_sandbox(authorised(&token, StopSandboxRequest { id })).await.map(drop)
            }
            Verb::Start => {
                api.start_sandbox(authorised(&token, StartSandboxRequest { id })).await.map(drop)
            }
            // There is nobody in there: only the way to the door is of interest.
            Verb::Exec => {
                let command = exec_start::Command::Shell("true".into());
                let start = ExecStart { id, command: Some(command), ..ExecStart::default() };
                let request = ExecCommandRequest { start: Some(start), ..Default::default() };
                api.exec_command(authorised(&token, request)).await.map(drop)
            }
        };
        if done.is_ok() { Done::Changed { key } } else { Done::Refused { key } }
    }
}
