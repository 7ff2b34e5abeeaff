//! Forwards as the command line names them: `8080`, `8080:80`, `:80`, `8080:/run/app.sock`, or `-` for
//! stdin and stdout.

use proto::{
    forward::check_unix_path,
    name::Port,
    sandbox::v1::{ForwardTcp, forward_open::Target},
};

/// Word of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Word {
    /// Our stdin and stdout are the local end.
    Stdio,
    /// Ports.
    Forward(Spec),
}

impl Word {
    /// Returns the ports; `None` for stdin and stdout.
    pub(crate) fn forward(self) -> Option<Spec> {
        match self {
            Self::Forward(spec) => Some(spec),
            Self::Stdio => None,
        }
    }
}

/// A forward.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Spec {
    /// Port on this machine; 0 is any free one.
    pub(crate) local: u16,
    /// End in the sandbox.
    pub(crate) remote: Remote,
}

/// End of a forward in a sandbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Remote {
    /// TCP port.
    Port(Port),
    /// Path of a unix socket.
    Unix(String),
}

impl Remote {
    /// Target of the API.
    pub(crate) fn target(&self) -> Target {
        match self {
            Self::Port(port) => {
                Target::Tcp(ForwardTcp { host: String::new(), port: (*port).into() })
            }
            Self::Unix(path) => Target::UnixPath(path.clone()),
        }
    }
}

impl std::fmt::Display for Remote {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Port(port) => write!(f, "{port}"),
            Self::Unix(path) => f.write_str(path),
        }
    }
}

/// Parses a word.
pub(crate) fn parse(text: &str) -> Result<Word, String> {
    if text == "-" {
        return Ok(Word::Stdio);
    }
    let (local, remote) = match text.split_once(':') {
        Some((local, remote)) => (Some(local), remote),
        None => (None, text),
    };
    let remote = if remote.starts_with('/') {
        check_unix_path(remote).map_err(|invalid| invalid.to_string())?;
        Remote::Unix(remote.to_owned())
    } else {
        Remote::Port(remote.parse().map_err(|_| wrong())?)
    };
    let local = match (local, &remote) {
        (None, Remote::Port(port)) => port.get(),
        (None | Some("" | "0"), _) => 0,
        (Some(local), _) => local.parse::<Port>().map_err(|_| wrong())?.get(),
    };
    Ok(Word::Forward(Spec { local, remote }))
}

fn wrong() -> String {
    "must be PORT, LOCAL:PORT, :PORT for any free local port, LOCAL:/SOCKET, or -".into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwards_are_written_like_those_of_ssh_and_kubectl() {
        let forward = |local, remote: &str| {
            let remote = match remote.parse() {
                Ok(port) => Remote::Port(port),
                Err(_) => Remote::Unix(remote.to_owned()),
            };
            Ok(Word::Forward(Spec { local, remote }))
        };
        assert_eq!(parse("8080"), forward(8080, "8080"));
        assert_eq!(parse("8080:80"), forward(8080, "80"));
        assert_eq!((parse(":80"), parse("0:80")), (forward(0, "80"), forward(0, "80")));
        assert_eq!(parse("8080:/run/a.sock"), forward(8080, "/run/a.sock"));
        assert_eq!(parse(":/run/a.sock"), forward(0, "/run/a.sock"));
        assert_eq!(parse("-"), Ok(Word::Stdio));
        for bad in
            ["", "0", "80:0", "70000", "1:70000", "08", "a", "80:b", "1:2:3", "-1", "80:run/a"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
