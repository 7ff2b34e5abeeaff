use std::fs;

use proto::id::SandboxId;

use super::*;

fn vmid(number: u32) -> Vmid {
    Vmid::try_from(number).expect("in range")
}

fn found(sandboxes: usize) -> Found {
    let marked = |number| Marked { vmid: vmid(number), mark: None };
    let numbers = 100..100 + u32::try_from(sandboxes).expect("few");
    Found {
        sandboxes: numbers.map(marked).collect(),
        bridge: Some("vmbr1".to_owned()),
        has_data: true,
        tunnel: None,
    }
}

/// Decides on a terminal where these answers are given, in this order.
fn answered(flags: &Flags, found: &Found, answers: &[&str]) -> Result<Plan, Error> {
    let mut left = answers.iter();
    let mut ask = |question: &str| {
        let answer = left.next().unwrap_or_else(|| panic!("no answer to {question}"));
        Ok((*answer).to_owned())
    };
    let decided = decide(flags, found, Some(&mut ask));
    assert_eq!(left.next(), None, "a question was not asked");
    decided
}

#[test]
fn everything_is_asked_once_on_a_terminal() {
    let flags = Flags::default();
    let all = Plan { sandboxes: Choice::Delete, data: Choice::Delete, bridge: Choice::Delete };
    assert_eq!(answered(&flags, &found(2), &["delete", "d", "delete"]).expect("a plan"), all);
    let some = Plan { data: Choice::Keep, ..all };
    assert_eq!(answered(&flags, &found(0), &["keep", "delete"]).expect("a plan"), some);
    assert_eq!(answered(&flags, &Found::default(), &[]).expect("a plan"), all);
    let error = answered(&flags, &found(1), &[""]).expect_err("no answer");
    assert!(error.to_string().contains("nothing was done"), "{error}");
}

#[test]
fn kept_sandboxes_keep_what_they_need() {
    let none = Plan { sandboxes: Choice::Keep, data: Choice::Keep, bridge: Choice::Keep };
    assert_eq!(answered(&Flags::default(), &found(1), &["keep"]).expect("a plan"), none);
    let keep = Flags { sandboxes: Some(Choice::Keep), yes: true, ..Flags::default() };
    assert_eq!(decide(&keep, &found(1), None).expect("a plan"), none);
    let data = Flags { data: Some(Choice::Delete), ..keep.clone() };
    let bridge = Flags { bridge: Some(Choice::Delete), ..keep };
    for (flags, named) in [(data, "--data keep"), (bridge, "--bridge keep")] {
        let error = decide(&flags, &found(1), None).expect_err("refused").to_string();
        assert!(error.contains(named) && error.contains("--sandboxes delete"), "{error}");
    }
}

#[test]
fn without_a_terminal_every_missing_flag_is_named_at_once() {
    let error = decide(&Flags::default(), &found(1), None).expect_err("refused").to_string();
    for flag in ["--sandboxes keep|delete", "--data keep|delete", "--bridge keep|delete", "--yes"] {
        assert!(error.contains(flag), "{error}");
    }
    let error =
        decide(&Flags::default(), &Found::default(), None).expect_err("refused").to_string();
    assert!(error.ends_with("say --yes"), "{error}");
    let dry = Flags { dry_run: true, ..Flags::default() };
    decide(&dry, &Found::default(), None).expect("a dry run needs no --yes");
}

#[test]
fn sandbox_that_came_while_the_operator_was_asked_is_not_deleted() {
    let all = Plan { sandboxes: Choice::Delete, data: Choice::Delete, bridge: Choice::Delete };
    let check = |flags: &Flags, plan, seen: usize, now: usize| {
        check_unseen(flags, plan, &found(seen), &found(now).sandboxes)
    };
    let asked = Flags { yes: true, ..Flags::default() };
    let plan = decide(&asked, &Found::default(), None).expect("an empty node is not asked about");
    assert_eq!(plan, all);
    let told = check(&asked, plan, 0, 1).expect_err("it was made meanwhile").to_string();
    assert!(told.contains("100 with a mark that cannot be read"), "{told}");
    assert!(told.contains("Say --sandboxes keep, or --sandboxes delete"), "{told}");
    let told = check(&asked, plan, 2, 4).expect_err("two were shown").to_string();
    assert!(told.starts_with("2 sandboxes (102 "), "{told}");
    check(&asked, plan, 2, 2).expect("they were shown");
    check(&asked, plan, 2, 0).expect("they have ended");
    let keep = Plan { sandboxes: Choice::Keep, ..all };
    check(&asked, keep, 0, 1).expect("nothing is deleted");
    let said = Flags { sandboxes: Some(Choice::Delete), ..asked };
    check(&said, plan, 0, 1).expect("the flag speaks of all");
}

#[test]
fn connector_is_stopped_whatever_is_kept_and_the_tunnel_is_left_to_its_own_command() {
    let found = Found { tunnel: Some("pve-sandbox-example-com".to_owned()), ..found(1) };
    for choice in [Choice::Keep, Choice::Delete] {
        let plan = Plan { sandboxes: choice, data: choice, bridge: choice };
        let lines = steps(plan, &found);
        let told =
            |line: &&String| line.contains("pve-sandbox-example-com, which stays at Cloudflare");
        assert_eq!(lines.iter().filter(told).count(), 1, "{lines:?}");
    }
}

#[test]
fn kept_sandboxes_are_followed_by_a_removal_and_never_by_a_purge_or_a_forgotten_node() {
    let all = Plan { sandboxes: Choice::Delete, data: Choice::Delete, bridge: Choice::Delete };
    let kept = Plan { sandboxes: Choice::Keep, data: Choice::Keep, bridge: Choice::Keep };
    let node: NodeName = "pve1".parse().expect("a name");
    let told = |plan, keeps, deleted| afterwards(plan, &found(1), keeps, deleted, &node).join("\n");
    let of_kept = told(kept, true, false);
    assert!(of_kept.contains("apt remove pve-sandbox-agent"), "{of_kept}");
    assert!(!of_kept.contains("purge") && !of_kept.contains("forget"), "{of_kept}");
    assert!(of_kept.ends_with("as unreachable"), "a node without a tunnel: {of_kept}");
    assert!(of_kept.contains("pve-sandbox-agent setup"), "{of_kept}");
    let of_tunnel = Found { tunnel: Some("pve-sandbox-example-com".to_owned()), ..found(1) };
    let of_tunnel = afterwards(kept, &of_tunnel, true, false, &node);
    let last = of_tunnel.last().map(String::as_str);
    assert_eq!(last, Some("then: systemctl enable --now pve-sandbox-tunnel"), "{of_tunnel:?}");

    let of_all = told(all, false, true);
    assert!(of_all.contains("apt purge") && of_all.ends_with("forget pve1 --lost"), "{of_all}");
    assert!(told(all, false, false).ends_with("forget pve1"), "nothing was lost");
    // An empty node, whose journal is to stay.
    let of_data = told(Plan { data: Choice::Keep, ..all }, false, true);
    assert!(!of_data.contains("purge") && of_data.contains("forget pve1"), "{of_data}");
}

#[test]
fn going_on_needs_a_yes() {
    confirm(&mut |_| Ok("yes\n".to_owned())).expect("confirmed");
    for answer in ["", "no", "delete"] {
        confirm(&mut |_| Ok(answer.to_owned())).expect_err("declined");
    }
}

#[test]
fn containers_with_a_mark_of_any_version_are_found() {
    let dir = tempfile::tempdir().expect("a directory");
    let mark = Mark {
        sandbox_id: SandboxId::new(1, &[1; 10]),
        vmid: vmid(101),
        attempt: 1,
        team: "acme".parse().expect("valid"),
        request_id: "r-1".parse().expect("valid"),
    };
    let write = |name: &str, notes: &[&str]| {
        let mut config = ContainerConfig::parse(b"arch: amd64\n");
        notes.iter().for_each(|note| config.add_note(note));
        fs::write(dir.path().join(name), config.to_bytes()).expect("written");
    };
    write("101.conf", &["mine", &mark.to_string()]);
    write("102.conf", &["mine"]);
    write("103.conf", &["pve-sandbox:v9 unknown=1"]);
    write("104.conf", &[&mark.to_string()]);
    write("105.conf", &["pve-sandbox-template:v1 snapshot=debian cores=1 memory_mib=512"]);
    write("106.conf.tmp", &[&mark.to_string()]);
    let seen = marked(dir.path()).expect("read");
    let numbers: Vec<_> = seen.iter().map(|one| (one.vmid.get(), one.mark.is_some())).collect();
    assert_eq!(numbers, [(101, true), (103, false), (104, false)]);
    let lines = listing(&Found { sandboxes: seen, ..Found::default() });
    assert!(lines[0].starts_with("3 containers") && lines[1].contains("team acme"), "{lines:?}");

    let error = marked(&dir.path().join("none")).expect_err("cannot be read");
    assert!(matches!(error, Error::Containers(..)), "{error}");
}
