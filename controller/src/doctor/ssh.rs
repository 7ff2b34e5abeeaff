//! Checks of the SSH server: its host key, its listener, and the address that clients are told.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    path::Path,
    str::FromStr as _,
};

use daemon::doctor::{
    Check,
    reach::{PATIENCE, local},
};
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpStream, lookup_host},
    time::timeout,
};

use super::{RESTART, config_option};
use crate::{
    config::{Config, Ssh},
    ssh::host_key::{self, Found},
};

/// First bytes of a server of this program, before its version.
const GREETING: &[u8] = b"SSH-2.0-pve-sandbox";

/// Observations of an SSH server.
#[derive(Debug)]
pub(super) struct Facts {
    key: Result<Option<Found>, String>,
    listener: Listener,
    /// Whether the name for clients is known here; `None` for an address.
    resolves: Option<bool>,
}

/// Answer of the address where the server should listen.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Listener {
    Own,
    Nobody,
    Other,
}

/// Looks at the server.
pub(super) async fn look(config: &Config, ssh: &Ssh) -> Facts {
    let host = ssh.host.trim_matches(['[', ']']);
    let resolves = async {
        let found = timeout(PATIENCE, lookup_host((host, 22))).await;
        found.is_ok_and(|found| found.is_ok_and(|mut addresses| addresses.next().is_some()))
    };
    let is_name = !host.is_empty() && IpAddr::from_str(host).is_err();
    Facts {
        key: host_key::look(&config.data_dir).map_err(|error| error.to_string()),
        listener: listener(local(ssh.listen)).await,
        resolves: if is_name { Some(resolves.await) } else { None },
    }
}

/// Connects, and reads how the server introduces itself.
async fn listener(address: SocketAddr) -> Listener {
    let Ok(Ok(mut stream)) = timeout(PATIENCE, TcpStream::connect(address)).await else {
        return Listener::Nobody;
    };
    let mut greeting = [0; GREETING.len()];
    let read: Result<io::Result<_>, _> = timeout(PATIENCE, stream.read_exact(&mut greeting)).await;
    match read {
        Ok(Ok(_)) if greeting == GREETING => Listener::Own,
        _ => Listener::Other,
    }
}

/// Judges the server. Pure.
pub(super) fn checks(path: &Path, config: &Config, ssh: &Ssh, facts: &Facts) -> [Check; 3] {
    [host_key(path, config, &facts.key), listening(ssh, facts.listener), address(path, ssh, facts)]
}

fn host_key(path: &Path, config: &Config, key: &Result<Option<Found>, String>) -> Check {
    const NAME: &str = "ssh-host-key";
    let file = host_key::path(&config.data_dir).display().to_string();
    let make = format!("pve-sandbox-controller setup --no-start{}; {RESTART}", config_option(path));
    let failed = |found: String, remedy: String| Check::failed(NAME, file.clone(), found, remedy);
    match key {
        Ok(None) => failed(
            "not there: restore it from a backup, or make another, which clients take for an attack until they \
             have run `sandboxctl ssh-config --write` again"
                .to_owned(),
            make,
        ),
        Err(why) => {
            failed(why.clone(), format!("restore it from a backup; without one: rm {file}; {make}"))
        }
        Ok(Some(found)) if found.mode & 0o077 != 0 => failed(
            format!("mode {:o}: others than the service's user may use it", found.mode),
            format!("chmod 600 {file}"),
        ),
        Ok(Some(found)) => Check::ok(NAME, file.clone(), found.fingerprint.clone()),
    }
}

fn listening(ssh: &Ssh, listener: Listener) -> Check {
    const NAME: &str = "ssh";
    let address = local(ssh.listen);
    match listener {
        Listener::Own => Check::ok(NAME, address.to_string(), "it answers"),
        Listener::Nobody => Check::failed(
            NAME,
            address.to_string(),
            "nothing listens: the controller does not run, or was started before `[ssh]` was in its configuration",
            format!("{RESTART}; why it ended: journalctl -u pve-sandbox-controller -n 20"),
        ),
        Listener::Other => Check::failed(
            NAME,
            address.to_string(),
            "something listens that is not the SSH server of this controller",
            format!("ss -ltnp 'sport = :{}' shows what does", address.port()),
        ),
    }
}

/// Judges the address that clients are told.
fn address(path: &Path, ssh: &Ssh, facts: &Facts) -> Check {
    const NAME: &str = "ssh-address";
    let host = ssh.host.trim_matches(['[', ']']);
    let port = ssh.public_port.unwrap_or(ssh.listen.port());
    let subject =
        if host.is_empty() { format!("port {port}") } else { format!("{host}, port {port}") };
    let edit = |line: &str| format!("edit {}: {line}; {RESTART}", path.display());
    let warning =
        |found: &str, line: &str| Check::warning(NAME, subject.clone(), found, edit(line));
    let ip = IpAddr::from_str(host).ok();
    if host.contains(':') && ip.is_none() {
        let found = "a port is no part of the host: clients cannot find it";
        return Check::failed(
            NAME,
            subject,
            found,
            edit("port and host apart, in public_port and host"),
        );
    }
    if ip.is_some_and(|ip| ip.is_loopback() || ip.is_unspecified()) || host == "localhost" {
        let found = "clients are told an address that leads each of them to its own machine";
        return warning(found, "host = \"NAME\", by which clients reach this machine");
    }
    if facts.resolves == Some(false) {
        let found = "the name is not known on this machine; clients may not know it either";
        return warning(found, "host = \"NAME\", which is in the DNS");
    }
    if ssh.listen.ip().is_loopback() && host.is_empty() {
        let found =
            "only this machine reaches the server, and clients are told the host of the API";
        return warning(
            found,
            "listen = \"0.0.0.0:2222\", or host = \"NAME\" of what forwards to it",
        );
    }
    Check::ok(NAME, subject, "clients are told it")
}

#[cfg(test)]
mod tests {
    use daemon::doctor::State;

    use super::*;

    fn judge(ssh: &str, resolves: Option<bool>) -> Check {
        let text =
            format!("url_template = \"https://port-{{port}}-vm-{{vmid}}.x.test\"\n[ssh]\n{ssh}");
        let path = Path::new("controller.toml");
        let config = Config::parse(path, &text).expect("valid");
        let facts = Facts { key: Ok(None), listener: Listener::Own, resolves };
        address(path, config.ssh.as_ref().expect("one"), &facts)
    }

    #[test]
    fn address_that_leads_clients_nowhere_is_found() {
        let any = "listen = \"0.0.0.0:2222\"\n";
        for (lines, resolves, state) in [
            ("", None, State::Ok),
            ("host = \"ssh.x.test\"\n", Some(true), State::Ok),
            ("host = \"192.0.2.1\"\npublic_port = 22\n", None, State::Ok),
            ("host = \"2001:db8::1\"\n", None, State::Ok),
            ("host = \"ssh.x.test\"\n", Some(false), State::Warning),
            ("host = \"localhost\"\n", Some(true), State::Warning),
            ("host = \"::1\"\n", None, State::Warning),
            ("host = \"0.0.0.0\"\n", None, State::Warning),
            ("host = \"ssh.x.test:22\"\n", Some(false), State::Failed),
        ] {
            let check = judge(&format!("{any}{lines}"), resolves);
            assert_eq!(check.state, state, "{lines} {check:?}");
            assert_eq!(check.remedy.is_some(), state != State::Ok);
        }
        let own = "listen = \"127.0.0.1:2222\"\n";
        assert_eq!(judge(own, None).state, State::Warning);
        let behind = format!("{own}host = \"ssh.x.test\"\n");
        assert_eq!(judge(&behind, Some(true)).state, State::Ok, "something forwards to it");
    }

    #[tokio::test]
    async fn servers_are_told_apart_by_their_greeting() {
        use tokio::io::AsyncWriteExt as _;
        for (greeting, found) in [
            (&b"SSH-2.0-pve-sandbox\r\n"[..], Listener::Own),
            (b"SSH-2.0-OpenSSH_9.2\r\n", Listener::Other),
            (b"", Listener::Other),
        ] {
            let socket = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
            let address = socket.local_addr().expect("bound");
            let server = tokio::spawn(async move {
                let (mut stream, _) = socket.accept().await.expect("somebody");
                stream.write_all(greeting).await.expect("sent");
            });
            assert_eq!(listener(address).await, found);
            server.await.expect("ended");
            assert_eq!(listener(address).await, Listener::Nobody);
        }
    }
}
