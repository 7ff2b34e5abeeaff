//! Who reaches an open port, and the credentials for it.

use std::time::Duration;

use proto::{Reason, name::Port, visibility::Visibility};

use super::*;
use crate::sandbox::access::{
    credential::{Credential, Purpose},
    expose::Reach,
    links::Wanted,
};

fn port(number: u32) -> Port {
    Port::try_from(number).expect("a port")
}

fn wanted(visibility: Visibility) -> Reach {
    Reach { wanted: Some(visibility), default: Visibility::Public }
}

fn by_default(default: Visibility) -> Reach {
    Reach { wanted: None, default }
}

impl Node {
    async fn open(&self, name: &str, number: u32, reach: Reach) -> Option<Visibility> {
        let name = name.parse().expect("a name");
        let opened = self.sandboxes.expose(&id(1), name, port(number), reach).await;
        opened.expect("opened").visibility(port(number))
    }

    async fn link(&self, service: &str, purpose: Option<Purpose>) -> Result<String> {
        let user = Some("ada".parse().expect("a label"));
        let wanted = Wanted { service: service.into(), purpose, life: None, user };
        Ok(self.sandboxes.create_access_link(&id(1), wanted).await?.text)
    }

    /// True when a credential opens a port now, by the record alone.
    async fn opens(&self, text: &str, purpose: Purpose, number: u32) -> bool {
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
