//! The one call that the agent makes: it joins a controller that it knows by the fingerprint of its CA.

use std::{io, net::IpAddr, time::Duration};

use daemon::flow::Leg;
use proto::sandbox::v1::{
    JoinRequest, JoinResponse, enrolment_service_client::EnrolmentServiceClient,
};
use tokio::{net::TcpStream, time::timeout};

/// Longest wait for a connection, and for the answer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Reason why a node did not join.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no way to the controller.
    #[error("the controller at {0} cannot be reached")]
    Unreachable(String, #[source] io::Error),
    /// TLS cannot be set up.
    #[error("no connection can be made")]
    Tls(#[source] io::Error),
    /// The controller did not answer in time.
    #[error("the controller at {0} does not answer; run this line again")]
    Silent(String),
    /// The controller refused, or the connection failed.
    #[error("the controller did not admit this node: {}", said(.0))]
    Refused(Box<tonic::Status>),
}

/// Returns what a status says, with the causes of a failed connection.
fn said(status: &tonic::Status) -> String {
    let causes = std::error::Error::source(status);
    daemon::chain::with_causes(status.message().to_owned(), causes)
}

/// Returns the address from which this node reaches a controller at `host:port`.
///
/// # Errors
/// When it does not.
pub async fn own_address(controller: &str) -> Result<IpAddr, Error> {
    let failed = |error| Error::Unreachable(controller.to_owned(), error);
    let late = |_| failed(io::ErrorKind::TimedOut.into());
    let tcp = timeout(PATIENCE, TcpStream::connect(controller)).await.map_err(late)?;
    Ok(tcp.and_then(|tcp| tcp.local_addr()).map_err(failed)?.ip())
}

/// Joins the controller at `host:port`, whose CA has this SHA-256.
///
/// # Errors
/// When it cannot be reached, has another CA, or refuses.
pub async fn join(
    controller: &str,
    ca_sha256: [u8; 32],
    request: JoinRequest,
) -> Result<JoinResponse, Error> {
    let tls = daemon::tls::client_that_pins(ca_sha256)
        .map_err(|error| Error::Tls(io::Error::other(error)))?;
    let name = daemon::peer::CONTROLLER_NAME;
    let channel = daemon::channel::tls(Leg::Api, controller, name, tls).map_err(Error::Tls)?;
    let mut client = EnrolmentServiceClient::new(channel);
    let answer = timeout(PATIENCE, client.join(request)).await;
    let answer = answer.map_err(|_| Error::Silent(controller.to_owned()))?;
    answer.map(tonic::Response::into_inner).map_err(|status| Error::Refused(Box::new(status)))
}
