//! Somebody's first session with the program, on a terminal of 80 columns: typos, wrong ids, Ctrl-C and a
//! closed controller. The screens are snapshots, which are read as a whole.

use std::{sync::atomic::Ordering, time::SystemTime};

use tokio::process::Command;

use crate::{
    fake::{Behaviour, Fake, ID},
    terminal::{CTRL_C, Terminal, screen},
};

const COLUMNS: u16 = 80;

/// A session, written down as it is shown.
struct Session {
    fake: Fake,
    shown: String,
}

impl Session {
    async fn start(behaviour: Behaviour) -> Self {
        Self { fake: Fake::start(behaviour).await, shown: String::new() }
    }

    /// Runs a command line; presses keys, each once its text is shown.
    async fn line(&mut self, line: &str, keys: &[(&str, &str)]) {
        let words: Vec<_> = line.split(' ').filter(|word| !word.is_empty()).collect();
        let command = self.fake.bare(&words);
        self.run(line, command, keys).await;
    }

    async fn run(&mut self, line: &str, mut command: Command, keys: &[(&str, &str)]) {
        command.current_dir(self.fake.file(""));
        let mut terminal = Terminal::run(command, COLUMNS);
        for (wanted, typed) in keys {
            terminal.until(wanted).await.press(typed).await;
        }
        let (code, output) = terminal.end().await;
        let text = screen(&self.same(&output), COLUMNS.into());
        // How far a spinner came is different each time.
        let is_spinner = |c: char| ('\u{2800}'..='\u{28ff}').contains(&c);
        let lines: Vec<_> = text.split('\n').filter(|line| !line.starts_with(is_spinner)).collect();
        let text = lines.join("\n");
        self.shown.push_str(&format!("$ sandboxctl {line}\n{text}[exit {code}]\n\n"));
    }

    /// Replaces what differs from run to run.
    fn same(&self, output: &str) -> String {
        let age = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).expect("a clock");
        let days = (age.as_secs() - 1_700_000_000) / 86_400;
        let home = self.fake.file("");
        let home = home.to_str().expect("utf-8").trim_end_matches('/');
        output
            .replace(&format!("localhost:{}", self.fake.port), "localhost:77443")
            .replace(home, "~")
            .replace(&format!("{days}d"), "1111d")
    }
}

fn one_snapshot() -> Behaviour {
    Behaviour { snapshots: vec!["small"], ..Behaviour::default() }
}

#[tokio::test]
async fn first_session() {
    let mut session = Session::start(one_snapshot()).await;
    let endpoint = format!("{}\n", session.fake.endpoint());
    let ca = format!("{}\n", session.fake.file("cert.pem").display());
    session.line("ls", &[]).await;
    session.line("login", &[("Endpoint", "controller:7443\n")]).await;
    let with = |token| [("Endpoint", endpoint.as_str()), ("CA", ca.as_str()), ("Token", token)];
    session.line("login lab", &with("wrong\n")).await;
    session.line("login lab", &with(CTRL_C)).await;
    session.line("login lab", &with("t0ken\n")).await;
    session.line("context ls", &[]).await;
    session.line("context use prod", &[]).await;
    session.line("--context prod ls", &[]).await;
    session.line("lst", &[]).await;
    session.line("lsit --wtach", &[]).await;
    session.line("ls --wtach", &[]).await;
    session.line("ls", &[]).await;
    session.line("create", &[]).await;
    session.line("get 100002", &[]).await;
    session.line("get my-web", &[]).await;
    session.line("exec 0000 true", &[]).await;
    session.line("exec sn02q exit 3", &[]).await;
    session.line("exec", &[]).await;
    session.line("shell", &[]).await;
    session.line("logs sn02q nothing", &[]).await;
    session.line("attach sn02q nothing", &[]).await;
    session.line("kill sn02q nothing", &[]).await;
    session.line("console sn02q", &[]).await;
    session.line("rm sn02q", &[("[y/N]", CTRL_C)]).await;
    session.line("rm sn02q", &[("[y/N]", "n\n")]).await;
    assert_eq!(session.fake.behaviour.deletes.load(Ordering::SeqCst), 0);
    session.line("rm sn02q", &[("[y/N]", "y\n")]).await;
    session.line("nodes", &[]).await;
    session.line("events sn02q --last 3", &[]).await;
    let mut closed = session.fake.bare(&["ls"]);
    closed.env("SANDBOXCTL_ENDPOINT", "https://localhost:1");
    session.run("ls    # the controller is closed", closed, &[]).await;
    session.line("login other --endpoint https://localhost:1 --ca nowhere.pem", &[]).await;
    let login = "login other --endpoint https://localhost:1";
    session.line(login, &[("CA", &ca), ("Token", "x\n")]).await;
    session.line("context ls", &[]).await;
    session.line("context rm lab", &[]).await;
    session.line("ls", &[]).await;
    insta::assert_snapshot!(session.shown);
}

#[tokio::test]
async fn ctrl_c_at_any_time() {
    let mut session = Session::start(Behaviour { create_hangs: true, ..one_snapshot() }).await;
    let (fake, path) = (&session.fake, session.fake.file("cert.pem"));
    let path = path.to_str().expect("utf-8");
    let login = ["login", "lab", "--endpoint", &fake.endpoint(), "--ca", path];
    let mut terminal = Terminal::run(fake.bare(&login), COLUMNS);
    terminal.until("Token").await.press("t0ken\n").await;
    assert_eq!(terminal.end().await.0, 0);
    session.line("create --request-id mine", &[("on node2", CTRL_C)]).await;
    session.line(&format!("exec {ID} signal"), &[("ready", CTRL_C)]).await;
    session.line(&format!("exec --exec-id job --detach {ID} signal"), &[]).await;
    session.line(&format!("attach {ID} job"), &[("leaves it", CTRL_C)]).await;
    session.line(&format!("logs -f {ID} job"), &[("ready", CTRL_C)]).await;
    session.line("ls --watch", &[("\x1b[J", CTRL_C)]).await;
    session.line("top", &[("\x1b[J", CTRL_C)]).await;
    session.line(&format!("kill {ID} signal"), &[]).await;
    insta::assert_snapshot!(session.shown);
}
