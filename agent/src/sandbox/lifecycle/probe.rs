//! Readiness of a sandbox: it has its address, it runs `true`, and its template's probe succeeds.

use std::{ffi::OsString, net::Ipv4Addr, time::Duration};

use proto::{Reason, id::Vmid, name::Port};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::{Instant, sleep, timeout_at},
};

use crate::{
    pve::Pve,
    run::{self, Exit},
    sandbox::{Error, Probe, Result},
};

/// First delay between two checks.
const PAUSE: Duration = Duration::from_millis(5);
/// Longest delay where a check reads a file or connects to a port.
const PAUSE_MAX: Duration = Duration::from_millis(20);
/// Longest delay where a check starts a command.
const PAUSE_COMMAND_MAX: Duration = Duration::from_millis(250);
/// Time limit of one check; a server that accepts and says nothing is asked again.
const LOOK: Duration = Duration::from_secs(5);

/// Checks until the sandbox is ready, the container is down, or `until`. Nothing is sent to an
/// address but to `ip`, the sandbox's lease; a sandbox without a lease has no address.
pub(crate) async fn until_it_answers(
    pve: &dyn Pve,
    vmid: Vmid,
    ip: Option<Ipv4Addr>,
    probe: &Probe,
    until: Instant,
) -> Result<()> {
    let longest = match probe {
        Probe::Command(_) => PAUSE_COMMAND_MAX,
        Probe::None | Probe::Http { .. } => PAUSE_MAX,
    };
    let (mut pause, mut enters) = (PAUSE, false);
    loop {
        let missing = match look(pve, vmid, ip, probe, &mut enters, until).await {
            Ok(()) => return Ok(()),
            Err(missing) => missing,
        };
        if !pve.running(vmid).await {
            return Err(Error::new(
                Reason::PctFailed,
                format!("CT {vmid} stopped while it booted; {missing}"),
            ));
        }
        if Instant::now() + pause >= until {
            return Err(Error::new(
                Reason::ProbeTimeout,
                format!("CT {vmid} did not answer in time: {missing}"),
            ));
        }
        sleep(pause).await;
        pause = (pause * 3 / 2).min(longest);
    }
}

/// Checks once; `Err` says what is missing. Entering is tried only until it works once.
async fn look(
    pve: &dyn Pve,
    vmid: Vmid,
    ip: Option<Ipv4Addr>,
    probe: &Probe,
    enters: &mut bool,
    until: Instant,
) -> Result<(), String> {
    // Asks the kernel about one address: however many a tenant adds, that costs nothing.
    if let Some(ip) = ip
        && !pve.has_address(vmid, ip).await
    {
        return Err(format!("it does not have its address {ip} yet"));
    }
    // A fake PVE has no way in, and is ready as soon as it has its address.
    let Some(enter) = pve.enter(vmid) else { return Ok(()) };
    let until = until.min(Instant::now() + LOOK);
    if !*enters {
        command(&enter, &["true".into()], until).await?;
        *enters = true;
    }
    match probe {
        Probe::None => {}
        Probe::Command(argv) => {
            let argv: Vec<OsString> = argv.iter().map(Into::into).collect();
            command(&enter, &argv, until).await?;
        }
        Probe::Http { port, path } => {
            let ip = ip.ok_or("it has no address that its probe could be sent to")?;
            http(ip, *port, path, until).await?;
        }
    }
    Ok(())
}

async fn command(enter: &[OsString], argv: &[OsString], until: Instant) -> Result<(), String> {
    let said = |what: String| format!("`{}` {what}", argv.join(" ".as_ref()).display());
    let line = [enter, argv].concat();
    // Nobody reads its output: the pipes are closed at once.
    let mut process = run::spawn_piped(&line, Vec::new())
        .map_err(|error| said(format!("was not started: {error}")))?
        .process;
    match timeout_at(until, process.wait()).await {
        Ok(Ok(Exit::Code(0))) => Ok(()),
        Ok(Ok(Exit::Code(code))) => Err(said(format!("exited with {code}"))),
        Ok(Ok(Exit::Signal(signal))) => Err(said(format!("was ended by signal {signal}"))),
        Ok(Err(error)) => Err(said(format!("was lost: {error}"))),
        Err(_) => {
            if let Err(error) = process.signal(nix::sys::signal::Signal::SIGKILL) {
                tracing::warn!(%error, "probe command was not killed");
            }
            Err(said("did not end".to_owned()))
        }
    }
}

async fn http(ip: Ipv4Addr, port: Port, path: &str, until: Instant) -> Result<(), String> {
    let said = |what: String| format!("http://{ip}:{port}{path} {what}");
    let ask = async {
        let mut stream = TcpStream::connect((ip, port.get())).await?;
        let request = format!(
            "GET {path} HTTP/1.0\r\nHost: localhost:{port}\r\nUser-Agent: pve-sandbox-probe\r\n\r\n"
        );
        stream.write_all(request.as_bytes()).await?;
        // `HTTP/1.x NNN`: the status line is all that matters.
        let mut head = [0u8; 12];
        stream.read_exact(&mut head).await?;
        Ok::<_, std::io::Error>(head)
    };
    match timeout_at(until, ask).await {
        Ok(Ok(head)) => match head {
            [b'H', b'T', b'T', b'P', b'/', b'1', b'.', _, b' ', b'2' | b'3', _, _] => Ok(()),
            _ => Err(said(format!("says {:?}", String::from_utf8_lossy(&head)))),
        },
        Ok(Err(error)) => Err(said(format!("is not there: {error}"))),
        Err(_) => Err(said("does not answer".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn http_probe_passes_on_success_and_redirects() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("bound");
        let port = u32::from(listener.local_addr().expect("bound").port());
        let port = Port::try_from(port).expect("a port");
        for (answer, green) in [
            ("HTTP/1.1 200 OK\r\n\r\n", true),
            ("HTTP/1.0 302 Found\r\n\r\n", true),
            ("HTTP/1.1 503 Wait\r\n\r\n", false),
            ("SSH-2.0-OpenSSH_9.2\r\n", false),
            ("", false),
        ] {
            let serve = async {
                let (mut stream, _) = listener.accept().await.expect("accepted");
                stream.write_all(answer.as_bytes()).await.expect("written");
            };
            let until = Instant::now() + Duration::from_secs(5);
            let (result, ()) = tokio::join!(http(Ipv4Addr::LOCALHOST, port, "/", until), serve);
            assert_eq!(result.is_ok(), green, "{answer:?}: {result:?}");
        }
    }

    #[tokio::test]
    async fn command_probe_passes_only_on_exit_code_zero() {
        let until = || Instant::now() + Duration::from_secs(5);
        let shell = ["/bin/sh".into(), "-c".into()];
        assert_eq!(command(&shell, &["exit 0".into()], until()).await, Ok(()));
        let error = command(&shell, &["exit 3".into()], until()).await.expect_err("3 is not 0");
        assert_eq!(error, "`exit 3` exited with 3");
        let soon = Instant::now() + Duration::from_millis(50);
        let error = command(&shell, &["sleep 60".into()], soon).await.expect_err("too slow");
        assert_eq!(error, "`sleep 60` did not end");
    }
}
