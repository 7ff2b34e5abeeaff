//! Changing what a sandbox is called, what its caller notes about it, and its rules: one write of its
//! record, all of the fields or none. Nothing is done to the container; `resize` changes that.

use std::sync::Arc;

use proto::{id::SandboxId, update::Update};

use crate::{
    journal::Record,
    sandbox::{Error, Sandboxes, core::queries},
};

impl Sandboxes {
    /// Changes the fields that `update` names.
    ///
    /// # Errors
    /// When there is no such sandbox; REVISION_CONFLICT when it has another revision than `update`
    /// wants; FIELD_INVALID when it would have too much metadata.
    pub async fn update(
        self: &Arc<Self>,
        id: &SandboxId,
        update: Update,
    ) -> Result<Arc<Record>, Error> {
        let now = self.clock.moment();
        self.amend_living(id, move |record| {
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
            Ok(())
        })
        .await
    }
}
