use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{task::JoinSet, time::timeout};

use crate::{
    http::{Client, Request},
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
