use std::collections::BTreeMap;

use super::*;
use crate::{
    enrolment,
    store::enrolments::{Admission, Issued},
};

fn setup(dir: &Path, dry_run: bool) -> Setup {
    Setup {
        dry_run,
        config: dir.join("etc/controller.toml"),
        domain: Some("sandbox.test".into()),
        names: vec!["api.test".into()],
        team: "main".parse().expect("team"),
        join: false,
        no_start: true,
        ssh: None,
        sandboxctl_config: Some(dir.join("home/config.toml")),
        data_dir: Some(dir.join("data")),
        node_root: dir.join("node"),
    }
}

/// Runs the setup; returns whether anything was missing, and what it said.
async fn run(setup: &Setup) -> (bool, String) {
    let mut said = String::new();
    let mut say = |line: &str| {
        said.push_str(line);
        said.push('\n');
        Ok(())
    };
    let changed = setup.run(&mut say).await.expect("set up");
    (changed, said)
}

fn entries(dir: &Path) -> usize {
    fs::read_dir(dir).map_or(0, Iterator::count)
}

#[tokio::test]
async fn second_run_changes_nothing_and_a_dry_run_never_does() {
    let dir = tempfile::tempdir().expect("a directory");
    let (missing, said) = run(&setup(dir.path(), true)).await;
    assert!(missing && said.contains("would make a CA"), "{said}");
    assert_eq!(entries(dir.path()), 0, "a dry run writes nothing");

    let (missing, said) = run(&setup(dir.path(), false)).await;
    assert!(missing && said.contains("done: make a CA"), "{said}");
    let config = Config::load(&dir.path().join("etc/controller.toml")).expect("a configuration");
    assert_eq!(config.urls().domain().as_deref(), Some("sandbox.test"));
    assert_eq!(config.url_template, "https://port-{port}-{id}.sandbox.test");
    let names = ca::names(&config.data_dir).expect("names");
    assert!(names.contains(&"api.test".to_owned()) && names.len() > 5, "{names:?}");

    // The token that is saved is good.
    let saved = fs::read_to_string(dir.path().join("home/tokens/local")).expect("a token");
    let (id, secret) = proto::token::split(saved.trim()).expect("a token");
    let store = Sqlite::open(&config.database()).expect("opened");
    let known = store.token(id).await.expect("read").expect("it is there");
    let secret = token::Proof::Text(secret);
    assert_eq!(token::verify(&known, secret, SystemClock.now_ms()), token::Verdict::Valid);
    assert_eq!(known.scopes, Scopes::ALL);
    let context = fs::read_to_string(dir.path().join("home/config.toml")).expect("a context");
    assert!(
        context.contains("context = \"local\"") && context.contains("127.0.0.1:7443"),
        "{context}"
    );
    drop(store);

    let certificate = fs::read(dir.path().join("data/ca/controller.crt")).expect("there");
    let (missing, said) = run(&setup(dir.path(), false)).await;
    assert!(!missing && said.contains("nothing to do"), "{said}");
    assert_eq!(fs::read(dir.path().join("data/ca/controller.crt")).expect("there"), certificate);

    // A new name is added; the others stay.
    let more = Setup { names: vec!["new.test".into()], ..setup(dir.path(), false) };
    assert!(run(&more).await.0);
    let all = ca::names(&config.data_dir).expect("names");
    assert_eq!(all.len(), names.len() + 1, "{all:?}");
}

#[tokio::test]
async fn ssh_server_is_switched_on_once_and_its_host_key_stays() {
    let dir = tempfile::tempdir().expect("a directory");
    run(&setup(dir.path(), false)).await;
    let path = dir.path().join("etc/controller.toml");
    assert!(Config::load(&path).expect("a configuration").ssh.is_none(), "off by default");
    let with = Setup { ssh: "0.0.0.0:2200".parse().ok(), ..setup(dir.path(), false) };
    let (missing, said) = run(&with).await;
    assert!(missing && said.contains("make the SSH host key"), "{said}");
    let key = said.split("SHA256:").nth(1).and_then(|key| key.split_whitespace().next());
    let fingerprint = key.expect("a fingerprint").to_owned();
    let (missing, said) = run(&with).await;
    assert!(!missing && said.contains(&fingerprint), "{said}");
    let ssh = Config::load(&path).expect("a configuration").ssh.expect("on");
    assert_eq!((ssh.listen.port(), ssh.connections_max), (2200, 1024));
}

#[tokio::test]
async fn configuration_of_the_operator_is_kept() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("etc/controller.toml");
    fs::create_dir_all(dir.path().join("etc")).expect("made");
    let data = dir.path().join("elsewhere");
    let mine = format!(
        "# mine\nurl_template = \"https://port-{{port}}-vm-{{vmid}}.mine.test\"\ndata_dir = {data:?}\n"
    );
    fs::write(&path, &mine).expect("written");
    let setup = Setup { domain: None, ..setup(dir.path(), false) };
    run(&setup).await;
    assert_eq!(fs::read_to_string(&path).expect("read"), mine);
    assert!(data.join("ca/ca.crt").exists());
    // Its form, too, where it has the domain that is asked for.
    let same = Setup { domain: Some("mine.test".into()), ..setup };
    run(&same).await;
    assert_eq!(fs::read_to_string(&path).expect("read"), mine);
}

/// Runs a setup that must fail; returns why.
async fn refused(setup: &Setup) -> String {
    let error = setup.run(&mut |_| Ok(())).await.expect_err("refused");
    format!("{error:#}")
}

/// Reads all files below a directory, but those of the store: a thread of its own closes it some time later.
fn content(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let (mut found, mut next) = (BTreeMap::new(), vec![dir.to_owned()]);
    while let Some(path) = next.pop() {
        if path.is_dir() {
            let entries = fs::read_dir(&path).expect("listed");
            next.extend(entries.map(|entry| entry.expect("read").path()));
        } else if !path.to_string_lossy().contains("/controller.db") {
            let bytes = fs::read(&path).expect("read");
            found.insert(path, bytes);
        }
    }
    found
}

/// Lets a node join, as the controller stores it.
async fn join(config: &Config, node: &str) {
    let store = Sqlite::open(&config.database()).expect("opened");
    let node = node.parse().expect("a name");
    let (_, token) = enrolment::issue(&node, 0, SystemClock.now_ms()).expect("issued");
    store.add_node_token(token.clone()).await.expect("stored");
    let admission = Admission {
        token: token.id,
        key: vec![1; 32],
        node,
        address: "192.0.2.12:7445".to_owned(),
        pool: "10.100.1.0/24".to_owned(),
        issued: Issued { serial: "01".to_owned(), not_after_ms: u64::MAX / 2, in_use: None },
        now_ms: SystemClock.now_ms(),
    };
    assert!(store.admit(admission).await.expect("stored"));
}

/// Returns method, object and kind of the entries that wait for the audit log.
fn recorded(dir: &Path) -> Vec<(String, String, String)> {
    let text = fs::read_to_string(dir.join("data/audit/local.jsonl")).unwrap_or_default();
    let entry = |line: &str| {
        let entry: serde_json::Value = serde_json::from_str(line).expect("an entry");
        let word = |key: &str| entry[key].as_str().unwrap_or_default().to_owned();
        (word("method"), word("object"), word("kind"))
    };
    text.lines().map(entry).collect()
}

#[tokio::test]
async fn domain_that_is_given_later_restarts_the_controller_and_names_the_nodes() {
    let dir = tempfile::tempdir().expect("a directory");
    let without = Setup { domain: None, ..setup(dir.path(), false) };
    run(&without).await;
    let config = Config::load(&dir.path().join("etc/controller.toml")).expect("a configuration");
    join(&config, "pve2").await;
    let later = setup(dir.path(), false);
    assert!(later.planned().expect("read").changes, "a controller that runs has to be restarted");
    let (missing, said) = run(&later).await;
    assert!(missing && said.contains("done: write "), "{said}");
    assert!(said.contains("(pve2)") && said.contains("domain = \"sandbox.test\""), "{said}");
    assert!(!later.planned().expect("read").changes);
    let (missing, said) = run(&later).await;
    assert!(!missing && !said.contains("pve2"), "{said}");
}

#[tokio::test]
async fn change_of_a_run_that_fails_before_the_restart_is_seen_by_the_next_one() {
    let dir = tempfile::tempdir().expect("a directory");
    run(&Setup { domain: None, ..setup(dir.path(), false) }).await;
    let path = dir.path().join("etc/controller.toml");
    let config = Config::load(&path).expect("a configuration");
    join(&config, "pve2").await;
    let before = fs::read_to_string(&path).expect("read");
    let key = host_key::path(&config.data_dir);
    fs::write(&key, "no key").expect("written");
    let later = Setup { ssh: "0.0.0.0:2200".parse().ok(), ..setup(dir.path(), false) };
    refused(&later).await;
    assert_eq!(fs::read_to_string(&path).expect("read"), before);
    assert!(later.planned().expect("read").changes, "the controller still has to be restarted");
    fs::remove_file(&key).expect("removed");
    let (_, said) = run(&later).await;
    assert!(said.contains("done: write ") && said.contains("(pve2)"), "{said}");
}

#[tokio::test]
async fn nodes_that_need_a_new_domain_are_named_before_a_step_of_the_node_fails() {
    let dir = tempfile::tempdir().expect("a directory");
    run(&Setup { domain: None, ..setup(dir.path(), false) }).await;
    let config = Config::load(&dir.path().join("etc/controller.toml")).expect("a configuration");
    join(&config, "pve2").await;
    // This machine is that node, and its agent cannot tell what it lacks.
    for (name, text) in [
        ("etc/pve/.members", r#"{"nodename": "pve2"}"#),
        ("etc/pve-sandbox/tls/node.crt", ""),
        ("usr/sbin/pve-sandbox-agent", "no program"),
    ] {
        let path = dir.path().join("node").join(name);
        fs::create_dir_all(path.parent().expect("below the root")).expect("made");
        fs::write(path, text).expect("written");
    }
    let later = Setup { join: true, ..setup(dir.path(), false) };
    let mut said = String::new();
    let mut say = |line: &str| {
        said.push_str(line);
        Ok(())
    };
    later.run(&mut say).await.expect_err("no agent");
    assert!(said.contains("(pve2)"), "{said}");
}

#[tokio::test]
async fn one_address_that_the_controller_listens_on_is_used_for_the_context_and_the_certificate() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("etc/controller.toml");
    fs::create_dir_all(dir.path().join("etc")).expect("made");
    let data = dir.path().join("data");
    fs::write(&path, format!("listen = \"192.0.2.11:7000\"\ndata_dir = {data:?}\n"))
        .expect("written");
    run(&setup(dir.path(), false)).await;
    let context = fs::read_to_string(dir.path().join("home/config.toml")).expect("a context");
    assert!(context.contains("\"https://192.0.2.11:7000\""), "{context}");
    let names = ca::names(&data).expect("names");
    assert!(names.contains(&"192.0.2.11".to_owned()), "{names:?}");
    // Another address later.
    let text = fs::read_to_string(&path).expect("read");
    fs::write(&path, text.replace("192.0.2.11", "192.0.2.12")).expect("written");
    let (missing, said) = run(&setup(dir.path(), false)).await;
    assert!(missing && said.contains("add 192.0.2.12 to"), "{said}");
    assert!(!run(&setup(dir.path(), false)).await.0, "a second run has nothing to do");
}

#[test]
fn agent_of_this_machine_joins_where_the_controller_listens() {
    let names = ["10.0.0.9".to_owned()];
    let both = ["2001:db8::1".to_owned(), "10.0.0.9".to_owned()];
    let cases: [(&str, &[String], &str); 8] = [
        ("0.0.0.0:7443", &both, "10.0.0.9:7443"),
        ("[::]:7443", &both, "[2001:db8::1]:7443"),
        ("0.0.0.0:7443", &names, "10.0.0.9:7443"),
        ("[::]:7443", &["2001:db8::1".to_owned()], "[2001:db8::1]:7443"),
        ("0.0.0.0:7443", &[], "127.0.0.1:7443"),
        ("192.0.2.11:7000", &names, "192.0.2.11:7000"),
        ("[2001:db8::2]:7443", &names, "[2001:db8::2]:7443"),
        ("127.0.0.1:7443", &names, "127.0.0.1:7443"),
    ];
    for (listen, names, expected) in cases {
        let listen = listen.parse().expect("an address");
        assert_eq!(node::reachable(listen, names), expected);
    }
}

#[test]
fn unit_is_enabled_and_started_and_restarted_for_a_change_alone() {
    let words = |is_up, is_enabled, is_changed| {
        let steps = unit_steps(is_up, is_enabled, is_changed).into_iter();
        steps.map(|(_, words)| words.join(" ")).collect::<Vec<_>>()
    };
    let restart = format!("restart {UNIT}");
    let (enable, now) = (format!("enable --quiet {UNIT}"), format!("enable --now --quiet {UNIT}"));
    assert_eq!(words(true, true, false), [""; 0]);
    assert_eq!(words(true, true, true), [restart.as_str()]);
    assert_eq!(words(true, false, false), [enable.as_str()]);
    assert_eq!(words(true, false, true), [enable, restart]);
    for (is_enabled, is_changed) in [(true, true), (true, false), (false, true), (false, false)] {
        assert_eq!(words(false, is_enabled, is_changed), [now.as_str()]);
    }
}

#[tokio::test]
async fn malformed_input_is_refused_before_the_first_step() {
    let dir = tempfile::tempdir().expect("a directory");
    for dry_run in [true, false] {
        let name = Setup { names: vec!["\u{e9}.x".into()], ..setup(dir.path(), dry_run) };
        assert!(refused(&name).await.contains("neither a host name nor an address"));
        let domain = Setup { domain: Some("a b".into()), ..setup(dir.path(), dry_run) };
        assert!(refused(&domain).await.contains("url_template"));
        // A node of PVE whose agent is not installed.
        let node = dir.path().join("node/etc/pve");
        fs::create_dir_all(&node).expect("made");
        fs::write(node.join(".members"), r#"{"nodename": "pve1"}"#).expect("written");
        let join = Setup { join: true, ..setup(dir.path(), dry_run) };
        assert!(refused(&join).await.contains("pve-sandbox-agent is not installed"));
        fs::remove_dir_all(dir.path().join("node")).expect("removed");
        assert_eq!(entries(dir.path()), 0, "nothing is written");
    }
}

#[tokio::test]
async fn lost_half_of_a_ca_is_told_and_a_ca_that_never_was_is_made() {
    let dir = tempfile::tempdir().expect("a directory");
    run(&setup(dir.path(), false)).await;
    let ca = dir.path().join("data/ca");
    fs::remove_file(ca.join("client-ca.crt")).expect("removed");
    let before = content(dir.path());
    for dry_run in [true, false] {
        let other = Setup { domain: Some("other.test".into()), ..setup(dir.path(), dry_run) };
        let why = refused(&other).await;
        assert!(why.contains("client-ca.crt is not there"), "{why}");
        let after = content(dir.path());
        let differs = |path: &&PathBuf| before.get(*path) != after.get(*path);
        let written: Vec<_> = before.keys().chain(after.keys()).filter(differs).collect();
        assert!(written.is_empty(), "{written:?}");
    }
    // Both halves: as an earlier version had it.
    fs::remove_file(ca.join("client-ca.key")).expect("removed");
    let (missing, said) = run(&setup(dir.path(), false)).await;
    assert!(missing && said.contains("done: make client-ca.crt, client-ca.key in "), "{said}");
    assert!(ca.join("client-ca.crt").exists());
    let (missing, said) = run(&setup(dir.path(), false)).await;
    assert!(!missing, "{said}");
}

#[tokio::test]
async fn each_step_of_an_operator_is_in_the_audit_log() {
    let dir = tempfile::tempdir().expect("a directory");
    run(&Setup { domain: None, ..setup(dir.path(), false) }).await;
    let configuration = ("LocalSetupConfiguration", "configuration");
    let with = |change: fn(&mut Setup), dry_run| {
        let mut more = setup(dir.path(), dry_run);
        change(&mut more);
        more
    };
    let changes: [(fn(&mut Setup), _); 3] = [
        (|_| {}, configuration),
        (|more| more.ssh = "0.0.0.0:2200".parse().ok(), configuration),
        (|more| more.names.push("new.test".into()), ("LocalInit", "certificate:controller")),
    ];
    for (change, (method, object)) in changes {
        let before = recorded(dir.path());
        run(&with(change, true)).await;
        assert_eq!(recorded(dir.path()), before, "a dry run has none");
        run(&with(change, false)).await;
        let entry = |kind: &str| (method.to_owned(), object.to_owned(), kind.to_owned());
        assert_eq!(recorded(dir.path())[before.len()..], [entry("begun"), entry("call")]);
        let after = recorded(dir.path());
        run(&with(change, false)).await;
        assert_eq!(recorded(dir.path()), after, "nothing was done");
    }
}
