//! Waking by a web request: a paused sandbox until the first byte of its answer, through Caddy.

use std::{
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use proto::{
    agent::v1::{
        ExposeHttpServiceRequest, HelloRequest, PauseSandboxRequest,
        agent_service_client::AgentServiceClient,
    },
    sandbox::v1::{EventKind, HttpService, Phase, Sandbox, Visibility, WatchEventsRequest},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    task::JoinSet,
    time::timeout,
};
use tonic::transport::Channel;

use crate::{
    figures::{Figures, median},
    world::{World, timed},
};

/// Rounds of steps that take milliseconds.
const ROUNDS: usize = 40;
/// Concurrent requests for one paused sandbox.
const BURST: usize = 100;
/// Port of the web server in the sandboxes of the lab.
const WEB: u32 = 8000;
/// Longest wait for one answer.
const ANSWER: Duration = Duration::from_secs(30);
/// Address of the first node's Caddy in the lab's network, where the bench runs.
const CADDY: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(10, 99, 0, 1)), 8480);

type Agent = AgentServiceClient<Channel>;

pub(crate) async fn measure(world: &World, figures: &mut Figures) -> Result<()> {
    let id = world.create("node1").await?;
    let host = host(world, &id).await?;
    let mut agent = world.agent("node1")?;
    let epoch = agent.hello(HelloRequest::default()).await?.into_inner().epoch;
    let service = HttpService { name: "web".into(), port: WEB, ..HttpService::default() };
    let expose = ExposeHttpServiceRequest {
        epoch,
        id: id.clone(),
        service: Some(service),
        default_visibility: Visibility::Public.into(),
    };
    agent.expose_http_service(expose).await?;
    let mut running = Vec::new();
    for _ in 0..ROUNDS {
        let (took, answered) = timed(first_byte(&host)).await;
        answered?;
        running.push(took);
    }
    let mut woken = Vec::new();
    for _ in 0..ROUNDS {
        pause(&mut agent, epoch, &id).await?;
        let (took, answered) = timed(first_byte(&host)).await;
        answered?;
        woken.push(took);
    }
    let running = median(&mut running);
    figures.add("wake_p50", median(&mut woken), "ms", "the same request while it runs", running);
    burst(world, &mut agent, epoch, &id, figures).await?;
    world.delete(&id).await
}

/// Sends many requests at once to one sandbox that runs, and to the same one paused, which they wake once.
async fn burst(
    world: &World,
    agent: &mut Agent,
    epoch: u64,
    id: &str,
    figures: &mut Figures,
) -> Result<()> {
    let host = host(world, id).await?;
    let running = all_at_once(&host).await?;
    let asleep = pause(agent, epoch, id).await?.revision;
    // The log has states: a pause that it does not have yet would hide the wake.
    wakes(world, id, asleep, asleep).await?;
    let woken = all_at_once(&host).await?;
    let name = format!("wake_burst_{BURST}");
    figures.add(&name, woken, "ms", "the same requests while it runs", running);
    ensure!(world.get(id).await?.phase() == Phase::Running, "it did not wake");
    let again = pause(agent, epoch, id).await?.revision;
    let wakes = wakes(world, id, asleep, again).await?;
    figures.alone(&format!("{name}_wakes"), f64::from(wakes), "wakes");
    ensure!(wakes == 1, "{BURST} requests at once woke the sandbox {wakes} times");
    Ok(())
}

/// Waits until the controller's log has the pause at revision `until` of the node's journal; returns the number of
/// wakes after revision `since`.
async fn wakes(world: &World, id: &str, since: u64, until: u64) -> Result<u32> {
    timeout(ANSWER, async {
        let request =
            WatchEventsRequest { id: id.to_owned(), follow: true, ..WatchEventsRequest::default() };
        let request = world.authorised(request)?;
        let mut events = world.client()?.watch_events(request).await?.into_inner();
        let mut count = 0;
        while let Some(answer) = events.message().await? {
            let Some(event) = answer.event else { continue };
            if event.kind() == EventKind::Resumed && event.node_revision > since {
                count += 1;
            } else if event.kind() == EventKind::Paused && event.node_revision >= until {
                return Ok(count);
            }
        }
        bail!("the events ended before the pause")
    })
    .await
    .context("the controller does not hear of the pause")?
}

/// Time until all of the answers are there, ms.
async fn all_at_once(host: &str) -> Result<f64> {
    let begun = Instant::now();
    let mut requests = JoinSet::new();
    for _ in 0..BURST {
        let host = host.to_owned();
        requests.spawn(async move { first_byte(&host).await });
    }
    for answered in requests.join_all().await {
        answered?;
    }
    Ok(begun.elapsed().as_secs_f64() * 1000.0)
}

async fn host(world: &World, id: &str) -> Result<String> {
    Ok(format!("port-{WEB}-vm-{}.sandbox.localhost", world.get(id).await?.vmid))
}

async fn pause(agent: &mut Agent, epoch: u64, id: &str) -> Result<Sandbox> {
    let request = PauseSandboxRequest { epoch, id: id.to_owned(), ..Default::default() };
    let sandbox = agent.pause_sandbox(request).await?.into_inner().sandbox.context("a sandbox")?;
    ensure!(sandbox.phase() == Phase::Paused, "{id} is {:?}", sandbox.phase());
    Ok(sandbox)
}

/// Sends a GET and reads the first byte of the answer, which must be 200.
async fn first_byte(host: &str) -> Result<()> {
    timeout(ANSWER, async {
        let mut stream = TcpStream::connect(CADDY).await?;
        let request = format!("GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await?;
        let mut status = [0; 12];
        stream.read_exact(&mut status).await?;
        let text = String::from_utf8_lossy(&status).into_owned();
        ensure!(text.ends_with(" 200"), "{text}");
        // Caddy logs a client that leaves in the middle.
        tokio::io::copy(&mut stream, &mut tokio::io::sink()).await?;
        Ok(())
    })
    .await?
}
