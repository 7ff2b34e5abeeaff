//! Tests of `audit`: its output, and that a changed export is found without a controller.

use daemon::audit::{Chain, GAP_QUEUE, Head, Kind, Record};
use proto::sandbox::v1::{AuditEntry, AuditGap, AuditKind};
use serde_json::json;

use crate::fake::{Behaviour, Fake, ID};

fn record(kind: Kind) -> Record {
    Record::new(kind, 1_700_000_000_000)
}

/// Stored log of the fake, and its last line.
pub(crate) fn log() -> (Vec<u8>, Head) {
    let (mut chain, mut lines) = (Chain::after(Head::START), Vec::new());
    let call = Record { method: "Exec".into(), sandbox: ID.into(), ..record(Kind::Call) };
    let gap = Record { reason: GAP_QUEUE.into(), count: 92, ..record(Kind::Gap) };
    for record in [record(Kind::Opened), call, gap] {
        chain.add(&record, &mut lines);
    }
    (lines, chain.head())
}

/// The same as the API lists it.
pub(crate) fn entries() -> Vec<AuditEntry> {
    let entry = |seq, kind: AuditKind| AuditEntry {
        seq,
        at: Some(prost_types::Timestamp { seconds: 1_700_000_000, nanos: 0 }),
        kind: kind.into(),
        ..AuditEntry::default()
    };
    let call = AuditEntry {
        method: "Exec".into(),
        team: "lab".into(),
        token: "0123456789ab".into(),
        user: "ada@example.com".into(),
        peer: "192.0.2.7:4711".into(),
        sandbox_id: ID.into(),
        duration: Some(prost_types::Duration { seconds: 1, nanos: 500_000_000 }),
        ..entry(2, AuditKind::Call)
    };
    let gap = AuditGap::QueueFull.into();
    vec![
        entry(1, AuditKind::Opened),
        call,
        AuditEntry { gap, count: 92, ..entry(3, AuditKind::Gap) },
    ]
}

#[tokio::test]
async fn audit_ls_shows_callers_objects_and_outcomes() {
    let fake = Fake::start(Behaviour::default()).await;
    let ran = fake.run(&["audit", "ls"]).await;
    let rows: Vec<Vec<_>> =
        ran.text().lines().map(|line| line.split_whitespace().collect()).collect();
    let at = "2023-11-14T22:13:20Z";
    assert_eq!(rows[0], ["SEQ", "AT", "TEAM", "WHO", "CALL", "OBJECT", "OUTCOME"], "{ran:?}");
    assert_eq!(rows[2], ["2", at, "lab", "ada@example.com", "Exec", ID, "ok"], "{ran:?}");
    assert!(ran.text().contains("QUEUE_FULL: 92 missing"), "{ran:?}");
    let wide = fake.run(&["audit", "ls", "-o", "wide", "--team", "lab"]).await;
    assert!(wide.text().contains("192.0.2.7:4711") && wide.text().contains("1500 ms"), "{wide:?}");
    let value = fake.run(&["audit", "ls", "--team", "lab", "--json"]).await.json();
    let entry = &value[0];
    assert_eq!((&entry["code"], &entry["duration_s"]), (&json!("OK"), &json!(1.5)), "{value}");
    assert_eq!((&entry["peer"], &entry["kind"]), (&json!("192.0.2.7:4711"), &json!("call")));
    let last = fake.run(&["audit", "ls", "-n", "1", "--since", "30d"]).await;
    assert!(last.stderr.contains("the newest 1"), "{last:?}");
    assert_eq!(fake.run(&["audit", "ls", "--since", "soon"]).await.code, Some(2));
}

#[tokio::test]
async fn export_is_verified_without_a_controller() {
    let fake = Fake::start(Behaviour::default()).await;
    let ran = fake.run(&["audit", "export"]).await;
    let (lines, head) = log();
    assert_eq!((ran.code, &ran.stdout), (Some(0), &lines), "{ran:?}");
    let path = fake.file("audit.jsonl");
    let name = path.to_str().expect("utf-8");
    let verify = async |bytes: &[u8], more: &[&str]| {
        std::fs::write(&path, bytes).expect("written");
        let args = [&["audit", "verify", name], more].concat();
        crate::fake::finish(fake.bare(&args).spawn().expect("spawn")).await
    };
    let right = verify(&lines, &[]).await;
    let expected = format!(
        "3 entries are right: 1 to 3\nplaces where entries are missing: 1; 92 missing ones were \
         counted\nhead {head}\n"
    );
    assert_eq!((right.code, right.text()), (Some(0), expected.as_str()), "{right:?}");
    let changed = String::from_utf8(lines.clone()).expect("text").replace("Exec", "Stat");
    let wrong = verify(changed.as_bytes(), &[]).await;
    assert_eq!(wrong.code, Some(1));
    let expected = format!("line 3 of {name} (entry 3) is wrong: the line does not follow");
    assert!(wrong.text().starts_with(&expected), "{wrong:?}");
    // A cut tail is found by the head alone.
    let cut =
        &lines[..lines[..lines.len() - 1].iter().rposition(|b| *b == b'\n').expect("a line") + 1];
    assert_eq!(verify(cut, &[]).await.code, Some(0));
    let head = head.to_string();
    let missing = verify(cut, &["--head", &head]).await;
    assert_eq!(missing.code, Some(1));
    assert!(missing.text().contains("is missing"), "{missing:?}");
    assert_eq!(verify(&lines, &["--head", &head]).await.code, Some(0));
    assert_eq!(verify(&lines, &["--head", "7"]).await.code, Some(2));
    let none = fake.bare(&["audit", "verify", "/no/such/file"]).spawn().expect("spawn");
    assert_eq!(crate::fake::finish(none).await.code, Some(1));
}

#[tokio::test]
async fn verify_asks_the_controller() {
    let fake = Fake::start(Behaviour::default()).await;
    let ran = fake.run(&["audit", "verify"]).await;
    let (_, head) = log();
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.text().ends_with(&format!("head {head}\n")), "{ran:?}");
    let other = format!("3:{}", "0".repeat(64));
    let ran = fake.run(&["audit", "verify", "--head", &other]).await;
    assert_eq!(ran.code, Some(1));
    let first = "entry 3 in audit-00000000000000000001.jsonl is wrong: ";
    assert!(ran.text().starts_with(first), "{}", ran.text());
    let value = fake.run(&["audit", "verify", "--json"]).await.json();
    assert_eq!((&value["entries"], &value["lost"]), (&json!(3), &json!(92)), "{value}");
}
