//! Tests of `login`, of contexts, and of what wins over what.

use std::{fs, os::unix::fs::PermissionsExt};

use crate::{
    fake::{Behaviour, Fake, Ran, finish},
    terminal::{CTRL_C, Terminal},
};

async fn fake() -> Fake {
    Fake::start(Behaviour::default()).await
}

async fn bare(fake: &Fake, args: &[&str]) -> Ran {
    finish(fake.bare(args).spawn().expect("spawn")).await
}

/// Logs in with all that is needed as flags.
async fn login(fake: &Fake, name: &str, to: &Fake) -> Ran {
    let (ca, token) = (to.file("cert.pem"), to.file("token"));
    let (ca, token) = (ca.to_str().expect("utf-8"), token.to_str().expect("utf-8"));
    let flags = ["--endpoint", &to.endpoint(), "--ca", ca, "--token-file", token];
    bare(fake, &[&["login", name][..], &flags].concat()).await
}

const CONFIG: &str = ".config/sandboxctl/config.toml";
const TOKENS: &str = ".config/sandboxctl/tokens";

#[tokio::test]
async fn login_saves_a_context_that_is_used_from_then_on() {
    let fake = fake().await;
    let ran = login(&fake, "lab", &fake).await;
    let told = format!(
        "logged in to {} as team lab; the context lab is used from now on\n",
        fake.endpoint()
    );
    assert_eq!((ran.code, ran.text()), (Some(0), told.as_str()), "{ran:?}");
    assert_eq!(bare(&fake, &["ls", "-q"]).await.code, Some(0), "it needs nothing more");
    let token = fake.file(TOKENS).join("lab");
    assert_eq!(fs::read_to_string(&token).expect("saved"), "t0ken\n");
    for (path, mode) in [(token, 0o600), (fake.file(CONFIG), 0o600), (fake.file(TOKENS), 0o700)] {
        let is = fs::metadata(&path).expect("there").permissions().mode() & 0o777;
        assert_eq!(is, mode, "{}", path.display());
    }
    let config = fs::read_to_string(fake.file(CONFIG)).expect("saved");
    assert!(!config.contains("t0ken\""), "the token is not in it: {config}");
    let list = bare(&fake, &["context", "ls", "--json"]).await.json();
    assert_eq!((&list[0]["id"], &list[0]["team"]), (&"lab".into(), &"lab".into()), "{list}");
}

#[tokio::test]
async fn login_saves_nothing_that_the_controller_refuses() {
    let fake = fake().await;
    fs::write(fake.file("wrong"), "s3cr3t-x\n").expect("written");
    let (ca, wrong) = (fake.file("cert.pem"), fake.file("wrong"));
    let (ca, wrong) = (ca.to_str().expect("utf-8"), wrong.to_str().expect("utf-8"));
    let endpoint = fake.endpoint();
    for (endpoint, token) in [(endpoint.as_str(), wrong), ("https://localhost:1", wrong)] {
        let flags = ["login", "--endpoint", endpoint, "--ca", ca, "--token-file", token];
        let ran = bare(&fake, &flags).await;
        assert_ne!(ran.code, Some(0), "{ran:?}");
        assert!(!ran.stderr.contains("s3cr3t"), "no token is shown: {ran:?}");
    }
    let ran = bare(&fake, &["login"]).await;
    assert!(ran.code == Some(2) && ran.stderr.contains("give --endpoint"), "{ran:?}");
    let ran = login(&fake, "../x", &fake).await;
    assert!(ran.code == Some(2) && ran.stderr.contains("cannot be the name"), "{ran:?}");
    assert!(!fake.file(CONFIG).exists() && !fake.file(TOKENS).exists());
}

#[tokio::test]
async fn token_comes_from_a_pipe_or_is_typed_without_being_shown() {
    let fake = fake().await;
    let ca = fake.file("cert.pem");
    let ca = ca.to_str().expect("utf-8");
    let flags = ["login", "--endpoint", &fake.endpoint(), "--ca", ca];
    for more in [&[][..], &["--token-file", "-"]] {
        let mut command = fake.bare(&[&flags[..], more].concat());
        let token = fs::File::open(fake.file("token")).expect("there");
        let ran = finish(command.stdin(token).spawn().expect("spawn")).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
    }
    assert!(fake.file(TOKENS).join("localhost").exists(), "named by the host");
    let ran = bare(&fake, &["context", "rm", "localhost"]).await;
    assert_eq!(ran.text(), "localhost removed\n");
    assert!(!fake.file(TOKENS).join("localhost").exists());

    let mut terminal = Terminal::run(fake.bare(&["login", "lab"]), 80);
    terminal.until("Endpoint of").await.press(&format!("{}\n", fake.endpoint())).await;
    terminal.until("CA of").await.press(&format!("{ca}\n")).await;
    terminal.until("not shown").await.press("t0ken\n").await;
    let (code, seen) = terminal.end().await;
    assert!(code == 0 && seen.contains("logged in to"), "{code}: {seen}");
    assert!(!seen.contains("t0ken"), "{seen}");
    let mut terminal = Terminal::run(fake.bare(&["login", "lab"]), 80);
    terminal.until("not shown").await.press(CTRL_C).await;
    let (code, seen) = terminal.end().await;
    assert_eq!(code, 130, "{seen}");
}

#[tokio::test]
async fn flag_wins_over_the_environment_and_that_over_what_is_chosen() {
    let (fake, other) = (fake().await, fake().await);
    for (name, to) in [("one", &fake), ("two", &other)] {
        assert_eq!(login(&fake, name, to).await.code, Some(0));
    }
    let lists = |of: &Fake| of.behaviour.lists.load(std::sync::atomic::Ordering::SeqCst);
    // Each login was a call.
    let called = async |mut command: tokio::process::Command| {
        let before = (lists(&fake), lists(&other));
        let ran = finish(command.spawn().expect("spawn")).await;
        assert_eq!(ran.code, Some(0), "{ran:?}");
        match (lists(&fake) > before.0, lists(&other) > before.1) {
            (true, false) => "one",
            (false, true) => "two",
            both => panic!("{both:?}"),
        }
    };
    assert_eq!(called(fake.bare(&["ls"])).await, "two", "the last login");
    assert_eq!(bare(&fake, &["context", "use", "one"]).await.code, Some(0));
    assert_eq!(called(fake.bare(&["ls"])).await, "one");
    assert_eq!(called(fake.bare(&["--context", "two", "ls"])).await, "two");
    let mut named = fake.bare(&["ls"]);
    named.env("SANDBOXCTL_CONTEXT", "two");
    assert_eq!(called(named).await, "two");
    let mut both = fake.command(&["ls"]);
    both.env("SANDBOXCTL_CONTEXT", "two");
    assert_eq!(called(both).await, "one", "the environment names the endpoint, too");
    assert_eq!(called(fake.command(&["ls", "--context", "two"])).await, "two", "a flag is meant");
    let noted = finish(fake.command(&["context", "use", "two"]).spawn().expect("spawn")).await;
    assert!(noted.stderr.contains("SANDBOXCTL_ENDPOINT is set"), "{noted:?}");
    let ran = bare(&fake, &["ls", "--context", "three"]).await;
    assert_eq!(ran.code, Some(2));
    let told = "there is no context \"three\"; there are one, two\nhint: `sandboxctl context ls`";
    assert!(ran.stderr.contains(told), "{ran:?}");
    for verb in ["use", "rm"] {
        assert_eq!(bare(&fake, &["context", verb, "three"]).await.code, Some(2), "{verb}");
    }
    let completed = bare(&fake, &["__complete", "--", "context", "use", "o"]).await;
    assert_eq!(completed.text(), format!("one\t{}\n", fake.endpoint()));
}

#[tokio::test]
async fn top_level_of_the_file_counts_where_no_context_is_chosen() {
    let fake = fake().await;
    let config = fake.file("config.toml");
    let text = format!(
        "# mine\nendpoint = \"{}\"\ntoken_file = {:?}\nca = {:?}\n",
        fake.endpoint(),
        fake.file("token"),
        fake.file("cert.pem")
    );
    fs::write(&config, &text).expect("written");
    let path = config.to_str().expect("utf-8");
    assert_eq!(bare(&fake, &["--config", path, "ls"]).await.code, Some(0));
    let listed = bare(&fake, &["--config", path, "context", "ls"]).await;
    assert_eq!(
        (listed.text(), listed.stderr.as_str()),
        ("", "no contexts; `sandboxctl login` makes one\n")
    );
    fs::write(&config, format!("context = \"gone\"\n{text}")).expect("written");
    let ran = bare(&fake, &["--config", path, "ls"]).await;
    assert!(ran.stderr.contains("no context \"gone\"; there are no contexts yet"), "{ran:?}");
}
