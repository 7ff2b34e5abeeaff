//! Open forwards to ports, so that a revocation of a port's access ends them. A forward has a credential of its own,
//! the caller's token, and needs no open port: `hide` and another visibility do not end it.

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
    /// By sandbox and port; the number tells those to one port apart.
    open: BTreeMap<(SandboxId, Port, u64), CancellationToken>,
}

/// Open forwards to ports of this node's sandboxes. Clones share them.
#[derive(Debug, Clone, Default)]
pub(in crate::sandbox) struct Forwards(Arc<Mutex<Table>>);

/// Entry of one forward, until it is dropped.
#[derive(Debug)]
pub(in crate::sandbox) struct OpenForward {
    all: Forwards,
    key: (SandboxId, Port, u64),
    revoked: CancellationToken,
}

impl Forwards {
    /// Adds a forward. It is added before it connects, so that no revocation misses it.
    pub(in crate::sandbox) fn add(&self, id: SandboxId, port: Port) -> OpenForward {
        let revoked = CancellationToken::new();
        let mut table = self.0.lock();
        let key = (id, port, table.next);
        table.next += 1;
        table.open.insert(key, revoked.clone());
        drop(table);
        OpenForward { all: self.clone(), key, revoked }
    }

    /// Ends the forwards to a port. Returns how many there were.
    pub(in crate::sandbox) fn cut(&self, id: SandboxId, port: Port) -> usize {
        let table = self.0.lock();
        let to_port = table.open.range((id, port, 0)..=(id, port, u64::MAX));
        to_port.inspect(|(_, revoked)| revoked.cancel()).count()
    }
}

impl OpenForward {
    /// Returns the token that is cancelled when the access to the port is revoked.
    pub(in crate::sandbox) fn revoked(&self) -> CancellationToken {
        self.revoked.clone()
    }
}

impl Drop for OpenForward {
    fn drop(&mut self) {
        self.all.0.lock().open.remove(&self.key);
    }
}

impl Sandboxes {
    /// Ends the forwards to a port that is not open to HTTP, by its number. `None` when there are none.
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
}
