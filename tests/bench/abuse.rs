//! Callers and sandboxes that take all they can get, and what is left for another team beside them:
//! its slowest calls, and the memory of agent and controller.

use std::{future::Future, time::Duration};

use anyhow::{Result, ensure};
use proto::sandbox::v1::{
    ArchiveStart, Argv, DownloadArchiveRequest, ExecCommandRequest, ExecRequest, ExecStart,
    GetSandboxRequest, UploadArchiveRequest, WatchEventsRequest, WatchSandboxesRequest,
    exec_request, exec_start, sandbox_service_client::SandboxServiceClient, upload_archive_request,
};
use tokio::{net::TcpStream, task::JoinSet, time::sleep};
use tokio_stream::{StreamExt as _, iter, pending};
use tonic::transport::Channel;

use crate::{
    figures::Figures,
    world::{World, api_address, ingress_address, timed},
};

/// Calls of the other team, before the abuse and during it.
const CALLS: usize = 200;
/// Connections that say nothing, to the API and to the ingress.
const IDLE: usize = 1000;
/// Connections of callers without a valid token, each with as many calls that never end.
const STRANGERS: usize = 100;
/// Streams of each kind that a team leaves unread.
const STREAMS: usize = 16;
/// Tasks that call without a pause.
const LOOPS: usize = 2;
/// Time for the abuse to be under way.
const WARM_UP: Duration = Duration::from_secs(5);
/// Most memory that the agent and the controller may have used, MiB.
const AGENT_MIB: f64 = 200.0;
const CONTROLLER_MIB: f64 = 400.0;

/// Starts processes until it cannot, floods the way out, and fills the disk.
const INSIDE: &str = "(while :; do sleep 600 & done) 2>/dev/null & \
     (while :; do : >/dev/udp/203.0.113.2/$((RANDOM + 1)); done) 2>/dev/null & \
     (while :; do head -c 64M /dev/zero >/root/full; done) 2>/dev/null & wait";

pub(crate) async fn measure(world: &World, figures: &mut Figures) -> Result<()> {
    let victim = world.other_team()?;
    let (own, bomb) = (world.create("node1").await?, world.create("node1").await?);
    let other = victim.create("node1").await?;
    // The first command makes the way in.
    ensure!(victim.exec_true(&other).await? == 0, "exec true did not exit with 0");

    let quiet = slowest(&victim, &other).await?;
    let mut abuse = JoinSet::new();
    without_a_token(world, &mut abuse)?;
    with_a_token(world, &mut abuse, &own)?;
    detach(world, &bomb, INSIDE).await?;
    sleep(WARM_UP).await;
    let abused = slowest(&victim, &other).await;
    let still = abuse.len();
    let (agent, controller) = (world.agent_peak_mib("node1")?, world.controller_peak_mib()?);
    abuse.shutdown().await;
    let abused = abused?;

    for (name, quiet, abused) in
        [("abuse_exec_p99", quiet.exec, abused.exec), ("abuse_get_p99", quiet.get, abused.get)]
    {
        figures.add(name, abused, "ms", "the same calls before the abuse", quiet);
    }
    figures.add("abuse_agent_peak", agent, "MiB", "most that is allowed", AGENT_MIB);
    figures.add("abuse_controller_peak", controller, "MiB", "most that is allowed", CONTROLLER_MIB);
    #[expect(clippy::cast_precision_loss, reason = "a count of some thousands")]
    figures.alone("abuse_callers", still as f64, "at the end");
    for (team, id) in [(world, &own), (world, &bomb), (&victim, &other)] {
        team.delete(id).await?;
    }
    Ok(())
}

/// Slowest of a hundred calls, in milliseconds.
struct Slowest {
    exec: f64,
    get: f64,
}

async fn slowest(team: &World, id: &str) -> Result<Slowest> {
    let (mut execs, mut gets) = (Vec::new(), Vec::new());
    for _ in 0..CALLS {
        let (took, code) = timed(team.exec_true(id)).await;
        ensure!(code? == 0, "exec true did not exit with 0");
        execs.push(took);
        let (took, sandbox) = timed(team.get(id)).await;
        sandbox?;
        gets.push(took);
    }
    Ok(Slowest { exec: p99(&mut execs), get: p99(&mut gets) })
}

fn p99(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() * 99 / 100]
}

/// Repeats a call without a pause; whether it succeeds does not matter.
async fn repeat<F: Future>(mut call: impl FnMut() -> F) {
    loop {
        drop(call().await);
        tokio::task::yield_now().await;
    }
}

/// Opens, holds and repeats whatever a client without a valid token can.
fn without_a_token(world: &World, abuse: &mut JoinSet<()>) -> Result<()> {
    let silent = |address: String| async move {
        loop {
            if let Ok(connection) = TcpStream::connect(&address).await {
                // Returns when the other side hangs up.
                drop(connection.readable().await);
            }
            sleep(Duration::from_secs(1)).await;
        }
    };
    for address in [api_address(), ingress_address(&world.lab, "node1")?] {
        for _ in 0..IDLE / 2 {
            abuse.spawn(silent(address.clone()));
        }
    }
    for number in 0..STRANGERS {
        let client = world.client()?;
        for _ in 0..STREAMS {
            let api = client.clone();
            abuse.spawn(repeat(move || {
                let mut api = api.clone();
                async move { api.exec(pending::<ExecRequest>()).await.map(drop) }
            }));
        }
        if number < LOOPS {
            abuse.spawn(repeat(move || {
                let mut api = client.clone();
                async move { api.get_sandbox(GetSandboxRequest { id: "x".into() }).await.map(drop) }
            }));
        }
    }
    Ok(())
}

/// Lets one team leave streams unread and unwritten in every direction, and call without a pause.
fn with_a_token(world: &World, abuse: &mut JoinSet<()>, id: &str) -> Result<()> {
    let shell = |script: &str| ExecRequest {
        message: Some(exec_request::Message::Start(ExecStart {
            id: id.into(),
            command: Some(exec_start::Command::Shell(script.into())),
            ..ExecStart::default()
        })),
    };
    let stdin =
        |_| ExecRequest { message: Some(exec_request::Message::Stdin(vec![0; 64 * 1024].into())) };
    let bulk = |_| UploadArchiveRequest {
        message: Some(upload_archive_request::Message::Data(vec![0; 64 * 1024].into())),
    };
    for _ in 0..STREAMS {
        // Output that nobody reads, and input that no program reads.
        let yes = world.authorised(iter([shell("yes")]).chain(pending()))?;
        hold(abuse, world.client()?, |mut api| async move { api.exec(yes).await });
        let deaf = iter([shell("sleep 600")]).chain(iter(0..u32::MAX).map(stdin));
        let deaf = world.authorised(deaf)?;
        hold(abuse, world.client()?, |mut api| async move { api.exec(deaf).await });
        // Uploads that stop, and one that is no archive; downloads that nobody reads.
        let start = UploadArchiveRequest {
            message: Some(upload_archive_request::Message::Start(ArchiveStart {
                id: id.into(),
                path: "/root".into(),
                ..ArchiveStart::default()
            })),
        };
        let stops = world.authorised(iter([start.clone()]).chain(pending()))?;
        hold(abuse, world.client()?, |mut api| async move { api.upload_archive(stops).await });
        let endless = world.authorised(iter([start]).chain(iter(0..u32::MAX).map(bulk)))?;
        hold(abuse, world.client()?, |mut api| async move { api.upload_archive(endless).await });
        let path = "/usr".to_owned();
        let usr = DownloadArchiveRequest { id: id.into(), path, user: String::new() };
        let usr = world.authorised(usr)?;
        hold(abuse, world.client()?, |mut api| async move { api.download_archive(usr).await });
        let watch = world.authorised(WatchSandboxesRequest::default())?;
        hold(abuse, world.client()?, |mut api| async move { api.watch_sandboxes(watch).await });
        let events = WatchEventsRequest { follow: true, ..WatchEventsRequest::default() };
        let events = world.authorised(events)?;
        hold(abuse, world.client()?, |mut api| async move { api.watch_events(events).await });
    }
    for _ in 0..LOOPS {
        let list = world.clone();
        abuse.spawn(async move { repeat(|| list.count("node1")).await });
        let (world, id) = (world.clone(), id.to_owned());
        abuse.spawn(async move { repeat(|| world.exec_true(&id)).await });
    }
    Ok(())
}

/// Begins a call on a connection of its own and holds what comes back, unread.
fn hold<T, F>(
    abuse: &mut JoinSet<()>,
    api: SandboxServiceClient<Channel>,
    call: impl FnOnce(SandboxServiceClient<Channel>) -> F,
) where
    T: Send + 'static,
    F: Future<Output = Result<tonic::Response<T>, tonic::Status>> + Send + 'static,
{
    let call = call(api);
    abuse.spawn(async move {
        let _held = call.await;
        std::future::pending::<()>().await;
    });
}

/// Starts a command that goes on without a caller.
async fn detach(world: &World, id: &str, script: &str) -> Result<()> {
    let start = ExecStart {
        id: id.into(),
        command: Some(exec_start::Command::Argv(Argv {
            args: ["bash", "-c", script].map(str::to_owned).into(),
        })),
        exec_id: "abuse".into(),
        detached: true,
        ..ExecStart::default()
    };
    let request = ExecCommandRequest { start: Some(start), ..ExecCommandRequest::default() };
    world.client()?.exec_command(world.authorised(request)?).await?;
    Ok(())
}
