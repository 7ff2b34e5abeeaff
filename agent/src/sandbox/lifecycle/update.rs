//! Changing what a sandbox is called, what its caller notes about it, and its rules: one write of its
//! record, all of the fields or none. Nothing is done to the container; `resize` changes that.
//! The rules of isolation follow the record.

use std::sync::Arc;

use proto::{
    id::{SandboxId, SandboxRef},
    spec::Egress,
    update::Update,
};

use crate::{
    journal::Record,
    sandbox::{Error, Known, Sandboxes, core::queries},
};

impl Sandboxes {
    /// Changes the fields that `update` names.
    ///
    /// # Errors
    /// When there is no such sandbox; REVISION_CONFLICT when it has another revision than `update`
    /// wants; FIELD_INVALID when it would have too much metadata; ISOLATION_FAILED when the rules for its
    /// egress are not in force, which then follow later.
    pub async fn update(
        self: &Arc<Self>,
        id: &SandboxId,
        update: Update,
    ) -> Result<Arc<Record>, Error> {
        let now = self.clock.moment();
        let egress = update.egress.clone().map(Option::unwrap_or_default);
        let follows = egress.is_some();
        if let Some(egress) = &egress {
            // Not whether the resolver answers: until it does, what is asked for is closed.
            self.check_egress(egress)?;
            if *egress != Egress::Open
                && let Some(Known::Live(record)) = self.known(&SandboxRef::Id(*id))
                && let Some(config) = self.pve.config(record.vmid).await?
            {
                self.check_interfaces(record.vmid, &config)?;
            }
        }
        let record = self
            .amend_living(id, move |record| {
                if let Some(wanted) = update.revision.filter(|wanted| *wanted != record.revision) {
                    return Err(queries::changed_since(record, wanted));
                }
                record.metadata = update.metadata_of(&record.metadata).map_err(Error::of_field)?;
                if let Some(name) = &update.name {
                    record.name.clone_from(name);
                }
                record.lifetime = record.lifetime.clone().with(&update.lifetime, &now);
                let (wake_on, asked) = (&mut record.wake_on, update.wake_on);
                wake_on.http = asked.http.unwrap_or(wake_on.http);
                wake_on.ssh = asked.ssh.unwrap_or(wake_on.ssh);
                wake_on.exec = asked.exec.unwrap_or(wake_on.exec);
                if let Some(egress) = &egress {
                    record.egress.clone_from(egress);
                }
                Ok(())
            })
            .await?;
        if follows {
            // The record stands: if this fails, each pass of the reconciler tries again.
            self.isolate().await?;
        }
        Ok(record)
    }
}
