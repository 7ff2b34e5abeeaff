//! Configured templates that sandboxes can be created from now. A configured template may be
//! missing on the node, be no template, or have lines that are forbidden.

use std::collections::BTreeMap;

use proto::{Reason, id::Vmid, name::SnapshotId};

use crate::{
    pve::forbidden::Allowed,
    sandbox::{Error, Result, Sandboxes, Template},
};

impl Sandboxes {
    /// Lists the configured templates that are templates on this node and have no forbidden line.
    /// One that cannot be looked up keeps its last known state.
    pub async fn cloneable(&self) -> Vec<&Template> {
        let mut unfit = BTreeMap::new();
        for template in &self.options.templates {
            let why = match self.pve.config(template.vmid).await {
                Ok(config) => template.obstacle(config.as_ref()),
                Err(_) => {
                    let known = self.unfit_templates.read();
                    known.as_ref().and_then(|known| known.get(&template.vmid).cloned())
                }
            };
            unfit.extend(why.map(|why| (template.vmid, why)));
        }
        let fit = |template: &&Template| !unfit.contains_key(&template.vmid);
        let fit: Vec<_> = self.options.templates.iter().filter(fit).collect();
        self.tell(fit.is_empty(), unfit);
        fit
    }

    /// Logs the snapshots that are not offered, whenever they change.
    fn tell(&self, none: bool, unfit: BTreeMap<Vmid, String>) {
        let mut known = self.unfit_templates.write();
        if known.as_ref() == Some(&unfit) {
            return;
        }
        for Template { snapshot, vmid, allowed, .. } in &self.options.templates {
            if let Some(why) = unfit.get(vmid) {
                tracing::error!(%snapshot, %vmid, "the snapshot is not offered: its template {why}");
            } else if *allowed != Allowed::default() {
                tracing::warn!(
                    %snapshot, %vmid, ?allowed,
                    "the operator allows lines in this template that are forbidden otherwise"
                );
            }
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
            let known = self.unfit_templates.read();
            let mut named = self.options.templates.iter().filter(|t| t.snapshot == *snapshot);
            let why = named.find_map(|t| known.as_ref()?.get(&t.vmid).cloned());
            let why = why.map_or("it is not known".to_owned(), |why| format!("its template {why}"));
            let message = format!("this node has no snapshot {snapshot}: {why}");
            Error::new(Reason::SnapshotNotFound, message)
        })
    }
}
