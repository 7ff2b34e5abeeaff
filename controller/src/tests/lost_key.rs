//! The controller's key is lost while creations are under way: it starts over a store whose requests and
//! files cannot be read.

use bytes::Bytes;
use proto::{Reason, sandbox::v1::*};

use super::*;
use crate::store::State;

/// Boot time within which a controller is restarted.
const BOOT: Duration = Duration::from_mins(1);

/// Begins a creation on slow nodes; returns it while it is under way.
async fn under_way(
    memory: &Arc<Memory>,
    boot: Duration,
    files: Vec<FileContent>,
) -> (Lab, Sandbox) {
    let lab = Lab::over(memory.clone()).await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.boot = boot);
    }
    let asked = CreateSandboxRequest {
        wait: Some(prost_types::Duration::default()),
        name: "box".to_owned(),
        files,
        ..request("r1")
    };
    let begun = create(&mut lab.api(), asked).await.expect("accepted");
    assert_eq!(begun.phase(), Phase::Creating);
    tokio::time::sleep(Duration::from_secs(2)).await;
    (lab, begun)
}

async fn restart_without_key(lab: &mut Lab, memory: &Memory) {
    lab.controller = None;
    memory.lose_key();
    lab.start().await;
}

async fn state(lab: &Lab, id: &str) -> State {
    lab.store.get(&id.parse().expect("id")).await.expect("read").expect("a row").state
}

#[tokio::test(start_paused = true)]
async fn creation_whose_request_is_lost_is_cancelled_and_fails() {
    let memory = Arc::new(Memory::new());
    let (mut lab, begun) = under_way(&memory, BOOT, Vec::new()).await;
    restart_without_key(&mut lab, &memory).await;
    let failed = lab.until(&begun.id, Phase::Failed).await;
    assert_eq!(failed.failure.map(|failure| failure.reason()), Some(Reason::EnvLost));
    assert_eq!((failed.name, failed.snapshot_id), (begun.name, begun.snapshot_id));
    assert_eq!(lab.living(), []);
    assert_eq!(state(&lab, &begun.id).await, State::Failed);
    // The request_id tells the same, in the next life of the controller, too.
    lab.start().await;
    let again = CreateSandboxRequest { name: "box".to_owned(), ..request("r1") };
    assert_eq!(reason(create(&mut lab.api(), again).await), Reason::EnvLost);
    // Its name is free.
    let other = CreateSandboxRequest { name: "box".to_owned(), ..request("r2") };
    create(&mut lab.api(), other).await.expect("accepted");
}

#[tokio::test(start_paused = true)]
async fn deletion_asked_for_is_carried_out_without_the_request() {
    let memory = Arc::new(Memory::new());
    let (mut lab, begun) = under_way(&memory, BOOT, Vec::new()).await;
    lab.store.cancel(&begun.id.parse().expect("id")).await.expect("written");
    restart_without_key(&mut lab, &memory).await;
    lab.until(&begun.id, Phase::Deleted).await;
    assert_eq!(lab.living(), []);
    assert_eq!(state(&lab, &begun.id).await, State::Failed);
}

#[tokio::test(start_paused = true)]
async fn sandbox_that_came_up_is_kept_without_its_request() {
    let memory = Arc::new(Memory::new());
    let (mut lab, begun) = under_way(&memory, Duration::from_secs(5), Vec::new()).await;
    lab.controller = None;
    tokio::time::sleep(Duration::from_secs(10)).await;
    restart_without_key(&mut lab, &memory).await;
    lab.until(&begun.id, Phase::Running).await;
    assert_eq!(state(&lab, &begun.id).await, State::Done);
    assert_eq!(lab.living().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn creation_whose_files_are_lost_fails_and_leaves_nothing() {
    let memory = Arc::new(Memory::new());
    let content = Bytes::from_static(b"secret");
    let file = FileContent { path: "/srv/a".to_owned(), content, mode: 0o600 };
    let (mut lab, begun) = under_way(&memory, Duration::from_secs(5), vec![file]).await;
    lab.controller = None;
    tokio::time::sleep(Duration::from_secs(10)).await;
    restart_without_key(&mut lab, &memory).await;
    let failed = lab.until(&begun.id, Phase::Failed).await;
    assert_eq!(failed.failure.map(|failure| failure.reason()), Some(Reason::EnvLost));
    assert_eq!(lab.living(), []);
}

#[tokio::test(start_paused = true)]
async fn lost_creation_without_a_node_fails() {
    let memory = Arc::new(Memory::new());
    let mut lab = Lab::over(memory.clone()).await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.refuse = Some(Reason::StorageFull));
    }
    let no_wait = Some(prost_types::Duration::default());
    let asked = CreateSandboxRequest { wait: no_wait, ..request("r1") };
    let begun = create(&mut lab.api(), asked).await.expect("accepted");
    lab.until_progress(&begun.id, Progress::Queued).await;
    restart_without_key(&mut lab, &memory).await;
    let failed = lab.until(&begun.id, Phase::Failed).await;
    assert_eq!(failed.failure.map(|failure| failure.reason()), Some(Reason::EnvLost));
}

#[tokio::test(start_paused = true)]
async fn lost_creation_waits_for_its_node_and_is_cancelled_there() {
    let memory = Arc::new(Memory::new());
    let (mut lab, begun) = under_way(&memory, Duration::from_mins(20), Vec::new()).await;
    let holder = lab.holder(&begun.id).clone();
    holder.down();
    restart_without_key(&mut lab, &memory).await;
    tokio::time::sleep(Duration::from_mins(10)).await;
    assert_eq!(lab.get(&begun.id).await.expect("known").phase(), Phase::Creating);
    holder.up();
    lab.until(&begun.id, Phase::Failed).await;
    assert_eq!(lab.living(), []);
}
