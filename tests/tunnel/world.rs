//! A node for the tunnel, in a root of its own: the directories of the files, and small programs in place of systemctl
//! and of cloudflared. Nothing here connects to Cloudflare, so a real cloudflared only tells its version and checks
//! configurations.

use std::{
    fs,
    net::SocketAddr,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};

use agent::{
    run::Runner,
    tunnel::{
        api::Api,
        judge, look,
        node::{Node, Paths},
        render::Origin,
        settings::{self, Hostname, Settings},
        setup::{self, Done, Order},
    },
};
use daemon::doctor::{Check, State};

use crate::cloud::{Cloud, TOKEN};

/// 2026-11-30.
pub(crate) const NOW_MS: u64 = 1_796_000_000_000;

/// The stand-in for cloudflared; see its own file.
const STANDIN: &str = env!("CARGO_BIN_EXE_cloudflared-standin");
/// The real one.
const REAL: &str = "/usr/bin/cloudflared";

/// Reason of [`World::with_checker`]'s cloudflared.
pub(crate) const REFUSAL: &str = "the reason of the test";

/// Stands for systemd: gives the unit its files, starts and stops cloudflared, and notes what it was asked. As with
/// `Type=notify`, the unit is activating until it was connected once, and `try-restart` does nothing to such a unit.
/// Files of the root change that: `edge` has the number of connections from the next start on, `stopping` keeps the unit
/// in its stop, `fails` has the verb that fails, and `ignores` one that succeeds and does nothing.
const SYSTEMCTL: &str = r#"
alive() { test -s $ROOT/pid && readlink /proc/$(cat $ROOT/pid)/exe >/dev/null; }
state() {
  if ! alive; then echo inactive; return; fi
  if test -e $ROOT/stopping; then echo deactivating; return; fi
  if test "$(cat $ROOT/given/edge 2>/dev/null)" != 0; then touch $ROOT/given/started; fi
  if test -e $ROOT/given/started; then echo active; else echo activating; fi
}
start() {
  mkdir -p $ROOT/given
  cp $ROOT/tunnel/config.yml $ROOT/tunnel/credentials.json $ROOT/given/
  if test -e $ROOT/edge; then cp $ROOT/edge $ROOT/given/edge; fi
  setsid $CLOUDFLARED --config $ROOT/given/config.yml --no-autoupdate tunnel run \
    --credentials-file $ROOT/given/credentials.json </dev/null >$ROOT/cloudflared.log 2>&1 &
  echo $! > $ROOT/pid
  state >/dev/null
}
stop() {
  if alive; then
    kill -TERM $(cat $ROOT/pid)
    left=1500
    while alive; do
      left=$((left - 1))
      if [ $left -eq 0 ]; then echo "cloudflared does not end on SIGTERM" >&2; exit 1; fi
      sleep 0.02
    done
  fi
  rm -rf $ROOT/given $ROOT/pid
}
case "$1" in
  is-active) now=$(state); echo $now; if test $now = active; then exit 0; fi; exit 3;;
  is-enabled) test -e $ROOT/enabled; exit;;
esac
echo "$*" >> $ROOT/systemctl.log
if test "$(cat $ROOT/fails 2>/dev/null)" = "$1"; then echo "Job failed" >&2; exit 1; fi
if test "$(cat $ROOT/ignores 2>/dev/null)" = "$1"; then exit 0; fi
case "$*" in
  start*) if ! alive; then start; fi;;
  stop*) stop;;
  enable*) touch $ROOT/enabled;;
  disable*) rm -f $ROOT/enabled; stop;;
  restart*) stop; start;;
  try-restart*) if test "$(state)" = active; then stop; start; fi;;
  *) echo "unknown: $*" >&2; exit 1;;
esac
"#;

pub(crate) struct World {
    dir: tempfile::TempDir,
    pub(crate) node: Node,
    pub(crate) origin: Origin,
    pub(crate) metrics: SocketAddr,
}

/// Result of a call of setup: what it said, and how it ended.
pub(crate) type Told = (Vec<String>, Result<Done, setup::Error>);

impl World {
    /// Makes a node with the stand-in for cloudflared.
    pub(crate) fn new() -> Self {
        Self::with(Path::new(STANDIN))
    }

    /// Makes a node where the real cloudflared tells its version and checks configurations, or else its stand-in, and
    /// says so. The stand-in is what connects.
    pub(crate) fn with_real() -> Self {
        let real = Path::new(REAL);
        if real.exists() {
            eprintln!("NOT THE REAL cloudflared connects, but its stand-in: the real one checks");
            return Self::with(real);
        }
        eprintln!(
            "NOT THE REAL cloudflared: {REAL} is not there, so its stand-in with the recorded behaviour ran"
        );
        Self::with(Path::new(STANDIN))
    }

    /// Makes a node whose cloudflared checks configurations and refuses to connect, as a real one does with a tunnel
    /// that is not there. It refuses each configuration while the file `refuses` is there.
    pub(crate) fn with_checker() -> Self {
        let mut world = Self::new();
        let (path, refuses) = (world.file("cloudflared"), world.file("refuses"));
        let script = format!(
            "#!/bin/sh\ncase \"$*\" in\n--version) exec {STANDIN} --version;;\n*\"tunnel ingress validate\")\n\
             if [ -e {} ]; then echo 'Validation failed: {REFUSAL}' >&2; exit 1; fi\nexec {STANDIN} \"$@\";;\n\
             *) echo 'Unauthorized: Invalid tunnel secret' >&2; exit 1;;\nesac\n",
            refuses.display()
        );
        executable(&path, &script);
        let paths = Paths { cloudflared: path, ..world.node.paths().clone() };
        world.node = Node::new(paths, runner(&world.file("output-of-the-checker")));
        world
    }

    fn with(cloudflared: &Path) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let file = |name: &str| dir.path().join(name);
        let script = format!(
            "#!/bin/sh\nROOT={}\nCLOUDFLARED={}\n{SYSTEMCTL}",
            dir.path().display(),
            STANDIN
        );
        executable(&file("systemctl"), &script);
        let paths = Paths {
            dir: file("tunnel"),
            cloudflared: cloudflared.to_owned(),
            systemctl: file("systemctl"),
            systemd: dir.path().to_owned(),
            given: file("given"),
        };
        let free = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        let metrics = free.local_addr().expect("bound");
        Self {
            node: Node::new(paths, runner(&file("output"))),
            origin: Origin {
                domain: host("example.com"),
                caddy: ([127, 0, 0, 1], 8480).into(),
                ca: "/etc/pve-sandbox/tls/ca.crt".into(),
            },
            metrics,
            dir,
        }
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn order(&self) -> Order {
        Order {
            name: settings::name_of(&self.origin.domain),
            zone: None,
            account: None,
            controller: None,
            metrics: self.metrics,
            replace_record: false,
            dry_run: false,
            start: true,
            now_ms: NOW_MS,
        }
    }

    pub(crate) async fn setup(&self, cloud: &Cloud, order: &Order) -> Told {
        let mut told = Vec::new();
        let mut say = |line: &str| told.push(line.to_owned());
        let done = setup::run(order, &self.origin, &api(cloud), &self.node, &mut say).await;
        for line in &told {
            assert!(!line.contains(TOKEN), "{line}");
        }
        (told, done)
    }

    pub(crate) fn settings(&self) -> Settings {
        let path = self.node.paths().settings();
        Settings::read(&path).expect("read").expect("set up")
    }

    /// Returns what `doctor` finds wrong with the tunnel.
    pub(crate) async fn findings(&self, cloud: Option<&Cloud>) -> Vec<Check> {
        self.findings_at(self.node.paths(), cloud, NOW_MS).await
    }

    /// Returns what `doctor` finds wrong with the tunnel of these paths at this time.
    pub(crate) async fn findings_at(
        &self,
        paths: &Paths,
        cloud: Option<&Cloud>,
        now_ms: u64,
    ) -> Vec<Check> {
        let api = cloud.map(api);
        let facts = look::look(paths, Some(&self.origin), api.as_ref(), now_ms).await;
        let all = judge::checks(&facts.expect("seen").expect("set up"), paths).into_iter();
        all.filter(|check| check.state != State::Ok).collect()
    }

    /// Returns what systemctl was asked since the last question.
    pub(crate) fn systemctl(&self) -> Vec<String> {
        let path = self.file("systemctl.log");
        let text = fs::read_to_string(&path).unwrap_or_default();
        fs::remove_file(path).ok();
        text.lines().map(str::to_owned).collect()
    }

    pub(crate) fn pid(&self) -> Option<i32> {
        fs::read_to_string(self.file("pid")).ok()?.trim().parse().ok()
    }

    /// Waits for a state of this node.
    pub(crate) async fn until(&self, what: &str, holds: impl Fn(&Self) -> bool) {
        let waited = async {
            while !holds(self) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(10), waited).await.expect(what);
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if let Some(pid) = self.pid() {
            let pid = nix::unistd::Pid::from_raw(pid);
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).ok();
        }
    }
}

fn executable(path: &Path, script: &str) {
    fs::write(path, script).expect("written");
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).expect("executable");
}

fn runner(output: &Path) -> Runner {
    Runner::new(output.to_owned(), "/proc".into(), |_| false, 1).expect("a runner")
}

/// Sets a tunnel up, with nothing wrong.
pub(crate) async fn set_up() -> (Cloud, World) {
    set_up_in(World::new()).await
}

/// Sets a tunnel up on this node, with nothing wrong.
pub(crate) async fn set_up_in(world: World) -> (Cloud, World) {
    let cloud = Cloud::start().await;
    world.setup(&cloud, &world.order()).await.1.expect("set up");
    world.systemctl();
    (cloud, world)
}

/// Checks that there is this one finding, with this in its remedy.
#[track_caller]
pub(crate) fn only(found: &[Check], name: &str, remedy: &str) {
    let [one] = found else { panic!("{name}: {found:?}") };
    assert_eq!(one.name, name);
    assert!(one.remedy.as_deref().is_some_and(|text| text.contains(remedy)), "{one:?}");
}

pub(crate) fn host(text: &str) -> Hostname {
    text.parse().expect("a host name")
}

pub(crate) fn api(cloud: &Cloud) -> Api {
    Api::new(&cloud.base, &TOKEN.into(), None).expect("a client")
}
