//! Who reaches an open port, and the credentials for it.

use std::{net::SocketAddr, time::Duration};

use nix::{errno::Errno, unistd::geteuid};
use proto::{Reason, name::Port, visibility::Visibility};

use super::*;
use crate::sandbox::access::{
    credential::{Credential, Purpose},
    expose::Reach,
    kill_connections::AGAIN,
    links::Wanted,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::{sleep, timeout},
};

pub(super) fn port(number: u32) -> Port {
    Port::try_from(number).expect("a port")
}

pub(super) fn wanted(visibility: Visibility) -> Reach {
    Reach { wanted: Some(visibility), default: Visibility::Public }
}

fn by_default(default: Visibility) -> Reach {
    Reach { wanted: None, default }
}

impl Node {
    pub(super) async fn open(&self, name: &str, number: u32, reach: Reach) -> Option<Visibility> {
        let name = name.parse().expect("a name");
        let opened = self.sandboxes.expose(&id(1), name, port(number), reach).await;
        opened.expect("opened").visibility(port(number))
    }

    pub(super) async fn link(&self, service: &str, purpose: Option<Purpose>) -> Result<String> {
        let user = Some("ada".parse().expect("a label"));
        let wanted = Wanted { service: service.into(), purpose, life: None, user };
        Ok(self.sandboxes.create_access_link(&id(1), wanted).await?.text)
    }

    /// True when a credential opens a port now, by the record alone.
    pub(super) async fn opens(&self, text: &str, purpose: Purpose, number: u32) -> bool {
        let record = self.record(1).await;
        let guarded = record.access.ports.get(&port(number)).zip(record.access.key);
        guarded.is_some_and(|(guarded, key)| {
            let read = Credential::read(text.as_bytes(), purpose, &key, &id(1));
            let now_s = self.clock.now_ms() / 1000;
            read.is_some_and(|it| it.is_good_for(port(number), guarded.generation, now_s))
        })
    }
}

#[tokio::test(start_paused = true)]
async fn port_has_one_visibility_under_all_its_names() {
    use Visibility::{Private, Public, Team, Token};
    let mut node = Node::new().await;
    node.running(1).await;
    assert_eq!(node.open("web", 80, by_default(Team)).await, Some(Team));
    // What is open keeps what it has, whatever the default is.
    assert_eq!(node.open("web", 80, by_default(Public)).await, Some(Team));
    assert_eq!(node.open("www", 80, by_default(Private)).await, Some(Team));
    assert_eq!(node.open("www", 80, wanted(Token)).await, Some(Token));
    assert_eq!(node.open("api", 81, wanted(Public)).await, Some(Public));
    node.restart().await;
    let open: Vec<_> = node
        .record(1)
        .await
        .open_ports()
        .into_iter()
        .map(|open| (open.name.to_string(), open.port.get(), open.visibility))
        .collect();
    let expected = [("api", 81, Public), ("web", 80, Token), ("www", 80, Token)];
    assert_eq!(open, expected.map(|(name, port, who)| (name.to_owned(), port, who)));
    // To the version before, what is not public is closed.
    let record = node.record(1).await;
    assert_eq!(record.services.values().collect::<Vec<_>>(), [&port(81)]);
    assert_eq!(node.open("web", 80, wanted(Public)).await, Some(Public));
    let record = node.record(1).await;
    assert_eq!((record.services.len(), record.access.ports.len()), (3, 0));
    let (record, closed) =
        node.sandboxes.hide(&id(1), "www".parse().expect("a name")).await.expect("closed");
    assert_eq!((closed.len(), record.visibility(port(80))), (2, None));
}

#[tokio::test(start_paused = true)]
async fn credentials_end_with_hide_revocation_and_another_visibility() {
    let mut node = Node::new().await;
    node.running(1).await;
    node.open("web", 80, wanted(Visibility::Token)).await;
    node.open("other", 81, wanted(Visibility::Token)).await;
    assert_eq!(node.record(1).await.access.key, None, "it is made when it is needed");
    let other = node.link("other", None).await.expect("made");
    for round in 0..3 {
        let token = node.link("80", None).await.expect("made");
        node.restart().await;
        assert!(node.opens(&token, Purpose::Token, 80).await, "{round}");
        assert!(!node.opens(&token, Purpose::Token, 81).await, "{round}");
        // The same again changes nothing.
        node.open("web", 80, wanted(Visibility::Token)).await;
        assert!(node.opens(&token, Purpose::Token, 80).await, "{round}");
        match round {
            0 => {
                let (_, revoked) =
                    node.sandboxes.revoke_access(&id(1), "web".into()).await.expect("revoked");
                assert_eq!(revoked, port(80));
            }
            1 => {
                let name = "web".parse().expect("a name");
                node.sandboxes.hide(&id(1), name).await.expect("closed");
                assert!(!node.opens(&token, Purpose::Token, 80).await);
                node.open("web", 80, wanted(Visibility::Token)).await;
            }
            _ => {
                node.open("web", 80, wanted(Visibility::Private)).await;
                node.open("web", 80, wanted(Visibility::Token)).await;
            }
        }
        assert!(!node.opens(&token, Purpose::Token, 80).await, "{round}");
        assert!(node.opens(&other, Purpose::Token, 81).await, "another port's stay: {round}");
    }
    node.sandboxes.delete(&id(1), LONG).await.expect("deleted");
    assert_eq!(node.record(1).await.access.key, None, "a tombstone keeps no secret");
}

#[tokio::test(start_paused = true)]
async fn port_takes_the_credentials_of_its_visibility_alone() {
    use Purpose::{Link, Token};
    let node = Node::new().await;
    node.running(1).await;
    for (number, visibility) in (80..).zip(Visibility::ALL) {
        node.open(visibility.word(), number, wanted(visibility)).await;
    }
    for (service, takes) in [
        ("public", [false; 3]),
        ("team", [true, true, false]),
        ("token", [true, false, true]),
        ("private", [false; 3]),
    ] {
        for (purpose, takes) in [None, Some(Link), Some(Token)].into_iter().zip(takes) {
            let made = node.link(service, purpose).await;
            assert_eq!(made.is_ok(), takes, "{service} {purpose:?}");
            if let Err(error) = made {
                assert_eq!(error.reason, Reason::AccessKind);
            }
        }
    }
    let unknown = node.link("99", None).await.expect_err("closed");
    assert_eq!(unknown.reason, Reason::ServiceNotFound);
    let revoked = node.sandboxes.revoke_access(&id(1), "nothing".into()).await;
    assert_eq!(revoked.expect_err("closed").reason, Reason::ServiceNotFound);
    let life = |service: &str, seconds| Wanted {
        service: service.into(),
        purpose: None,
        life: Some(Duration::from_secs(seconds)),
        user: None,
    };
    for (service, seconds, is_fine) in [
        ("team", 3600, true),
        ("team", 3601, false),
        ("team", 0, false),
        ("token", 30 * 86_400, true),
        ("token", 30 * 86_400 + 1, false),
    ] {
        let made = node.sandboxes.create_access_link(&id(1), life(service, seconds)).await;
        assert_eq!(made.is_ok(), is_fine, "{service} {seconds}");
    }
}

/// Makes a node with a running sandbox, and a port of that with a server which answers nobody.
pub(super) async fn serving(disk: Arc<dyn Disk>) -> (Node, TcpListener, u32) {
    assert!(geteuid().is_root(), "run this test as root: it ends sockets of others");
    // Its sandboxes have addresses of this host, which no other run of this test uses.
    let [.., high, low] = std::process::id().to_be_bytes();
    let address = |last| Ipv4Addr::new(127, 50 + high % 50, low, last);
    let addresses = (address(2), address(254));
    let node = Node::with_addresses(addresses, disk, |_| {}, Faults::default()).await;
    node.running(1).await;
    node.cluster.set_entry("env");
    let ip = node.record(1).await.lease().expect("an address");
    let listener = TcpListener::bind(SocketAddr::from((ip, 0))).await.expect("free");
    let number = u32::from(listener.local_addr().expect("bound").port());
    (node, listener, number)
}

/// A server in a sandbox, and a client of it.
pub(super) async fn connected(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let address = listener.local_addr().expect("bound");
    let (client, server) = tokio::join!(TcpStream::connect(address), listener.accept());
    (client.expect("connected"), server.expect("accepted").0)
}

/// Checks that a connection was cut: its end is an error, and none that the server made.
pub(super) async fn assert_cut(client: &mut TcpStream) {
    let mut read = [0; 8];
    let end = timeout(Duration::from_secs(1), client.read(&mut read)).await.expect("it is cut");
    let end = end.expect_err("its server ended nothing");
    assert_eq!(end.raw_os_error(), Some(Errno::ECONNABORTED as i32), "{end}");
}

/// Checks that a connection is open.
pub(super) async fn assert_open((client, server): &mut (TcpStream, TcpStream)) {
    server.write_all(b"open").await.expect("sent");
    let mut read = [0; 4];
    client.read_exact(&mut read).await.expect("it is open");
}

#[tokio::test(start_paused = true)]
async fn request_that_connects_just_after_hide_is_cut_later() {
    let (node, listener, number) = serving(Arc::new(SoundDisk)).await;
    let hide =
        async || node.sandboxes.hide(&id(1), "web".parse().expect("a name")).await.expect("closed");
    node.open("web", number, wanted(Visibility::Team)).await;
    let (mut early, _server) = connected(&listener).await;
    hide().await;
    assert_cut(&mut early).await;
    // It had its route before, and takes its time.
    let mut late = connected(&listener).await;
    sleep(AGAIN - Duration::from_secs(1)).await;
    assert_open(&mut late).await;
    sleep(Duration::from_secs(2)).await;
    assert_cut(&mut late.0).await;

    // Whoever connects once everybody may stays.
    for (visibility, stays) in [(Visibility::Public, true), (Visibility::Team, false)] {
        node.open("web", number, wanted(Visibility::Token)).await;
        hide().await;
        node.open("web", number, wanted(visibility)).await;
        let mut late = connected(&listener).await;
        sleep(AGAIN + Duration::from_secs(1)).await;
        if stays {
            assert_open(&mut late).await;
        } else {
            assert_cut(&mut late.0).await;
        }
        hide().await;
        sleep(AGAIN + Duration::from_secs(1)).await;
    }
}
