//! Tests of `ssh`, with a program in the place of OpenSSH's client.

use std::{fs::Permissions, os::unix::fs::PermissionsExt};

use crate::fake::{Behaviour, Fake, ID, finish};

#[tokio::test]
async fn ssh_becomes_that_of_the_machine_with_the_host_key_pinned() {
    let fake = Fake::start(Behaviour::default()).await;
    let bin = fake.file("bin");
    let ssh = async |args: &[&str]| {
        let child = fake.command(args).env("PATH", &bin).spawn().expect("spawn");
        finish(child).await
    };
    let missing = ssh(&["ssh", ID]).await;
    assert!(missing.code != Some(0) && missing.stderr.contains("no program `ssh`"), "{missing:?}");
    std::fs::create_dir(&bin).expect("made");
    let script = "#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit 7\n";
    std::fs::write(bin.join("ssh"), script).expect("written");
    std::fs::set_permissions(bin.join("ssh"), Permissions::from_mode(0o755)).expect("set");
    let ran = ssh(&["ssh", "--identity", "/k", ID, "-L", "1:localhost:2", "make", "-o", "x"]).await;
    let known = fake.file(".ssh/sandboxctl/sandboxctl-localhost-2222.known_hosts");
    for option in [
        "HostName=localhost".to_owned(),
        "Port=2222".to_owned(),
        "StrictHostKeyChecking=yes".to_owned(),
        format!("UserKnownHostsFile=\"{}\"", known.display()),
        "IdentityFile=\"/k\"".to_owned(),
    ] {
        assert!(ran.text().contains(&format!("-o\n{option}\n")), "{option}: {ran:?}");
    }
    let end = format!("-o\nUser={ID}\n{ID}\n-L\n1:localhost:2\nmake\n-o\nx\n");
    assert!(ran.code == Some(7) && ran.text().ends_with(&end), "{ran:?}");
    let known = std::fs::read_to_string(known).expect("written");
    assert_eq!(known, "sandboxctl-localhost-2222 ssh-ed25519 AAAA\n");
    assert!(!fake.file(".ssh/config").exists(), "nothing else is written");
    let ran = ssh(&["ssh", ID, "--", "-o", "X=y"]).await;
    assert!(ran.text().ends_with(&format!("{ID}\n-o\nX=y\n")), "{ran:?}");
    let json = ssh(&["ssh", ID, "--json"]).await;
    assert!(json.code == Some(125) && json.stdout.is_empty(), "{json:?}");
}
