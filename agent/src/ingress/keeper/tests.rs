use std::{fs, os::unix::fs::PermissionsExt};

use super::*;
use crate::{
    clock::{Clock as _, SystemClock},
    ingress::{
        settings::{Peers, PlainPath},
        switch::Run,
    },
    run::Runner,
};

/// Services in memory.
#[derive(Debug, Default)]
struct Memory {
    runs: Mutex<Vec<(Colour, Run)>>,
    calls: Mutex<Vec<String>>,
    broken: Mutex<bool>,
    busy: Mutex<Vec<Colour>>,
}

impl Memory {
    /// Returns what was called since the last time.
    fn calls(&self) -> Vec<String> {
        std::mem::take(&mut *self.calls.lock())
    }

    fn on(&self) -> Vec<Colour> {
        self.runs.lock().iter().map(|(colour, _)| *colour).collect()
    }
}

#[async_trait::async_trait]
impl Services for Memory {
    async fn state(&self, colour: Colour) -> io::Result<Service> {
        if self.busy.lock().contains(&colour) {
            return Ok(Service::Busy);
        }
        let runs = self.runs.lock();
        let found = runs.iter().find(|(of, _)| *of == colour);
        Ok(found.map_or(Service::Off, |(_, run)| Service::On(run.clone())))
    }

    async fn is_enabled(&self) -> io::Result<bool> {
        Ok(true)
    }

    async fn start(&self, colour: Colour) -> io::Result<()> {
        let mut calls = self.calls.lock();
        calls.push(format!("start {colour:?}"));
        if *self.broken.lock() {
            return Err(io::Error::other("Job failed"));
        }
        let invocation = format!("{colour:?} {}", self.runs.lock().len() + calls.len());
        let run = Run { invocation, started_ms: SystemClock::default().now_ms() + 1000 };
        self.runs.lock().push((colour, run));
        Ok(())
    }

    async fn stop(&self, colour: Colour) -> io::Result<()> {
        self.calls.lock().push(format!("stop {colour:?}"));
        self.runs.lock().retain(|(of, _)| *of != colour);
        self.busy.lock().retain(|of| *of != colour);
        Ok(())
    }
}

struct Place {
    dir: tempfile::TempDir,
    services: Arc<Memory>,
    keeper: Keeper,
}

/// Makes a keeper whose Caddy is a script: `version` prints the file `version`, and `validate` fails when
/// the file `refuse` is there.
fn place() -> Place {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name);
    let plain = |name: &str| PlainPath::try_from(path(name).as_path()).expect("a plain path");
    let script = format!(
        "#!/bin/sh\ncd {}\ncase $1 in version) cat version;; validate) test -s $3 && ! test -e refuse || \
         {{ echo 'Error: it is bad' >&2; exit 1; }};; esac\n",
        dir.path().display()
    );
    fs::write(path("caddy"), script).expect("written");
    fs::set_permissions(path("caddy"), PermissionsExt::from_mode(0o755)).expect("set");
    fs::write(path("version"), "2.6.2\n").expect("written");
    for name in ["ca", "crt", "key"] {
        fs::write(path(name), name).expect("written");
    }
    let settings = Settings {
        domain: "sbx.test".parse().expect("a domain"),
        public: vec!["127.0.0.1:8480".parse().expect("an address")],
        route_socket: plain("route.sock"),
        https: true,
        frames: true,
        cors: true,
        peers: Some(Peers {
            listen: "127.0.0.1:8481".parse().expect("an address"),
            ca: plain("ca"),
            cert: plain("crt"),
            key: plain("key"),
        }),
        access_log: Some(plain("log/access.log")),
        generation: Generation::Before,
    };
    let runner = Runner::new(path("output"), "/proc".into(), |_| false, 1).expect("a runner");
    let caddy = Caddy { path: path("caddy"), runner, user: None };
    let files = Files {
        config: path("caddy.json"),
        group: None,
        record: path("record"),
        problem: path("problem"),
    };
    let proof = Proof::ensure(&files.config).expect("a proof");
    let services = Arc::new(Memory::default());
    let dynamic = Arc::clone(&services) as Arc<dyn Services>;
    let keeper = Keeper::new(settings, files, proof, caddy).served_by(dynamic);
    Place { dir, services, keeper }
}

impl Place {
    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    async fn look(&self) -> Vec<String> {
        assert!(self.keeper.look().await, "no service is busy");
        self.services.calls()
    }
}

#[tokio::test]
async fn first_look_writes_the_configuration_and_starts_caddy() {
    let place = place();
    assert_eq!(place.look().await, ["start Blue"]);
    assert!(place.text("caddy.json").contains("port-"));
    assert!(place.path("log").is_dir());
    assert_eq!(place.look().await, [""; 0]);
    // A new agent knows what the one before has started.
    assert!(place.text("record").contains("Blue"));
    // Nothing is left beside it.
    assert!(!place.path("caddy.candidate.json").exists() && !place.path("problem").exists());
}

#[tokio::test]
async fn change_by_hand_is_put_back_without_a_switch() {
    let place = place();
    place.look().await;
    let written = place.text("caddy.json");
    for other in ["{}", "", "not json"] {
        fs::write(place.path("caddy.json"), other).expect("written");
        assert_eq!(place.look().await, [""; 0], "what runs is as it should be");
        assert_eq!(place.text("caddy.json"), written);
    }
    fs::remove_file(place.path("caddy.json")).expect("removed");
    assert_eq!(place.look().await, [""; 0]);
    assert_eq!(place.text("caddy.json"), written);
}

#[tokio::test]
async fn new_certificate_is_used_by_a_second_caddy_before_the_first_ends() {
    let place = place();
    place.look().await;
    for (round, calls) in
        [["start Green", "stop Blue"], ["start Blue", "stop Green"]].into_iter().enumerate()
    {
        fs::write(place.path("crt"), format!("new {round}")).expect("written");
        assert_eq!(place.look().await, calls);
        assert_eq!(place.look().await, [""; 0]);
    }
    assert_eq!(place.services.on(), [Colour::Blue]);
}

#[tokio::test]
async fn upgrade_of_caddy_brings_the_form_for_it() {
    let place = place();
    place.look().await;
    assert!(!place.text("caddy.json").contains("read_idle_timeout"));
    fs::write(place.path("version"), "v2.11.7 h1:x\n").expect("written");
    assert_eq!(place.look().await, ["start Green", "stop Blue"]);
    assert!(place.text("caddy.json").contains("read_idle_timeout"));
    // Also where the form stays.
    fs::write(place.path("version"), "v2.11.8 h1:x\n").expect("written");
    assert_eq!(place.look().await, ["start Blue", "stop Green"]);
}

#[tokio::test]
async fn configuration_that_caddy_refuses_is_not_used() {
    let place = place();
    place.look().await;
    let written = place.text("caddy.json");
    fs::write(place.path("refuse"), "").expect("written");
    fs::remove_file(place.path("caddy.json")).expect("removed");
    assert_eq!(place.look().await, [""; 0]);
    assert!(!place.path("caddy.json").exists());
    assert_eq!(place.services.on(), [Colour::Blue]);
    assert!(place.text("problem").contains("it is bad"), "{}", place.text("problem"));
    fs::remove_file(place.path("refuse")).expect("removed");
    assert_eq!(place.look().await, [""; 0]);
    assert_eq!(place.text("caddy.json"), written);
    assert!(!place.path("problem").exists());
}

#[tokio::test]
async fn new_certificate_is_used_also_while_caddy_refuses_a_new_configuration() {
    let place = place();
    place.look().await;
    let written = place.text("caddy.json");
    fs::write(place.path("refuse"), "").expect("written");
    // The new Caddy runs with the configuration that is there.
    fs::write(place.path("version"), "v2.11.7 h1:x\n").expect("written");
    for calls in [&["start Green", "stop Blue"][..], &[]] {
        assert_eq!(place.look().await, calls);
    }
    fs::write(place.path("crt"), "new").expect("written");
    for calls in [&["start Blue", "stop Green"][..], &[]] {
        assert_eq!(place.look().await, calls);
        assert_eq!(place.text("caddy.json"), written);
        assert!(place.text("problem").contains("it is bad"), "{}", place.text("problem"));
    }
    fs::remove_file(place.path("refuse")).expect("removed");
    assert_eq!(place.look().await, ["start Green", "stop Blue"]);
    assert!(!place.path("problem").exists());
}

#[tokio::test]
async fn nothing_changes_while_caddy_does_not_tell_its_version() {
    let place = place();
    fs::remove_file(place.path("version")).expect("removed");
    assert_eq!(place.look().await, [""; 0]);
    let problem = place.text("problem");
    assert!(problem.contains("does not tell its version"), "{problem}");
    assert!(!place.path("caddy.json").exists());
    fs::write(place.path("version"), "v2.11.7 h1:x\n").expect("written");
    assert_eq!(place.look().await, ["start Blue"]);
    assert!(!place.path("problem").exists());
    // A new agent, which has not heard it yet.
    let written = place.text("caddy.json");
    *place.keeper.version.lock() = None;
    fs::remove_file(place.path("version")).expect("removed");
    assert_eq!(place.look().await, [""; 0]);
    assert_eq!(place.text("caddy.json"), written);
    fs::write(place.path("version"), "v2.11.7 h1:x\n").expect("written");
    assert_eq!(place.look().await, [""; 0]);
}

#[tokio::test]
async fn caddy_that_never_comes_up_is_a_problem_and_is_stopped_beside_another() {
    let place = place();
    place.look().await;
    let is_busy_for_long = || {
        let long_ago = Instant::now().checked_sub(BUSY_MAX);
        *place.keeper.busy.lock() = Some(long_ago.expect("an earlier time"));
    };
    place.services.busy.lock().push(Colour::Green);
    assert!(!place.keeper.look().await, "it may come up");
    assert!(!place.path("problem").exists());
    is_busy_for_long();
    assert_eq!(place.look().await, ["stop Green"]);
    assert_eq!(place.services.on(), [Colour::Blue]);
    assert!(place.keeper.busy.lock().is_none());
    // The only one.
    place.services.busy.lock().push(Colour::Blue);
    assert!(!place.keeper.look().await, "it may come up");
    is_busy_for_long();
    assert_eq!(place.look().await, [""; 0]);
    assert!(place.text("problem").contains("does not come up"), "{}", place.text("problem"));
    place.services.busy.lock().clear();
    assert_eq!(place.look().await, [""; 0]);
    assert!(!place.path("problem").exists());
}

#[tokio::test]
async fn caddy_that_does_not_start_leaves_the_one_that_runs() {
    let place = place();
    place.look().await;
    *place.services.broken.lock() = true;
    fs::write(place.path("crt"), "new").expect("written");
    assert_eq!(place.look().await, ["start Green", "stop Green"]);
    assert_eq!(place.services.on(), [Colour::Blue]);
    assert!(place.text("problem").contains("Job failed"), "{}", place.text("problem"));
    *place.services.broken.lock() = false;
    assert_eq!(place.look().await, ["start Green", "stop Blue"]);
    assert!(!place.path("problem").exists());
}

#[tokio::test]
async fn configuration_is_written_also_where_caddy_is_not_installed_yet() {
    let place = place();
    fs::remove_file(place.path("caddy")).expect("removed");
    assert_eq!(place.keeper.write().await, Ok(Looked::Written));
    assert!(!place.text("caddy.json").contains("read_idle_timeout"));
    assert_eq!(place.keeper.write().await, Ok(Looked::Current));
}
