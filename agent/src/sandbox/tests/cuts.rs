//! Connections of ports that were closed are cut to the end, though the caller hangs up, the agent crashes or the
//! journal fails in between.

use daemon::disk::{FatalDisk, When};
use proto::visibility::Visibility;
use tokio::{
    sync::watch,
    time::{sleep, timeout},
};

use super::{
    ports::{assert_cut, assert_open, connected, port, serving, wanted},
    *,
};
use crate::sandbox::access::kill_connections::AGAIN;

const SECOND: Duration = Duration::from_secs(1);

/// Disk whose syncs wait while it is held.
#[derive(Debug, Default)]
struct HeldDisk(watch::Sender<bool>);

#[async_trait::async_trait]
impl Disk for HeldDisk {
    async fn before_sync(&self) {
        self.0.subscribe().wait_for(|held| !held).await.expect("the disk lives");
    }

    async fn after_sync(&self) {}
}

/// Change after which those who are connected have no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Closing {
    Hide,
    Revoke,
    Guard,
}

impl Closing {
    const ALL: [Self; 3] = [Self::Hide, Self::Revoke, Self::Guard];

    async fn run(self, node: &Node, number: u32) {
        match self {
            Self::Hide => node.hide("web").await,
            Self::Revoke => {
                drop(node.sandboxes.revoke_access(&id(1), "web".into()).await.expect("revoked"));
            }
            Self::Guard => {
                node.open("web", number, wanted(Visibility::Team)).await;
            }
        }
    }
}

impl Node {
    async fn cuts_pending(&self) -> usize {
        self.record(1).await.access.pending_cuts.len()
    }
}

#[tokio::test(start_paused = true)]
async fn connections_are_cut_though_the_caller_of_the_closing_hangs_up() {
    for closing in Closing::ALL {
        let disk = Arc::new(HeldDisk::default());
        let (node, listener, number) = serving(Arc::clone(&disk) as _).await;
        node.open("web", number, wanted(Visibility::Token)).await;
        let mut early = connected(&listener).await;
        let forward = node.sandboxes.forwards.add(id(1), port(number));
        disk.0.send_replace(true);
        timeout(SECOND, closing.run(&node, number)).await.expect_err("its write takes longer");
        assert_open(&mut early).await;
        disk.0.send_replace(false);
        assert_cut(&mut early.0).await;
        let is_cut = forward.revoked().is_cancelled();
        assert_eq!(is_cut, closing != Closing::Guard, "a visibility is about HTTP: {closing:?}");
        // It had its route before, and takes its time.
        let mut late = connected(&listener).await;
        sleep(AGAIN + SECOND).await;
        assert_cut(&mut late.0).await;
        assert_eq!(node.cuts_pending().await, 0, "{closing:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn next_agent_cuts_what_the_one_that_crashed_behind_the_write_has_not() {
    for closing in Closing::ALL {
        let disk = Arc::new(FatalDisk::new(Some((0, When::After))));
        let (mut node, listener, number) = serving(Arc::clone(&disk) as _).await;
        node.open("web", number, wanted(Visibility::Token)).await;
        let mut early = connected(&listener).await;
        disk.arm(true);
        tokio::select! {
            biased;
            () = disk.reached() => {}
            () = closing.run(&node, number) => panic!("{closing:?} was answered"),
        }
        disk.arm(false);
        node.restart().await;
        assert_open(&mut early).await;
        node.reconciler().pass().await;
        assert_cut(&mut early.0).await;
    }
}

#[tokio::test(start_paused = true)]
async fn next_agent_cuts_the_second_time_when_the_one_before_crashed_after_the_first() {
    for closing in Closing::ALL {
        let (mut node, listener, number) = serving(Arc::new(SoundDisk)).await;
        node.open("web", number, wanted(Visibility::Token)).await;
        let mut early = connected(&listener).await;
        closing.run(&node, number).await;
        assert_cut(&mut early.0).await;
        let mut late = connected(&listener).await;
        node.restart().await;
        node.reconciler().pass().await;
        assert_cut(&mut late.0).await;
        let mut later = connected(&listener).await;
        sleep(AGAIN + SECOND).await;
        assert_cut(&mut later.0).await;
        assert_eq!(node.cuts_pending().await, 0, "{closing:?}");
        // Those who come after that were let in by the new rule.
        let mut new = connected(&listener).await;
        node.restart().await;
        node.reconciler().pass().await;
        sleep(AGAIN + SECOND).await;
        assert_open(&mut new).await;
    }
}

#[tokio::test(start_paused = true)]
async fn cut_that_the_journal_cannot_record_is_not_repeated() {
    let (node, listener, number) = serving(Arc::new(SoundDisk)).await;
    node.open("web", number, wanted(Visibility::Token)).await;
    Closing::Revoke.run(&node, number).await;
    node.journal.fail(Some("no space left on device"));
    sleep(AGAIN + SECOND).await;
    let mut new = connected(&listener).await;
    node.reconciler().pass().await;
    sleep(AGAIN * 3).await;
    assert_open(&mut new).await;
    assert_eq!(node.cuts_pending().await, 1);
    node.journal.fail(None);
    sleep(AGAIN + SECOND).await;
    assert_eq!(node.cuts_pending().await, 0);
    assert_open(&mut new).await;
}
