use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    net::UnixStream,
    task::JoinSet,
    time::{Instant, timeout},
};

use crate::{
    http::{Client, Request, once},
    node::{Node, at, host, need_caddy},
    sandbox::Sandbox,
};

/// Waits until a hundred more requests have been served.
async fn a_hundred_more(done: &AtomicUsize) {
    let before = done.load(Ordering::Relaxed);
    let served = async {
        while done.load(Ordering::Relaxed) < before + 100 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(30), served).await.expect("requests are served");
}

/// Restarts and kills the agent: no request fails, because Caddy asks again.
#[tokio::test(flavor = "multi_thread")]
async fn no_request_is_lost_when_the_agent_restarts() {
    need_caddy!();
    let mut node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut load = JoinSet::new();
    for _ in 0..64 {
        let (public, stop, done) = (node.public, Arc::clone(&stop), Arc::clone(&done));
        load.spawn(async move {
            let mut client = Client::connect(public).await.expect("connected");
            let host = host(8000, 100_001);
            let mut bad = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                match client.request(&Request::get(&host, "/")).await {
                    Ok(answer) if answer.status == 200 => {
                        done.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(answer) => bad.push(format!("{} {}", answer.status, answer.text())),
                    Err(error) => {
                        bad.push(error.to_string());
                        break;
                    }
                }
            }
            bad
        });
    }
    for round in 0..6 {
        // Always under load: some requests have been served since the last restart.
        a_hundred_more(&done).await;
        if round % 2 == 0 {
            node.restart_agent();
        } else {
            node.kill_agent();
            tokio::time::sleep(Duration::from_millis(200)).await;
            node.start_agent();
        }
    }
    a_hundred_more(&done).await;
    stop.store(true, Ordering::Relaxed);
    let bad = load.join_all().await.concat();
    assert!(bad.is_empty(), "{} failed: {:?}", bad.len(), &bad[..bad.len().min(5)]);
}

/// An agent that stays away closes every port: nobody else decides who gets in.
#[tokio::test(flavor = "multi_thread")]
async fn request_fails_and_reaches_no_sandbox_while_the_agent_is_away() {
    need_caddy!();
    let mut node = Node::start(1).await;
    let sandbox = Sandbox::start(at(10, 8000), "alpha").await;
    node.put(100_001, sandbox.address);
    let host = host(8000, 100_001);
    let mut client = Client::connect(node.public).await.expect("connected");
    assert_eq!(client.request(&Request::get(&host, "/")).await.expect("an answer").status, 200);
    let before = sandbox.got().len();
    node.kill_agent();
    let gone = async {
        while UnixStream::connect(node.dir.join("route.sock")).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    timeout(Duration::from_secs(10), gone).await.expect("it is killed");

    // On a connection that was answered before, and on new ones; with a body, and with headers that say the way.
    let begun = Instant::now();
    let upstream = sandbox.address.to_string();
    let forged = Request::get(&host, "/")
        .with("X-Sbx-Kind", "local")
        .with("X-Sbx-Host", "localhost")
        .with("X-Sbx-Upstream", &upstream);
    let post = Request { method: "POST", body: b"kept", ..Request::get(&host, "/") };
    let get = Request::get(&host, "/");
    let (old, forged, posted) =
        tokio::join!(client.request(&get), once(node.public, &forged), once(node.public, &post));
    for answer in [old, forged, posted] {
        let answer = answer.expect("an answer");
        assert!(matches!(answer.status, 500..=599), "{} {}", answer.status, answer.text());
        assert!(!answer.text().contains("alpha"), "{}", answer.text());
        // Not that the sandbox is at fault, which nobody has asked.
        let told = answer.text().starts_with("the agent of this node does not answer (");
        assert!(told, "{}", answer.text());
    }
    // Caddy asks for 15 s, the time that an agent takes to restart.
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    assert_eq!(sandbox.got().len(), before, "{:?}", sandbox.got());

    node.start_agent();
    assert_eq!(once(node.public, &get).await.expect("an answer").status, 200);
}
