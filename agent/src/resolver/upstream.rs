//! Asks the node's name servers.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use super::message::{self, ANSWER_MAX, Answer, Said};

/// Longest wait for one name server.
const PATIENCE: Duration = Duration::from_secs(2);
/// Name servers that are asked for one question: the first ones, or the only one again.
const TRIES: usize = 2;

/// Asks for the addresses of a name.
pub(super) async fn resolve(servers: &[SocketAddr], name: &str) -> Answer {
    for server in servers.iter().cycle().take(TRIES) {
        match timeout(PATIENCE, ask(*server, name)).await {
            Ok(Ok(Said::Answer(answer))) => return answer,
            Ok(Ok(Said::Truncated | Said::Refused | Said::Foreign)) => {}
            Ok(Err(error)) => tracing::debug!(%server, name, %error, "name server was not asked"),
            Err(_) => tracing::debug!(%server, name, "name server did not answer in time"),
        }
    }
    Answer::Failed
}

async fn ask(server: SocketAddr, name: &str) -> io::Result<Said> {
    // A port and a number that nobody can guess: the kernel chooses the first.
    let mut random = [0; 2];
    getrandom::fill(&mut random).map_err(io::Error::other)?;
    let id = u16::from_be_bytes(random);
    let question = message::ask(id, name);
    match by_udp(server, &question, (id, name)).await? {
        Said::Truncated => by_tcp(server, &question, (id, name)).await,
        said @ (Said::Answer(_) | Said::Refused | Said::Foreign) => Ok(said),
    }
}

async fn by_udp(server: SocketAddr, question: &[u8], of: (u16, &str)) -> io::Result<Said> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).await?;
    // From now on it takes no datagram of anybody else.
    socket.connect(server).await?;
    socket.send(question).await?;
    let mut buffer = vec![0; ANSWER_MAX];
    loop {
        let length = socket.recv(&mut buffer).await?;
        match message::said(&buffer[..length], of.0, of.1) {
            // Somebody guesses: the true answer may still come.
            Said::Foreign => {}
            said @ (Said::Answer(_) | Said::Truncated | Said::Refused) => return Ok(said),
        }
    }
}

async fn by_tcp(server: SocketAddr, question: &[u8], of: (u16, &str)) -> io::Result<Said> {
    let mut stream = TcpStream::connect(server).await?;
    let length = u16::try_from(question.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes()[..], question].concat()).await?;
    let length = usize::from(stream.read_u16().await?);
    if length > ANSWER_MAX {
        return Ok(Said::Foreign);
    }
    let mut buffer = vec![0; length];
    stream.read_exact(&mut buffer).await?;
    Ok(message::said(&buffer, of.0, of.1))
}
