use std::{fs, os::unix::fs::PermissionsExt};

use super::*;
use crate::{
    ingress::{
        settings::{AcmeDns, Certificate, CertificateFiles, Peers, PlainPath, Secure},
        switch::Run,
        version::Generation,
    },
    run::Runner,
};

/// Address of the listener with a certificate of the operator's own.
const LISTEN: &str = "127.0.0.1:443";

/// Services in memory.
#[derive(Debug, Default)]
struct Memory {
    runs: Mutex<Vec<(Colour, Run)>>,
    calls: Mutex<Vec<String>>,
    broken: Mutex<bool>,
    busy: Mutex<Vec<Colour>>,
    low_ports: Mutex<bool>,
    /// Configuration of Caddy, while another program has the port of its listener with a certificate.
    taken: Mutex<Option<PathBuf>>,
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
        let taken = self.taken.lock();
        let config = taken.as_ref().map(|config| fs::read_to_string(config).unwrap_or_default());
        if *self.broken.lock() || config.is_some_and(|config| config.contains(LISTEN)) {
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

    async fn permit_low_ports(&self, allow: bool) -> io::Result<()> {
        if std::mem::replace(&mut *self.low_ports.lock(), allow) != allow {
            self.calls.lock().push(format!("low ports {allow}"));
        }
        Ok(())
    }
}

struct Place {
    dir: tempfile::TempDir,
    services: Arc<Memory>,
    keeper: Keeper,
}

/// Makes a keeper without a certificate of the operator's own.
fn place() -> Place {
    place_with(|_| None)
}

/// Makes a keeper whose Caddy is a script: `version` and `list-modules` print the files of these names, and `validate` fails
/// when the file `refuse` is there.
fn place_with(secure: impl FnOnce(&Path) -> Option<Secure>) -> Place {
    let dir = tempfile::tempdir().expect("a directory");
    let path = |name: &str| dir.path().join(name);
    let plain = |name: &str| PlainPath::try_from(path(name).as_path()).expect("a plain path");
    let script = format!(
        "#!/bin/sh\ncd {}\ncase $1 in version) cat version;; list-modules) cat modules;; validate) test -s $3 && ! test -e refuse || \
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
        secure: secure(dir.path()),
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
async fn change_by_hand_is_put_back_without_a_switch_and_recorded() {
    let mut place = place();
    let edits = Arc::new(HandEdits::default());
    place.keeper = place.keeper.recording(Arc::clone(&edits));
    place.look().await;
    let written = place.text("caddy.json");
    for (before, other) in ["{}", "", "not json"].into_iter().enumerate() {
        assert_eq!(edits.count(), before as u64);
        fs::write(place.path("caddy.json"), other).expect("written");
        assert_eq!(place.look().await, [""; 0], "what runs is as it should be");
        assert_eq!(place.text("caddy.json"), written);
    }
    fs::remove_file(place.path("caddy.json")).expect("removed");
    assert_eq!(place.look().await, [""; 0]);
    assert_eq!(place.text("caddy.json"), written);
    assert_eq!(edits.count(), 4, "a removal is a change, too");
    let told = edits.recent(SystemClock::default().now_ms());
    assert_eq!(told.into_keys().map(PathBuf::from).collect::<Vec<_>>(), [place.path("caddy.json")]);
    // Nobody has changed the file where the version of Caddy brings another form.
    fs::write(place.path("version"), "v2.11.7 h1:x\n").expect("written");
    place.look().await;
    assert_ne!(place.text("caddy.json"), written);
    assert_eq!(edits.count(), 4);
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

fn pair(domain: &str) -> (String, String) {
    let params = rcgen::CertificateParams::new(vec![format!("*.{domain}")]).expect("names");
    let key = rcgen::KeyPair::generate().expect("a key");
    (params.self_signed(&key).expect("signed").pem(), key.serialize_pem())
}

fn secure(certificate: Certificate) -> Secure {
    let listen = vec![LISTEN.parse().expect("an address")];
    Secure { listen, redirect: Vec::new(), certificate }
}

fn plain(path: PathBuf) -> PlainPath {
    PlainPath::try_from(path.as_path()).expect("a plain path")
}

/// Makes a keeper with a certificate in files, which are not there yet.
fn place_with_files() -> Place {
    place_with(|dir| {
        let (cert, key) = (dir.join("own.crt"), dir.join("own.key"));
        let copy = plain(dir.join("copy.pem"));
        Some(secure(Certificate::Files(CertificateFiles { cert, key, copy })))
    })
}

impl Place {
    fn put(&self, (cert, key): &(String, String)) {
        fs::write(self.path("own.crt"), cert).expect("written");
        fs::write(self.path("own.key"), key).expect("written");
    }

    fn has_secure(&self) -> bool {
        self.text("caddy.json").contains(LISTEN)
    }
}

#[tokio::test]
async fn caddy_runs_without_a_certificate_of_ones_own_until_there_is_a_good_one() {
    let place = place_with_files();
    assert_eq!(place.look().await, ["start Blue"]);
    assert!(!place.has_secure());
    let problem = place.text("problem");
    assert!(problem.contains("runs without it") && problem.contains("own.crt"), "{problem}");
    place.put(&pair("other.test"));
    assert_eq!(place.look().await, [""; 0]);
    assert!(place.text("problem").contains("not for *.sbx.test"), "{}", place.text("problem"));
    place.put(&pair("sbx.test"));
    // It may listen there before it starts.
    assert_eq!(place.look().await, ["low ports true", "start Green", "stop Blue"]);
    assert!(place.has_secure() && !place.path("problem").exists());
    assert_eq!(place.look().await, [""; 0]);
}

#[tokio::test]
async fn renewed_certificate_is_used_and_a_bad_one_leaves_the_one_before() {
    let place = place_with_files();
    place.put(&pair("sbx.test"));
    assert_eq!(place.look().await, ["low ports true", "start Blue"]);
    let (written, copy) = (place.text("caddy.json"), place.text("copy.pem"));
    let next = pair("sbx.test");
    // The certificate is there, and its key is not.
    fs::write(place.path("own.crt"), &next.0).expect("written");
    assert_eq!(place.look().await, [""; 0]);
    assert_eq!(place.text("copy.pem"), copy);
    let problem = place.text("problem");
    assert!(problem.contains("the one before stays") && problem.contains("own.key"), "{problem}");
    for gone in ["own.crt", "own.key"] {
        fs::remove_file(place.path(gone)).expect("removed");
        assert_eq!(place.look().await, [""; 0]);
        assert!(place.has_secure());
    }
    place.put(&next);
    assert_eq!(place.look().await, ["start Green", "stop Blue"]);
    assert_ne!(place.text("copy.pem"), copy);
    assert_eq!(place.text("caddy.json"), written);
    assert!(!place.path("problem").exists());
}

impl Place {
    /// Has another program take the port of the listener, or give it back.
    fn take_port(&self, is_taken: bool) {
        *self.services.taken.lock() = is_taken.then(|| self.path("caddy.json"));
    }

    /// Lets the pause end in which the listener is not tried.
    fn end_rest(&self) {
        let long_ago = Instant::now().checked_sub(RETRY).expect("an earlier time");
        self.keeper.rest.lock().as_mut().expect("a pause").since = long_ago;
    }
}

#[tokio::test]
async fn listener_whose_port_is_taken_leaves_a_configuration_that_starts() {
    let place = place_with_files();
    assert_eq!(place.look().await, ["start Blue"]);
    let bare = place.text("caddy.json");
    place.put(&pair("sbx.test"));
    place.take_port(true);
    assert_eq!(place.look().await, ["low ports true", "start Green", "stop Green"]);
    // It is tried again later, and not once a minute.
    for _ in 0..2 {
        assert_eq!(
            (place.text("caddy.json"), place.services.on()),
            (bare.clone(), vec![Colour::Blue])
        );
        let problem = place.text("problem");
        assert!(problem.contains("Job failed") && problem.contains("ten minutes"), "{problem}");
        assert_eq!(place.look().await, [""; 0]);
    }
    place.end_rest();
    assert_eq!(place.look().await, ["start Green", "stop Green"]);
    assert_eq!(place.text("caddy.json"), bare);
    // What else is new is used meanwhile.
    fs::write(place.path("crt"), "new").expect("written");
    assert_eq!(place.look().await, ["start Green", "stop Blue"]);
    place.take_port(false);
    place.end_rest();
    assert_eq!(place.look().await, ["start Blue", "stop Green"]);
    assert!(place.has_secure() && !place.path("problem").exists());
}

#[tokio::test]
async fn boot_with_a_listener_whose_port_is_taken_ends_with_a_caddy_without_it() {
    let place = place_with_files();
    place.put(&pair("sbx.test"));
    place.take_port(true);
    // Nothing runs.
    let calls = place.look().await;
    assert_eq!(calls, ["low ports true", "start Blue", "stop Blue", "start Blue"]);
    assert_eq!(place.services.on(), [Colour::Blue]);
    assert!(!place.has_secure());
    // systemd starts one again and again, and the agent is a new one.
    *place.keeper.rest.lock() = None;
    place.services.busy.lock().push(Colour::Blue);
    *place.keeper.busy.lock() = Instant::now().checked_sub(BUSY_MAX);
    assert!(!place.keeper.look().await, "it comes up with the other configuration");
    assert!(!place.has_secure());
    assert!(place.text("problem").contains("does not come up"), "{}", place.text("problem"));
    place.services.busy.lock().clear();
    assert_eq!(place.look().await, [""; 0]);
}

#[tokio::test]
async fn listener_is_written_before_a_boot_only_if_caddy_has_come_up_with_it() {
    let place = place_with_files();
    place.put(&pair("sbx.test"));
    assert_eq!(place.keeper.write().await, Ok(Looked::Written));
    assert!(!place.has_secure());
    place.look().await;
    let with_it = place.text("caddy.json");
    assert_eq!(place.keeper.write().await, Ok(Looked::Current));
    assert!(place.has_secure());
    // An agent that was killed between the write and the start.
    let known = record(&place.path("record")).expect("a record");
    place.keeper.note(Record { secure: false, ..known }).expect("noted");
    assert_eq!(place.text("caddy.json"), with_it);
    assert_eq!(place.keeper.write().await, Ok(Looked::Replaced));
    assert!(!place.has_secure());
}

#[tokio::test]
async fn caddy_that_serves_https_goes_on_while_the_next_one_does_not_start() {
    let place = place_with_files();
    place.put(&pair("sbx.test"));
    place.look().await;
    place.put(&pair("sbx.test"));
    place.take_port(true);
    assert_eq!(place.look().await, ["start Green", "stop Green"]);
    assert_eq!(place.look().await, [""; 0]);
    assert_eq!(place.services.on(), [Colour::Blue]);
    assert!(!place.has_secure(), "a boot starts without it");
    place.take_port(false);
    place.end_rest();
    assert_eq!(place.look().await, ["start Green", "stop Blue"]);
    assert!(place.has_secure());
}

#[tokio::test]
async fn low_ports_stay_while_the_configuration_without_them_is_refused() {
    let place = place_with_acme();
    fs::write(place.path("modules"), "dns.providers.cloudflare\n").expect("written");
    assert_eq!(place.look().await, ["low ports true", "start Blue"]);
    fs::write(place.path("modules"), "http\n").expect("written");
    fs::write(place.path("refuse"), "").expect("written");
    place.look().await;
    assert!(place.has_secure() && *place.services.low_ports.lock());
    fs::remove_file(place.path("refuse")).expect("removed");
    place.look().await;
    assert!(!place.has_secure() && !*place.services.low_ports.lock());
}

#[tokio::test]
async fn copy_that_no_setting_uses_is_removed_once_caddy_runs_without_it() {
    let place = place();
    let copies = own_certificate::copies(&place.path("caddy.json"));
    for copy in &copies {
        fs::write(copy, "x").expect("written");
    }
    *place.services.broken.lock() = true;
    place.look().await;
    assert!(copies.iter().all(|copy| copy.exists()));
    *place.services.broken.lock() = false;
    assert_eq!(place.look().await, ["start Blue"]);
    assert!(!copies.iter().any(|copy| copy.exists()));
}

/// Makes a keeper whose Caddy is to get a certificate by itself.
fn place_with_acme() -> Place {
    let place = place_with(|dir| {
        Some(secure(Certificate::Acme(AcmeDns {
            provider: "cloudflare".parse().expect("a name"),
            email: "ops@example.com".parse().expect("a text"),
            token_field: "api_token".parse().expect("a name"),
            directory: None,
            resolvers: Vec::new(),
            token: dir.join("token"),
            token_copy: plain(dir.join("token-copy")),
        })))
    });
    fs::write(place.path("version"), "v2.11.7 h1:x\n").expect("written");
    fs::write(place.path("modules"), "http\ndns.providers.hetzner\n").expect("written");
    fs::write(place.path("token"), "abc\n").expect("written");
    fs::set_permissions(place.path("token"), PermissionsExt::from_mode(0o600)).expect("set");
    place
}

#[tokio::test]
async fn caddy_without_the_module_of_the_provider_is_told_of_and_runs_without_acme() {
    let place = place_with_acme();
    assert_eq!(place.look().await, ["start Blue"]);
    let problem = place.text("problem");
    for word in ["dns.providers.cloudflare", "caddyserver.com/download", "cert and key"] {
        assert!(problem.contains(word), "{word}: {problem}");
    }
    assert!(!place.has_secure() && !place.path("token-copy").exists());
    // Another Caddy, of a version that does not read the token.
    fs::write(place.path("modules"), "dns.providers.cloudflare\n").expect("written");
    fs::write(place.path("version"), "v2.7.6 h1:x\n").expect("written");
    place.look().await;
    assert!(place.text("problem").contains("needs 2.8.0 or later"), "{}", place.text("problem"));
    assert!(!place.has_secure());
    fs::write(place.path("version"), "v2.11.7 h1:x\n").expect("written");
    let calls = place.look().await;
    assert_eq!(calls, ["low ports true", "start Blue", "stop Green"]);
    assert!(place.has_secure() && place.text("token-copy") == "abc");
    assert!(!place.text("caddy.json").contains("abc\""), "the token is in its own file");
    assert!(!place.path("problem").exists());
    // An upgrade by the distribution takes the module away: everything else goes on.
    fs::write(place.path("modules"), "http\n").expect("written");
    assert_eq!(place.look().await, ["low ports false", "start Green", "stop Blue"]);
    assert!(!place.has_secure());
}

#[tokio::test]
async fn token_is_renewed_and_a_list_of_modules_that_fails_changes_nothing() {
    let place = place_with_acme();
    fs::write(place.path("modules"), "dns.providers.cloudflare\n").expect("written");
    assert_eq!(place.look().await, ["low ports true", "start Blue"]);
    fs::write(place.path("token"), "def").expect("written");
    assert_eq!(place.look().await, ["start Green", "stop Blue"]);
    fs::set_permissions(place.path("token"), PermissionsExt::from_mode(0o644)).expect("set");
    assert_eq!(place.look().await, [""; 0]);
    assert!(place.text("problem").contains("chmod 0600"), "{}", place.text("problem"));
    fs::remove_file(place.path("modules")).expect("removed");
    assert_eq!(place.look().await, [""; 0]);
    assert!(place.has_secure());
    assert!(place.text("problem").contains("does not list"), "{}", place.text("problem"));
}
