//! Tests of the other verbs: their text and JSON, and their failures.

use std::sync::atomic::{AtomicU32, Ordering};

use serde_json::json;

use crate::fake::{Behaviour, Fake, HOSTILE, ID, WITHOUT_URL, finish};

async fn fake() -> Fake {
    Fake::start(Behaviour { snapshots: vec!["small"], ..Behaviour::default() }).await
}

#[tokio::test]
async fn create_takes_the_only_snapshot_and_waits_until_it_runs() {
    let fake = fake().await;
    let ran = fake.run(&["create", "--expose", "web=8080"]).await;
    assert_eq!((ran.code, ran.text()), (Some(0), format!("{ID}\n").as_str()), "{ran:?}");
    assert!(ran.stderr.contains("running on node2 at 10.100.2.7"), "{ran:?}");
    let value = fake.run(&["create", "--json"]).await.json();
    assert_eq!((&value["id"], &value["phase"]), (&json!(ID), &json!("running")), "{value}");
    let value = fake.run(&["create", "--json", "--no-wait", "--request-id", "r-9"]).await.json();
    assert_eq!((&value["phase"], &value["request_id"]), (&json!("creating"), &json!("r-9")));
    let list = fake.run(&["create", "--json", "--count", "3"]).await.json();
    assert_eq!(list.as_array().map(Vec::len), Some(3), "{list}");
}

#[tokio::test]
async fn create_with_several_snapshots_lists_them() {
    let fake =
        Fake::start(Behaviour { snapshots: vec!["big", "small"], ..Behaviour::default() }).await;
    let ran = fake.run(&["create"]).await;
    assert_eq!(ran.code, Some(2));
    assert!(
        ran.stderr.contains("there are 2 snapshots: big, small\nhint: choose one with --snapshot"),
        "{ran:?}"
    );
    let value = fake.run(&["create", "--json", "--no-wait", "--snapshot", "big"]).await.json();
    assert_eq!(value["snapshot_id"], "big");
    let mut set = fake.command(&["create", "--json", "--no-wait"]);
    let set = finish(set.env("SANDBOXCTL_SNAPSHOT", "small").spawn().expect("spawn")).await;
    assert_eq!(set.json()["snapshot_id"], "small");
    let none = Fake::start(Behaviour::default()).await.run(&["create"]).await;
    assert_eq!(none.code, Some(3), "{none:?}");
}

#[tokio::test]
async fn create_asks_again_when_the_outcome_is_unknown() {
    let behaviour =
        Behaviour { snapshots: vec!["small"], unknown: AtomicU32::new(2), ..Behaviour::default() };
    let fake = Fake::start(behaviour).await;
    assert_eq!(fake.run(&["create"]).await.code, Some(0));
    assert_eq!(fake.behaviour.creates.load(Ordering::SeqCst), 3);
}

#[tokio::test]
async fn failed_create_shows_the_reason_and_the_rollback() {
    let behaviour =
        Behaviour { snapshots: vec!["small"], create_fails: true, ..Behaviour::default() };
    let ran = Fake::start(behaviour).await.run(&["create"]).await;
    assert_eq!((ran.code, ran.text()), (Some(1), ""), "{ran:?}");
    let expected = "error: start failed: no such device; rollback: the container was destroyed (PCT_FAILED)\nhint: ";
    assert!(ran.stderr.contains(expected), "{ran:?}");
}

#[tokio::test]
async fn create_says_how_long_it_waited() {
    let behaviour =
        Behaviour { snapshots: vec!["small"], create_hangs: true, ..Behaviour::default() };
    let fake = Fake::start(behaviour).await;
    let ran = fake.run(&["create", "--wait", "1s"]).await;
    assert_eq!(ran.code, Some(4), "{ran:?}");
    assert!(ran.stderr.contains("did not finish within 1 s"), "{ran:?}");
}

#[tokio::test]
async fn hidden_characters_of_a_tenant_do_not_reach_the_terminal() {
    let fake = fake().await;
    let hidden = ['\u{202e}', '\u{200b}', '\x1b'];
    for words in [&["get", HOSTILE][..], &["get", "--json", HOSTILE]] {
        let ran = fake.run(words).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(!ran.text().contains(hidden), "{ran:?}");
    }
    let value = fake.run(&["get", "--json", HOSTILE]).await.json();
    assert_eq!(value["metadata"]["note"], "a\u{202e}b\u{200b}c\x1b[2Jd", "scripts read it whole");
}

#[tokio::test]
async fn idempotent_verbs_wait_for_an_agent_that_restarts() {
    let fake = fake().await;
    for verb in
        [["stop", ID].as_slice(), &["pause", ID], &["rm", ID], &["exec", ID, "--", "exit", "0"]]
    {
        fake.behaviour.away.store(2, Ordering::SeqCst);
        let ran = fake.run(verb).await;
        assert_eq!(ran.code, Some(0), "{verb:?} {ran:?}");
        assert_eq!(fake.behaviour.away.load(Ordering::SeqCst), 0, "{verb:?}");
    }
    // An error that is final is reported at once.
    let ran = fake.run(&["stop", "pvelxc-01h455vb4pex5vsknk084sn02r"]).await;
    assert_eq!(ran.code, Some(3), "{ran:?}");
}

#[tokio::test]
async fn ls_reads_every_page() {
    let fake = fake().await;
    let ran = fake.run(&["ls"]).await;
    let rows: Vec<_> = ran.text().lines().collect();
    assert_eq!(rows.len(), 3, "{ran:?}");
    assert!(
        rows[0]
            .split_whitespace()
            .eq(["ID", "NAME", "VMID", "NODE", "PHASE", "IP", "SNAPSHOT", "SIZE", "PORTS", "AGE"])
    );
    assert!(rows[2].contains("creating (clone)"), "{ran:?}");
    assert!(!ran.text().contains('\x1b'), "no colours in a pipe");
    let list = fake.run(&["ls", "--json"]).await.json();
    assert_eq!((&list[0]["id"], &list[1]["phase"]), (&json!(ID), &json!("creating")));
    assert_eq!(fake.run(&["ls", "-q"]).await.text(), format!("{ID}\n{ID}\n"));
}

#[tokio::test]
async fn get_shows_all_details_of_a_sandbox() {
    let fake = fake().await;
    let value = fake.run(&["get", "--json", "100001"]).await.json();
    let expected = json!({
        "id": ID, "name": "", "vmid": 100_001, "node": "node2", "team": "lab", "phase": "running",
        "step": "done",
        "snapshot_id": "small", "size": { "cpu_cores": 1, "memory_mib": 512, "disk_gib": 20 }, "ip": "10.100.2.7",
        "services": [{
            "name": "web", "port": 8080, "url": format!("http://port-8080-{ID}.sandbox.localhost"),
            "visibility": "team", "bypasses_access": false,
        }],
        "metadata": { "user": "ada" }, "created_at": "2023-11-14T22:13:20Z", "started_at": null,
        "boot": 1, "attempt": 1, "revision": 7, "request_id": "r-1", "failure": null,
        "wake_on": { "http": true, "ssh": false, "exec": true },
        "cause": "", "stop_result": "", "expires_at": null,
        "lifetime": {
            "ttl_s": 0, "ttl_action": "pause", "idle_s": 0, "idle_action": "pause", "idle_cpu": 0,
        },
        "egress": "open",
        "egress_names": [],
    });
    assert_eq!(value, expected);
    assert!(fake.run(&["get", ID]).await.text().contains("node:       node2"));
}

#[tokio::test]
async fn gc_lists_garbage_and_recover_takes_a_container_back() {
    let fake = fake().await;
    let ran = fake.run(&["gc", "--dry-run", "--node", "node1"]).await;
    let text = ran.text();
    assert!(text.contains("quarantined  100017") && text.contains("nothing was done"), "{text}");
    let ran = fake.run(&["gc", "--json"]).await;
    assert_eq!(ran.code, Some(1), "not all was told");
    assert!(
        String::from_utf8_lossy(&ran.stdout).contains("\"unreachable\":[\"node2\"]"),
        "{ran:?}"
    );
    let ran = fake.run(&["recover", "--node", "node1", "100017", "--dry-run"]).await;
    assert_eq!(ran.text(), format!("{ID} would be running again, of team lab\n"));
    assert_eq!(fake.run(&["recover", "100017"]).await.code, Some(2), "on which node");
}

#[tokio::test]
async fn adopt_needs_yes_and_forget_gives_up_a_node() {
    let fake = fake().await;
    let ran = fake.run(&["adopt", "207", "--team", "lab"]).await;
    let told = ran.text();
    assert!(told.contains("would be a sandbox of team lab"), "{told}");
    assert!(told.contains("local:vm-207-disk-0 goes when"), "{told}");
    assert!(told.ends_with("nothing was done; say --yes to do it\n"), "{told}");
    let ran = fake.run(&["adopt", "207", "--team", "lab", "--yes"]).await;
    let done = ran.text();
    assert!(done.starts_with(&format!("container 207 is {ID} of team lab")), "{done}");
    let ran = fake.run(&["adopt", "207", "--team", "lab", "--json"]).await;
    let value: serde_json::Value = serde_json::from_slice(&ran.stdout).expect("JSON");
    assert_eq!((&value["adopted"], &value["sandbox"]["id"]), (&false.into(), &ID.into()));
    let ran = fake.run(&["release", ID]).await;
    let ended = ran.text();
    assert!(ended.starts_with(&format!("{ID} has ended; container")), "{ended}");
    let ran = fake.run(&["node", "forget", "node3", "--dry-run"]).await;
    let told = ran.text();
    assert!(told.contains(ID) && told.ends_with("nothing was done\n"), "{told}");
    assert_eq!(fake.run(&["adopt", "207"]).await.code, Some(2), "whose");
}

#[tokio::test]
async fn ssh_keys_are_added_listed_and_removed() {
    let fake = Fake::start(Behaviour::default()).await;
    let none = fake.run(&["ssh-key", "add"]).await;
    assert!(none.code == Some(2) && none.stderr.contains("ssh-keygen"), "{none:?}");
    std::fs::create_dir(fake.file(".ssh")).expect("made");
    std::fs::write(fake.file(".ssh/id_ed25519.pub"), "ssh-ed25519 AAAA ada\n").expect("written");
    let ran = fake.run(&["ssh-key", "add", "--name", "laptop"]).await;
    assert!(ran.text().contains("laptop (0123456789ab) of team lab: SHA256:abc"), "{ran:?}");
    let json = fake.run_with(&["ssh-key", "add", "-", "--json"], b"ssh-ed25519 BBBB").await.json();
    assert_eq!(json["public_key"], "ssh-ed25519 BBBB");
    let private = fake.run_with(&["ssh-key", "add", "-"], b"--BEGIN OPENSSH PRIVATE KEY--").await;
    assert!(private.code == Some(2) && private.stderr.contains("was not sent"), "{private:?}");
    let json = fake.run(&["ssh-key", "ls", "--json"]).await.json();
    assert_eq!((&json[0]["name"], &json[0]["state"]), (&"laptop".into(), &"good".into()));
    let ran = fake.run(&["ssh-key", "rm", "laptop"]).await;
    assert_eq!(ran.text(), "laptop (0123456789ab) of team lab is removed\n");
    assert_eq!(fake.run(&["ssh-key", "rm", "other"]).await.code, Some(3));
}

#[tokio::test]
async fn ssh_config_is_printed_or_written_beside_the_users_own() {
    let fake = Fake::start(Behaviour::default()).await;
    let printed = fake.run(&["ssh-config"]).await;
    assert!(printed.text().contains("  HostName localhost\n  Port 2222\n"), "{printed:?}");
    assert!(printed.text().contains(&format!("  User {ID}\n")), "{printed:?}");
    let wrote = fake.run(&["ssh-config", "--write"]).await;
    assert!(wrote.code == Some(0), "{wrote:?}");
    let config = std::fs::read_to_string(fake.file(".ssh/config")).expect("written");
    assert!(config.starts_with("Include ~/.ssh/sandboxctl/*.conf\n"), "{config}");
    let known = fake.file(".ssh/sandboxctl/sandboxctl-localhost-2222.known_hosts");
    let known = std::fs::read_to_string(known).expect("written");
    assert_eq!(known, "sandboxctl-localhost-2222 ssh-ed25519 AAAA\n");
}

#[tokio::test]
async fn node_token_prints_one_line_and_revoke_turns_a_node_away() {
    let fake = Fake::start(Behaviour::default()).await;
    let ran = fake.run(&["node", "token", "pve3", "--ttl", "1h"]).await;
    let line = format!(
        "PVE_SANDBOX_JOIN_TOKEN=pvesj_pve3_3600 pve-sandbox-agent join \
         https://controller.example:{} --ca-sha256 {}\n",
        fake.port,
        "ab".repeat(32)
    );
    assert_eq!((ran.code, ran.text()), (Some(0), line.as_str()));
    let given = fake.run(&["node", "token", "pve3", "--controller", "10.0.0.9:7443"]).await;
    let line =
        "PVE_SANDBOX_JOIN_TOKEN=pvesj_pve3_900 pve-sandbox-agent join https://10.0.0.9:7443 ";
    assert!(given.text().starts_with(line), "{given:?}");
    let json = fake.run(&["node", "token", "pve3", "--json"]).await.json();
    assert_eq!(json["expires_at"], "2023-11-14T22:28:20Z");

    let ran = fake.run(&["node", "revoke", "node2"]).await;
    assert!(ran.text().contains("node2 is revoked; 3 sandboxes"), "{ran:?}");
    assert_ne!(fake.run(&["node", "revoke", "node9"]).await.code, Some(0));
}

#[tokio::test]
async fn cordon_and_drain_report_the_state_of_the_node() {
    let fake = fake().await;
    let ran = fake.run(&["cordon", "node2", "--why", "disks"]).await;
    assert_eq!(ran.text(), "node2 gets no new sandboxes\n");
    let ran = fake.run(&["uncordon", "node2"]).await;
    assert_eq!(ran.text(), "node2 gets new sandboxes again\n");
    let ran = fake.run(&["drain", "node2"]).await;
    assert_eq!(ran.code, Some(1), "not empty");
    for told in ["moved to node1", "stays: node3 does not see its disk", "1 left on node2"] {
        assert!(ran.text().contains(told), "{ran:?}");
    }
    let ran = fake.run(&["drain", "node2", "--json"]).await;
    let ran: serde_json::Value = serde_json::from_slice(&ran.stdout).expect("JSON");
    assert_eq!((&ran["moved"][0]["id"], ran["stays"][ID].is_string()), (&json!(ID), true));
    let ran = fake.run(&["drain", "node2", "--wait", "--timeout", "1s"]).await;
    assert_eq!(ran.code, Some(1), "not empty in time");
}

#[tokio::test]
async fn prune_lists_old_sandboxes_and_compare_lists_differences() {
    let fake = fake().await;
    let ran = fake.run(&["prune", "--older-than", "2d", "--dry-run"]).await;
    assert!(ran.text().contains("would be deleted"), "{}", ran.text());
    let ran = fake.run(&["prune", "--older-than", "2d", "--json"]).await;
    assert_eq!(ran.json()[0]["deleted"], true);
    let ran = fake.run(&["prune", "--older-than", "30d"]).await;
    assert_eq!(ran.text(), "nothing has been stopped for so long\n");
    for wrong in [&["prune"][..], &["prune", "--older-than", "never"]] {
        assert_eq!(fake.run(wrong).await.code, Some(2), "{wrong:?}");
    }
    let list = tempfile::NamedTempFile::new().expect("a file");
    let path = list.path().to_str().expect("UTF-8");
    std::fs::write(path, format!("  {ID}\n\n")).expect("written");
    let ran = fake.run(&["compare", path]).await;
    assert_eq!((ran.code, ran.text()), (Some(0), "the list is what there is\n"));
    std::fs::write(path, "100099\n").expect("written");
    let ran = fake.run(&["compare", path]).await;
    assert_eq!(ran.code, Some(1));
    assert_eq!(ran.text(), format!("+ {ID} running on node2\n- 100099\n"));
    assert_eq!(fake.run(&["compare", "/nowhere"]).await.code, Some(2));
}

#[tokio::test]
async fn lifetime_shows_and_sets_the_rules() {
    let fake = fake().await;
    assert_eq!(fake.run(&["lifetime", ID]).await.text(), format!("{ID} does not expire\n"));
    let set = ["--ttl", "2d", "--ttl-action", "delete", "--idle", "30m", "--idle-action", "stop"];
    let args = [&["lifetime", "--json", ID], &set[..]].concat();
    let ran = fake.run(&args).await;
    let ran = ran.json();
    let expected = json!({
        "ttl_s": 172_800, "ttl_action": "delete", "idle_s": 1800, "idle_action": "stop",
        "idle_cpu": 0,
    });
    assert_eq!(ran["lifetime"], expected);
    let ran = fake.run(&["lifetime", ID, "--idle", "5m"]).await;
    let text = ran.text();
    assert_eq!(text, format!("{ID} does not expire; idle after 5m (pause)\n"));
    let ran = fake.run(&["lifetime", ID, "--idle", "5m", "--idle-cpu", "20"]).await;
    let text = ran.text();
    let rule = "idle after 5m below 20 % of a core (pause)";
    assert_eq!(text, format!("{ID} does not expire; {rule}\n"));
    for wrong in [["--ttl", "soon"], ["--ttl", "0"], ["--idle", "-1"], ["--ttl-action", "hide"]] {
        assert_eq!(
            fake.run(&["lifetime", ID, wrong[0], wrong[1]]).await.code,
            Some(2),
            "{wrong:?}"
        );
    }
}

#[tokio::test]
async fn pause_resume_wake_on_and_egress_print_the_new_state() {
    let fake = fake().await;
    assert_eq!(fake.run(&["pause", ID]).await.text(), format!("{ID} paused\n"));
    assert_eq!(fake.run(&["pause", "--or-stop", ID]).await.text(), format!("{ID} stopped\n"));
    assert_eq!(fake.run(&["resume", "--json", ID]).await.json()["phase"], "running");
    assert_eq!(fake.run(&["wake-on", ID]).await.text(), format!("{ID} http, exec\n"));
    let ran = fake.run(&["wake-on", ID, "--http", "off", "--ssh", "on"]).await;
    assert_eq!(ran.text(), format!("{ID} exec, ssh\n"));
    let value = fake.run(&["wake-on", "--json", ID, "--exec", "off"]).await.json();
    assert_eq!(value["wake_on"], json!({ "http": true, "ssh": false, "exec": false }));
    assert_eq!(fake.run(&["wake-on", ID, "--http", "maybe"]).await.code, Some(2));
    assert_eq!(fake.run(&["egress", ID]).await.text(), format!("{ID} open\n"));
    assert_eq!(fake.run(&["egress", ID, "none"]).await.text(), format!("{ID} none\n"));
    assert_eq!(fake.run(&["egress", ID, "some"]).await.code, Some(2));
    let listed = fake.run(&["egress", ID, "allow=GitHub.com,*.npmjs.org"]).await;
    assert_eq!(listed.text(), format!("{ID} allow=*.npmjs.org,github.com\n"));
    let value = fake.run(&["egress", "--json", ID, "allow=github.com"]).await.json();
    assert_eq!(
        (&value["egress"], &value["egress_names"]),
        (&json!("allow"), &json!(["github.com"]))
    );
    for wrong in ["allow", "allow=", "allow=10.0.0.1", "allow=*.com"] {
        assert_eq!(fake.run(&["egress", ID, wrong]).await.code, Some(2), "{wrong}");
    }
    assert!(fake.run(&["get", ID]).await.text().contains("wake on:    http, exec"));
}

#[tokio::test]
async fn top_shows_the_usage_of_one_second() {
    let fake = fake().await;
    let list = fake.run(&["top", "--json"]).await.json();
    let expected = json!([{
        "id": ID, "phase": "running", "cpu_percent": 50.0, "memory_bytes": 64 << 20,
        "memory_max_bytes": 512 << 20, "swap_bytes": 0, "pids": 3, "psi_cpu": 1.5,
        "psi_memory": 0.0, "psi_io": 0.0,
    }]);
    assert_eq!(list, expected);
    let ran = fake.run(&["top", "--once", ID]).await;
    let rows: Vec<_> = ran.text().lines().collect();
    assert_eq!(rows.len(), 2, "{ran:?}");
    assert!(rows[1].split_whitespace().eq([
        ID,
        "running",
        "50.0",
        "64",
        "MiB",
        "512",
        "MiB",
        "0",
        "MiB",
        "3",
        "1.5/0.0/0.0"
    ]));
}

#[tokio::test]
async fn unknown_sandbox_ends_with_3_and_a_hint() {
    let fake = fake().await;
    for verb in [&["get"][..], &["rm"], &["watch"], &["url"]] {
        let ran = fake.run(&[verb, &["100002"]].concat()).await;
        assert_eq!(ran.code, Some(3), "{ran:?}");
        assert!(ran.stderr.contains("(SANDBOX_NOT_FOUND)\nhint: "), "{ran:?}");
    }
    let ran = fake.run(&["get", "--json", "100002"]).await;
    let error: serde_json::Value = serde_json::from_str(&ran.stderr).expect("json on stderr");
    assert_eq!(error["error"]["reason"], "SANDBOX_NOT_FOUND");
}

#[tokio::test]
async fn one_id_gives_an_object_and_several_give_a_list() {
    let fake = fake().await;
    assert_eq!(fake.run(&["stop", ID]).await.text(), format!("{ID} stopped\n"));
    assert_eq!(
        fake.run(&["start", ID]).await.text(),
        format!("{ID} running\n"),
        "it is waited for"
    );
    assert_eq!(fake.run(&["rm", "--json", ID]).await.json()["phase"], "deleted");
    let list = fake.run(&["rm", "--json", ID, "100001"]).await.json();
    assert_eq!(list.as_array().map(Vec::len), Some(2));
    let ran = fake.run(&["rm", ID, "100002"]).await;
    assert_eq!((ran.code, ran.text()), (Some(3), format!("{ID} deleted\n").as_str()), "{ran:?}");
}

#[tokio::test]
async fn ports_are_exposed_listed_and_hidden() {
    let fake = fake().await;
    let url = format!("http://port-9000-{ID}.sandbox.localhost");
    assert_eq!(fake.run(&["expose", ID, "9000"]).await.text(), format!("{url}\n"));
    let value = fake.run(&["expose", "--json", ID, "9000", "--name", "api"]).await.json();
    let exposed = json!({
        "id": ID, "name": "api", "port": 9000, "url": url, "visibility": "public",
        "bypasses_access": false,
    });
    assert_eq!(value, exposed);
    let web = format!("http://port-8080-{ID}.sandbox.localhost\n");
    for args in [&["url", ID][..], &["url", ID, "8080"], &["url", ID, "web"]] {
        assert_eq!(fake.run(args).await.text(), web, "{args:?}");
    }
    let closed = fake.run(&["url", ID, "81"]).await;
    assert_eq!(closed.code, Some(3));
    assert!(closed.stderr.contains("hint: open it with"), "{closed:?}");
    // A script must not take an empty line for a URL.
    let none = fake.run(&["url", WITHOUT_URL, "web"]).await;
    assert_eq!((none.code, none.text()), (Some(1), ""), "{none:?}");
    assert!(none.stderr.contains("no address begins with 10.9."), "{none:?}");
    let none = fake.run(&["url", WITHOUT_URL]).await;
    assert_eq!((none.code, none.text()), (Some(0), ""), "{none:?}");
    assert!(none.stderr.contains("port 8080 has no URL"), "{none:?}");
    for name in ["web", "8080"] {
        assert_eq!(fake.run(&["hide", ID, name]).await.text(), format!("{ID} web, www closed\n"));
    }
    assert_eq!(fake.run(&["hide", ID, "other"]).await.code, Some(3));
}

#[tokio::test]
async fn port_is_exposed_to_some_and_they_get_links_and_tokens() {
    let fake = fake().await;
    for (who, note) in [
        (vec!["--public"], ""),
        (vec!["--visibility", "team"], "it needs a link: `sandboxctl link"),
        (vec!["--visibility", "token"], "it needs a token: `sandboxctl link"),
        (vec!["--visibility", "private"], "a port forward reaches it"),
    ] {
        let ran = fake.run(&[&["expose", ID, "9000"], who.as_slice()].concat()).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
        assert!(ran.stderr.contains(note), "{ran:?}");
        assert_eq!(ran.stderr.is_empty(), note.is_empty(), "{ran:?}");
    }
    for wrong in [&["--visibility", "everybody"][..], &["--public", "--visibility", "team"]] {
        let ran = fake.run(&[&["expose", ID, "9000"], wrong].concat()).await;
        assert_eq!(ran.code, Some(2), "{ran:?}");
    }
    let url = format!("http://port-8080-{ID}.sandbox.localhost/");
    let link = fake.run(&["link", ID, "8080"]).await;
    assert_eq!(link.text(), format!("{url}?sbx_link=sbxl1_x\n"), "{link:?}");
    let bare = fake.run(&["link", ID, "8080", "--bare", "--ttl", "1h"]).await;
    assert_eq!(bare.text(), "sbxl1_x\n");
    let value = fake.run(&["link", ID, "8080", "--json"]).await.json();
    assert_eq!((&value["kind"], &value["port"]), (&json!("link"), &json!(8080)));
    assert_eq!(value["credential"], json!("sbxl1_x"));
    assert_eq!(fake.run(&["link", ID, "81"]).await.code, Some(3));
    let revoked = fake.run(&["revoke", ID, "8080"]).await;
    assert!(revoked.text().contains("port 8080: all links"), "{revoked:?}");
    assert_eq!(fake.run(&["revoke", ID, "81"]).await.code, Some(3));
    let shown = fake.run(&["get", ID]).await;
    assert!(shown.text().contains("8080 team web"), "{shown:?}");
}

#[tokio::test]
async fn verbs_of_operators_print_text_and_json() {
    let fake = fake().await;
    let nodes = fake.run(&["nodes"]).await;
    assert!(nodes.text().contains("█████░░░░░  50 %"), "{nodes:?}");
    assert!(nodes.text().contains("UNREACHABLE"), "{nodes:?}");
    let list = fake.run(&["nodes", "--json"]).await.json();
    assert_eq!((&list[0]["id"], &list[0]["load"]["cpu_busy"]), (&json!("node1"), &json!(0.5)));
    assert_eq!((&list[1]["ready"], &list[1]["load"]), (&json!(false), &json!(null)));

    let fsck = fake.run(&["fsck"]).await;
    assert_eq!(fsck.code, Some(1), "findings are not success");
    assert!(fsck.text().contains("checked 3 sandboxes on 2 nodes: 1 finding"), "{fsck:?}");

    let explained = fake.run(&["explain", ID]).await;
    assert!(explained.text().contains("went to node2"), "{explained:?}");
    assert!(explained.text().contains("cpu 0.125 + memory 0.125"), "{explained:?}");
    assert!(explained.text().contains("MEMORY_SUM: 512 MiB wanted"), "{explained:?}");
    let value = fake.run(&["explain", "--json", "--dry-run"]).await.json();
    assert_eq!(
        (&value["id"], &value["node"], &value["nodes"][0]["chosen"]),
        (&json!(null), &json!("node2"), &json!(true))
    );

    assert!(fake.run(&["snapshot", "ls"]).await.text().contains("node1, node2"));
    assert_eq!(fake.run(&["snapshot", "ls", "--json"]).await.json()[0]["id"], "small");
    let uneven = Behaviour { snapshots: vec!["listening", "uneven"], ..Behaviour::default() };
    let uneven = Fake::start(uneven).await;
    let listed = uneven.run(&["snapshot", "ls"]).await;
    assert!(listed.text().contains("vscode=39378:team, on listen"), "{listed:?}");
    assert!(listed.stderr.contains("uneven: its default services differ on node2"), "{listed:?}");
    let list = uneven.run(&["snapshot", "ls", "--json"]).await.json();
    let service = json!({ "name": "vscode", "port": 39378, "visibility": "team" });
    assert_eq!(list[0]["services"], json!([service]));
    assert_eq!(
        (&list[0]["expose_on_listen"], &list[1]["differing_nodes"]),
        (&json!(true), &json!(["node2"]))
    );
    assert!(fake.run(&["version"]).await.text().contains("controller 0.9.9 (epoch 4)"));
    let watched = fake.run(&["watch", ID, "--json"]);
    let first = tokio::time::timeout(std::time::Duration::from_secs(2), watched).await;
    assert!(first.is_err(), "a running sandbox is watched on");
}

#[tokio::test]
async fn wrong_token_and_wrong_ca_say_what_to_set() {
    let fake = fake().await;
    let wrong = fake.command(&["ls"]).env("SANDBOXCTL_TOKEN", "wrong").spawn().expect("spawn");
    let wrong = finish(wrong).await;
    assert_eq!(wrong.code, Some(2));
    assert!(wrong.stderr.contains("(TOKEN_INVALID)\nhint: give a token"), "{wrong:?}");

    let other = Fake::start(Behaviour::default()).await;
    let mut command = fake.command(&["ls"]);
    let from_other = other.command(&[]);
    let ca = from_other.as_std().get_envs().find(|(key, _)| *key == "SANDBOXCTL_CA");
    command.env("SANDBOXCTL_CA", ca.and_then(|(_, value)| value).expect("set"));
    let foreign = finish(command.spawn().expect("spawn")).await;
    assert_eq!(foreign.code, Some(2), "{foreign:?}");
    assert!(foreign.stderr.contains("hint: SANDBOXCTL_CA must be the CA"), "{foreign:?}");

    // Without a CA those of the system count, which this one becomes here.
    let mut command = fake.command(&["ls"]);
    command.env_remove("SANDBOXCTL_CA").env("SSL_CERT_FILE", fake.file("cert.pem"));
    let public = finish(command.spawn().expect("spawn")).await;
    assert_eq!(public.code, Some(0), "{public:?}");
    command.env("SSL_CERT_FILE", other.file("cert.pem"));
    let foreign = finish(command.spawn().expect("spawn")).await;
    assert!(foreign.code == Some(2) && foreign.stderr.contains("the system's CAs"), "{foreign:?}");
    command.env("SSL_CERT_FILE", fake.file("none.pem"));
    let missing = finish(command.spawn().expect("spawn")).await;
    assert!(missing.code == Some(2) && missing.stderr.contains("none.pem"), "{missing:?}");

    let bare = fake.command(&["ls"]).env_remove("SANDBOXCTL_ENDPOINT").spawn().expect("spawn");
    let bare = finish(bare).await;
    assert_eq!(bare.code, Some(2));
    assert!(
        bare.stderr.contains("endpoint is not configured\nhint: `sandboxctl login` asks"),
        "{bare:?}"
    );
    let bare = fake.command(&["version"]).env_remove("SANDBOXCTL_ENDPOINT").spawn().expect("spawn");
    assert_eq!(finish(bare).await.code, Some(0), "our own version needs nobody");
}

#[tokio::test]
async fn token_is_shown_once_on_stdout_and_can_be_revoked() {
    let fake = fake().await;
    let ran = fake.run(&["token", "create", "ci", "--scope", "exec,manage"]).await;
    let plain = format!("pvesb_0123456789ab_{}\n", "f".repeat(64));
    assert_eq!((ran.code, ran.text()), (Some(0), plain.as_str()), "{ran:?}");
    assert!(ran.stderr.contains("token ci (0123456789ab) of team lab: exec manage"), "{ran:?}");
    let ran = fake.run(&["token", "create", "--format", "e2b", "--expires", "30d"]).await;
    assert_eq!(ran.text(), format!("e2b_0123456789ab{}\n", "f".repeat(64)), "{ran:?}");
    let value = fake.run(&["token", "create", "--team", "acme", "--json"]).await.json();
    assert_eq!((&value["team"], &value["id"]), (&json!("acme"), &json!("0123456789ab")));
    assert!(value["token"].as_str().is_some_and(|text| text.starts_with("pvesb_")), "{value}");
    let ran = fake.run(&["token", "create", "taken"]).await;
    assert!(ran.code == Some(1) && ran.stderr.contains("NAME_TAKEN"), "{ran:?}");
    let ran = fake.run(&["token", "create", "--scope", "all"]).await;
    assert!(ran.code == Some(2) && ran.stderr.contains("read, exec, manage, admin"), "{ran:?}");

    let ran = fake.run(&["token", "ls"]).await;
    assert!(ran.text().contains("ci") && !ran.text().contains("revoked"), "{ran:?}");
    let list = fake.run(&["token", "ls", "-a", "--json"]).await.json();
    let states: Vec<_> = list.as_array().into_iter().flatten().map(|t| &t["state"]).collect();
    assert_eq!(states, [&json!("good"), &json!("revoked")], "both pages");
    let ran = fake.run(&["token", "revoke", "ci"]).await;
    assert_eq!(ran.text(), "ci (0123456789ab) of team lab is revoked\n", "{ran:?}");
    let ran = fake.run(&["token", "revoke", "other"]).await;
    assert!(ran.code == Some(3) && ran.stderr.contains("token ls -a"), "{ran:?}");
    let ran = fake.run(&["team", "ls", "-o", "name"]).await;
    assert_eq!(ran.text(), "acme\nlab\n", "{ran:?}");
}

#[tokio::test]
async fn limits_of_a_team_are_shown_beside_their_use_and_set() {
    let fake = fake().await;
    let ran = fake.run(&["team", "get"]).await;
    for part in ["team lab", "sandboxes", "3", "20", "6.0 GiB", "none", "10/hour", "the default"] {
        assert!(ran.text().contains(part), "{part} in {ran:?}");
    }
    let words =
        ["team", "set", "acme", "--memory", "80g", "--sandboxes", "none", "--creates", "5/30m"];
    let ran = fake.run(&words).await;
    for part in ["team acme", "80 GiB", "5/30m", "its own"] {
        assert!(ran.text().contains(part), "{part} in {ran:?}");
    }
    let value = fake.run(&[&words[..], &["--json"]].concat()).await.json();
    assert_eq!(value["own"], json!(["sandboxes", "memory_mib", "creates"]));
    assert_eq!(value["max"]["egress"], "open");
    let closed = fake.run(&["team", "set", "acme", "--egress", "none", "--json"]).await.json();
    assert_eq!((&closed["own"], &closed["max"]["egress"]), (&json!(["egress"]), &json!("none")));
    let set = ["team", "set", "acme", "--egress", "allow=github.com", "--json"];
    assert_eq!(fake.run(&set).await.json()["max"]["egress"], "allow=github.com");
    assert_eq!(
        (&value["max"]["sandboxes"], &value["max"]["memory_mib"]),
        (&json!(null), &json!(81_920))
    );
    assert_eq!(
        (&value["used"]["sandboxes"], &value["max"]["creates"]),
        (&json!(3), &json!("5/30m"))
    );
    let words = "team set acme --execs 600/1m --running-execs 64 --streams none --kept-output 512m --events \
                 50000 --changes 60/1m";
    let words: Vec<_> = words.split(' ').filter(|word| !word.is_empty()).collect();
    let ran = fake.run(&words).await;
    for part in ["600/minute", "kept output", "12 MiB", "512 MiB", "340", "50000", "60/minute"] {
        assert!(ran.text().contains(part), "{part} in {ran:?}");
    }
    let value = fake.run(&[&words[..], &["--json"]].concat()).await.json();
    let own = ["changes", "execs", "running_execs", "output_mib", "streams", "events"];
    assert_eq!(value["own"], json!(own));
    let own = own.map(|name| (&value["used"][name], &value["max"][name]));
    let (some, none) = (|number: u32| json!(number), json!(null));
    assert_eq!((own[0].0, own[1].0, own[2].0), (&some(1), &some(7), &some(5)));
    assert_eq!((own[3].1, own[4].1, own[5].1), (&some(512), &none, &some(50_000)));
    assert_eq!((own[0].1, own[1].1), (&json!("60/minute"), &json!("600/minute")));
    let list = fake.run(&["team", "ls"]).await;
    assert!(list.text().contains("3 of 20") && list.text().contains("2 of 10/hour"), "{list:?}");
    for wrong in [
        &["team", "set", "acme"][..],
        &["team", "set", "acme", "--creates", "10"],
        &["team", "set", "acme", "--egress", "some"],
        &["team", "set", "acme", "--execs", "600"],
        &["team", "set", "acme", "--running-execs", "-1"],
    ] {
        assert_eq!(fake.run(wrong).await.code, Some(2));
    }
}

#[tokio::test]
async fn client_certificate_is_written_with_its_key_and_nothing_is_overwritten() {
    use std::os::unix::fs::PermissionsExt as _;
    let fake = Fake::start(Behaviour::default()).await;
    let dir = tempfile::tempdir().expect("a directory");
    let file = dir.path().join("ci.pem");
    let path = file.to_str().expect("text");
    let make = ["token", "create", "ci", "--certificate", path];
    let ran = fake.run(&make).await;
    assert_eq!(ran.code, Some(0), "{ran:?}");
    assert!(ran.text().contains(path) && !ran.text().contains("PRIVATE"), "{ran:?}");
    let text = std::fs::read_to_string(&file).expect("written");
    assert!(text.starts_with("-----BEGIN CERTIFICATE-----") && text.contains("PRIVATE KEY"));
    let mode = std::fs::metadata(&file).expect("there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(fake.run(&make).await.code, Some(2), "it is there already");
    assert_eq!(std::fs::read_to_string(&file).expect("read"), text);
    // A refused call leaves nothing behind.
    let other = dir.path().join("other.pem");
    let refused = ["token", "create", "taken", "--certificate", other.to_str().expect("text")];
    assert_eq!(fake.run(&refused).await.code, Some(1));
    assert!(!other.exists());
}
