//! Open forwards by their ports, so that `revoke` and `hide` of a port end them: connections to the port, listeners on
//! it, and the connections that these have accepted. A forward has a credential of its own, the caller's token, so new
//! ones are possible; another visibility is about HTTP and ends none.

use std::{collections::BTreeMap, sync::Arc};

use daemon::sync::Mutex;
use proto::{
    id::{SandboxId, SandboxRef},
    name::Port,
};
use tokio_util::sync::CancellationToken;

use crate::{
    journal::Record,
    sandbox::{Known, Sandboxes},
};

#[derive(Debug, Default)]
struct Table {
    next: u64,
    /// By sandbox and port; the number tells those of one port apart.
    open: BTreeMap<(SandboxId, Port, u64), CancellationToken>,
    /// Ports of listeners, by their sandboxes and names.
    listeners: BTreeMap<(SandboxId, String), Port>,
}

/// Open forwards by the ports of this node's sandboxes. Clones share them.
#[derive(Debug, Clone, Default)]
pub(in crate::sandbox) struct Forwards(Arc<Mutex<Table>>);

/// Entry of one forward, until it is dropped.
#[derive(Debug)]
pub(in crate::sandbox) struct OpenForward {
    all: Forwards,
    key: (SandboxId, Port, u64),
    /// Name, if it is a listener.
    listener: Option<String>,
    revoked: CancellationToken,
}

impl Table {
    fn add(&mut self, id: SandboxId, port: Port) -> ((SandboxId, Port, u64), CancellationToken) {
        let (key, revoked) = ((id, port, self.next), CancellationToken::new());
        self.next += 1;
        self.open.insert(key, revoked.clone());
        (key, revoked)
    }
}

impl Forwards {
    /// Adds a forward to a port. It is added before it connects, so that no revocation misses it.
    pub(in crate::sandbox) fn add(&self, id: SandboxId, port: Port) -> OpenForward {
        let (key, revoked) = self.0.lock().add(id, port);
        OpenForward { all: self.clone(), key, listener: None, revoked }
    }

    /// Adds a listener on a port, before it listens.
    pub(in crate::sandbox) fn add_listener(
        &self,
        id: SandboxId,
        port: Port,
        name: &str,
    ) -> OpenForward {
        let mut table = self.0.lock();
        table.listeners.insert((id, name.to_owned()), port);
        let (key, revoked) = table.add(id, port);
        drop(table);
        OpenForward { all: self.clone(), key, listener: Some(name.to_owned()), revoked }
    }

    /// Adds a connection that a listener has accepted. `None`: the listener has ended, or is about to.
    pub(in crate::sandbox) fn add_accepted(
        &self,
        id: SandboxId,
        name: &str,
    ) -> Option<OpenForward> {
        let mut table = self.0.lock();
        let port = *table.listeners.get(&(id, name.to_owned()))?;
        let (key, revoked) = table.add(id, port);
        drop(table);
        Some(OpenForward { all: self.clone(), key, listener: None, revoked })
    }

    /// Ends the forwards of a port. Returns how many there were.
    pub(in crate::sandbox) fn cut(&self, id: SandboxId, port: Port) -> usize {
        let mut table = self.0.lock();
        // What such a listener has accepted and nobody has taken yet ends with it.
        table.listeners.retain(|(sandbox, _), of| (*sandbox, *of) != (id, port));
        let of_port = table.open.range((id, port, 0)..=(id, port, u64::MAX));
        of_port.inspect(|(_, revoked)| revoked.cancel()).count()
    }
}

impl OpenForward {
    /// Returns the token that is cancelled when the access to the port is revoked, or the port is hidden.
    pub(in crate::sandbox) fn revoked(&self) -> CancellationToken {
        self.revoked.clone()
    }

    pub(in crate::sandbox) fn is_listener(&self) -> bool {
        self.listener.is_some()
    }
}

impl Drop for OpenForward {
    fn drop(&mut self) {
        let mut table = self.all.0.lock();
        table.open.remove(&self.key);
        if let Some(name) = self.listener.take() {
            table.listeners.remove(&(self.key.0, name));
        }
    }
}

impl Sandboxes {
    /// Ends the forwards of a port that is not open to HTTP, by its number. `None` when there are none.
    pub(in crate::sandbox) fn revoke_forwards(
        &self,
        id: &SandboxId,
        service: &str,
    ) -> Option<(Arc<Record>, Port)> {
        let port = service.parse().ok()?;
        match self.known(&SandboxRef::Id(*id)) {
            Some(Known::Live(record)) => {
                (self.forwards.cut(*id, port) > 0).then_some((record, port))
            }
            Some(Known::Ended(_)) | None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_of_one_sandbox_and_port_are_cut_and_forgotten_with_their_end() {
        let all = Forwards::default();
        let [one, other] = [1, 2].map(|number| SandboxId::new(number, &[0; 10]));
        let [web, api] = [80, 81].map(|port| Port::try_from(port).expect("a port"));
        let open = [(one, web), (one, web), (one, api), (other, web)];
        let open = open.map(|(id, port)| all.add(id, port));
        assert_eq!(all.cut(one, web), 2);
        let cut = open.each_ref().map(|forward| forward.revoked().is_cancelled());
        assert_eq!(cut, [true, true, false, false]);
        drop(open);
        assert_eq!(all.cut(one, web), 0);
        assert!(all.0.lock().open.is_empty());
    }

    #[test]
    fn listener_is_cut_with_what_it_has_accepted_and_nothing_more_is_taken_of_it() {
        let all = Forwards::default();
        let [one, other] = [1, 2].map(|number| SandboxId::new(number, &[0; 10]));
        let [web, api] = [80, 81].map(|port| Port::try_from(port).expect("a port"));
        let cut = |open: &OpenForward| open.revoked().is_cancelled();
        let (first, second) = (all.add_listener(one, web, "a"), all.add_listener(one, api, "b"));
        let (taken, kept) = (all.add_accepted(one, "a"), all.add_accepted(one, "b"));
        let (taken, kept) = (taken.expect("it listens"), kept.expect("it listens"));
        assert!(all.add_accepted(other, "a").is_none(), "another sandbox's");
        assert_eq!(all.cut(one, web), 2);
        assert!(cut(&first) && cut(&taken) && !cut(&second) && !cut(&kept));
        assert!(all.add_accepted(one, "a").is_none());
        drop(second);
        assert!(all.add_accepted(one, "b").is_none(), "it has ended");
        drop((first, taken, kept));
        let table = all.0.lock();
        assert!(table.open.is_empty() && table.listeners.is_empty());
    }
}
