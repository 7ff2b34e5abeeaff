//! Servers inside, as the host sees them without entering.

use std::net::SocketAddr;

use proto::name::Port;

use crate::stage::{DEADLINE, Shown, Stage};

/// Ports inside that nothing of a template listens on.
const ON_LOOPBACK: u16 = 47_021;
const ON_ALL: u16 = 47_022;
const ON_NONE: u16 = 47_023;

/// Tells a server on 127.0.0.1 alone from one on 0.0.0.0, for as long as it listens.
pub(super) async fn server_on_loopback_alone_is_told_apart(stage: &dyn Stage) -> Shown {
    let order = stage.started().await;
    let (pve, vmid) = (stage.pve(), order.vmid);
    let port = |number: u16| Port::try_from(u32::from(number)).expect("a port");
    let on_loopback = async || {
        let mut found = Vec::new();
        for number in [ON_LOOPBACK, ON_ALL, ON_NONE] {
            if pve.listens_on_loopback(vmid, port(number)).await {
                found.push(number);
            }
        }
        found
    };
    let listed = async || {
        let listeners = pve.listeners(vmid).await.into_iter();
        listeners.filter(|at| (ON_LOOPBACK..=ON_NONE).contains(&at.port())).collect::<Vec<_>>()
    };
    assert_eq!((on_loopback().await, listed().await), (vec![], vec![]));

    let servers: [SocketAddr; 2] =
        [([127, 0, 0, 1], ON_LOOPBACK).into(), ([0, 0, 0, 0], ON_ALL).into()];
    stage.listen(vmid, &servers).await;
    assert_eq!((on_loopback().await, listed().await), (vec![ON_LOOPBACK], servers.to_vec()));
    stage.listen(vmid, &servers[1..]).await;
    assert_eq!((on_loopback().await, listed().await), (vec![], servers[1..].to_vec()));
    stage.listen(vmid, &[]).await;
    assert_eq!((on_loopback().await, listed().await), (vec![], vec![]));

    pve.stop(vmid, DEADLINE).await.expect("stop");
    assert_eq!((on_loopback().await, listed().await), (vec![], vec![]));
    stage.destroy(&order).await;
    Shown::Yes
}
