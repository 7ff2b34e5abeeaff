//! Whether the bridge of the sandboxes can go: `ifdown` would take it from whatever guest is on it.

use std::{fs, io, path::Path};

use super::Error;

/// Most ports that are looked at; one is enough to stay.
const PORTS_MAX: usize = 16;

/// Checks that nothing is connected to a bridge. `net` is the kernel's list of network interfaces. A
/// bridge that is down already is fine.
///
/// # Errors
/// [`Error::HasPorts`] with their names, and [`Error::Ports`] when nobody can tell.
pub fn check_bridge(net: &Path, bridge: &str) -> Result<(), Error> {
    let failed = |error| Error::Ports(bridge.to_owned(), error);
    let listed = match fs::read_dir(net.join(bridge).join("brif")) {
        Ok(listed) => listed,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    };
    let mut ports = Vec::new();
    for port in listed.take(PORTS_MAX) {
        ports.push(port.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    ports.sort();
    if ports.is_empty() {
        return Ok(());
    }
    Err(Error::HasPorts { bridge: bridge.to_owned(), ports: ports.join(", ") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bridge_with_a_guest_stays_and_names_its_ports() {
        let net = tempfile::tempdir().expect("a directory");
        let check = || check_bridge(net.path(), "vmbr1").map_err(|error| error.to_string());
        check().expect("it is down");
        let ports = net.path().join("vmbr1/brif");
        fs::create_dir_all(&ports).expect("made");
        check().expect("nothing is on it");
        for port in ["veth207i0", "tap300i0"] {
            fs::write(ports.join(port), "").expect("written");
        }
        let told = check().expect_err("guests are on it");
        assert!(told.contains("vmbr1 stays") && told.contains("tap300i0, veth207i0"), "{told}");
        fs::remove_dir_all(&ports).expect("removed");
        fs::write(&ports, "").expect("written");
        let told = check().expect_err("nobody can tell");
        assert!(told.contains("cannot be listed"), "{told}");
    }
}
