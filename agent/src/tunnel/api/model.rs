//! Messages of Cloudflare's API, version 4: the fields that are used, in the shapes of its own client for Node.

use serde::{Deserialize, Serialize};

use crate::tunnel::ids::{CloudId, TunnelId};

/// Envelope of every answer.
#[derive(Debug, Deserialize)]
pub(super) struct Envelope {
    #[serde(default)]
    pub(super) success: bool,
    #[serde(default)]
    pub(super) errors: Vec<Problem>,
    #[serde(default)]
    pub(super) result: serde_json::Value,
    #[serde(default)]
    pub(super) result_info: Option<Page>,
}

/// Place in a list that comes in pages.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
pub(super) struct Page {
    pub(super) page: u32,
    pub(super) per_page: u32,
    pub(super) count: u32,
    pub(super) total_count: u32,
    pub(super) total_pages: u32,
}

/// Error of the API.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Problem {
    /// Number.
    #[serde(default)]
    pub code: u32,
    /// Text.
    #[serde(default)]
    pub message: String,
}

/// Place where a tunnel is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ConfigSource {
    /// A file beside each connector.
    Local,
    /// Cloudflare's dashboard.
    Cloudflare,
    /// A place that this version does not know.
    #[serde(other)]
    Unknown,
}

/// Tunnel.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Tunnel {
    /// Identifier.
    pub id: TunnelId,
    /// Name.
    #[serde(default)]
    pub name: String,
    /// State, such as `healthy`.
    #[serde(default)]
    pub status: String,
    /// Place where it is configured; absent in answers of older versions.
    #[serde(default)]
    pub config_src: Option<ConfigSource>,
    /// Time of its deletion.
    #[serde(default)]
    pub deleted_at: Option<String>,
}

/// Order of a new tunnel.
#[derive(Debug, Serialize)]
pub(super) struct NewTunnel<'a> {
    pub(super) name: &'a str,
    pub(super) config_src: &'static str,
    pub(super) tunnel_secret: &'a str,
}

/// Zone.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Zone {
    /// Identifier.
    pub id: CloudId,
    /// Name.
    pub name: String,
    /// State, such as `active` or `pending`.
    #[serde(default)]
    pub status: String,
    /// Kind: `full`, or `partial` where another company serves the names.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// Account that it belongs to.
    pub account: Account,
    /// Name servers that the domain must have.
    #[serde(default)]
    pub name_servers: Option<Vec<String>>,
}

/// Account.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Account {
    /// Identifier.
    pub id: CloudId,
}

/// DNS record.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Record {
    /// Identifier.
    pub id: String,
    /// Type, such as `CNAME`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Name.
    pub name: String,
    /// Value.
    #[serde(default)]
    pub content: String,
    /// Whether requests go through Cloudflare.
    #[serde(default)]
    pub proxied: bool,
    /// Comment.
    #[serde(default)]
    pub comment: Option<String>,
}

/// Wanted DNS record: a proxied CNAME.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Cname {
    /// Type.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Name.
    pub name: String,
    /// Value.
    pub content: String,
    /// Whether requests go through Cloudflare.
    pub proxied: bool,
    /// Time to live, seconds; 1 is automatic.
    pub ttl: u32,
    /// Comment.
    pub comment: String,
}

/// Connector of a tunnel: a cloudflared that runs.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Connector {
    /// Identifier, which each start of cloudflared has anew.
    #[serde(default)]
    pub id: String,
    /// Version of cloudflared.
    #[serde(default)]
    pub version: String,
    /// Time of its start.
    #[serde(default)]
    pub run_at: String,
    /// Connections to Cloudflare's data centres.
    #[serde(default)]
    pub conns: Vec<Connection>,
}

impl Connector {
    /// Returns the address that it comes from.
    pub fn origin(&self) -> Option<&str> {
        self.conns.first().map(|conn| conn.origin_ip.as_str())
    }
}

/// Connection of a connector.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Connection {
    /// Data centre.
    #[serde(default)]
    pub colo_name: String,
    /// Address that the connector comes from.
    #[serde(default)]
    pub origin_ip: String,
}

/// State of a token.
#[derive(Debug, Deserialize)]
pub(super) struct TokenState {
    #[serde(default)]
    pub(super) status: String,
}
