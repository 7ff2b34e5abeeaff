//! Applies all our edits to configs from real nodes: an edit and its undo must leave every byte the
//! same, and lines of other sections must not be read as ours.

use proto::id::{SandboxId, Vmid};

use super::{ContainerConfig, Mark, ownership, pause_lock};

const CONFIGS: [(&str, &str); 3] = [
    ("raw", include_str!("testdata/configs/raw.conf")),
    ("oci", include_str!("testdata/configs/oci.conf")),
    ("pending", include_str!("testdata/configs/pending.conf")),
];

fn configs() -> impl Iterator<Item = (&'static str, ContainerConfig)> {
    CONFIGS.into_iter().map(|(name, text)| {
        let config = ContainerConfig::parse(text.as_bytes());
        assert_eq!(config.to_bytes(), text.as_bytes(), "{name}");
        (name, config)
    })
}

fn mark() -> Mark {
    Mark {
        sandbox_id: SandboxId::new(1, &[1; 10]),
        vmid: Vmid::try_from(310).expect("in range"),
        attempt: 1,
        team: "acme".parse().expect("valid"),
        request_id: "r-1".parse().expect("valid"),
    }
}

#[test]
fn adopt_pause_resume_and_release_leave_the_config_unchanged() {
    for (name, before) in configs() {
        let mut config = before.clone();
        ownership::mark(&mut config, &mark()).expect("it fits");
        assert_eq!(config.mark(), Some(mark()), "{name}");
        let adopted = config.clone();
        pause_lock::acquire(&mut config).expect("nobody holds it");
        assert!(pause_lock::is_held(&config) && config.lock() == Some("backup"), "{name}");
        pause_lock::release(&mut config).expect("ours");
        assert_eq!(config, adopted, "{name}");
        ownership::unmark(&mut config, &mark().sandbox_id);
        assert_eq!(config, before, "{name}");
    }
}

#[test]
fn snapshot_and_pending_sections_are_not_read_as_the_container() {
    let of = |name: &str| configs().find(|(known, _)| *known == name).expect("there").1;
    assert_eq!(of("pending").get("tags"), None);
    assert_eq!(of("raw").description().as_deref(), Some("an operator's note: 100 % hers"));
    assert_eq!(of("raw").rootfs(), Some("btr:310/vm-310-disk-0.raw"));
    let oci = of("oci");
    let mounts: Vec<_> = oci.mounts().collect();
    assert_eq!(mounts, ["btr:311/vm-311-disk-1.raw", "btr:311/vm-311-disk-0.raw"]);
    assert!(oci.is_unprivileged() && oci.lock().is_none());
}
