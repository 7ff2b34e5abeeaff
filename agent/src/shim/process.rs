//! Main function of the shim process.

use std::{io, sync::Arc};

use tokio::{
    net::UnixListener,
    runtime::{Builder, Runtime},
};

use super::{Container, Options, Parts, serve, tree::MARK_LOOKS_MAX};
use crate::{pve::shim_cgroup, sys::inherited};

/// Threads for calls that end soon, whatever a tenant does: reads of cgroups, and of what the kernel
/// itself knows of processes.
const SHORT_CALLS: usize = 2;

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
    let runtime = runtime()?;
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
    // A search for marks that hangs ends with the process: do not wait for it.
    runtime.shutdown_background();
    served
}

/// Builds the runtime of a shim: one thread, and few for blocking calls, since there is one shim for each
/// sandbox. All searches for marks may hang, and as many threads are theirs: what signals and ends commands
/// has its own.
///
/// # Errors
/// When the kernel has no descriptors for it.
pub(super) fn runtime() -> io::Result<Runtime> {
    Builder::new_current_thread()
        .max_blocking_threads(MARK_LOOKS_MAX + SHORT_CALLS)
        .enable_all()
        .build()
}
