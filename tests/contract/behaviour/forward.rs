//! Byte streams to servers inside, through the suite's own shim and the helper that it starts inside.

use agent::shim::{
    FORWARD_WINDOW,
    client::{self, Attachment, Refused},
};
use helper::{ForwardTask, Order, Task, User};
use proto::{
    Reason,
    shim::v1::{Forward, Stdin, Taken, request, response},
};
use tokio::{
    net::UnixStream,
    time::{Instant, timeout},
};

use super::exec::{Serving, Shim};
use crate::stage::{DEADLINE, Shown, Stage};

/// Port inside that the suite listens on; nothing of a template does.
const PORT: u16 = 47_011;
/// Bytes that go through a connection, in pieces.
const PIECES: usize = 40;
const PIECE: usize = 50_000;

/// Listens inside, connects to that from inside, and passes bytes both ways between the two. What nobody
/// listens on is refused.
pub(super) async fn bytes_pass_between_two_ends_inside(stage: &dyn Stage) -> Shown {
    let order = stage.started().await;
    let host = stage.inside(order.vmid);
    // What runs inside takes real time, whatever clock the suite has here.
    let run = tokio::task::spawn_blocking(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let serving = Serving::start(host);
            forward(&serving.shim).await;
        });
    });
    run.await.expect("no panic");
    stage.destroy(&order).await;
    Shown::Yes
}

async fn forward(shim: &Shim) {
    let to = || ForwardTask::Tcp(vec![([127, 0, 0, 1], PORT).into()]);
    assert_eq!(refused(shim, to()).await, Reason::NotListening);
    let name = "0f".repeat(16);
    let listen = ForwardTask::Listen { port: PORT, name: name.clone() };
    let mut listener = open(shim, listen.clone()).await.expect("it listens");
    assert_eq!(refused(shim, listen).await, Reason::ForwardRefused);
    let mut out = open(shim, to()).await.expect("it is connected");
    let number = said(&mut listener).await;
    let Some(response::Message::Stdout(number)) = number else { panic!("no number: {number:?}") };
    let connection = u64::from_le_bytes(number[..].try_into().expect("8 bytes"));
    let accepted = ForwardTask::Accepted { name, connection };
    let mut back = open(shim, accepted.clone()).await.expect("it is taken");
    assert_eq!(refused(shim, accepted).await, Reason::NotListening);

    let (sent, got) = tokio::join!(send(&mut out), receive(&mut back));
    assert!(sent == got, "{} of {} bytes", got.len(), sent.len());
    // Its other half is still open.
    let (sent, got) = tokio::join!(send(&mut back), receive(&mut out));
    assert!(sent == got, "{} of {} bytes", got.len(), sent.len());
    for one in [&mut out, &mut back] {
        let mut exit = said(one).await;
        while matches!(exit, Some(response::Message::Done(_))) {
            exit = said(one).await;
        }
        assert!(matches!(exit, Some(response::Message::Exit(exit)) if exit.code == 0), "{exit:?}");
    }
}

async fn open(shim: &Shim, task: ForwardTask) -> Result<Attachment, Refused> {
    let (task, user, cwd) = (Task::Forward(task), User::Id(0), Some("/".to_owned()));
    let order = Order { task, user, cwd, env: Vec::new() };
    let forward = Forward {
        order: serde_json::to_vec(&order).expect("JSON").into(),
        mark: "PVE_SANDBOX_EXEC=contract-forward".into(),
        start_by_ms: helper::up_ms() + 20_000,
    };
    let stream = UnixStream::connect(&shim.socket).await.expect("it listens");
    client::attach(stream, request::Message::Forward(forward), Instant::now() + DEADLINE).await
}

async fn refused(shim: &Shim, task: ForwardTask) -> Reason {
    match open(shim, task).await {
        Err(Refused::No(reason, _)) => reason,
        other => panic!("not refused: {other:?}"),
    }
}

async fn said(of: &mut Attachment) -> Option<response::Message> {
    let said = timeout(DEADLINE, of.output.next()).await.expect("in time");
    said.map(|said| said.expect("the shim lives"))
}

/// Sends bytes within the window, and their end. Returns them.
async fn send(to: &mut Attachment) -> Vec<u8> {
    let mut all = Vec::new();
    let mut window = FORWARD_WINDOW;
    for number in 0..=PIECES {
        while window == 0 {
            match said(to).await {
                Some(response::Message::Done(_)) => window += 1,
                other => panic!("no credit: {other:?}"),
            }
        }
        let data = if number < PIECES { vec![number as u8; PIECE] } else { Vec::new() };
        all.extend_from_slice(&data);
        let stdin = Stdin { data: data.into(), eof: number == PIECES, ..Stdin::default() };
        to.input.send(request::Message::Stdin(stdin)).await.expect("the shim lives");
        window -= 1;
    }
    all
}

/// Receives bytes up to their end.
async fn receive(from: &mut Attachment) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        match said(from).await {
            Some(response::Message::Stdout(bytes)) => all.extend_from_slice(&bytes),
            Some(response::Message::Eof(_)) => return all,
            // Credit for what was sent before.
            Some(response::Message::Done(_)) => continue,
            other => panic!("it broke: {other:?}"),
        }
        let taken = request::Message::Taken(Taken { pieces: 1 });
        // A stream that has ended hears no more; its last messages are still to be read.
        from.input.send(taken).await.ok();
    }
}
