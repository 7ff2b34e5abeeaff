//! Targets of forwards, as controller and agent check them.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

use crate::{
    id::Invalid,
    name::Port,
    sandbox::v1::{ForwardAccepted, ForwardTcp, forward_open},
};

/// Longest path of a unix socket in bytes: the kernel's address has 108, one of them for the end.
pub const UNIX_PATH_BYTES_MAX: usize = 107;
/// Most ports of one answer of ListPorts.
pub const PORTS_MAX: usize = 1000;
/// Number of bytes of a listener's name before it is written in hexadecimal digits.
pub const LISTENER_BYTES: usize = 16;
/// Most connections of a listener that may wait at its caller for a place: as many as the sandbox keeps. Root inside
/// could tell of more.
pub const ACCEPTED_WAITING_MAX: usize = 64;
/// Longest wait for such a place: the sandbox closes a connection that nobody has taken for 30 s.
pub const ACCEPTED_WAIT: Duration = Duration::from_secs(25);

/// Target of a forward inside a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// TCP server.
    Tcp(Host, Port),
    /// Unix socket at an absolute path.
    Unix(String),
    /// Connection that a listener has accepted: its name, and the number of the connection.
    Accepted(String, u64),
}

/// Address of a TCP server inside a sandbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Host {
    /// Loopback addresses, then the sandbox's own.
    Any,
    /// One of these.
    Address(IpAddr),
}

impl Host {
    /// Returns the addresses to try, in order. `own` is the sandbox's, if it has one.
    ///
    /// # Errors
    /// When the address is neither of the loopback nor the sandbox's own.
    pub fn addresses(self, own: Option<Ipv4Addr>) -> Result<Vec<IpAddr>, Invalid> {
        match self {
            Self::Any => {
                let local: [IpAddr; 2] = [Ipv4Addr::LOCALHOST.into(), Ipv6Addr::LOCALHOST.into()];
                Ok(local.into_iter().chain(own.map(IpAddr::from)).collect())
            }
            Self::Address(address)
                if is_local(address) || own.is_some_and(|own| address == own) =>
            {
                Ok(vec![address])
            }
            Self::Address(_) => Err(elsewhere()),
        }
    }
}

fn is_local(address: IpAddr) -> bool {
    address == Ipv4Addr::LOCALHOST || address == Ipv6Addr::LOCALHOST
}

fn elsewhere() -> Invalid {
    Invalid::new("host", "must be localhost, 127.0.0.1, ::1 or the sandbox's own address")
}

/// Parses the host of a TCP target; empty is `localhost`.
///
/// # Errors
/// When it is no IP address: names are never looked up.
pub fn host(text: &str) -> Result<Host, Invalid> {
    match text {
        "" | "localhost" => Ok(Host::Any),
        address => address.parse().map(Host::Address).map_err(|_| elsewhere()),
    }
}

/// Checks the path of a unix socket.
///
/// # Errors
/// When it is not absolute, too long, or has a NUL.
pub fn check_unix_path(path: &str) -> Result<(), Invalid> {
    if path.starts_with('/') && path.len() <= UNIX_PATH_BYTES_MAX && !path.contains('\0') {
        return Ok(());
    }
    let why = "must be an absolute path of at most 107 bytes without a NUL";
    Err(Invalid::new("unix_path", why))
}

impl Target {
    /// Reads a target.
    ///
    /// # Errors
    /// When it is missing or not valid.
    pub fn read(target: Option<forward_open::Target>) -> Result<Self, Invalid> {
        match target {
            Some(forward_open::Target::Tcp(ForwardTcp { host: text, port })) => {
                Ok(Self::Tcp(host(&text)?, Port::try_from(port)?))
            }
            Some(forward_open::Target::UnixPath(path)) => {
                check_unix_path(&path)?;
                Ok(Self::Unix(path))
            }
            Some(forward_open::Target::Accepted(ForwardAccepted { listener, connection })) => {
                check_listener(&listener)?;
                Ok(Self::Accepted(listener, connection))
            }
            None => Err(Invalid::new("target", "must be tcp, unix_path or accepted")),
        }
    }
}

/// Checks the name of a listener.
///
/// # Errors
/// When it is none that an agent has made.
fn check_listener(name: &str) -> Result<(), Invalid> {
    let digits = name.bytes().all(|b| b.is_ascii_hexdigit());
    if digits && name.len() == 2 * LISTENER_BYTES {
        return Ok(());
    }
    Err(Invalid::new("accepted.listener", "must be the name that `listening` told"))
}

/// Returns the target as the audit log names it.
pub fn shown(target: Option<&forward_open::Target>) -> String {
    match target {
        Some(forward_open::Target::Tcp(tcp)) if tcp.host.is_empty() => format!("tcp:{}", tcp.port),
        Some(forward_open::Target::Tcp(tcp)) => format!("tcp:{}:{}", tcp.host, tcp.port),
        Some(forward_open::Target::UnixPath(path)) => format!("unix:{path}"),
        Some(forward_open::Target::Accepted(accepted)) => {
            format!("accepted:{}", accepted.connection)
        }
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(host: &str, port: u32) -> Result<Target, Invalid> {
        let tcp = ForwardTcp { host: host.into(), port };
        Target::read(Some(forward_open::Target::Tcp(tcp)))
    }

    #[test]
    fn only_addresses_of_the_sandbox_itself_are_targets() {
        let own = Some(Ipv4Addr::new(10, 100, 1, 7));
        let addresses = |host: &str| match tcp(host, 80)? {
            Target::Tcp(host, _) => host.addresses(own),
            Target::Unix(_) | Target::Accepted(..) => unreachable!("it is TCP"),
        };
        assert_eq!(addresses("").expect("any").len(), 3);
        assert_eq!(addresses("localhost"), addresses(""));
        for good in ["127.0.0.1", "::1", "10.100.1.7"] {
            let parsed: IpAddr = good.parse().expect("an address");
            assert_eq!(addresses(good), Ok(vec![parsed]));
        }
        for bad in [
            "10.100.1.8",
            "127.0.0.2",
            "0.0.0.0",
            "::",
            "::ffff:127.0.0.1",
            "169.254.169.254",
            "example.com",
            "localhost.",
            "127.1",
            " 127.0.0.1",
        ] {
            assert_eq!(addresses(bad).expect_err(bad).what, "host", "{bad}");
        }
    }

    #[test]
    fn targets_are_checked_field_by_field() {
        for bad in [0, 70_000] {
            assert_eq!(tcp("", bad).expect_err("no port").what, "port");
        }
        let unix = |path: &str| Target::read(Some(forward_open::Target::UnixPath(path.into())));
        unix(&format!("/{}", "x".repeat(106))).expect("the longest path");
        for bad in ["", "run/a", "/a\0b", &format!("/{}", "x".repeat(107))] {
            assert_eq!(unix(bad).expect_err("no path").what, "unix_path");
        }
        let accepted = |listener: &str| {
            let accepted = ForwardAccepted { listener: listener.into(), connection: 1 };
            Target::read(Some(forward_open::Target::Accepted(accepted)))
        };
        accepted(&"0a".repeat(16)).expect("a name");
        for bad in ["", "x", &"0g".repeat(16), &"0a".repeat(17)] {
            assert_eq!(accepted(bad).expect_err("no name").what, "accepted.listener");
        }
        assert_eq!(Target::read(None).expect_err("nothing").what, "target");
    }
}
