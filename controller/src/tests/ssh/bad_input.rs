//! Requests out of bounds: each is refused or brought within them, and what is in order goes on.

use russh::{
    Channel, ChannelMsg, Sig,
    client::{AuthResult, Msg},
    keys::PrivateKeyWithHashAlg,
};

use super::{
    forwards::{connect, connect_nearby, dial, log_in},
    *,
};

/// Waits for the answer to a request: true when it is granted.
async fn is_granted(channel: &mut Channel<Msg>) -> bool {
    loop {
        let message = timeout(STEP, channel.wait()).await.expect("in time").expect("open");
        if matches!(message, ChannelMsg::Success | ChannelMsg::Failure) {
            return matches!(message, ChannelMsg::Success);
        }
    }
}

/// Waits until a line was started, and returns how.
async fn started(door: &Door, line: &str) -> ExecStart {
    let agent = door.lab.holder(&door.id);
    let last = || agent.last_command().map(|(start, _)| start);
    until("the command", || async { last().is_some_and(|start| start.title == line) }).await;
    last().expect("one")
}

/// Tries to log in as a user.
async fn log_in_as(door: &Door, user: String) -> AuthResult {
    let mut client = connect(door).await;
    let key = PrivateKeyWithHashAlg::new(Arc::new(key(1)), None);
    let answer = client.authenticate_publickey(user, key);
    timeout(STEP, answer).await.expect("in time").expect("answered")
}

#[tokio::test(flavor = "multi_thread")]
async fn user_that_is_no_name_of_a_sandbox_is_refused_as_any_other() {
    let door = Door::open().await;
    let id = &door.id;
    let users = [
        String::new(),
        "x".repeat(128),
        "x".repeat(129),
        "x".repeat(20_000),
        "s\u{e4}ndbox".to_owned(),
        "\u{1f4e6}".repeat(40),
        format!("\u{202e}{id}"),
        format!("{id}\0"),
        format!("{id}\n"),
        format!(" {id}"),
        format!("{id} "),
        format!("{id}{}", " ".repeat(128)),
        format!("../{id}"),
    ];
    let refused = log_in_as(&door, "nobody".to_owned()).await;
    assert!(!refused.success());
    let answers = users.clone().map(|user| log_in_as(&door, user));
    for (user, said) in users.iter().zip(futures_util::future::join_all(answers).await) {
        assert_eq!(said, refused, "{} bytes: {user:?}", user.len());
    }
    assert!(log_in_as(&door, id.clone()).await.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn terminal_without_a_size_or_with_a_huge_one_has_a_possible_one() {
    let door = Door::open().await;
    let client = log_in(&door).await;
    let sizes = [
        ((0, 0), (80, 24)),
        ((1, 1), (1, 1)),
        ((0, 1001), (80, 1000)),
        ((u32::MAX, u32::MAX), (1000, 1000)),
    ];
    let of = |(cols, rows)| Some(WindowSize { rows, cols });
    let agent = door.lab.holder(&door.id);
    for ((columns, rows), expected) in sizes {
        let mut channel = client.channel_open_session().await.expect("open");
        let asked = channel.request_pty(true, "xterm", columns, rows, u32::MAX, u32::MAX, &[]);
        asked.await.expect("sent");
        assert!(is_granted(&mut channel).await, "{columns}x{rows}");
        let line = format!("echo {columns}x{rows}; sleep 60");
        channel.exec(true, line.as_bytes()).await.expect("sent");
        assert!(is_granted(&mut channel).await, "{columns}x{rows}");
        assert_eq!(started(&door, &line).await.window, of(expected), "{columns}x{rows}");
        for ((columns, rows), expected) in sizes {
            channel.window_change(columns, rows, 0, 0).await.expect("sent");
            let window = || agent.last_command().and_then(|(_, window)| window);
            until("the size", || async { window() == of(expected) }).await;
        }
        channel.close().await.expect("sent");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn variables_out_of_bounds_are_refused_and_the_command_runs() {
    let door = Door::open().await;
    let client = log_in(&door).await;
    let mut channel = client.channel_open_session().await.expect("open");
    let long = "v".repeat(512);
    for (name, value) in [
        ("PATH", "/tmp"),
        ("LD_PRELOAD", "/tmp/x.so"),
        ("LC_lower", "x"),
        ("LC_A=B", "x"),
        (&format!("LC_{}", "A".repeat(30)), "x"),
        ("LC_LONG", &format!("{long}v")),
        ("LC_NUL", "a\0b"),
    ] {
        channel.set_env(true, name, value).await.expect("sent");
        assert!(!is_granted(&mut channel).await, "{name}");
    }
    // As many as there may be, each as long as it may be.
    let letter = |number: u8| char::from(b'A' + number);
    for number in 0..32 {
        let name = format!("LC_{}{}{}", "A".repeat(27), letter(number / 16), letter(number % 16));
        channel.set_env(true, name.as_str(), long.as_str()).await.expect("sent");
        assert!(is_granted(&mut channel).await, "{number}: {name}");
    }
    channel.set_env(true, "LC_MORE", "x").await.expect("sent");
    assert!(!is_granted(&mut channel).await, "too many");
    // The name of a terminal that is too long is left out.
    let term = "t".repeat(5000);
    channel.request_pty(true, &term, 80, 24, 0, 0, &[]).await.expect("sent");
    assert!(is_granted(&mut channel).await);
    let line = "echo in; sleep 60";
    channel.exec(true, line).await.expect("sent");
    let start = started(&door, line).await;
    assert_eq!(start.env.len(), 32);
    assert!(start.env.keys().all(|name| name.starts_with("LC_")), "{:?}", start.env.keys());
}

#[tokio::test(flavor = "multi_thread")]
async fn signals_of_a_client_reach_the_command_and_unknown_ones_nobody() {
    let door = Door::open().await;
    let client = log_in(&door).await;
    for signal in [Sig::TERM, Sig::INT, Sig::KILL, Sig::Custom("USR2".to_owned())] {
        let mut channel = client.channel_open_session().await.expect("open");
        // Nothing runs yet.
        channel.signal(Sig::KILL).await.expect("sent");
        channel.exec(true, "sleep 60").await.expect("sent");
        assert!(is_granted(&mut channel).await);
        for unknown in ["STOP", "KILL@example.com", "", "9", "\u{e4}"] {
            channel.signal(Sig::Custom(unknown.to_owned())).await.expect("sent");
        }
        channel.signal(signal.clone()).await.expect("sent");
        let ended = async {
            loop {
                let message = channel.wait().await.expect("open");
                assert!(!matches!(message, ChannelMsg::ExitStatus { .. }), "{message:?}");
                if let ChannelMsg::ExitSignal { signal_name, .. } = message {
                    return signal_name;
                }
            }
        };
        let told = timeout(STEP, ended).await.expect("in time");
        assert_eq!(format!("{told:?}"), format!("{signal:?}"));
    }
}

#[tokio::test(start_paused = true)]
async fn client_that_does_not_log_in_within_30_s_is_disconnected() {
    let door = Door::open().await;
    let begun = tokio::time::Instant::now();
    // One that says nothing at all, and one that has a key exchange behind it.
    let mut silent = dial(&door);
    let client = connect_nearby(&door).await;
    let mut greeting = Vec::new();
    let early = timeout(Duration::from_secs(29), silent.read_to_end(&mut greeting)).await;
    early.expect_err("it is still waited for");
    assert!(!client.is_closed());
    let ended = timeout(Duration::from_secs(2), silent.read_to_end(&mut greeting)).await;
    ended.expect("it ends in time").expect("an end");
    let closed = async {
        while !client.is_closed() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    timeout(Duration::from_secs(2), closed).await.expect("it ends in time");
    assert!(begun.elapsed() >= Duration::from_secs(30));
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_a_connection_change_under_full_load() {
    let door = Door::open().await;
    let bytes = counted(20 << 20);
    let mut ssh = door.ssh(1, &door.id);
    // With -v the client tells of each exchange of keys.
    ssh.args(["-v", "-o", "RekeyLimit=1M"]).arg("cat").stdin(Stdio::piped());
    let mut child = ssh.spawn().expect("ssh");
    let mut stdin = child.stdin.take().expect("one");
    let sent = bytes.clone();
    let feed = tokio::spawn(async move { stdin.write_all(&sent).await });
    let ended = timeout(STEP, child.wait_with_output()).await.expect("in time").expect("ended");
    let said = text(&ended.stderr);
    assert!(
        ended.status.success() && ended.stdout == bytes,
        "{} bytes: {said}",
        ended.stdout.len()
    );
    feed.await.expect("no panic").expect("sent");
    let exchanges = said.matches("SSH2_MSG_NEWKEYS received").count();
    assert!(exchanges > 10, "{exchanges} exchanges: {said}");
}
