//! Giving credentials for open ports, and taking all of a port's back.

use std::{sync::Arc, time::Duration};

use daemon::mac;
use proto::{
    Reason,
    id::{Invalid, SandboxId, SandboxRef},
    name::{Port, UserLabel},
    visibility::Visibility,
};

use super::credential::{Credential, Purpose};
use crate::{
    journal::{AccessKey, Record},
    sandbox::{Error, Result, Sandboxes},
};

/// Life of a link where the caller names none. A link stands in logs and histories.
pub const LINK_LIFE: Duration = Duration::from_secs(5 * 60);
/// Longest life of a link.
pub const LINK_LIFE_MAX: Duration = Duration::from_secs(3600);
/// Life of a token where the caller names none.
pub const TOKEN_LIFE: Duration = Duration::from_secs(24 * 3600);
/// Longest life of a token.
pub const TOKEN_LIFE_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

/// Credential that a caller wants.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Port by a name of it, or by its number.
    pub service: String,
    /// LINK or TOKEN; `None`: the one that the port takes.
    pub purpose: Option<Purpose>,
    /// Life; `None`: the default of its kind.
    pub life: Option<Duration>,
    /// Label of the user that it is for.
    pub user: Option<UserLabel>,
}

/// Credential that was made.
#[derive(Debug)]
pub struct Made {
    /// The sandbox.
    pub record: Arc<Record>,
    /// Content of the credential.
    pub credential: Credential,
    /// Its text: a secret.
    pub text: String,
}

impl Sandboxes {
    /// Makes a credential for an open port.
    ///
    /// # Errors
    /// SERVICE_NOT_FOUND when the port is not open; ACCESS_KIND when it takes no such credential;
    /// FIELD_INVALID when the life is out of bounds.
    pub async fn create_access_link(
        self: &Arc<Self>,
        id: &SandboxId,
        wanted: Wanted,
    ) -> Result<Made> {
        // Only what can be answered makes a key.
        takes(&*self.living(&SandboxRef::Id(*id))?, &wanted)?;
        let record = self.with_access_key(id).await?;
        let (port, purpose) = takes(&record, &wanted)?;
        let life = life(purpose, wanted.life)?;
        let guarded = record.access.ports.get(&port).zip(record.access.key);
        let (guarded, key) = guarded.ok_or_else(|| not_found(&record, &wanted.service))?;
        let credential = Credential {
            purpose,
            port,
            generation: guarded.generation,
            expires_s: (self.now_ms() / 1000).saturating_add(life.as_secs()),
            user: wanted.user,
        };
        let text = credential.sign(&key, id);
        Ok(Made { record, credential, text })
    }

    /// Returns the sandbox; first makes its key, durably, if it has none.
    async fn with_access_key(self: &Arc<Self>, id: &SandboxId) -> Result<Arc<Record>> {
        let key = mac::random_key();
        let key = key.map_err(|error| Error::new(Reason::Invariant, error.to_string()))?;
        self.amend_living(id, move |record| {
            record.access.key.get_or_insert(AccessKey::new(key));
            Ok(())
        })
        .await
    }

    /// Makes all credentials of a port void, durably, and cuts open connections and forwards of it. Of a port that
    /// is not open, given by its number, there are forwards alone.
    ///
    /// # Errors
    /// SERVICE_NOT_FOUND when the port is not open, and no forward belongs to it.
    pub async fn revoke_access(
        self: &Arc<Self>,
        id: &SandboxId,
        service: String,
    ) -> Result<(Arc<Record>, Port)> {
        let id = *id;
        self.run_to_end(|sandboxes| async move { sandboxes.revoke_now(&id, service).await }).await
    }

    async fn revoke_now(
        self: &Arc<Self>,
        id: &SandboxId,
        service: String,
    ) -> Result<(Arc<Record>, Port)> {
        let named = service.clone();
        let revoked = self.amend_living(id, move |record| {
            let port = record.port_of(&named).ok_or_else(|| not_found(record, &named))?;
            record.revoke(port);
            Ok(())
        });
        let record = match revoked.await {
            Err(error) if error.reason == Reason::ServiceNotFound => {
                return self.revoke_forwards(id, &service).ok_or(error);
            }
            revoked => revoked?,
        };
        let port = record.port_of(&service).ok_or_else(|| not_found(&record, &service))?;
        self.forwards.cut(record.id, port);
        self.begin_cuts(id).await;
        Ok((record, port))
    }
}

/// Returns the port, and the kind of credential that it takes.
fn takes(record: &Record, wanted: &Wanted) -> Result<(Port, Purpose)> {
    let found = record.port_of(&wanted.service);
    let port = found.ok_or_else(|| not_found(record, &wanted.service))?;
    let refuse = |why: String| Err(Error::new(Reason::AccessKind, why));
    let purpose = match record.visibility(port) {
        Some(Visibility::Team) => Purpose::Link,
        Some(Visibility::Token) => Purpose::Token,
        Some(Visibility::Public) => {
            return refuse(format!("port {port} is public: its URL needs no link and no token"));
        }
        Some(Visibility::Private) => {
            return refuse(format!(
                "port {port} is private: nobody reaches it over HTTP; expose it with another visibility"
            ));
        }
        None => return Err(not_found(record, &wanted.service)),
    };
    match (purpose, wanted.purpose) {
        (Purpose::Link, Some(Purpose::Token)) => {
            refuse(format!("port {port} has visibility team: it takes links, and no tokens"))
        }
        (Purpose::Token, Some(Purpose::Link)) => {
            refuse(format!("port {port} has visibility token: it takes tokens, and no links"))
        }
        _ => Ok((port, purpose)),
    }
}

fn life(purpose: Purpose, wanted: Option<Duration>) -> Result<Duration> {
    let (default, max, why) = match purpose {
        Purpose::Token => (TOKEN_LIFE, TOKEN_LIFE_MAX, "must be 1 s to 30 days for a token"),
        Purpose::Link | Purpose::Session => {
            (LINK_LIFE, LINK_LIFE_MAX, "must be 1 s to 1 h for a link")
        }
    };
    let life = wanted.unwrap_or(default);
    if life < Duration::from_secs(1) || life > max {
        return Err(Error::of_field(Invalid::new("ttl", why)));
    }
    Ok(life)
}

fn not_found(record: &Record, service: &str) -> Error {
    let why = format!("{} has no open port or service {service}", record.id);
    Error::new(Reason::ServiceNotFound, why)
}
