//! `setup` that is repeated: what a join has not made is seen, and made by the next run.

use std::{fs, os::unix::fs::PermissionsExt as _, path::Path};

use agent::join::lacks::{self, Lack, Wanted};
use clap::{FromArgMatches as _, Subcommand as _};
use controller::{
    commands::Command,
    store::{
        enrolments::{Admission, Enrolments as _, Issued, NodeToken},
        sqlite::Sqlite,
    },
};

use crate::{patient::Patient as _, sick::Sick};

#[tokio::test(flavor = "multi_thread")]
async fn parts_that_a_join_has_not_made_are_seen() {
    let sick = Sick::start().await;
    sick.sh("echo \"source $ROOT/interfaces.d/*\" >$ROOT/interfaces");
    let all = Wanted { bridge: true, template: true, start: true };
    let look = |wanted, runs| {
        let host = sick.host();
        lacks::look(wanted, &host.bridge, &host.net, runs).expect("read")
    };
    assert_eq!(look(all, true), []);
    assert_eq!(look(all, false), [Lack::Agent]);
    assert_eq!(look(Wanted { start: false, ..all }, false), []);
    // A bridge without its address, and without its interface.
    for (file, breaks) in [
        ("proc/net/fib_trie", "echo >$ROOT/proc/net/fib_trie"),
        ("net/vmbr1", "rm -r $ROOT/net/vmbr1"),
    ] {
        sick.sh(&format!("cp -r $ROOT/{file} $ROOT/kept; {breaks}"));
        assert_eq!(look(all, true), [Lack::Bridge], "{breaks}");
        assert_eq!(look(Wanted { bridge: false, ..all }, true), [], "{breaks}");
        sick.sh(&format!("mv -T $ROOT/kept $ROOT/{file}"));
        assert_eq!(look(all, true), [], "{file} is back");
    }
    // The one of the node's own network would be taken instead.
    let config = sick.host().bridge.config;
    sick.sh("cp $ROOT/agent.toml $ROOT/kept; sed -i '/^bridge = /d' $ROOT/agent.toml");
    assert!(!lacks::names_a_bridge(&config).expect("read"));
    assert_eq!(look(all, true), [Lack::Bridge]);
    sick.sh("mv $ROOT/kept $ROOT/agent.toml");
    assert!(lacks::names_a_bridge(&config).expect("read"));
    sick.sh("sed -i '/^\\[\\[template\\]\\]$/,/^vmid/d' $ROOT/agent.toml");
    assert_eq!(look(all, true), [Lack::Template]);
    assert_eq!(look(Wanted { template: false, ..all }, true), []);
}

/// Stand-in for the agent's program: it notes its command lines. A join ends with an error, and `setup` makes
/// what the file `lacks` names.
const AGENT: &str = "#!/bin/sh\n\
    echo \"$*\" >>$ROOT/calls\n\
    case \"$1 $*\" in\n\
    'join '*) test -z \"$PVE_SANDBOX_JOIN_TOKEN\" || exit 1;;\n\
    'setup '*--dry-run*) cat $ROOT/lacks;;\n\
    'setup '*) test ! -e $ROOT/broken || exit 1; : >$ROOT/lacks;;\n\
    esac\n";

/// Node of PVE with the stand-in, and a controller that is set up for it.
struct Machine {
    dir: tempfile::TempDir,
}

impl Machine {
    fn new() -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        let machine = Self { dir };
        let root = machine.text("");
        machine.write("etc/pve/.members", "{\"nodename\":\"n1\",\"version\":0}");
        let script = AGENT.replace("$ROOT", root.trim_end_matches('/'));
        machine.write("usr/sbin/pve-sandbox-agent", &script);
        let program = machine.dir.path().join("usr/sbin/pve-sandbox-agent");
        fs::set_permissions(program, fs::Permissions::from_mode(0o755)).expect("executable");
        machine
    }

    fn text(&self, name: &str) -> String {
        self.dir.path().join(name).display().to_string()
    }

    fn write(&self, name: &str, text: &str) {
        let path = self.dir.path().join(name);
        fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).expect("made");
        fs::write(path, text).expect("written");
    }

    /// Runs `setup --join`; returns what it says.
    async fn setup(&self, flags: &str) -> Result<String, String> {
        let [config, data, home, root] =
            ["controller.toml", "data", "home/config.toml", ""].map(|name| self.text(name));
        let line = format!(
            "pve-sandbox-controller setup --config {config} --data-dir {data} --domain sandbox.test \
             --no-start --sandboxctl-config {home} --node-root {root} --join {flags}"
        );
        let definition = Command::augment_subcommands(clap::Command::new("pve-sandbox-controller"));
        let matches = definition.try_get_matches_from(line.split_whitespace()).expect("a command");
        let Ok(Command::Setup(setup)) = Command::from_arg_matches(&matches) else {
            panic!("{line} is another command");
        };
        let mut said = String::new();
        let mut say = |line: &str| {
            said.push_str(line);
            said.push('\n');
            Ok(())
        };
        let done = setup.run(&mut say).await;
        done.map(|_| said).map_err(|error| format!("{error:#}"))
    }

    /// Command lines that the stand-in got since the last call.
    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.text("calls")).unwrap_or_default();
        fs::remove_file(self.text("calls")).ok();
        calls.lines().map(str::to_owned).collect()
    }

    /// Enrols the node, as a join does.
    async fn enrol(&self) {
        let node: proto::name::NodeName = "n1".parse().expect("a name");
        let store = Sqlite::open(Path::new(&self.text("data/controller.db"))).expect("opened");
        let (id, key) = ("pvesj_test".to_owned(), vec![1]);
        let token = NodeToken {
            id: id.clone(),
            hash: vec![0; 32],
            node: node.clone(),
            created_ms: 1,
            expires_ms: 1000,
            used_ms: 0,
            key: Vec::new(),
        };
        store.add_node_token(token).await.expect("added");
        let admission = Admission {
            token: id,
            key,
            node,
            address: "192.0.2.11:7445".into(),
            pool: "10.100.1.0/24".into(),
            issued: Issued { serial: "01".into(), not_after_ms: 10_000, in_use: None },
            now_ms: 2,
        };
        assert!(store.admit(admission).await.expect("stored"), "it is enrolled");
        self.write("etc/pve-sandbox/tls/node.crt", "");
    }
}

#[tokio::test]
async fn setup_makes_what_an_interrupted_join_has_not() {
    let machine = Machine::new();
    let error = machine.setup("").await.expect_err("the join has not made all");
    assert!(error.contains("could not join the agent of n1"), "{error}");
    let calls = machine.calls();
    assert!(calls.len() == 1 && calls[0].starts_with("join https://"), "{calls:?}");
    assert!(calls[0].ends_with("--no-start") && !calls[0].contains("pvesj"), "{calls:?}");

    machine.enrol().await;
    machine.write("lacks", "would make the bridge\nwould make the first template\n");
    let said = machine.setup("--dry-run").await.expect("a dry run");
    assert!(said.contains("would make the bridge, make the first template"), "{said}");
    assert_eq!(machine.calls(), ["setup --no-start --dry-run"]);

    // What still fails is an error each time, and is tried again.
    machine.write("broken", "");
    let error = machine.setup("").await.expect_err("it fails again");
    assert!(error.contains("could not make the bridge"), "{error}");
    fs::remove_file(machine.text("broken")).expect("mended");
    machine.calls();
    let said = machine.setup("").await.expect("the rest is made");
    assert!(said.contains("done: make the bridge, make the first template"), "{said}");
    assert_eq!(machine.calls(), ["setup --no-start --dry-run", "setup --no-start"]);
    let said = machine.setup("").await.expect("all is there");
    assert!(said.contains("nothing to do"), "{said}");
    assert_eq!(machine.calls(), ["setup --no-start --dry-run"]);
}
