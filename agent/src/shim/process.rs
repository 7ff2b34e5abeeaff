//! Main function of the shim process.

use std::{io, sync::Arc};

use tokio::net::UnixListener;

use super::{Container, Options, Parts, serve};
use crate::{pve::shim_cgroup, sys::inherited};

/// Reason why a shim did not serve.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The options on the command line are not valid JSON.
    #[error("the shim's options are not valid JSON")]
    Options(#[source] serde_json::Error),
    #[error("the vmid is not valid")]
    Vmid(#[source] proto::id::Invalid),
    #[error("the shim could not serve")]
    Io(#[from] io::Error),
}

/// Serves one sandbox until it is gone. Inherits its listener as descriptor 3 and the helper's
/// image as descriptor 4.
///
/// # Errors
/// When the shim cannot start.
pub fn run(options: &str) -> Result<(), Error> {
    let [listener, image] = inherited::take()?;
    let options: Options = serde_json::from_str(options).map_err(Error::Options)?;
    let host = Arc::new(Container::new(&options).map_err(Error::Vmid)?);
    let own =
        options.limits.map(|limits| (options.places.cgroup_root.clone(), host.vmid(), limits));
    if let Some((root, vmid, limits)) = &own {
        if let Err(error) = shim_cgroup::join(root, *vmid, *limits) {
            // Commands are worth more than their accounting.
            tracing::warn!(%vmid, %error, "the shim stays in the agent's cgroup");
        }
        options.io.set(&options.places, *vmid);
    }
    let Options { socket, dir, ids, output_bytes_max, .. } = options;
    // One thread, and few for blocking calls: there is one shim for each sandbox.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(2)
        .enable_all()
        .build()?;
    let served = runtime.block_on(async {
        let listener = std::os::unix::net::UnixListener::from(listener);
        listener.set_nonblocking(true)?;
        let parts = Parts { host, image, dir, ids, socket, output_bytes_max };
        let served = serve(UnixListener::from_std(listener)?, parts).await;
        // Leave the socket file: by now another shim may listen under that name.
        served.map_err(Error::Io)
    });
    if let Some((root, vmid, _)) = own {
        shim_cgroup::leave(&root, vmid);
    }
    served
}
