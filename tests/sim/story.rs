//! One story: callers create, stop, start and delete while agents, nodes, links and `pct` fail.
//! Then all is well again, and the world must be right.

use std::{collections::BTreeMap, fmt, time::Duration};

use agent::pve::{
    ErrorKind,
    fake::{Fault, Op, Trouble},
};
use proto::sandbox::v1::{
    CreateSandboxRequest, DeleteSandboxRequest, ExpiryAction, Lifetime, PauseSandboxRequest, Phase,
    ResumeSandboxRequest, StartSandboxRequest, StopSandboxRequest,
    sandbox_service_client::SandboxServiceClient,
};
use tonic::{Request, metadata::MetadataValue};

use crate::{
    chance::Chance,
    check,
    cluster::{Cluster, SNAPSHOT},
};

/// Moves of a story.
const MOVES: u64 = 30;

/// What happened, counted.
#[derive(Debug, Default)]
pub(crate) struct Told {
    pub(crate) created: u64,
    pub(crate) deleted: u64,
    pub(crate) crashes: u64,
    pub(crate) faults: u64,
    pub(crate) unknown: u64,
}

impl Told {
    pub(crate) fn add(&mut self, other: &Told) {
        self.created += other.created;
        self.deleted += other.deleted;
        self.crashes += other.crashes;
        self.faults += other.faults;
        self.unknown += other.unknown;
    }
}

impl fmt::Display for Told {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { created, deleted, crashes, faults, unknown } = self;
        write!(
            f,
            "{created} created, {deleted} deleted, {crashes} crashes, {faults} faults of pct, \
             {unknown} calls without an answer"
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
}

/// Requests of sandboxes that delete themselves begin so.
pub(crate) const MORTAL: &str = "mortal";
/// When they do.
const TTL: Duration = Duration::from_secs(90);

/// The callers' memory, by request_id.
pub(crate) type Memory = BTreeMap<String, Known>;

/// Tells the story of a seed, and checks its end.
pub(crate) async fn tell(seed: u64) -> Told {
    let chance = Chance::new(seed, 1);
    let mut cluster = Cluster::new(seed).await;
    let (mut told, mut memory) = (Told::default(), Memory::new());
    let mut calls = tokio::task::JoinSet::new();
    for step in 0..MOVES {
        match chance.below(100) {
            0..45 => {
                // Now and then the same request again, as a caller does that got no answer.
                let key = match chance.pick(&memory.keys().cloned().collect::<Vec<_>>()) {
                    Some(key) if chance.percent(20) => key.clone(),
                    _ if chance.percent(20) => format!("{MORTAL}{step}"),
                    _ => format!("r{step}"),
                };
                memory.entry(key.clone()).or_default();
                calls.spawn(create(&cluster, key));
            }
            45..65 => {
                let known: Vec<_> = memory
                    .iter()
                    .filter(|(_, k)| k.acked && k.deleted.is_none())
                    .map(|(key, k)| (key.clone(), k.id.clone().expect("an acked one has an id")))
                    .collect();
                if let Some((key, id)) = chance.pick(&known) {
                    let verb = chance.below(6);
                    if verb == 0 {
                        memory.get_mut(key).expect("known").deleted = Some(false);
                    }
                    calls.spawn(change(&cluster, key.clone(), id.clone(), verb));
                }
            }
            65..78 => {
                cluster.pve.inject(fault(&chance));
                told.faults += 1;
            }
            78..86 => {
                let index = usize::try_from(chance.below(3)).expect("an index");
                if chance.percent(30) {
                    cluster.power_cut(index).await;
                } else {
                    cluster.kill_agent(index).await;
                }
                told.crashes += 1;
                pause(&chance, 3000).await;
                cluster.start_agent(index).await;
            }
            86..92 => {
                let index = usize::try_from(chance.below(3)).expect("an index");
                let name = cluster.hosts[index].name.clone();
                cluster.net.set_reachable(&name, false);
                pause(&chance, 20_000).await;
                cluster.net.set_reachable(&name, true);
            }
            92..96 => {
                cluster.restart_controller().await;
                told.crashes += 1;
            }
            _ => {
                cluster.pve.set_quorate(false);
                pause(&chance, 15_000).await;
                cluster.pve.set_quorate(true);
            }
        }
        pause(&chance, 4000).await;
        while let Some(done) = calls.try_join_next() {
            note(&mut told, &mut memory, done.expect("a caller does not panic"));
        }
    }
    cluster.pve.release();
    while let Some(done) = calls.join_next().await {
        note(&mut told, &mut memory, done.expect("a caller does not panic"));
    }
    check::settles(&mut cluster, &memory).await;
    told
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
    let trouble = match chance.below(4) {
        0 => Trouble::Before(failed()),
        1 => Trouble::After(failed()),
        2 => Trouble::Killed,
        _ => Trouble::Hangs,
    };
    Fault { op, node: None, vmid: None, trouble }
}

/// What a call came to.
enum Done {
    Created { key: String, id: String, running: bool },
    Deleted { key: String },
    Changed,
    Refused,
}

fn note(told: &mut Told, memory: &mut Memory, done: Done) {
    match done {
        Done::Created { key, id, running } => {
            let known = memory.get_mut(&key).expect("known");
            // I4: one sandbox per request_id, whatever is asked again. A failed try may be
            // followed by another sandbox; an acked one never is.
            if let Some(before) = known.id.as_ref().filter(|_| known.acked && running) {
                assert_eq!(before, &id, "I4: {key} is two sandboxes");
            }
            told.created += u64::from(running && !known.acked);
            known.acked |= running;
            known.id = Some(id);
        }
        Done::Deleted { key } => {
            told.deleted += 1;
            memory.get_mut(&key).expect("known").deleted = Some(true);
        }
        Done::Changed => {}
        Done::Refused => told.unknown += 1,
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
            Err(_) => Done::Refused,
        }
    }
}

fn change(
    cluster: &Cluster,
    key: String,
    id: String,
    verb: u64,
) -> impl Future<Output = Done> + Send + use<> {
    let (mut api, token) = (Api::new(cluster.channel()), cluster.token.clone());
    async move {
        let done = match verb {
            0 => {
                let answer = api.delete_sandbox(authorised(&token, DeleteSandboxRequest { id }));
                match answer.await {
                    Ok(answer) => {
                        let sandbox = answer.into_inner().sandbox.expect("a sandbox");
                        let gone = sandbox.phase() == Phase::Deleted;
                        return if gone { Done::Deleted { key } } else { Done::Changed };
                    }
                    Err(status) => Err(status),
                }
            }
            3 | 4 => {
                let request = PauseSandboxRequest { id, or_stop: verb == 4 };
                api.pause_sandbox(authorised(&token, request)).await.map(drop)
            }
            5 => {
                api.resume_sandbox(authorised(&token, ResumeSandboxRequest { id })).await.map(drop)
            }
            1 => api.stop_sandbox(authorised(&token, StopSandboxRequest { id })).await.map(drop),
            _ => api.start_sandbox(authorised(&token, StartSandboxRequest { id })).await.map(drop),
        };
        done.map_or(Done::Refused, |()| Done::Changed)
    }
}
