//! `doctor`: each finding comes with what was broken, and goes with its remedy.

use serde_json::Value;

use crate::fake::{Behaviour, Fake, Ran, finish};

async fn fake() -> Fake {
    Fake::start(Behaviour { snapshots: vec!["small"], ..Behaviour::default() }).await
}

/// Returns the first check with a name.
#[track_caller]
fn check<'a>(report: &'a Value, name: &str) -> &'a Value {
    let checks = report["checks"].as_array().expect("a list");
    checks.iter().find(|check| check["name"] == name).unwrap_or_else(|| panic!("{name}: {report}"))
}

#[track_caller]
fn json(ran: &Ran) -> Value {
    serde_json::from_slice(&ran.stdout).unwrap_or_else(|error| panic!("{error}: {ran:?}"))
}

async fn with(fake: &Fake, name: &str, value: &str) -> Ran {
    let mut command = fake.command(&["doctor", "--json"]);
    finish(command.env(name, value).spawn().expect("spawn")).await
}

#[tokio::test]
async fn doctor_shows_what_an_operator_sees_and_how_to_mend_it() {
    let fake = fake().await;
    let ran = fake.run(&["doctor", "--json"]).await;
    assert_eq!(ran.code, Some(1), "{ran:?}");
    let report = json(&ran);
    for good in ["context", "connection", "token", "snapshots"] {
        assert_eq!(check(&report, good)["state"], "ok", "{report}");
    }
    // The fake has another version, a node that does not answer, and a finding of fsck.
    assert_eq!(check(&report, "version")["state"], "warning");
    let nodes = report["checks"].as_array().expect("a list").iter();
    let down = nodes.filter(|check| check["name"] == "nodes" && check["state"] == "failed");
    let down: Vec<_> = down.collect();
    assert_eq!((down.len(), down[0]["subject"].as_str()), (1, Some("node2")), "{report}");
    assert_eq!(down[0]["remedy"], "pve-sandbox-agent doctor, on node2");
    assert_eq!(check(&report, "fsck")["found"], "findings: 1 I1");
    assert_eq!(report["failed"], 2, "{report}");

    let ran = fake.run(&["doctor"]).await;
    assert_eq!(ran.code, Some(1));
    assert!(ran.text().lines().all(|line| line.chars().count() <= 80), "{}", ran.text());
    assert!(ran.text().contains("\n  remedy: "), "{}", ran.text());
}

#[tokio::test]
async fn each_flaw_of_the_connection_is_found_until_it_is_mended() {
    let fake = fake().await;
    let good =
        |ran: &Ran, name: &str| assert_eq!(check(&json(ran), name)["state"], "ok", "{ran:?}");
    let bad = |ran: &Ran, name: &str| {
        assert_eq!(ran.code, Some(1), "{ran:?}");
        let report = json(ran);
        let check = check(&report, name);
        assert_eq!(check["state"], "failed", "{report}");
        check["remedy"].as_str().expect("a remedy").to_owned()
    };
    let endpoint = "SANDBOXCTL_ENDPOINT";
    bad(&with(&fake, endpoint, "https://localhost:1").await, "connection");
    good(&with(&fake, endpoint, &fake.endpoint()).await, "connection");

    std::fs::write(fake.file("other"), "pvesb_wrong\n").expect("written");
    let path = |name: &str| fake.file(name).display().to_string();
    bad(&with(&fake, "SANDBOXCTL_TOKEN_FILE", &path("other")).await, "token");
    good(&with(&fake, "SANDBOXCTL_TOKEN_FILE", &path("token")).await, "token");

    let remedy = bad(&with(&fake, "SANDBOXCTL_CA", &path("nowhere.pem")).await, "tls");
    assert!(remedy.contains("SANDBOXCTL_CA"), "{remedy}");
    let other = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("certificate");
    std::fs::write(fake.file("other.pem"), other.cert.pem()).expect("written");
    bad(&with(&fake, "SANDBOXCTL_CA", &path("other.pem")).await, "connection");
    good(&with(&fake, "SANDBOXCTL_CA", &path("cert.pem")).await, "connection");

    // Nothing is configured: the remedy is to log in.
    let bare = finish(fake.bare(&["doctor", "--json"]).spawn().expect("spawn")).await;
    assert!(bad(&bare, "context").contains("sandboxctl login"));

    let empty = Fake::start(Behaviour::default()).await;
    let remedy = bad(&empty.run(&["doctor", "--json"]).await, "snapshots");
    assert!(remedy.starts_with("pve-sandbox-agent template init"), "{remedy}");
    let uneven = Behaviour { snapshots: vec!["uneven"], ..Behaviour::default() };
    let report = json(&Fake::start(uneven).await.run(&["doctor", "--json"]).await);
    let found = check(&report, "snapshots");
    assert_eq!(found["state"], "warning", "{report}");
}
