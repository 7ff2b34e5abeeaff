use std::{
    io,
    path::{Path, PathBuf},
    process::Child,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use agent::{
    clock::{Clock as _, SystemClock},
    ingress::{
        caddy::Proof,
        keeper::{Files, Keeper, Looked},
        program::Caddy,
        settings::Settings,
        switch::{Colour, Run, Service},
        systemd::Services,
    },
    run::Runner,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::{JoinSet, spawn_blocking},
    time::{Instant, sleep, timeout},
};

use crate::{
    http::{Client, Request, get},
    node::{self, Node, at, caddy, host, need_caddy, settings},
    program,
    sandbox::Sandbox,
};

/// Two services that run the real Caddy, as systemd does.
#[derive(Debug)]
pub(crate) struct Two {
    dir: PathBuf,
    /// Variables of Caddy beside those of the unit.
    variables: Vec<(&'static str, String)>,
    runs: Mutex<Vec<(Colour, Child, Run)>>,
    /// Starts so far.
    pub(crate) started: AtomicUsize,
}

impl Two {
    /// Lists the services that run.
    pub(crate) fn on(&self) -> Vec<Colour> {
        self.runs.lock().expect("no panic").iter().map(|(colour, ..)| *colour).collect()
    }

    fn take(&self, colour: Colour) -> Option<Child> {
        let mut runs = self.runs.lock().expect("no panic");
        let index = runs.iter().position(|(of, ..)| *of == colour)?;
        Some(runs.remove(index).1)
    }

    /// Waits until Caddy says that it serves; systemd waits for the notice of readiness.
    async fn is_ready(&self, said: usize) -> io::Result<()> {
        let deadline = Instant::now() + Duration::from_secs(15);
        let count = || {
            let log = std::fs::read_to_string(self.dir.join("caddy.log")).unwrap_or_default();
            log.matches("serving initial configuration").count()
        };
        while count() < said {
            if Instant::now() >= deadline {
                return Err(io::Error::other("Caddy is not ready"));
            }
            sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }
}

#[async_trait::async_trait]
impl Services for Two {
    async fn state(&self, colour: Colour) -> io::Result<Service> {
        let runs = self.runs.lock().expect("no panic");
        let found = runs.iter().find(|(of, ..)| *of == colour);
        Ok(found.map_or(Service::Off, |(_, _, run)| Service::On(run.clone())))
    }

    async fn is_enabled(&self) -> io::Result<bool> {
        Ok(true)
    }

    async fn start(&self, colour: Colour) -> io::Result<()> {
        let number = self.started.fetch_add(1, Ordering::Relaxed) + 1;
        let ours = self.variables.iter().map(|(name, value)| (*name, value.as_str()));
        let all: Vec<_> = program::memory().into_iter().chain(ours).collect();
        let caddy = caddy().expect("not skipped");
        let child = program::run(&caddy, &self.dir.join("caddy.json"), &self.dir, &all);
        let started_ms = SystemClock::default().now_ms();
        let run = Run { invocation: number.to_string(), started_ms };
        self.runs.lock().expect("no panic").push((colour, child, run));
        self.is_ready(number).await
    }

    async fn stop(&self, colour: Colour) -> io::Result<()> {
        let Some(mut child) = self.take(colour) else { return Ok(()) };
        kill(Pid::from_raw(i32::try_from(child.id()).expect("a pid")), Signal::SIGTERM)?;
        spawn_blocking(move || child.wait()).await.map_err(io::Error::other)??;
        Ok(())
    }

    async fn permit_low_ports(&self, _: bool) -> io::Result<()> {
        // Tests use high ports.
        Ok(())
    }
}

impl Drop for Two {
    fn drop(&mut self) {
        for (_, mut child, _) in self.runs.lock().expect("no panic").drain(..) {
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Makes the keeper of a node whose Caddy was ended.
pub(crate) fn keeper(node: &Node, settings: Settings) -> (Keeper, Arc<Two>) {
    keeper_with(node, settings, Vec::new())
}

/// Makes the keeper of a node whose Caddy was ended; the next ones get these variables.
pub(crate) fn keeper_with(
    node: &Node,
    settings: Settings,
    variables: Vec<(&'static str, String)>,
) -> (Keeper, Arc<Two>) {
    let path = |name: &str| node.dir.join(name);
    let services = Arc::new(Two {
        dir: node.dir.clone(),
        variables,
        runs: Mutex::default(),
        started: AtomicUsize::new(0),
    });
    let runner = Runner::new(path("output"), "/proc".into(), |_| false, 2).expect("a runner");
    let program = Caddy { path: caddy().expect("not skipped"), runner, user: None };
    let files = Files {
        config: path("caddy.json"),
        group: None,
        record: path("record"),
        problem: path("problem"),
    };
    let proof = Proof::ensure(&files.config).expect("a proof");
    let keeper = Keeper::new(settings, files, proof, program);
    (keeper.served_by(Arc::clone(&services) as Arc<dyn Services>), services)
}

/// Sends requests until `stop`. A client connects anew, once, when its connection ended without a byte of an
/// answer, as browsers and proxies do. Returns failures.
pub(crate) fn load<D, C, S>(
    dial: D,
    stop: &Arc<AtomicBool>,
    done: &Arc<AtomicUsize>,
) -> JoinSet<Vec<String>>
where
    D: Fn() -> C + Clone + Send + 'static,
    C: Future<Output = io::Result<Client<S>>> + Send + 'static,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut clients = JoinSet::new();
    for _ in 0..32 {
        let (dial, stop, done) = (dial.clone(), Arc::clone(stop), Arc::clone(done));
        clients.spawn(async move {
            let host = host(8000, 100_001);
            let request = Request::get(&host, "/");
            let (mut bad, mut connection) = (Vec::new(), None);
            while !stop.load(Ordering::Relaxed) {
                let mut answer = Err(io::Error::other("not sent"));
                for _ in 0..2 {
                    let mut client = match connection.take() {
                        Some(client) => client,
                        None => match dial().await {
                            Ok(client) => client,
                            Err(error) => {
                                answer = Err(error);
                                continue;
                            }
                        },
                    };
                    answer = client.request(&request).await;
                    if let Ok(got) = &answer {
                        // The one that ends says so.
                        if got.head.get("connection") != Some("close") {
                            connection = Some(client);
                        }
                        break;
                    }
                }
                match answer {
                    Ok(answer) if answer.status == 200 => {
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(answer) => bad.push(format!("{} {}", answer.status, answer.text())),
                    Err(error) => bad.push(error.to_string()),
                }
            }
            bad
        });
    }
    clients
}

/// Waits until more requests are answered.
pub(crate) async fn more(done: &AtomicUsize, count: usize) {
    let before = done.load(Ordering::Relaxed);
    let served = async {
        while done.load(Ordering::Relaxed) < before + count {
            sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(30), served).await.expect("requests are served");
}

#[tokio::test(flavor = "multi_thread")]
async fn second_caddy_takes_over_without_a_lost_request() {
    need_caddy!();
    let mut node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    node.kill_caddy();
    std::fs::remove_file(node.dir.join("caddy.log")).expect("removed");
    let wanted = settings(&node.dir, 1, None);
    let (first, services) = keeper(&node, wanted.clone());
    assert!(first.look().await);
    assert_eq!(services.on(), [Colour::Blue]);

    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let public = node.public;
    let clients = load(move || Client::connect(public), &stop, &done);
    more(&done, 100).await;
    // A change by hand is put back, and nothing is restarted.
    std::fs::write(node.dir.join("caddy.json"), "{}").expect("written");
    assert_eq!(first.write().await, Ok(Looked::Replaced));
    assert!(first.look().await);
    assert_eq!(services.started.load(Ordering::Relaxed), 1);
    // A next agent with other settings.
    let other = Settings { https: false, ..wanted };
    for https in [true, false, true] {
        let (next, _) = keeper(&node, Settings { https, ..other.clone() });
        let next = next.served_by(Arc::clone(&services) as Arc<dyn Services>);
        let before = services.started.load(Ordering::Relaxed);
        assert!(next.look().await);
        let is_new = usize::from(before > 1 || !https);
        assert_eq!(services.started.load(Ordering::Relaxed), before + is_new, "{https}");
        assert_eq!(services.on().len(), 1);
        more(&done, 100).await;
    }
    stop.store(true, Ordering::Relaxed);
    let bad = clients.join_all().await.concat();
    eprintln!("{} answered", done.load(Ordering::Relaxed));
    assert!(bad.is_empty(), "{} failed: {:?}", bad.len(), &bad[..bad.len().min(5)]);
    assert!(!node.dir.join("problem").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn configuration_that_caddy_refuses_leaves_the_one_that_runs() {
    need_caddy!();
    let mut node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    node.kill_caddy();
    std::fs::remove_file(node.dir.join("caddy.log")).expect("removed");
    let wanted = settings(&node.dir, 1, None);
    let (first, services) = keeper(&node, wanted.clone());
    assert!(first.look().await);
    // Certificates that are not there.
    let broken = settings(&node.dir, 1, Some(Path::new("/nonexistent")));
    let (next, _) = keeper(&node, broken);
    let next = next.served_by(Arc::clone(&services) as Arc<dyn Services>);
    assert!(next.look().await);
    let problem = std::fs::read_to_string(node.dir.join("problem")).expect("told");
    assert!(problem.contains("nonexistent"), "{problem}");
    assert_eq!(services.started.load(Ordering::Relaxed), 1);
    assert_eq!(get(node.public, &host(8000, 100_001), "/").await.status, 200);
    assert!(first.look().await, "the one before is right again");
    assert!(!node.dir.join("problem").exists());
    assert!(TcpStream::connect(node.public).await.is_ok());
    let current = node::settings(&node.dir, 1, None);
    assert!(
        agent::ingress::caddy::is_current(&current, &node.dir.join("caddy.json")).expect("read")
    );
}
