//! Invalid requests of callers: each gets a typed error and changes nothing.

use crate::world::{World, id, ran, refusal, world};

fn refused_as(world: &World, token: &str, args: &[&str]) -> (String, String) {
    let args: Vec<&str> = std::iter::once("--json").chain(args.iter().copied()).collect();
    let output = world.command_with_token(&args, token).output().expect("sandboxctl");
    refusal(&ran(output))
}

#[test]
fn invalid_arguments_are_refused_with_their_reason() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&[]);
    let id = id(&sandbox);
    let long = "x".repeat(5000);
    let cases: &[(&[&str], &str)] = &[
        (&["create", "--snapshot", "no-such-snapshot"], "SNAPSHOT_NOT_FOUND"),
        (&["create", "--snapshot", "a\nlxc.hook.pre-start: /bin/sh"], "FIELD_INVALID"),
        (&["create", "--request-id", "a b"], "FIELD_INVALID"),
        (&["create", "--cpus", "65"], "FIELD_INVALID"),
        (&["create", "--memory", "1"], "FIELD_INVALID"),
        (&["create", "--meta", "k=a\nb"], "FIELD_INVALID"),
        (&["create", "--meta", &format!("k={long}")], "FIELD_INVALID"),
        (&["create", "--node", "no-such-node"], "NODE_NOT_FOUND"),
        (&["create", "--node", "../etc"], "FIELD_INVALID"),
        (&["get", "no_name"], "FIELD_INVALID"),
        (&["get", "nobody"], "SANDBOX_NOT_FOUND"),
        (&["get", "100003"], "SANDBOX_NOT_FOUND"),
        (&["rm", "100003"], "SANDBOX_NOT_FOUND"),
        (&["stop", "9000"], "SANDBOX_NOT_FOUND"),
        (&["exec", "pvelxc-00000000000000000000000000", "--", "true"], "SANDBOX_NOT_FOUND"),
        (&["expose", id, "80", "--name", "Not A Label"], "FIELD_INVALID"),
        (&["hide", id, "never-exposed"], "SERVICE_NOT_FOUND"),
    ];
    for (args, reason) in cases {
        let (got, message) = world.refused(args);
        assert_eq!(&got, reason, "{args:?}: {message}");
    }
    world.finish();
}

#[test]
fn a_wrong_token_and_another_team_see_nothing() {
    let Some(world) = world() else { return };
    let sandbox = world.create(&[]);
    let id = id(&sandbox);
    for token in ["", "wrong", "pvesb_0000"] {
        let (reason, _) = refused_as(&world, token, &["ls"]);
        assert!(reason == "TOKEN_INVALID" || token.is_empty(), "{token:?}: {reason}");
    }
    let other = world.variable("LAB_OTHER_TEAM_TOKEN");
    assert!(!other.is_empty(), "the lab has a token of another team");
    for args in [
        &["get", id][..],
        &["exec", id, "--", "true"],
        &["stop", id],
        &["rm", id],
        &["expose", id, "8000"],
        &["explain", id],
    ] {
        let (reason, _) = refused_as(&world, &other, args);
        assert_eq!(reason, "SANDBOX_NOT_FOUND", "{args:?}");
    }
    let (reason, _) = refused_as(&world, &other, &["nodes"]);
    assert_eq!(reason, "SCOPE_MISSING");
    assert_eq!(world.get(id)["phase"], "running");
    world.finish();
}
