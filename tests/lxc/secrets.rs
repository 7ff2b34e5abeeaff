//! A canary in every input, looked for in the files and processes of the node and of the controller,
//! while a creation and a command run and after them. tests/secrets has the table of what may be seen
//! where, and looks at the log of every level.

use std::collections::BTreeSet;

use standin::faults::{Action, Rule};

use crate::world::{World, id, node, unique, wait, world};

/// Beginning of all canaries; a full stop ends each, because in a database a letter may follow.
const BEGINNING: &str = "canary7b2d";
/// Canaries as a pattern, which does not match the command line that has it.
const PATTERN: &str = "canary[7]b2d[A-Za-z]*";
/// Files of a node: journal and shims, sockets and outputs, PVE's task logs and descriptions, logs,
/// configuration, and what a program may have left behind.
const AREAS: &str =
    "/var/lib/pve-sandbox-agent /run/pve-sandbox /var/log /etc/pve /etc/pve-sandbox /tmp /var/tmp";

fn canary(input: &str) -> String {
    format!("{BEGINNING}{input}.")
}

/// Canaries in a text.
fn canaries(text: &str) -> BTreeSet<String> {
    let ends = text.split(BEGINNING).skip(1);
    ends.map(|rest| rest.chars().take_while(char::is_ascii_alphabetic).collect()).collect()
}

/// Canaries in the files of a node, other than what is in the sandboxes' own volumes.
fn in_files(world: &World, node: &str) -> BTreeSet<String> {
    // A file that ends while it is read is no failure.
    let line = format!("grep -raoh '{PATTERN}' {AREAS} 2>/dev/null; true");
    canaries(&world.shell(node, &line))
}

/// Canaries in the command lines of a node's processes, those of its containers among them. The nodes
/// of the lab see the processes of the machine, too: of `sandboxctl` people choose the arguments.
fn in_command_lines(world: &World, node: &str) -> BTreeSet<String> {
    let line = "for process in /proc/[0-9]*; do \
                  case \"$(readlink $process/exe)\" in */sandboxctl) continue;; esac; \
                  tr '\\0' ' ' <$process/cmdline; \
                done 2>/dev/null; true";
    canaries(&world.shell(node, line))
}

/// Canaries in the controller's files and in the logs of all daemons.
fn in_the_controller(world: &World) -> BTreeSet<String> {
    let layout = world.lab.layout();
    let mut found = BTreeSet::new();
    let mut dirs = vec![layout.dir().join("controller"), layout.logs()];
    while let Some(dir) = dirs.pop() {
        for entry in std::fs::read_dir(&dir).expect("listed").flatten() {
            match entry.file_type() {
                Ok(kind) if kind.is_dir() => dirs.push(entry.path()),
                Ok(kind) if kind.is_file() => {
                    let bytes = std::fs::read(entry.path()).unwrap_or_default();
                    found.extend(canaries(&String::from_utf8_lossy(&bytes)));
                }
                Ok(_) | Err(_) => {}
            }
        }
    }
    found
}

fn set(inputs: &[&str]) -> BTreeSet<String> {
    inputs.iter().map(ToString::to_string).collect()
}

/// Looks everywhere. Metadata is in the journal and in the store: callers find sandboxes by it.
#[track_caller]
fn look(world: &World, node: &str, command_lines: &[&str]) {
    let metadata = set(&["Metadata"]);
    let found = in_files(world, node);
    assert!(found.is_subset(&metadata), "in the files of {node}: {found:?}");
    let found = in_the_controller(world);
    assert!(found.is_subset(&metadata), "in the files of the controller: {found:?}");
    let found = in_command_lines(world, node);
    assert_eq!(found, set(command_lines), "in the command lines of {node}");
}

#[test]
fn secrets_are_in_no_file_and_no_command_line_of_a_node() {
    let Some(world) = world() else { return };
    let file = tempfile::NamedTempFile::new().expect("a file");
    std::fs::write(file.path(), canary("FirstFile")).expect("written");
    let first = format!("{}:/root/first", file.path().display());
    let env = format!("TOKEN={}", canary("Env"));
    let metadata = format!("note={}", canary("Metadata"));
    // While it is being created: `pct` runs, and the controller keeps its file.
    let key = unique("secrets");
    let slow = Rule::once("start", "lxc-start", Action::SleepMs);
    world.faults("node1", &[Rule { ms: Some(10_000), ..slow }]);
    let create: &[&str] = &[
        "create",
        "--node",
        "node1",
        "--request-id",
        &key,
        "--no-wait",
        "--env",
        &env,
        "--meta",
        &metadata,
        "--file",
        &first,
    ];
    let ran = world.ctl(create);
    assert_eq!(ran.code, 0, "{}", ran.stderr);
    wait("the container to be started", || {
        world.of_request(&key).iter().any(|sandbox| sandbox["step"] == "start")
    });
    look(&world, "node1", &[]);
    world.faults("node1", &[]);
    wait("the sandbox to run", || {
        world.of_request(&key).iter().any(|sandbox| sandbox["phase"] == "running")
    });
    let sandbox = world.of_request(&key).remove(0);
    let (id, node) = (id(&sandbox).to_owned(), node(&sandbox).to_owned());
    world.mine(&id);
    assert_eq!(world.ctl(&["exec", &id, "--", "cat", "/root/first"]).text(), canary("FirstFile"));

    // While a command runs, with a secret in its variables, its arguments and its input.
    let variable = format!("KEY={}", canary("ExecEnv"));
    let script =
        "cat >/root/stdin; test -n \"$TOKEN\" -a -n \"$KEY\" && touch /root/all; sleep 600; :";
    let argument = canary("Argv");
    let start: &[&str] = &[
        "exec",
        "-i",
        "--exec-id",
        "secrets",
        "--env",
        &variable,
        &id,
        "--",
        "sh",
        "-c",
        script,
        "--",
        &argument,
    ];
    let mut child = world.command(start);
    let mut child = child.stdin(std::process::Stdio::piped()).spawn().expect("sandboxctl");
    let mut stdin = child.stdin.take().expect("stdin");
    std::io::Write::write_all(&mut stdin, canary("Stdin").as_bytes()).expect("written");
    drop(stdin);
    wait("the command", || world.ctl(&["exec", &id, "--", "test", "-e", "/root/all"]).code == 0);
    // A process of a container shows its own arguments, as any process does.
    look(&world, &node, &["Argv"]);
    assert_eq!(world.ctl(&["kill", "-s", "9", &id, "secrets"]).code, 0);
    child.wait().expect("ended");

    // Also in a restart of the agent, which reads the journal, and after the end.
    let services = world.node(&node).services().expect("services");
    services.kill(lab::daemons::AGENT, false, std::time::Duration::from_secs(30)).expect("killed");
    let script: &[&str] = &["exec", &id, "--", "sh", "-c", "test -n \"$TOKEN\""];
    wait("the variable after a restart", || world.ctl(script).code == 0);
    look(&world, &node, &[]);
    assert_eq!(world.ctl(&["rm", &id]).code, 0);
    world.wait_phase(&id, "deleted");
    look(&world, &node, &[]);
    world.finish();
}
