//! Configured templates that sandboxes can be created from now. A configured template may be
//! missing on the node, or be no template.

use std::collections::BTreeSet;

use proto::{Reason, id::Vmid, name::SnapshotId};

use crate::sandbox::{Error, Result, Sandboxes, Template};

impl Sandboxes {
    /// Lists the configured templates that are templates on this node. One that cannot be looked up
    /// keeps its last known state.
    pub async fn cloneable(&self) -> Vec<&Template> {
        let mut unfit = BTreeSet::new();
        for template in &self.options.templates {
            match self.pve.config(template.vmid).await {
                Ok(Some(config))
                    if config.is_template()
                        && (config.is_unprivileged() || template.privileged) => {}
                Ok(Some(_) | None) => drop(unfit.insert(template.vmid)),
                Err(_) => {
                    let known = self.unfit_templates.read();
                    unfit.extend(known.iter().flatten().filter(|vmid| **vmid == template.vmid));
                }
            }
        }
        let fit = |template: &&Template| !unfit.contains(&template.vmid);
        let fit: Vec<_> = self.options.templates.iter().filter(fit).collect();
        self.tell(fit.is_empty(), unfit);
        fit
    }

    /// Logs the snapshots that are not offered, whenever they change.
    fn tell(&self, none: bool, unfit: BTreeSet<Vmid>) {
        let mut known = self.unfit_templates.write();
        if known.as_ref() == Some(&unfit) {
            return;
        }
        for template in self.options.templates.iter().filter(|t| unfit.contains(&t.vmid)) {
            let Template { snapshot, vmid, .. } = template;
            tracing::error!(
                %snapshot, %vmid,
                "the snapshot is not offered: its template is missing on this node, is no template, or is \
                 privileged, which its [[template]] does not allow"
            );
        }
        if none {
            tracing::warn!("no snapshot is offered: no sandbox can be made on this node");
        }
        *known = Some(unfit);
    }

    /// Picks the template of the snapshot with the shortest queue.
    pub(in crate::sandbox) async fn template(&self, snapshot: &SnapshotId) -> Result<Template> {
        let fit = self.cloneable().await;
        let of_it = fit.into_iter().filter(|template| template.snapshot == *snapshot);
        of_it.min_by_key(|t| (self.admission.queued(t.vmid), t.vmid)).cloned().ok_or_else(|| {
            let known = self.options.templates.iter().any(|t| t.snapshot == *snapshot);
            let why = match known {
                true => "its template is missing, is none, or is privileged",
                false => "it is not known",
            };
            let message = format!("this node has no snapshot {snapshot}: {why}");
            Error::new(Reason::SnapshotNotFound, message)
        })
    }
}
