//! The audit log of a real controller: calls of two teams, through a crash of the controller, are there once each.

use lab::daemons::CONTROLLER;
use serde_json::Value;

use crate::{
    names::Theirs,
    world::{PATIENCE, World, id, ran, unique, wait, world},
};

/// Returns entries of the last hour, the oldest first.
fn entries(world: &World, filter: &[&str]) -> Vec<Value> {
    let list = ["audit", "ls", "-n", "10000", "--since", "1h"];
    let listed = world.json(&[&list[..], filter].concat());
    listed.as_array().expect("a list").clone()
}

fn word<'a>(entry: &'a Value, key: &str) -> &'a str {
    entry[key].as_str().unwrap_or_default()
}

/// Public part of a token.
fn public(token: &str) -> String {
    token.split('_').nth(1).expect("a token").to_owned()
}

/// Entry that a test expects: method, kind, outcomes that it may have.
type Expected = (&'static str, &'static str, &'static [&'static str]);

const OK: &[&str] = &["OK"];
/// Outcomes of a stream whose last message its caller has seen, and has then hung up.
const SEEN: &[&str] = &["OK", "CANCELLED"];
const NONE: &[&str] = &[""];

/// Calls of one token on one sandbox that are to be in the log.
struct Calls {
    token: String,
    team: &'static str,
    sandbox: String,
    expected: Vec<Expected>,
}

impl Calls {
    fn count(&self, all: &[Value], (method, kind, codes): Expected) -> usize {
        let is_it = |entry: &&Value| {
            word(entry, "sandbox_id") == self.sandbox
                && (word(entry, "token"), word(entry, "team")) == (&self.token, self.team)
                && (word(entry, "method"), word(entry, "kind")) == (method, kind)
                && codes.contains(&word(entry, "code"))
        };
        all.iter().filter(is_it).count()
    }

    /// Returns the entries that are not there exactly once.
    fn wrong(&self, all: &[Value]) -> Vec<(Expected, usize)> {
        let counts = self.expected.iter().map(|expected| (*expected, self.count(all, *expected)));
        counts.filter(|(_, count)| *count != 1).collect()
    }
}

#[test]
fn calls_of_two_teams_are_in_the_log_once_each_through_a_crash_of_the_controller() {
    let Some(world) = world() else { return };
    let gaps = |world: &World| world.json(&["audit", "verify"])["gaps"].as_u64().expect("gaps");
    let gaps_before = gaps(&world);
    let (own, theirs) = (world.create(&[]), Theirs::create(&world, &["create"]));
    let own = id(&own);
    assert_eq!(world.ctl(&["exec", own, "--", "true"]).code, 0);
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("note");
    std::fs::write(&file, "kept").expect("written");
    let copied = world.ctl(&["cp", file.to_str().expect("text"), &format!("{own}:/srv/note")]);
    assert_eq!(copied.code, 0, "{}", copied.stderr);
    world.json(&["expose", own, "8000", "--name", "web"]);
    // A token of the other team that may not change anything.
    let name = unique("reader");
    let made = world.json(&["token", "create", &name, "--team", "other", "--scope", "read"]);
    let reader = word(&made, "token").to_owned();
    let expose = ["--json", "expose", &theirs.id, "8001"];
    let refused = ran(world.command_with_token(&expose, &reader).output().expect("sandboxctl"));
    assert_ne!(refused.code, 0, "{}", refused.text());

    let calls = [
        Calls {
            token: public(&world.variable("SANDBOXCTL_TOKEN")),
            team: "demo",
            sandbox: own.to_owned(),
            expected: vec![
                ("CreateSandbox", "call", OK),
                ("Exec", "begun", NONE),
                ("Exec", "call", SEEN),
                ("UploadArchive", "begun", NONE),
                ("UploadArchive", "call", OK),
                ("ExposeHttpService", "call", OK),
            ],
        },
        Calls {
            token: public(&world.variable("LAB_OTHER_TEAM_TOKEN")),
            team: "other",
            sandbox: theirs.id.clone(),
            expected: vec![("CreateSandbox", "call", OK)],
        },
    ];
    let wrong = |all: &[Value]| calls.iter().flat_map(|calls| calls.wrong(all)).collect::<Vec<_>>();
    let of_reader = |entry: &&Value| word(entry, "token") == public(&reader);
    // Entries go to the disk within a moment, and no call waits for that.
    wait("the entries of the calls", || {
        let all = entries(&world, &[]);
        wrong(&all).is_empty() && all.iter().any(|entry| of_reader(&entry))
    });

    // A command is under way when the controller dies.
    let begun = |all: &[Value]| calls[0].count(all, ("Exec", "begun", NONE));
    let mut sleeping =
        world.command(&["exec", own, "--", "sleep", "600"]).spawn().expect("started");
    wait("the begin of the command", || begun(&entries(&world, &[])) == 2);
    let before = entries(&world, &[]);
    world.lab.services().kill(CONTROLLER, false, PATIENCE).expect("kill -9");
    sleeping.kill().expect("killed");
    sleeping.wait().expect("dead");
    wait("the controller again", || world.ctl(&["nodes"]).code == 0);

    let after = entries(&world, &[]);
    let is_ours = |entry: &&Value| {
        calls.iter().any(|calls| word(entry, "sandbox_id") == calls.sandbox) || of_reader(entry)
    };
    let newest = before.last().expect("entries")["seq"].as_u64();
    let kept: Vec<_> = after.iter().filter(|entry| entry["seq"].as_u64() <= newest).collect();
    let kept: Vec<_> = kept.into_iter().filter(is_ours).collect();
    assert_eq!(kept, before.iter().filter(is_ours).collect::<Vec<_>>(), "none is lost or twice");
    let refusals: Vec<_> = after.iter().filter(of_reader).collect();
    let [refusal] = refusals[..] else { panic!("{refusals:?}") };
    assert_eq!((word(refusal, "method"), word(refusal, "team")), ("ExposeHttpService", "other"));
    assert_eq!(word(refusal, "code"), "PERMISSION_DENIED", "{refusal}");
    let is_token = |entry: &&Value| {
        let object = word(entry, "object");
        word(entry, "method") == "CreateToken"
            && (object.contains(&name) || object.contains(&public(&reader)))
    };
    let tokens: Vec<_> = after.iter().filter(is_token).collect();
    let [token] = tokens[..] else { panic!("{tokens:?}") };
    assert_eq!((word(token, "team"), word(token, "owner")), ("demo", "other"), "{token}");

    // What each team is told has nothing of the other one.
    for (team, their) in [("demo", &theirs.id[..]), ("other", own)] {
        let all = entries(&world, &["--team", team]);
        assert!(!all.is_empty(), "{team}");
        for entry in &all {
            assert!(word(entry, "team") == team || word(entry, "owner") == team, "{team}: {entry}");
            assert_ne!(word(entry, "sandbox_id"), their, "{team}: {entry}");
        }
    }

    // The crash is a gap, and nothing is wrong; neither is there in an export.
    let verified = world.json(&["audit", "verify"]);
    assert_eq!(verified["broken"], Value::Null, "{verified}");
    assert!(gaps(&world) > gaps_before, "{verified}");
    let export = world.ctl(&["audit", "export"]);
    assert_eq!(export.code, 0, "{}", export.stderr);
    let file = dir.path().join("export.jsonl");
    std::fs::write(&file, &export.stdout).expect("written");
    let checked = world.json(&["audit", "verify", file.to_str().expect("text")]);
    assert_eq!(checked["broken"], Value::Null, "{checked}");
    let text = export.text();
    let stored = text.lines().map(|line| serde_json::from_str::<Value>(line).expect("an entry"));
    let stored: Vec<_> = stored.filter(|entry| entry["sandbox"] == own).collect();
    for (method, kind, _) in &calls[0].expected {
        let is_it = |entry: &&Value| {
            (word(entry, "method"), word(entry, "kind")) == (*method, *kind)
                && entry["seq"].as_u64() <= newest
        };
        // Two commands have begun, and one had ended.
        let expected = if (*method, *kind) == ("Exec", "begun") { 2 } else { 1 };
        assert_eq!(stored.iter().filter(is_it).count(), expected, "{method} {kind}");
    }

    assert_eq!(world.ctl(&["token", "revoke", &public(&reader)]).code, 0);
    theirs.delete();
    world.finish();
}
