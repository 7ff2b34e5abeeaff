use std::sync::atomic::{AtomicU64, Ordering};

use super::*;
use crate::pve::{
    Mark,
    fake::{FakeCluster, Pace},
};

#[derive(Debug, Default)]
struct HandClock(AtomicU64);

impl Clock for HandClock {
    fn now_ms(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// Two nodes; the first polls the second.
struct Rig {
    cluster: FakeCluster,
    nodes: [NodeName; 2],
    clock: Arc<HandClock>,
    dir: tempfile::TempDir,
}

fn vmid(number: u32) -> Vmid {
    Vmid::try_from(number).expect("in range")
}

fn id(number: u8) -> SandboxId {
    SandboxId::new(1_000 + u64::from(number), &[number; 10])
}

impl Rig {
    fn new() -> Self {
        let nodes = ["node1", "node2"].map(|name| name.parse().expect("valid"));
        let cluster = FakeCluster::new(&nodes, Pace::default(), 1);
        let dir = tempfile::tempdir().expect("a directory");
        std::fs::create_dir_all(dir.path().join("nodes/node2/lxc")).expect("made");
        Self { cluster, nodes, clock: Arc::default(), dir }
    }

    fn owners(&self) -> OwnerResolver {
        let sources = Sources {
            root: self.dir.path().to_owned(),
            memory: self.dir.path().join("owners"),
            peer_port: 8481,
        };
        let clock = Arc::clone(&self.clock) as Arc<dyn Clock>;
        OwnerResolver::new(self.cluster.node(&self.nodes[0]), clock, sources)
    }

    /// Adds a container on the second node, with a mark for `marked`.
    fn put(&self, number: u32, sandbox: u8, marked: u32) {
        let mark = Mark {
            sandbox_id: id(sandbox),
            vmid: vmid(marked),
            attempt: 1,
            team: "acme".parse().expect("valid"),
            request_id: "r".parse().expect("valid"),
        };
        let mut config = ContainerConfig::parse(b"hostname: x\n");
        config.set_description(&mark.to_string()).expect("fits");
        let path = self.dir.path().join(format!("nodes/node2/lxc/{number}.conf"));
        std::fs::write(path, config.to_bytes()).expect("written");
        self.cluster.add_guest(&self.nodes[1], vmid(number), config, false);
    }
}

/// Address of the peer: the fake's nodes are all on loopback.
fn peer() -> Owner {
    Owner::Peer("127.0.0.1:8481".parse().expect("an address"))
}

#[tokio::test(start_paused = true)]
async fn new_sandbox_is_found_by_id_and_vmid_at_the_next_poll() {
    let rig = Rig::new();
    let owners = rig.owners();
    assert_eq!(owners.of(SandboxRef::Vmid(vmid(200))).await, Owner::Nobody);
    rig.put(200, 2, 200);
    // A fresh poll is not repeated for each question.
    assert_eq!(owners.of(SandboxRef::Vmid(vmid(200))).await, Owner::Nobody);
    tokio::time::advance(FRESH).await;
    for name in [SandboxRef::Vmid(vmid(200)), SandboxRef::Id(id(2))] {
        assert_eq!(owners.of(name).await, peer());
    }
    // A clone of a sandbox carries the mark of another container: it is not that sandbox.
    rig.put(201, 3, 999);
    tokio::time::advance(FRESH).await;
    assert_eq!(owners.of(SandboxRef::Id(id(3))).await, Owner::Nobody);
    assert_eq!(owners.of(SandboxRef::Vmid(vmid(201))).await, peer());
}

#[tokio::test(start_paused = true)]
async fn poll_reads_some_configs_and_the_next_one_the_rest() {
    let rig = Rig::new();
    let owners = rig.owners();
    // Without a version of its config, the one with the highest vmid comes last.
    for number in 0..u32::try_from(READS_MAX).expect("fits") {
        let config = ContainerConfig::parse(b"hostname: x\n");
        rig.cluster.add_guest(&rig.nodes[1], vmid(1000 + number), config, false);
    }
    rig.put(900_000, 2, 900_000);
    owners.look(Duration::ZERO).await;
    let (last, by_id) = (SandboxRef::Vmid(vmid(900_000)), SandboxRef::Id(id(2)));
    assert_eq!(owners.known(last), Some(peer()), "the mark is not needed for it");
    assert_eq!(owners.known(by_id), None);
    assert_eq!(owners.absent(by_id), Owner::Unknown, "any sandbox may be in what is unread");
    assert_eq!(owners.absent(SandboxRef::Vmid(vmid(200))), Owner::Nobody, "all vmids are listed");
    owners.look(Duration::ZERO).await;
    assert_eq!(owners.known(by_id), Some(peer()));
    assert_eq!(owners.absent(SandboxRef::Id(id(3))), Owner::Nobody);
}

/// A pipe that nobody writes stands for the file that hangs: opening it for a read does not return.
#[tokio::test]
async fn config_that_hangs_delays_no_request_by_vmid_and_is_read_later() {
    let rig = Rig::new();
    let owners = rig.owners();
    rig.put(200, 2, 200);
    owners.look(Duration::ZERO).await;
    rig.put(201, 3, 201);
    let config = rig.dir.path().join("nodes/node2/lxc/201.conf");
    let text = std::fs::read(&config).expect("it was written");
    std::fs::remove_file(&config).expect("removed");
    nix::unistd::mkfifo(&config, nix::sys::stat::Mode::S_IRWXU).expect("made");

    owners.look(Duration::ZERO).await;
    let by_vmid = [200, 201].map(|number| owners.known(SandboxRef::Vmid(vmid(number))));
    let by_id = [2, 3].map(|number| owners.known(SandboxRef::Id(id(number))));
    let unread = owners.absent(SandboxRef::Id(id(3)));
    // The next one does not wait for it, and begins no second read.
    let next = timeout(READING / 2, owners.look(Duration::ZERO)).await;
    let pending = owners.looked.lock().await.reading.is_some();
    // The read ends before anything is judged: the end of the test waits for it.
    tokio::task::spawn_blocking(move || std::fs::write(&config, text))
        .await
        .expect("ran")
        .expect("written");
    assert_eq!(by_vmid, [Some(peer()), Some(peer())]);
    assert_eq!((by_id, unread), ([Some(peer()), None], Owner::Unknown));
    assert_eq!((next, pending), (Ok(()), true));

    let read = async {
        while owners.known(SandboxRef::Id(id(3))).is_none() {
            owners.look(Duration::ZERO).await;
            tokio::task::yield_now().await;
        }
    };
    timeout(Duration::from_secs(10), read).await.expect("it is read");
}

#[tokio::test(start_paused = true)]
async fn deleted_sandbox_keeps_its_owner_for_a_day_across_restarts() {
    let rig = Rig::new();
    let owners = rig.owners();
    rig.put(200, 2, 200);
    owners.look(Duration::ZERO).await;
    owners.saved().await;
    drop(owners);
    // Deleted while this agent was down.
    rig.cluster.remove(vmid(200));
    for _ in 0..3 {
        let owners = rig.owners();
        for name in [SandboxRef::Id(id(2)), SandboxRef::Vmid(vmid(200))] {
            assert_eq!(owners.of(name).await, peer());
        }
        owners.saved().await;
    }
    rig.clock.0.fetch_add(24 * 60 * 60 * 1000 + 1, Ordering::Relaxed);
    let owners = rig.owners();
    owners.look(Duration::ZERO).await;
    assert_eq!(owners.of(SandboxRef::Id(id(2))).await, Owner::Nobody);
}

#[tokio::test(start_paused = true)]
async fn known_owners_are_kept_while_pmxcfs_is_down() {
    let rig = Rig::new();
    let owners = rig.owners();
    rig.put(200, 2, 200);
    owners.look(Duration::ZERO).await;
    rig.cluster.set_pmxcfs(&rig.nodes[0], false);
    owners.look(Duration::ZERO).await;
    assert_eq!(owners.of(SandboxRef::Id(id(2))).await, peer());
    // Not `Nobody`: the sandbox may have been created since.
    tokio::time::advance(FRESH).await;
    assert_eq!(owners.of(SandboxRef::Id(id(3))).await, Owner::Unknown);
    let blind_from_the_start = rig.owners();
    assert_eq!(blind_from_the_start.of(SandboxRef::Id(id(2))).await, Owner::Unknown);
}

/// A pipe that nobody reads stands for the disk that hangs: opening it for a write does not return.
#[tokio::test]
async fn memory_file_on_a_disk_that_hangs_delays_no_answer_and_is_written_later() {
    let rig = Rig::new();
    let owners = rig.owners();
    owners.look(Duration::ZERO).await;
    owners.saved().await;
    let memory = rig.dir.path().join("owners");
    std::fs::remove_file(&memory).expect("it was written");
    nix::unistd::mkfifo(&memory, nix::sys::stat::Mode::S_IRWXU).expect("made");

    for number in 2..4 {
        rig.put(u32::from(number) + 198, number, u32::from(number) + 198);
        let polled = timeout(LOOK / 2, owners.look(Duration::ZERO)).await;
        let answer = owners.of(SandboxRef::Vmid(vmid(300))).await;
        let found = owners.of(SandboxRef::Id(id(number))).await;
        if polled.is_err() || answer != Owner::Nobody || found != peer() {
            // Lets the write end, which the end of the test waits for.
            std::fs::File::options().read(true).write(true).open(&memory).expect("opened");
        }
        assert_eq!((polled, answer, found), (Ok(()), Owner::Nobody, peer()));
    }

    for _ in 0..SLOW {
        owners.look(Duration::ZERO).await;
    }
    assert!(owners.looked.lock().await.waited >= SLOW, "the write that hangs is told");

    // Both ends, until it is done: the write that hangs goes on. What came meanwhile is written, too, before the end.
    let both_ends = std::fs::File::options().read(true).write(true).open(&memory).expect("opened");
    owners.saved().await;
    drop(both_ends);
    assert!(std::fs::metadata(&memory).expect("there").is_file(), "nothing more was written");
    let written = std::fs::read_to_string(&memory).expect("a file again");
    for number in 2..4 {
        assert!(written.contains(&id(number).to_string()), "{written}");
    }
}

#[test]
fn location_lines_round_trip_and_torn_lines_are_skipped() {
    let node: NodeName = "node2".parse().expect("valid");
    for left_ms in [None, Some(7)] {
        let location = Location { vmid: vmid(200), node: node.clone(), left_ms };
        let line = to_lines([(&id(2), &location)].into_iter());
        assert_eq!(from_line(line.trim_end()), Some((id(2), location)));
        // A line cut short anywhere is skipped.
        for cut in 0..line.len() - 1 {
            assert_eq!(from_line(&line[..cut]), None, "{}", &line[..cut]);
        }
    }
}
