//! Files that a creation brings.

use bytes::Bytes;
use proto::{Reason, sandbox::v1::*};

use super::*;

fn with_files(request_id: &str, files: &[(&str, usize)]) -> CreateSandboxRequest {
    let file = |(path, bytes): &(&str, usize)| FileContent {
        path: (*path).into(),
        content: Bytes::from(vec![7; *bytes]),
        mode: 0o750,
    };
    CreateSandboxRequest { files: files.iter().map(file).collect(), ..request(request_id) }
}

impl Lab {
    /// Size and mode of a file in a sandbox.
    async fn file(&self, id: &str, path: &str) -> Option<(u64, u32)> {
        let request = StatFileRequest { id: id.into(), path: path.into(), user: String::new() };
        let file = self.api().stat_file(request).await.ok()?.into_inner().file?;
        Some((file.size, file.mode))
    }

    async fn kept(&self, id: &str) -> Option<Vec<u8>> {
        self.store.files(&id.parse().expect("id")).await.expect("read")
    }
}

#[tokio::test(start_paused = true)]
async fn files_are_there_when_the_sandbox_runs() {
    let lab = Lab::new().await;
    let asked = with_files("r1", &[("/srv/a", 1_000_000), ("/srv/b", 0)]);
    let sandbox = create(&mut lab.api(), asked.clone()).await.expect("made");
    assert_eq!(sandbox.phase(), Phase::Running);
    assert_eq!(lab.file(&sandbox.id, "/srv/a").await, Some((1_000_000, 0o750)));
    assert_eq!(lab.file(&sandbox.id, "/srv/b").await, Some((0, 0o750)));
    assert_eq!(lab.kept(&sandbox.id).await, None, "kept only until they are written");
    assert_eq!(create(&mut lab.api(), asked).await.expect("the same").id, sandbox.id);
    let other = create(&mut lab.api(), with_files("r1", &[("/srv/a", 9)])).await;
    assert_eq!(reason(other), Reason::RequestIdReused, "files are part of the body");
}

#[tokio::test(start_paused = true)]
async fn sandbox_does_not_run_before_its_files_are_written() {
    let mut lab = Lab::new().await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.refuse_files = Some(Reason::TooManyCalls));
    }
    let no_wait = Some(prost_types::Duration::default());
    let asked = CreateSandboxRequest { wait: no_wait, ..with_files("r1", &[("/srv/a", 3)]) };
    let sandbox = create(&mut lab.api(), asked).await.expect("accepted");
    assert_eq!(sandbox.phase(), Phase::Creating);
    let files = lab.until_progress(&sandbox.id, Progress::Files).await;
    assert_eq!(files.phase(), Phase::Creating);
    assert!(lab.kept(&sandbox.id).await.is_some());
    // A controller that starts again goes on.
    lab.start().await;
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!(lab.get(&sandbox.id).await.expect("known").phase(), Phase::Creating);
    for agent in &lab.agents {
        agent.faults(|faults| faults.refuse_files = None);
    }
    let up = lab.until(&sandbox.id, Phase::Running).await;
    assert_eq!((up.attempt, lab.living().len()), (1, 1));
    assert_eq!(lab.file(&sandbox.id, "/srv/a").await, Some((3, 0o750)));
    assert_eq!(lab.kept(&sandbox.id).await, None);
}

#[tokio::test(start_paused = true)]
async fn creation_whose_files_are_refused_fails_and_leaves_nothing() {
    let lab = Lab::new().await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.refuse_files = Some(Reason::FileRefused));
    }
    let refused = create(&mut lab.api(), with_files("r1", &[("/proc/x", 3)])).await;
    assert_eq!(reason(refused), Reason::FileRefused);
    assert_eq!(lab.living(), []);
    let all = ListSandboxesRequest { include_ended: true, ..ListSandboxesRequest::default() };
    let ended = lab.api().list_sandboxes(all).await.expect("listed").into_inner().sandboxes;
    assert_eq!((ended.len(), ended[0].phase()), (1, Phase::Failed));
    assert_eq!(lab.kept(&ended[0].id).await, None);
}

#[tokio::test(start_paused = true)]
async fn deletion_while_files_are_written_leaves_nothing() {
    let lab = Lab::new().await;
    for agent in &lab.agents {
        agent.faults(|faults| faults.refuse_files = Some(Reason::TooManyCalls));
    }
    let no_wait = Some(prost_types::Duration::default());
    let asked = CreateSandboxRequest { wait: no_wait, ..with_files("r1", &[("/srv/a", 3)]) };
    let sandbox = create(&mut lab.api(), asked).await.expect("accepted");
    lab.until_progress(&sandbox.id, Progress::Files).await;
    let delete = DeleteSandboxRequest { id: sandbox.id.clone() };
    lab.api().delete_sandbox(delete).await.expect("deleted");
    lab.until(&sandbox.id, Phase::Deleted).await;
    assert_eq!((lab.living(), lab.kept(&sandbox.id).await), (vec![], None));
}

#[tokio::test(start_paused = true)]
async fn wrong_files_are_refused_before_anything_is_made() {
    let lab = Lab::new().await;
    let many: Vec<_> = (0..1001).map(|_| ("/srv/a", 0)).collect();
    for (files, field) in [
        (&[("/srv/a", 1), ("srv/b", 1)][..], "files[1].path"),
        (&[("/srv/", 1)], "files[0].path"),
        (&[("/srv/a", 1600 << 10)], "files"),
        (&many, "files"),
    ] {
        let status = create(&mut lab.api(), with_files("r1", files)).await.expect_err(field);
        assert!(status.message().starts_with(field), "{field}: {status}");
    }
    let user = CreateSandboxRequest { files_user: "u".into(), ..request("r1") };
    let status = create(&mut lab.api(), user).await.expect_err("no files");
    assert!(status.message().starts_with("files_user"), "{status}");
    assert_eq!(lab.living(), []);
}

/// Begins a creation whose files every node refuses for this reason.
async fn begun(lab: &Lab, refusal: Reason) -> Sandbox {
    for agent in &lab.agents {
        agent.faults(|faults| faults.refuse_files = Some(refusal));
    }
    let no_wait = Some(prost_types::Duration::default());
    let asked = CreateSandboxRequest { wait: no_wait, ..with_files("r1", &[("/srv/a", 3)]) };
    let sandbox = create(&mut lab.api(), asked).await.expect("accepted");
    lab.until_progress(&sandbox.id, Progress::Files).await
}

#[tokio::test(start_paused = true)]
async fn refusal_that_passes_ends_no_creation() {
    for refusal in [
        Reason::SandboxNotRunning,
        Reason::SandboxPaused,
        Reason::SandboxBusy,
        Reason::ExecFailed,
        Reason::ExecLost,
    ] {
        let lab = Lab::new().await;
        let sandbox = begun(&lab, refusal).await;
        tokio::time::sleep(Duration::from_secs(20)).await;
        let files = lab.get(&sandbox.id).await.expect("known");
        assert_eq!((files.phase(), files.progress()), (Phase::Creating, Progress::Files));
        for agent in &lab.agents {
            agent.faults(|faults| faults.refuse_files = None);
        }
        let up = lab.until(&sandbox.id, Phase::Running).await;
        assert_eq!((up.attempt, lab.living().len()), (1, 1), "{refusal:?}");
        assert_eq!(lab.file(&sandbox.id, "/srv/a").await, Some((3, 0o750)));
    }
}

#[tokio::test(start_paused = true)]
async fn node_that_dies_before_the_files_are_written_is_replaced() {
    let lab = Lab::new().await;
    let first = begun(&lab, Reason::TooManyCalls).await;
    lab.holder(&first.id).down();
    for agent in &lab.agents {
        agent.faults(|faults| faults.refuse_files = None);
    }
    let up = lab.until(&first.id, Phase::Running).await;
    assert_ne!(up.node, first.node);
    assert_eq!(up.attempt, 2);
    assert_eq!(lab.file(&first.id, "/srv/a").await, Some((3, 0o750)));
    let dead = lab.agents.iter().find(|agent| agent.name().as_str() == first.node);
    dead.expect("a node").up();
    lab.controller.as_ref().expect("controller").settled(Duration::from_secs(10)).await;
    assert_eq!(lab.living().len(), 1, "the first attempt was cancelled");
}

#[tokio::test(start_paused = true)]
async fn files_that_are_refused_until_the_deadline_leave_nothing() {
    let lab = Lab::new().await;
    let sandbox = begun(&lab, Reason::SandboxPaused).await;
    tokio::time::sleep(lab.options.deadline).await;
    let failed = lab.until(&sandbox.id, Phase::Failed).await;
    assert_eq!(failed.failure.expect("why").reason(), Reason::SandboxPaused);
    assert_eq!((lab.living(), lab.kept(&sandbox.id).await), (vec![], None));
}

#[tokio::test(start_paused = true)]
async fn old_copy_of_the_store_changes_no_files_of_a_sandbox_in_use() {
    for now in [Phase::Running, Phase::Stopped] {
        let memory = Arc::new(Memory::new());
        let mut lab = Lab::over(memory.clone()).await;
        for agent in &lab.agents {
            agent.faults(|faults| faults.boot = Duration::from_secs(5));
        }
        let mut api = lab.api();
        let asked = with_files("r1", &[("/srv/a", 3)]);
        let creation = tokio::spawn(async move { create(&mut api, asked).await });
        tokio::time::sleep(Duration::from_secs(2)).await;
        let copy = memory.copy();
        let made = creation.await.expect("answered").expect("made");
        // Its user works with it from here on, and has for longer than a creation takes.
        let up = Some(prost_types::Timestamp::default());
        lab.holder(&made.id).put(Sandbox { started_at: up, ..made.clone() });
        let file = FileContent { path: "/srv/a".into(), content: "longer".into(), mode: 0o600 };
        let write = WriteFilesRequest { id: made.id.clone(), files: vec![file], user: "".into() };
        lab.api().write_files(write).await.expect("written");
        if now == Phase::Stopped {
            let stop = StopSandboxRequest { id: made.id.clone(), ..Default::default() };
            lab.api().stop_sandbox(stop).await.expect("stopped");
            for agent in &lab.agents {
                agent.faults(|faults| faults.refuse_files = Some(Reason::SandboxNotRunning));
            }
        }
        lab.store = Arc::new(copy);
        lab.red = token(&lab.store, "red", "sandbox operator").await;
        lab.start().await;
        lab.until(&made.id, now).await;
        tokio::time::sleep(Duration::from_secs(1000)).await;
        assert_eq!(lab.get(&made.id).await.expect("known").phase(), now);
        assert_eq!(lab.living().len(), 1);
        if now == Phase::Running {
            assert_eq!(lab.file(&made.id, "/srv/a").await, Some((6, 0o600)));
        }
    }
}
