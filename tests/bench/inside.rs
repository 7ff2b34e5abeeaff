//! Commands and files through the agent, beside what PVE and LXC do by hand.

use std::time::Instant;

use anyhow::{Context as _, Result, bail, ensure};
use proto::{
    agent::v1::{
        self as agent, FilesRequest, agent_service_client::AgentServiceClient, files_request,
        files_response,
    },
    sandbox::v1::{
        Argv, ExecRequest, ExecStart, FileContent, ForwardOpen, ForwardRequest, WriteFilesRequest,
        exec_request, exec_response, exec_start, forward_open, forward_request, forward_response,
    },
};
use tonic::transport::Channel;

use crate::{
    figures::{Figures, median},
    hand,
    world::{World, exec_true, timed},
};

/// Number of concurrent commands.
const PARALLEL: usize = 100;
/// Largest number of them in one sandbox.
const PER_SANDBOX: usize = 50;
/// Bytes of output.
const OUTPUT: u64 = 256 * 1024 * 1024;
/// Files in one call.
const FILES: usize = 100;
/// Rounds of steps that take tens of milliseconds.
const ROUNDS: usize = 10;

type Agent = AgentServiceClient<Channel>;

pub(crate) async fn measure(world: &World, figures: &mut Figures) -> Result<()> {
    let (first, second) = (world.create("node1").await?, world.create("node1").await?);
    let vmid = world.get(&first).await?.vmid;
    let mut agent = world.agent("node1")?;
    for id in [&first, &second] {
        ensure!(exec_true(&mut agent, id).await? == 0, "exec true did not exit with 0");
    }
    let (pss, _) = world.shim_pss_mib("node1")?;
    figures.alone("shim_rss", pss, "MiB (PSS)");
    parallel(world, figures, &agent, [&first, &second], vmid).await?;
    output(world, figures, &mut agent, &first, vmid).await?;
    forward(figures, &mut agent, &first).await?;
    write_files(world, figures, &mut agent, &first, vmid).await?;
    world.delete(&first).await?;
    world.delete(&second).await
}

/// Measures a hundred concurrent commands, and as many concurrent `lxc-attach`.
async fn parallel(
    world: &World,
    figures: &mut Figures,
    agent: &Agent,
    ids: [&String; 2],
    vmid: u32,
) -> Result<()> {
    let mut all = tokio::task::JoinSet::new();
    let begun = Instant::now();
    for number in 0..PARALLEL {
        let (mut agent, id) = (agent.clone(), ids[number / PER_SANDBOX].clone());
        all.spawn(async move { exec_true(&mut agent, &id).await });
    }
    for done in all.join_all().await {
        ensure!(done? == 0, "one of many at once did not exit with 0");
    }
    let ours = begun.elapsed().as_secs_f64() * 1000.0;
    let line =
        format!("sh -c 'for i in $(seq {PARALLEL}); do lxc-attach -n {vmid} -- true & done; wait'");
    let theirs = median(&mut hand::repeat(world, "node1", 3, &line)?);
    figures.add("exec_100_parallel", ours, "ms", "lxc-attach 100 times at once", theirs);
    Ok(())
}

async fn output(
    world: &World,
    figures: &mut Figures,
    agent: &mut Agent,
    id: &str,
    vmid: u32,
) -> Result<()> {
    let line = format!("head -c {OUTPUT} /dev/zero");
    let (took, bytes) = timed(read_all(agent, id, &line)).await;
    ensure!(bytes? == OUTPUT, "output was lost");
    let by_hand = format!("sh -c 'lxc-attach -n {vmid} -- {line} | cat >/dev/null'");
    let theirs = median(&mut hand::repeat(world, "node1", 3, &by_hand)?);
    #[expect(clippy::cast_precision_loss, reason = "256 MiB")]
    let mb = OUTPUT as f64 / 1e6;
    let rate = |ms: f64| mb / (ms / 1000.0);
    figures.add("exec_output_MBps", rate(took), "MB/s", "lxc-attach | cat", rate(theirs));
    Ok(())
}

async fn read_all(agent: &mut Agent, id: &str, line: &str) -> Result<u64> {
    let args = line.split(' ').map(ToOwned::to_owned).collect();
    let start = ExecStart {
        id: id.into(),
        command: Some(exec_start::Command::Argv(Argv { args })),
        ..ExecStart::default()
    };
    let message = exec_request::Message::Start(start);
    let first = agent::ExecRequest {
        message: Some(ExecRequest { message: Some(message) }),
        ..Default::default()
    };
    let mut answers = agent.exec(tokio_stream::iter([first])).await?.into_inner();
    let mut bytes = 0;
    while let Some(answer) = answers.message().await? {
        match answer.message.and_then(|message| message.message) {
            Some(exec_response::Message::Stdout(more)) => bytes += more.len() as u64,
            Some(exec_response::Message::Exit(exit)) => {
                ensure!(exit.code == 0, "it exited with {}", exit.code);
                return Ok(bytes);
            }
            _ => {}
        }
    }
    bail!("the stream ended without an exit")
}

/// Measures a forward to a server that sends, beside `cat` of the same bytes through exec.
async fn forward(figures: &mut Figures, agent: &mut Agent, id: &str) -> Result<()> {
    let serve = format!(
        "import os,socket; s=socket.socket(socket.AF_UNIX); s.bind(\"/run/bench.sock\"); s.listen(8)\n\
         if os.fork(): os._exit(0)\n\
         while True:\n c=s.accept()[0]\n for _ in range({}): c.sendall(bytes(1<<20))\n c.close()",
        OUTPUT >> 20
    );
    let start = ExecStart {
        id: id.into(),
        command: Some(exec_start::Command::Argv(Argv {
            args: ["python3", "-c", &serve].map(ToOwned::to_owned).into(),
        })),
        ..ExecStart::default()
    };
    let first = ExecRequest { message: Some(exec_request::Message::Start(start)) };
    let first = agent::ExecRequest { message: Some(first), ..Default::default() };
    let mut answers = agent.exec(tokio_stream::iter([first])).await?.into_inner();
    while answers.message().await?.is_some() {}
    let (mut ours, mut plain) = (Vec::new(), Vec::new());
    for _ in 0..3 {
        let (took, bytes) = timed(forwarded(agent, id)).await;
        ensure!(bytes? == OUTPUT, "bytes of a forward were lost");
        ours.push(took);
        let line = format!("head -c {OUTPUT} /dev/zero");
        let (took, bytes) = timed(read_all(agent, id, &line)).await;
        ensure!(bytes? == OUTPUT, "output was lost");
        plain.push(took);
    }
    #[expect(clippy::cast_precision_loss, reason = "256 MiB")]
    let mb = OUTPUT as f64 / 1e6;
    let rate = |ms: f64| mb / (ms / 1000.0);
    let (ours, plain) = (rate(median(&mut ours)), rate(median(&mut plain)));
    figures.add("forward_MBps", ours, "MB/s", "the same bytes through exec", plain);
    Ok(())
}

/// Reads all bytes of a connection to the bench's server.
async fn forwarded(agent: &mut Agent, id: &str) -> Result<u64> {
    let target = Some(forward_open::Target::UnixPath("/run/bench.sock".to_owned()));
    let open = ForwardOpen { id: id.into(), target };
    let message = |message| agent::ForwardRequest {
        message: Some(ForwardRequest { message: Some(message) }),
        ..Default::default()
    };
    let input = [
        message(forward_request::Message::Open(open)),
        message(forward_request::Message::Eof(true)),
    ];
    let mut answers = agent.forward(tokio_stream::iter(input)).await?.into_inner();
    let mut bytes = 0;
    while let Some(answer) = answers.message().await? {
        if let Some(forward_response::Message::Data(more)) =
            answer.message.and_then(|message| message.message)
        {
            bytes += more.len() as u64;
        }
    }
    Ok(bytes)
}

/// Measures a hundred small files in one call, and a hundred times `pct push`.
async fn write_files(
    world: &World,
    figures: &mut Figures,
    agent: &mut Agent,
    id: &str,
    vmid: u32,
) -> Result<()> {
    let content = vec![b'x'; 1024];
    let file = |number: usize| FileContent {
        path: format!("/srv/bench/{number}"),
        content: content.clone().into(),
        mode: 0o644,
    };
    let files: Vec<_> = (0..FILES).map(file).collect();
    let mut ours = Vec::new();
    for _ in 0..ROUNDS {
        let write = WriteFilesRequest { id: id.into(), files: files.clone(), user: String::new() };
        let request = FilesRequest { message: Some(files_request::Message::Write(write)) };
        let (took, answer) = timed(agent.files(tokio_stream::iter([request]))).await;
        let answer = answer?.into_inner().message().await?.and_then(|answer| answer.message);
        let Some(files_response::Message::Write(written)) = answer else {
            bail!("no answer to a write");
        };
        ensure!(usize::try_from(written.written)? == FILES, "files were not written");
        ours.push(took);
    }
    let push = format!(
        "sh -c 'head -c 1024 /dev/zero >/run/bench-file; \
         for i in $(seq {FILES}); do pct push {vmid} /run/bench-file /srv/pushed-$i || exit 1; done'"
    );
    let ours = median(&mut ours);
    let plain = median(&mut hand::repeat(world, "node1", 1, &push)?);
    figures.add("write_100_files", ours, "ms", "100 x pct push, at no cost", plain);
    world.set_cost(true)?;
    let costly = hand::repeat(world, "node1", 1, &push);
    world.set_cost(false)?;
    let costly = costly.context("100 x pct push")?[0];
    figures.add("write_100_files_vs_pct", ours, "ms", "100 x pct push (modelled)", costly);
    Ok(())
}
