//! Callers and sandboxes that take all they can get, and what is left for another team beside them:
//! its slowest calls, and the memory of agent and controller. Bounds that are missed are counted and told.

use std::{future::Future, time::Duration};

use anyhow::{Result, ensure};
use lab::layout::HUB_IP;
use proto::sandbox::v1::{
    ArchiveStart, Argv, DownloadArchiveRequest, ExecCommandRequest, ExecCommandResponse,
    ExecRequest, ExecStart, ExposeHttpServiceRequest, ForwardOpen, ForwardRequest, ForwardTcp,
    GetSandboxRequest, ReadFileRequest, UploadArchiveRequest, Visibility, WatchEventsRequest,
    WatchSandboxesRequest, exec_request, exec_start, forward_open, forward_request,
    sandbox_service_client::SandboxServiceClient, upload_archive_request,
};
use tokio::{io::AsyncWriteExt as _, net::TcpStream, task::JoinSet, time::sleep};
use tokio_stream::{StreamExt as _, iter, pending};
use tonic::transport::Channel;

use crate::{
    busy::Busy,
    figures::{Figures, median},
    world::{World, api_address, ingress_address, timed},
};

/// Calls of the other team, before the abuse and during it: enough that the slowest hundredth is no single accident.
const CALLS: usize = 1000;
/// Measurements of the same thing, of which the middle one counts: on a small machine two of them differ up to threefold.
const ROUNDS: usize = 3;
/// Connections that say nothing, or not all that they should, to the API, to the ingress and to the SSH server.
const IDLE: usize = 1500;
/// Web requests to a server that never answers.
const HELD: usize = 200;
/// Port of that server in its sandbox.
const DEAF_PORT: u32 = 9000;
/// Connections of callers without a valid token, each with as many calls that never end.
const STRANGERS: usize = 100;
/// Streams of each kind that a team leaves unread.
const STREAMS: usize = 16;
/// Tasks that call without a pause.
const LOOPS: usize = 2;
/// Time after which the abuse has reached its full extent.
const WARM_UP: Duration = Duration::from_secs(5);
/// Most memory that the agent and the controller may have used, MiB.
const AGENT_MIB: f64 = 200.0;
const CONTROLLER_MIB: f64 = 400.0;
/// Most that the other team's slowest calls may take, over what they take without the abuse.
const SLOWER: f64 = 2.0;
/// File that is read: large, and without a byte on the disk.
const SPARSE: &str = "/root/sparse";

/// Takes connections, as long as the kernel does, and never reads or answers.
const DEAF: &str = "python3 -c 'import socket, time
server = socket.create_server((\"0.0.0.0\", 9000), backlog=4096)
time.sleep(3600)'";

/// Waits until that server listens.
const LISTENS: &str = "for _ in $(seq 100); do : >/dev/tcp/127.0.0.1/9000 && exit 0; sleep 0.1; done 2>/dev/null; exit 1";

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

    let quiet = slowest(&other).await?;
    // How far apart two measurements of the same thing are.
    let again = slowest(&other).await?;
    // What anything that computes does to them, without a caller or a sandbox.
    let busy = Busy::start()?;
    let beside_work = slowest(&other).await;
    drop(busy);
    let beside_work = beside_work?;
    let mut abuse = JoinSet::new();
    yield_cpus(true)?;
    detach(world, &own, DEAF).await?;
    let listens = exec(world, &own, LISTENS, false).await?;
    ensure!(listens.exit.is_some_and(|exit| exit.code == 0), "nothing listens on {DEAF_PORT}");
    let sparse = exec(world, &own, &format!("truncate -s 4G {SPARSE}"), false).await?;
    ensure!(sparse.exit.is_some_and(|exit| exit.code == 0), "no {SPARSE}");
    without_a_token(world, &mut abuse)?;
    with_a_token(world, &mut abuse, &own)?;
    on_the_web(world, &mut abuse, &own).await?;
    sleep(WARM_UP).await;
    let called = slowest(&other).await?;
    detach(world, &bomb, INSIDE).await?;
    sleep(WARM_UP).await;
    let abused = slowest(&other).await;
    let still = abuse.len();
    let (agent, controller) = (world.agent_peak_mib("node1")?, world.controller_peak_mib()?);
    abuse.shutdown().await;
    yield_cpus(false)?;
    let abused = abused?;

    for (name, quiet, abused) in [
        ("abuse_none_exec_p99", quiet.exec, again.exec),
        ("abuse_none_get_p99", quiet.get, again.get),
        ("abuse_none_but_busy_exec_p99", quiet.exec, beside_work.exec),
        ("abuse_none_but_busy_get_p99", quiet.get, beside_work.get),
        ("abuse_by_callers_exec_p99", quiet.exec, called.exec),
        ("abuse_by_callers_get_p99", quiet.get, called.get),
        ("abuse_exec_p99", quiet.exec, abused.exec),
        ("abuse_get_p99", quiet.get, abused.get),
    ] {
        figures.add(name, abused, "ms", "the same calls before the abuse", quiet);
    }
    figures.add("abuse_agent_peak", agent, "MiB", "most that is allowed", AGENT_MIB);
    figures.add("abuse_controller_peak", controller, "MiB", "most that is allowed", CONTROLLER_MIB);
    #[expect(clippy::cast_precision_loss, reason = "a count of some thousands")]
    figures.alone("abuse_callers", still as f64, "at the end");
    for (team, id) in [(world, &own), (world, &bomb), (&victim, &other)] {
        team.delete(id).await?;
    }
    let bounds = [
        ("another team's exec, ms", abused.exec, SLOWER * quiet.exec),
        ("another team's get, ms", abused.get, SLOWER * quiet.get),
        ("memory of the agent, MiB", agent, AGENT_MIB),
        ("memory of the controller, MiB", controller, CONTROLLER_MIB),
    ];
    figures.bounds("abuse", &bounds);
    Ok(())
}

/// 99th percentiles of calls, in milliseconds.
struct Slowest {
    exec: f64,
    get: f64,
}

/// Measures several times, and returns the middle of each figure.
async fn slowest(id: &str) -> Result<Slowest> {
    let (mut execs, mut gets) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let Slowest { exec, get } = round(id).await?;
        execs.push(exec);
        gets.push(get);
    }
    Ok(Slowest { exec: median(&mut execs), get: median(&mut gets) })
}

/// Measures on a thread of its own, which does not wait for the callers of the abuse in this process.
async fn round(id: &str) -> Result<Slowest> {
    let id = id.to_owned();
    let measured = move || {
        schedule("--fifo", "1", &nix::unistd::gettid().to_string())?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        // The connection too: the runtime in which it begins also moves its bytes.
        runtime.block_on(async { slowest_here(&World::open()?.other_team()?, &id).await })
    };
    tokio::task::spawn_blocking(measured).await?
}

/// Has all threads of this process take what others leave of the CPUs, or their share again. Callers are on
/// machines of their own: here, they are not to take the time of what they call. A low priority is not enough:
/// a thread with one still runs to the end of its slice while what it called waits.
fn yield_cpus(yielding: bool) -> Result<()> {
    let threads = std::fs::read_dir("/proc/self/task")?;
    let policy = if yielding { "--idle" } else { "--other" };
    for thread in threads {
        let thread = thread?;
        let set = schedule(policy, "0", &thread.file_name().to_string_lossy());
        // One that has ended meanwhile needs no policy.
        ensure!(set.is_ok() || !thread.path().exists(), "{set:?}");
    }
    Ok(())
}

#[expect(clippy::disallowed_methods, reason = "a bench starts programs itself")]
fn schedule(policy: &str, priority: &str, thread: &str) -> Result<()> {
    let mut chrt = std::process::Command::new("chrt");
    let status = chrt.args([policy, "--pid", priority, thread]).output()?.status;
    ensure!(status.success(), "chrt failed: {status}");
    Ok(())
}

async fn slowest_here(team: &World, id: &str) -> Result<Slowest> {
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

/// Connects, says that and nothing more, and stays until the other side hangs up; again and again.
async fn stay(address: String, text: String) {
    loop {
        if let Ok(mut connection) = TcpStream::connect(&address).await
            && connection.write_all(text.as_bytes()).await.is_ok()
        {
            drop(tokio::io::copy(&mut connection, &mut tokio::io::sink()).await);
        }
        sleep(Duration::from_secs(1)).await;
    }
}

/// Sends web requests to a server in a sandbox that never answers.
async fn on_the_web(world: &World, abuse: &mut JoinSet<()>, id: &str) -> Result<()> {
    let expose = ExposeHttpServiceRequest {
        id: id.into(),
        name: "deaf".into(),
        port: DEAF_PORT,
        visibility: Visibility::Public.into(),
    };
    world.client()?.expose_http_service(world.authorised(expose)?).await?;
    let vmid = world.get(id).await?.vmid;
    let host = format!("port-{DEAF_PORT}-vm-{vmid}.sandbox.localhost");
    let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\n\r\n");
    let ingress = ingress_address(&world.lab, "node1")?;
    for _ in 0..HELD {
        abuse.spawn(stay(ingress.clone(), request.clone()));
    }
    Ok(())
}

/// Opens, holds and repeats whatever a client without a valid token can.
fn without_a_token(world: &World, abuse: &mut JoinSet<()>) -> Result<()> {
    let (ingress, ssh) = (ingress_address(&world.lab, "node1")?, format!("{HUB_IP}:2222"));
    // The head of a request that does not end, and a handshake that does not go on.
    let kinds = [
        (api_address(), ""),
        (ingress.clone(), ""),
        (ingress, "GET / HTTP/1.1\r\nHost: x\r\n"),
        (ssh.clone(), ""),
        (ssh, "SSH-2.0-OpenSSH_9.2\r\n"),
    ];
    for (address, text) in &kinds {
        for _ in 0..IDLE / kinds.len() {
            abuse.spawn(stay(address.clone(), (*text).to_owned()));
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
    let nothing =
        |_| ExecRequest { message: Some(exec_request::Message::Stdin(Vec::new().into())) };
    let bulk = |_| UploadArchiveRequest {
        message: Some(upload_archive_request::Message::Data(vec![0; 64 * 1024].into())),
    };
    let forwarded = |_| ForwardRequest {
        message: Some(forward_request::Message::Data(vec![0; 64 * 1024].into())),
    };
    for _ in 0..STREAMS {
        // Output that nobody reads, and input that no program reads.
        let yes = world.authorised(iter([shell("yes")]).chain(pending()))?;
        hold(abuse, world.client()?, |mut api| async move { api.exec(yes).await });
        let deaf = iter([shell("sleep 600")]).chain(iter(0..u32::MAX).map(stdin));
        let deaf = world.authorised(deaf)?;
        hold(abuse, world.client()?, |mut api| async move { api.exec(deaf).await });
        // Stdin of nothing, without an end: no window fills.
        let nothing = iter([shell("sleep 600")]).chain(iter(0..u32::MAX).map(nothing));
        let nothing = world.authorised(nothing)?;
        hold(abuse, world.client()?, |mut api| async move { api.exec(nothing).await });
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
        let read = ReadFileRequest { id: id.into(), path: SPARSE.into(), ..Default::default() };
        let read = world.authorised(read)?;
        hold(abuse, world.client()?, |mut api| async move { api.read_file(read).await });
        // A connection to a server that reads nothing, and one that nobody uses.
        let open = ForwardRequest {
            message: Some(forward_request::Message::Open(ForwardOpen {
                id: id.into(),
                target: Some(forward_open::Target::Tcp(ForwardTcp {
                    host: String::new(),
                    port: DEAF_PORT,
                })),
            })),
        };
        let unused = world.authorised(iter([open.clone()]).chain(pending()))?;
        hold(abuse, world.client()?, |mut api| async move { api.forward(unused).await });
        let unread = world.authorised(iter([open]).chain(iter(0..u32::MAX).map(forwarded)))?;
        hold(abuse, world.client()?, |mut api| async move { api.forward(unread).await });
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
    exec(world, id, script, true).await.map(drop)
}

async fn exec(
    world: &World,
    id: &str,
    script: &str,
    detached: bool,
) -> Result<ExecCommandResponse> {
    let start = ExecStart {
        id: id.into(),
        command: Some(exec_start::Command::Argv(Argv {
            args: ["bash", "-c", script].map(str::to_owned).into(),
        })),
        exec_id: if detached { "abuse".into() } else { String::new() },
        detached,
        ..ExecStart::default()
    };
    let request = ExecCommandRequest { start: Some(start), ..ExecCommandRequest::default() };
    Ok(world.client()?.exec_command(world.authorised(request)?).await?.into_inner())
}
