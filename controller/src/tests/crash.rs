//! The controller crashes at every write of a creation, right before and right after it, and
//! another one continues over the same store. The writes are counted first, so new ones are
//! covered.

use daemon::disk::{FatalDisk, When};
use proto::{Reason, sandbox::v1::*};
use tokio::time::timeout;

use super::*;
use crate::store::State;

/// Longest duration of a story.
const PATIENCE: Duration = Duration::from_secs(900);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Story {
    /// The first node makes it.
    Plain,
    /// Two nodes refuse, the third makes it.
    Refused,
    /// The first node goes down during the creation, its attempt is abandoned, and it comes back.
    Left,
    /// No node can make it.
    Failed,
    /// Its owner deletes it during the creation.
    Deleted,
}

const ALL: [Story; 5] = [Story::Plain, Story::Refused, Story::Left, Story::Failed, Story::Deleted];

impl Story {
    async fn prepare(self, lab: &Lab) {
        let full = Some(Reason::StorageFull);
        let faults = |index: usize, change: fn(&mut node::fake::Faults)| {
            lab.agents[index].faults(change);
        };
        match self {
            Self::Plain => {}
            Self::Refused => {
                for index in [0, 1] {
                    lab.agents[index].faults(|faults| faults.refuse = full);
                }
            }
            Self::Left => {
                faults(0, |faults| faults.boot = Duration::from_secs(30));
                for agent in &lab.agents[1..] {
                    agent.load(|load| load.cpu_busy = 0.9);
                }
                tokio::time::sleep(Duration::from_secs(2)).await;
            }
            Self::Failed => {
                for index in 0..3 {
                    faults(index, |faults| faults.fail = Some(Reason::PctFailed));
                }
            }
            Self::Deleted => {
                for index in 0..3 {
                    faults(index, |faults| faults.boot = Duration::from_secs(60));
                }
            }
        }
    }

    /// Runs what happens while the creation is under way.
    async fn meanwhile(self, lab: &Lab) {
        match self {
            Self::Plain | Self::Refused | Self::Failed => {}
            Self::Left => {
                tokio::time::sleep(Duration::from_secs(1)).await;
                lab.agents[0].down();
            }
            Self::Deleted => {
                tokio::time::sleep(Duration::from_secs(1)).await;
                for sandbox in lab.living() {
                    // The crash may interrupt this; it is then repeated.
                    let delete = DeleteSandboxRequest { id: sandbox.id };
                    drop(lab.api().delete_sandbox(delete).await);
                }
            }
        }
    }

    /// Repeats the request until the creation's end is known, as a backend does.
    async fn ask(self, lab: &Lab) -> Result<Sandbox, Status> {
        loop {
            if self == Self::Deleted {
                self.meanwhile(lab).await;
            }
            match lab.create("r1").await {
                Ok(sandbox) if sandbox.phase() == Phase::Creating => {}
                told => return told,
            }
        }
    }

    async fn check(self, lab: &Lab, at: &str) {
        let told = timeout(PATIENCE, self.ask(lab)).await;
        let told = told.unwrap_or_else(|_| panic!("{self:?}: no answer, {at}"));
        if self == Self::Left {
            lab.agents[0].up();
            // Pending cancels are sent when the node is back.
            tokio::time::sleep(Duration::from_secs(30)).await;
        }
        let living = lab.living();
        let rows = lab.store.all().await.expect("a store");
        let of_request: Vec<_> = rows.iter().filter(|row| !row.released).collect();
        assert_eq!(of_request.len(), 1, "{self:?}, {at}: {rows:?}");
        match self {
            Self::Plain | Self::Refused | Self::Left => {
                let sandbox = told.unwrap_or_else(|error| panic!("{self:?}, {at}: {error}"));
                assert_eq!(sandbox.phase(), Phase::Running, "{self:?}, {at}");
                assert_eq!(living.len(), 1, "{self:?}, {at}: {living:?}");
                assert_eq!(living[0].id, sandbox.id, "{self:?}, {at}");
                assert_eq!(of_request[0].state, State::Done, "{self:?}, {at}");
            }
            Self::Failed => {
                assert_eq!(reason(told), Reason::PctFailed, "{at}");
                assert_eq!(living, [], "{at}");
            }
            Self::Deleted => {
                assert_eq!(reason(told), Reason::CreateCancelled, "{at}");
                assert_eq!(living, [], "{at}");
            }
        }
        for agent in &lab.agents {
            let pending_cancels = lab.store.pending_cancels(agent.name()).await.expect("a store");
            assert_eq!(pending_cancels, [], "{self:?}, {at}: pending_cancels to {}", agent.name());
        }
    }
}

/// Runs a story up to the crash, if there is one; returns the number of writes.
async fn tell(story: Story, at: Option<(usize, When)>) -> usize {
    let disk = Arc::new(FatalDisk::new(at));
    let mut lab = Lab::over(Arc::new(Memory::on(Arc::clone(&disk) as _))).await;
    story.prepare(&lab).await;
    disk.arm(true);
    let whole = async {
        let (told, ()) = tokio::join!(story.ask(&lab), story.meanwhile(&lab));
        drop(told);
        // Writes may follow the answer.
        tokio::time::sleep(Duration::from_secs(120)).await;
    };
    let died = tokio::select! {
        biased;
        () = disk.reached() => true,
        () = whole => false,
        () = tokio::time::sleep(PATIENCE) => panic!("{story:?} hangs, {at:?}"),
    };
    assert_eq!(died, at.is_some(), "{story:?}, {at:?}");
    disk.arm(false);
    if died {
        lab.start().await;
    }
    story.check(&lab, &format!("{at:?}")).await;
    disk.syncs()
}

#[tokio::test(start_paused = true)]
async fn creation_survives_a_crash_around_every_write() {
    for story in ALL {
        let writes = tell(story, None).await;
        assert!(writes >= 2, "{story:?} writes {writes} times");
        for number in 0..writes {
            for when in [When::Before, When::After] {
                tell(story, Some((number, when))).await;
            }
        }
    }
}
