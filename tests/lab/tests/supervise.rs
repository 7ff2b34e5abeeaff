//! Tests of the supervisor as a process, with real services.

use std::fs;
use std::path::Path;
use std::process::{Child, Command};
use std::time::Duration;

use lab::Lab;
use lab::process::{Proc, wait_until};
use lab::supervise::{Restart, Service, Services, State};
use nix::sys::signal::Signal;
use tempfile::TempDir;

const WITHIN: Duration = Duration::from_secs(10);

struct Supervised {
    dir: TempDir,
    process: Child,
    services: Services,
}

impl Supervised {
    #[expect(clippy::disallowed_methods, reason = "a test starts the program that it tests")]
    fn start() -> Supervised {
        let dir = tempfile::tempdir().expect("tempdir");
        let process = Command::new(env!("CARGO_BIN_EXE_lab"))
            .arg("--lab-dir")
            .arg(dir.path())
            .arg("supervise")
            .spawn()
            .expect("it starts");
        let services = Lab::open(dir.path()).expect("a lab").services();
        wait_until(WITHIN, || services.status().is_ok()).expect("it answers");
        Supervised { dir, process, services }
    }

    fn service(&self, name: &str, script: &str) -> Service {
        Service {
            name: name.to_owned(),
            argv: ["/bin/sh", "-c", script].map(str::to_owned).to_vec(),
            env: [("WHO".to_owned(), "me".to_owned())].into(),
            log: self.dir.path().join(format!("{name}.log")),
            restart: Restart::No,
            notify: false,
            autostart: true,
            netns: None,
            cpu_weight: None,
        }
    }

    fn proc(&self, name: &str) -> Proc {
        let pid = self.services.status_of(name).expect("known").pid.expect("it runs");
        Proc::of(pid).expect("it lives")
    }
}

impl Drop for Supervised {
    fn drop(&mut self) {
        // The supervisor may have ended already, as the test wanted.
        drop(self.services.end());
        drop(self.process.wait());
    }
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

#[test]
fn service_starts_logs_and_reports_its_end() {
    let supervised = Supervised::start();
    let mut service = supervised.service("one", "echo out $WHO; echo err >&2; exit 3");
    service.autostart = false;
    let all = supervised.services.put(vec![service]).expect("put");
    assert_eq!((all[0].state, all[0].pid), (State::Stopped, None));
    supervised.services.start("one", WITHIN).ok();
    supervised.services.wait("one", State::Stopped, WITHIN).expect("it ends");
    let status = supervised.services.status_of("one").expect("known");
    assert_eq!(status.last_end.as_deref(), Some("exit code 3"));
    assert_eq!(read(&supervised.dir.path().join("one.log")), "out me\nerr\n");
    let unknown = supervised.services.start("two", WITHIN).expect_err("there is none");
    assert_eq!(unknown.to_string(), "there is no service two");
}

#[test]
fn killed_service_restarts_unless_it_is_held() {
    let supervised = Supervised::start();
    let mut service = supervised.service("one", "exec sleep 1000");
    service.restart = Restart::OnFailure;
    supervised.services.put(vec![service]).expect("put");
    supervised.services.wait("one", State::Ready, WITHIN).expect("it runs");
    let first = supervised.proc("one");
    supervised.services.kill("one", false, WITHIN).expect("killed");
    first.wait_gone(WITHIN).expect("gone");
    wait_until(WITHIN, || {
        supervised.services.status_of("one").is_ok_and(|status| status.restarts == 1)
    })
    .expect("it comes back");
    let second = supervised.proc("one");
    assert_ne!(first, second);
    supervised.services.kill("one", true, WITHIN).expect("killed");
    let status = supervised.services.status_of("one").expect("known");
    assert_eq!(
        (status.state, status.last_end.as_deref()),
        (State::Stopped, Some("killed by SIGKILL"))
    );
    supervised.services.start("one", WITHIN).expect("started by hand");
    let third = supervised.proc("one");
    supervised.services.stop("one", WITHIN).expect("stopped");
    assert!(!third.is_alive());
}

#[test]
fn service_that_cannot_start_or_is_never_ready_is_an_error() {
    let supervised = Supervised::start();
    let mut slow = supervised.service("slow", "exec sleep 1000");
    slow.notify = true;
    let missing =
        Service { argv: vec!["/nonexistent".to_owned()], ..supervised.service("missing", "") };
    supervised.services.put(vec![missing, slow]).expect("put");
    let error = supervised.services.wait("missing", State::Ready, WITHIN).expect_err("it cannot");
    assert!(error.to_string().contains("cannot start /nonexistent"), "{error}");
    let short = Duration::from_millis(50);
    let error = supervised.services.wait("slow", State::Ready, short).expect_err("it does not");
    assert!(error.to_string().contains("is still Starting"), "{error}");
}

#[test]
fn changed_list_restarts_only_what_changed() {
    let supervised = Supervised::start();
    let service = |name: &str, text: &str| supervised.service(name, text);
    let (a, b) = (service("a", "exec sleep 1000"), service("b", "exec sleep 1000"));
    supervised.services.put(vec![a.clone(), b]).expect("put");
    let (first_a, first_b) = (supervised.proc("a"), supervised.proc("b"));
    let c = service("c", "exec sleep 1000");
    supervised.services.put(vec![a, c]).expect("put");
    first_b.wait_gone(WITHIN).expect("what is not in the list ends");
    assert_eq!(supervised.proc("a"), first_a);
    let changed = service("a", "exec sleep 2000");
    supervised.services.put(vec![changed]).expect("put");
    first_a.wait_gone(WITHIN).expect("the changed one ends");
    supervised.services.wait("a", State::Ready, WITHIN).expect("and starts again");
    assert_ne!(supervised.proc("a"), first_a);
    // A service that was removed from the list is listed until its process has ended.
    let alone = || supervised.services.status().expect("answered").len() == 1;
    wait_until(WITHIN, alone).expect("nothing else is left");
}

#[test]
fn services_end_with_the_supervisor() {
    let supervised = Supervised::start();
    supervised.services.put(vec![supervised.service("one", "exec sleep 1000")]).expect("put");
    let service = supervised.proc("one");
    let pid = supervised.process.id().cast_signed();
    Proc::of(pid).expect("it lives").signal(Signal::SIGKILL).expect("killed");
    service.wait_gone(WITHIN).expect("its service dies with it");
}
