//! Callers that hang up on a command whose background is to go on, as SSH clients do.

use super::*;

const TTY: Option<Window> = Some(Window { rows: 24, columns: 80 });

/// Asks that a hang-up ends the session of the command alone.
fn sparing(order: Order) -> Order {
    Order { spare_background: true, ..order }
}

impl Rig {
    async fn listed(&self, exec_id: &str) -> ExecInfo {
        let list = self.execs.list(&SandboxRef::Id(id(1))).await.expect("listed");
        list.into_iter().find(|exec| exec.exec_id == exec_id).expect("there")
    }

    /// Waits until a command has ended, and returns what the list says of it.
    async fn until_ended(&self, exec_id: &str) -> ExecInfo {
        let begun = Instant::now();
        loop {
            let exec = self.listed(exec_id).await;
            if exec.exit.is_some() || !exec.lost.is_empty() {
                return exec;
            }
            assert!(begun.elapsed() < DEADLINE, "it is still running");
            sleep(Duration::from_millis(20)).await;
        }
    }
}

#[tokio::test]
async fn hang_up_spares_other_sessions_and_what_ignores_sighup() {
    let rig = Rig::new().await;
    for (number, tty) in [(7250, None), (7251, TTY)] {
        // Only the test ends these processes, so another run may have left some.
        let mark = format!("{number}.{}", std::process::id());
        let line = format!(
            "sleep {mark}01 & setsid sleep {mark}02 & (trap '' HUP; exec sleep {mark}03) & \
             (setsid sh -c 'sleep {mark}04 & sleep {mark}05 & wait' &); sleep {mark}06; true"
        );
        let order = sparing(Order { tty, ..shell(&line) });
        let (started, _input, outputs) = rig.start(order).await.expect("it starts");
        rig.until_count(&format!("sleep {mark}0"), 6).await;
        drop(outputs);
        let ended = rig.until_ended(&started.exec_id).await;
        assert!(ended.lost.contains("hung up"), "{ended:?}");
        let mut left = Vec::new();
        for process in 1..=6 {
            if rig.count(&format!("sleep {mark}0{process}")).await > 0 {
                left.push(process);
            }
        }
        assert_eq!(left, [2, 3, 4, 5], "{tty:?}");
        rig.end(&format!("{mark}0")).await;
    }
    rig.until_no_place_is_taken().await;
}

/// A process that is just moved to another cgroup is in neither list.
#[tokio::test]
async fn command_that_a_look_has_missed_is_ended_by_the_next() {
    let rig = Rig::new().await;
    let mark = format!("7255.{}", std::process::id());
    for spare_background in [true, false] {
        let order = Order { spare_background, ..shell(&format!("sleep {mark}; true")) };
        let (started, _input, outputs) = rig.start(order).await.expect("it starts");
        rig.until_count(&format!("sleep {mark}"), 1).await;
        rig.pve.blind_looks.store(1, std::sync::atomic::Ordering::Relaxed);
        drop(outputs);
        let ended = rig.until_ended(&started.exec_id).await;
        assert!(ended.lost.contains("hung up"), "{ended:?}");
        assert_eq!(rig.count(&format!("sleep {mark}")).await, 0, "{spare_background}");
    }
}

#[tokio::test]
async fn command_that_ignores_sighup_runs_on_without_its_caller() {
    let (rig, dir) = (Rig::new().await, tempfile::tempdir().expect("tempdir"));
    for (number, tty) in [(7252, None), (7253, TTY)] {
        let (mark, file) = (format!("{number}.{}", std::process::id()), dir.path().join("read"));
        drop(std::fs::remove_file(&file));
        let line = format!(
            "trap '' HUP; echo up; read x; echo \"<$x>\" >{}; sleep {mark}; true",
            file.display()
        );
        let order = sparing(Order { tty, timeout: None, ..shell(&line) });
        let (started, _input, mut outputs) = rig.start(order).await.expect("it starts");
        let up = timeout(DEADLINE, outputs.recv()).await.expect("in time").expect("output");
        assert!(matches!(up, Ok(Output::Stdout(_))), "{up:?}");
        drop(outputs);
        // Its input has ended, as that of a closed terminal or pipe.
        rig.until_count(&format!("sleep {mark}"), 1).await;
        assert_eq!(std::fs::read_to_string(&file).expect("written"), "<>\n", "{tty:?}");
        let runs = rig.listed(&started.exec_id).await;
        assert!(runs.exit.is_none() && runs.lost.is_empty() && runs.attached == 0, "{runs:?}");
        // It is a command like any other: it can be ended, and its end is told.
        let (name, kill) = (SandboxRef::Id(id(1)), Control::Signal(9));
        rig.execs.control(&name, started.exec_id.clone(), kill).await.expect("killed");
        let ended = rig.until_ended(&started.exec_id).await;
        assert_eq!(ended.exit.map(|exit| exit.signal), Some(9), "{tty:?}");
        rig.until_none_holds(&mark).await;
    }
    rig.until_no_place_is_taken().await;
}

#[tokio::test]
async fn timeout_ends_also_what_a_hang_up_would_spare() {
    let rig = Rig::new().await;
    let order = Order { timeout: Some(Duration::from_millis(1500)), ..shell(&thicket("7254")) };
    let (_, _keep, outputs) = rig.start(sparing(order)).await.expect("it starts");
    rig.until_count("sleep 7254.", 7).await;
    assert_eq!(drain(outputs).await.code(), 124);
    rig.until_none_holds("7254.").await;
}
