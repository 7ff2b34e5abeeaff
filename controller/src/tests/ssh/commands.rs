//! Lines of a client: the shell that runs them, and what is asked of the agent for them.

use std::path::Path;

use super::*;

/// Makes a directory of programs: those that the search for a shell needs, and a user database in which the
/// user's shell is this one.
fn programs(door: &Door, name: &str, shell: &str) -> PathBuf {
    let dir = door.path(name);
    std::fs::create_dir(&dir).expect("made");
    for program in ["cut", "id"] {
        let link = dir.join(program);
        std::os::unix::fs::symlink(Path::new("/usr/bin").join(program), link).expect("linked");
    }
    script(&dir.join("getent"), &format!("echo root:x:0:0:root:/root:{shell}"));
    dir
}

fn script(path: &Path, line: &str) {
    std::fs::write(path, format!("#!/bin/sh\n{line}\n")).expect("written");
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).expect("set");
}

#[tokio::test(flavor = "multi_thread")]
async fn line_is_run_by_the_users_own_shell_and_without_bash_by_sh() {
    let door = Door::open().await;
    let line = "echo \"$0\" 'a  b'";
    assert!(door.run(line).await.status.success());
    let (start, _) = door.lab.holder(&door.id).last_command().expect("one");
    assert_eq!(start.title, line, "lists show the line, and not how a shell is found for it");
    let Some(exec_start::Command::Argv(argv)) = start.command else { panic!("{start:?}") };
    let own = door.path("own");
    script(&own, "echo own \"$@\"");
    let own = own.display().to_string();
    for (name, shell, said) in [
        ("with", own.as_str(), format!("own -c {line}\n")),
        ("without", "/nosuch", "/bin/sh a  b\n".to_owned()),
        ("nameless", "", "/bin/sh a  b\n".to_owned()),
    ] {
        let mut run = Command::new(&argv.args[0]);
        run.args(&argv.args[1..]).env_clear().env("PATH", programs(&door, name, shell));
        let ran = output(run.stdin(Stdio::null())).await;
        assert_eq!(text(&ran.stdout), said, "{name}: {}", text(&ran.stderr));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn background_of_every_program_is_spared_when_its_client_goes() {
    let door = Door::open().await;
    let client = forwards::log_in(&door).await;
    let agent = door.lab.holder(&door.id);
    for (number, program) in ["exec", "shell", "sftp"].into_iter().enumerate() {
        let channel = client.channel_open_session().await.expect("open");
        match program {
            "exec" => channel.exec(false, "sleep 60").await,
            "shell" => channel.request_shell(false).await,
            _ => channel.request_subsystem(false, "sftp").await,
        }
        .expect("sent");
        until("the start", || async { agent.commands() as usize > number }).await;
        let (start, _) = agent.last_command().expect("one");
        assert!(start.spare_background && start.exec_id.is_empty(), "{program}: {start:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn client_with_the_old_scp_is_told_what_to_use() {
    let door = Door::open().await;
    let advice = "use `scp -s`";
    // This machine has one, which ends at the end of its input.
    let ran = door.run("scp -t /nosuch/file; exit 127").await;
    assert_eq!(ran.status.code(), Some(127));
    assert!(text(&ran.stderr).contains(advice), "{}", text(&ran.stderr));
    for line in ["exit 127", "scp -t /nosuch/file; exit 1"] {
        let said = text(&door.run(line).await.stderr);
        assert!(!said.contains(advice), "{line}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn right_key_may_come_after_six_others() {
    let door = Door::open().await;
    let mut ssh = Command::new("ssh");
    for seed in 11..=16 {
        let wrong =
            door.options(seed).into_iter().find(|option| option.starts_with("IdentityFile="));
        ssh.args(["-o".to_owned(), wrong.expect("a key")]);
    }
    ssh.args(door.options(1)).args(["-v", "-l", &door.id, "127.0.0.1", "echo in"]);
    let ran = output(ssh.stdin(Stdio::null()).kill_on_drop(true)).await;
    let said = text(&ran.stderr);
    assert_eq!(text(&ran.stdout), "in\n", "{said}");
    assert_eq!(said.matches("Offering public key").count(), 7, "{said}");
}
