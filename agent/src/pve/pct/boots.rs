//! Boots of the containers that carry a mark of ours.

use std::{io, sync::Arc};

use futures_util::{
    StreamExt,
    stream::{BoxStream, unfold},
};
use proto::id::Vmid;

use super::Host;
use crate::pve::{ContainerConfig, Mark, boot_watch::BootWatch, ownership};

/// Watches for boots until that fails.
///
/// # Errors
/// When they cannot be watched.
pub(super) fn watch(host: Arc<Host>) -> io::Result<BoxStream<'static, Mark>> {
    let next = |(mut watch, host): (BootWatch, Arc<Host>)| async move {
        loop {
            let vmid = match watch.next().await {
                Ok(vmid) => vmid,
                Err(error) => {
                    tracing::warn!(%error, "boots of containers can no longer be watched");
                    return None;
                }
            };
            match host.mark_by_config(vmid).await {
                Ok(Some(mark)) => return Some((mark, (watch, host))),
                Ok(None) => {}
                // Not tried again here, where the next boots wait: the look at the boots of each second finds it.
                Err(error) => {
                    tracing::debug!(%vmid, %error, "config of a booting container was not read");
                }
            }
        }
    };
    Ok(unfold((BootWatch::new(&host.places)?, host), next).boxed())
}

impl Host {
    /// Reads the mark of a container of ours from its config alone: nothing that a tenant makes is looked at, so no
    /// tenant delays this. `None` for a container that is not ours, or is gone.
    ///
    /// # Errors
    /// When the config cannot be read, such as when PVE's file system does not answer.
    pub(super) async fn mark_by_config(&self, vmid: Vmid) -> io::Result<Option<Mark>> {
        let Some(bytes) = self.files.read(self.config_path(vmid)).await? else { return Ok(None) };
        let config = ContainerConfig::parse(&bytes);
        Ok(ownership::marked(&config, vmid).ok().and_then(|()| config.mark()))
    }
}
