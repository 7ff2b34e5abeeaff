//! Changes of a sandbox's size.

use proto::{Reason, sandbox::v1::*, update};

use super::*;

impl Lab {
    async fn resize(&self, id: &str, size: Size, fields: &[&str]) -> Result<Sandbox, Status> {
        let change = Sandbox { id: id.into(), size: Some(size), ..Sandbox::default() };
        let answer = self.api().update_sandbox(update::request(change, fields)).await?;
        Ok(answer.into_inner().sandbox.expect("a sandbox"))
    }
}

#[tokio::test(start_paused = true)]
async fn size_is_changed_on_the_node_and_logged() {
    let lab = Lab::new().await;
    let made = lab.create("r1").await.expect("made");
    let size = Size { cpu_cores: 4, memory_mib: 4096, disk_gib: 20 };
    let now = lab.resize(&made.id, size, &["size"]).await.expect("larger");
    assert_eq!(now.size, Some(size));
    let memory = Size { memory_mib: 512, cpu_cores: 9, disk_gib: 1 };
    let now = lab.resize(&made.id, memory, &["size.memory_mib"]).await.expect("less memory");
    assert_eq!(now.size, Some(Size { memory_mib: 512, ..size }), "only what the mask names");
    assert_eq!(lab.get(&made.id).await.expect("known").size, now.size);
    events::settled(&lab).await;
    let events = events::of(&lab, &made.id, 0).await;
    let resized = events.iter().filter(|event| event.kind() == EventKind::Resized);
    assert_eq!(resized.count(), 2, "{events:?}");
}

#[tokio::test(start_paused = true)]
async fn smaller_disk_and_mixed_updates_reach_no_node() {
    let lab = Lab::new().await;
    let made = lab.create("r1").await.expect("made");
    let size = Size { disk_gib: 20, ..Size::default() };
    lab.resize(&made.id, size, &["size.disk_gib"]).await.expect("larger");
    let smaller = Size { disk_gib: 19, ..Size::default() };
    let status = lab.resize(&made.id, smaller, &["size"]).await.expect_err("smaller");
    assert!(status.message().contains("sandbox.size.disk_gib must be at least 20"), "{status}");
    for fields in [&["size", "name"][..], &["size.cpu_cores"]] {
        let refused = lab.resize(&made.id, Size { disk_gib: 21, ..Size::default() }, fields).await;
        assert_eq!(reason(refused), Reason::FieldInvalid, "{fields:?}");
    }
    assert_eq!(lab.get(&made.id).await.expect("known").size.expect("a size").disk_gib, 20);
}
