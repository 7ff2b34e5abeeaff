//! Forwards in reverse, with OpenSSH's client: programs in the sandbox connect, and a server beside the client answers.

use super::*;
use crate::node::calls::Call;

/// Starts a server that says back what it gets; returns its port.
async fn echo() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bound");
    let port = listener.local_addr().expect("an address").port();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.ok();
            });
        }
    });
    port
}

impl Door {
    /// Connects as a program in the sandbox.
    fn dial(&self, port: u32) -> std::io::Result<tokio::io::DuplexStream> {
        let dialled = self.lab.holder(&self.id).dial(&self.id, port);
        dialled.ok_or_else(|| std::io::ErrorKind::ConnectionRefused.into())
    }

    fn listened(&self) -> Vec<u32> {
        self.lab.holder(&self.id).listened(&self.id)
    }

    /// Runs a client that forwards alone.
    fn back(&self, seed: u8, forwards: &[String]) -> Command {
        let mut ssh = self.ssh(seed, &self.id);
        ssh.args(["-N", "-o", "ExitOnForwardFailure=yes"]);
        for forward in forwards {
            ssh.arg("-R").arg(forward);
        }
        ssh
    }

    async fn until_listened(&self, ports: &[u32]) {
        until("the listeners", || async { self.listened() == ports }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn programs_in_the_sandbox_reach_a_server_beside_the_client() {
    let door = Door::open().await;
    let here = echo().await;
    // Whatever address is asked for, the sandbox listens on its loopback; the client is told the one that it named.
    let forwards = ["9000", "*:9001", "0.0.0.0:9002", "10.1.2.3:9003", "localhost:9004"]
        .map(|listen| format!("{listen}:127.0.0.1:{here}"));
    let client = door.back(1, &forwards).spawn().expect("ssh");
    door.until_listened(&[9000, 9001, 9002, 9003, 9004]).await;
    for port in 9000..=9004 {
        assert!(echoes(door.dial(port)).await, "port {port}");
    }
    let many = (0..20).map(|_| echoes(door.dial(9000)));
    assert!(futures_util::future::join_all(many).await.into_iter().all(|echoed| echoed));
    // Each half ends apart, and nothing is lost.
    let bytes = counted(FILE_BYTES);
    let (mut read, mut write) = tokio::io::split(door.dial(9000).expect("connected"));
    let mut back = Vec::new();
    let sent = async {
        write.write_all(&bytes).await.expect("sent");
        write.shutdown().await.expect("ended");
    };
    let both = async { tokio::join!(sent, read.read_to_end(&mut back)) };
    timeout(STEP, both).await.expect("in time").1.expect("an end");
    assert!(back == bytes, "{} bytes", back.len());
    drop(client);
    door.until_listened(&[]).await;
    assert!(!echoes(door.dial(9000)).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn port_0_is_answered_with_a_port_and_a_cancelled_listener_ends_alone() {
    let door = Door::open().await;
    let here = echo().await;
    let socket = door.path("mux");
    let path = format!("ControlPath={}", socket.display());
    let mut master = door.ssh(1, &door.id);
    let _master = master.args(["-M", "-N", "-o", &path]).spawn().expect("ssh");
    until("the client", || async { socket.exists() }).await;
    let ask = async |what: &str, forward: &str| {
        let mut ask = door.ssh(1, &door.id);
        let asked = output(ask.args(["-o", &path, "-O", what, "-R", forward])).await;
        assert!(asked.status.success(), "{what} {forward}: {}", text(&asked.stderr));
        text(&asked.stdout).trim().to_owned()
    };
    let port = ask("forward", &format!("0:127.0.0.1:{here}")).await;
    let port: u32 = port.parse().expect("the client is told the port");
    assert!(port >= 49_152);
    door.until_listened(&[port]).await;
    let mut open = door.dial(port).expect("connected");
    assert!(echoes(Ok(&mut open)).await);
    ask("cancel", &format!("0:127.0.0.1:{here}")).await;
    door.until_listened(&[]).await;
    assert!(echoes(Ok(&mut open)).await, "its connection goes on");
    assert!(door.dial(port).is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn port_that_is_taken_and_a_server_that_is_gone_are_refused() {
    let door = Door::open().await;
    let forward = |port: u16| format!("9000:127.0.0.1:{port}");
    let nobody = {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("bound");
        free.local_addr().expect("an address").port()
    };
    let _client = door.back(1, &[forward(nobody)]).spawn().expect("ssh");
    door.until_listened(&[9000]).await;
    let taken = output(&mut door.back(1, &[forward(nobody)])).await;
    assert!(text(&taken.stderr).contains("remote port forwarding failed"), "{taken:?}");
    let mut program = door.dial(9000).expect("connected");
    let mut rest = Vec::new();
    let ended = timeout(STEP, program.read_to_end(&mut rest)).await.expect("in time");
    assert_eq!(ended.expect("an end"), 0, "nobody is there");
    let agent = door.lab.holder(&door.id);
    until("the break", || async { agent.broken_off() == 1 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn listener_outlives_a_restart_of_the_agent_and_ends_with_its_key() {
    let door = Door::open().await;
    let here = echo().await;
    door.add(4, "short").await;
    let forward = format!("9000:127.0.0.1:{here}");
    let mut client = door.back(4, &[forward]).spawn().expect("ssh");
    door.until_listened(&[9000]).await;
    door.lab.holder(&door.id).lose_listeners();
    door.until_listened(&[9000]).await;
    assert!(echoes(door.dial(9000)).await);
    let request = RemoveSshKeyRequest { key: "short".into(), team: String::new() };
    door.lab.operator().remove_ssh_key(request).await.expect("removed");
    let ended = timeout(STEP, client.wait()).await.expect("in time").expect("ended");
    assert!(!ended.success());
    door.until_listened(&[]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn listener_whose_access_is_revoked_does_not_listen_again() {
    let door = Door::open().await;
    let _client = door.back(1, &["9000:127.0.0.1:1".to_owned()]).spawn().expect("ssh");
    door.until_listened(&[9000]).await;
    door.lab.holder(&door.id).revoke_listeners();
    let usage = async || door.lab.usage("red").await.streams;
    until("the end of its stream", || async { usage().await == 0 }).await;
    assert!(door.listened().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn listener_listens_again_though_the_answer_to_that_is_lost() {
    let door = Door::open().await;
    let _client = door.back(1, &["9000:127.0.0.1:1".to_owned()]).spawn().expect("ssh");
    door.until_listened(&[9000]).await;
    let agent = door.lab.holder(&door.id);
    agent.faults(|faults| faults.unanswered = Some(Call::ForwardListen));
    agent.lose_listeners();
    until("the call", || async { agent.swallowed() > 0 }).await;
    agent.faults(|faults| faults.unanswered = None);
    door.lab.net.cut(agent.name());
    door.until_listened(&[9000]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn listener_ends_with_the_sandbox_and_wakes_a_paused_one_by_its_rule() {
    let door = Door::open().await;
    let forwards = ["9000:127.0.0.1:1".to_owned()];
    let mut api = door.lab.api();
    let pause = PauseSandboxRequest { id: door.id.clone(), or_stop: false };
    api.pause_sandbox(pause).await.expect("paused");
    let refused = output(&mut door.back(1, &forwards)).await;
    assert!(text(&refused.stderr).contains("remote port forwarding failed"), "{refused:?}");
    let wake_on = Some(WakeOn { http: false, ssh: true, exec: false });
    let change = Sandbox { id: door.id.clone(), wake_on, ..Sandbox::default() };
    let request = proto::update::request(change, &["wake_on"]);
    api.update_sandbox(request).await.expect("set");
    let _client = door.back(1, &forwards).spawn().expect("ssh");
    door.until_listened(&[9000]).await;
    let stop = StopSandboxRequest { id: door.id.clone(), ..StopSandboxRequest::default() };
    api.stop_sandbox(stop).await.expect("stopped");
    door.lab.holder(&door.id).lose_listeners();
    let usage = async || door.lab.usage("red").await.streams;
    until("the end of its stream", || async { usage().await == 0 }).await;
    assert!(door.listened().is_empty());
}
