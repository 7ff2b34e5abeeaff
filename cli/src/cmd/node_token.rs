//! `node token`: makes a one-time token for a node, and prints the line that joins it.

use std::{net::IpAddr, time::Duration};

use clap::Args;
use proto::sandbox::v1::{CreateNodeTokenRequest, CreateNodeTokenResponse};
use serde_json::json;

use crate::{
    client::{Controller, answer},
    failure::Failure,
    output::{Output, time},
    values::duration,
};

/// Arguments of `node token`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sandboxctl node token pve3  prints the line to run on pve3, as root
  sandboxctl node token pve3 | ssh root@pve3 sh  and runs it there

The token is good for this node, once, for 15 minutes. The line holds it: do not
put the line where others read it. A node that is there already can join again,
with new certificates.")]
pub(crate) struct NodeToken {
    /// PVE's name of the node
    node: String,
    /// Life of the token: 1m to 24h
    #[arg(long, value_name = "TIME", value_parser = duration, default_value = "15m")]
    ttl: Duration,
    /// Address of the controller as the node reaches it [default: the endpoint in use, or a name in the
    /// controller's certificate where that is only good on this machine]
    #[arg(long, value_name = "HOST:PORT")]
    controller: Option<String>,
}

pub(super) async fn run(
    controller: Controller,
    args: NodeToken,
    output: Output,
) -> Result<u8, Failure> {
    let NodeToken { node, ttl, controller: named } = args;
    let ttl_s = u32::try_from(ttl.as_secs()).unwrap_or(u32::MAX);
    let request = CreateNodeTokenRequest { node: node.clone(), ttl_s };
    let made = answer(controller.enrolment.clone().create_node_token(request)).await?;
    let address = named.unwrap_or_else(|| reachable(&controller.address, &made.names));
    let line = line(&address, &made);
    let expires_at = time::rfc3339(made.expires_at);
    if output.json {
        output.value(&json!({
            "node": node, "token": made.token, "ca_sha256": made.ca_sha256,
            "expires_at": expires_at, "command": line,
        }))?;
        return Ok(0);
    }
    if is_local(&address) {
        let note = "leads to this machine only; name another with --controller";
        output.note(format!("{address} {note}"));
    }
    output.line(line)?;
    Ok(0)
}

/// Line that joins the node. The token is in a variable: everybody on the node can read arguments.
fn line(address: &str, made: &CreateNodeTokenResponse) -> String {
    let address = address.strip_prefix("https://").unwrap_or(address);
    let CreateNodeTokenResponse { token, ca_sha256, .. } = made;
    let variable = format!("PVE_SANDBOX_JOIN_TOKEN={token}");
    format!("{variable} pve-sandbox-agent join https://{address} --ca-sha256 {ca_sha256}")
}

/// Host in `host:port`, without brackets.
fn host(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.trim_start_matches('[').trim_end_matches(']')
}

/// Whether an address leads to this machine only.
fn is_local(address: &str) -> bool {
    let host = host(address);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

/// Address that a node can use: ours, or a name of the controller where ours is only good here.
fn reachable(ours: &str, names: &[String]) -> String {
    let port = ours.rsplit_once(':').map_or("7443", |(_, port)| port);
    match names.first().filter(|_| is_local(ours)) {
        Some(name) if name.contains(':') => format!("[{name}]:{port}"),
        Some(name) => format!("{name}:{port}"),
        None => ours.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn line_names_an_address_that_is_good_elsewhere() {
        let names = ["10.0.0.9".to_owned()];
        for (ours, expected) in [
            ("127.0.0.1:7443", "10.0.0.9:7443"),
            ("[::1]:99", "10.0.0.9:99"),
            ("localhost:7443", "10.0.0.9:7443"),
            ("controller.example:7443", "controller.example:7443"),
        ] {
            assert_eq!(reachable(ours, &names), expected);
        }
        assert_eq!(reachable("localhost:7443", &[]), "localhost:7443");
        assert_eq!(reachable("localhost:7443", &["2001:db8::1".into()]), "[2001:db8::1]:7443");
    }
}
